"""`sdtune demo`: what it measures, where it writes, and, on the shipped base, how well it does."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sdtune import demo, evaluate
from sdtune.config import load, resolve_asset
from sdtune.contact_sheet import contact_sheet
from sdtune.data.metadata import read_rows
from sdtune.data.sources import load_source
from sdtune.report import Case, Comparison
from sdtune.run_folder import read_metrics
from tests.factories import make_sd

NAMES, PICTURES = evaluate.load_thumbnails()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Overrides: a small random base, and so little work that a run takes seconds."""
    base = make_sd(tmp_path_factory.mktemp("models") / "sd")
    return [
        f"model.base={json.dumps(str(base))}", "adapter.rank=2", "adapter.targets=attention", "train.steps=2",
        "train.batch_size=2", "data.1.generate=3", "data.1.drawing.steps=1", "validate.every=2",
        "validate.samples.prompts=[airplane]", "validate.samples.steps=1", "output.trackers=[]",
    ]


@pytest.fixture(scope="module")
def outcome(quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return demo.run_demo(folder, old=3, overrides=quick)


def test_it_writes_a_run_with_report_lora_and_picture(outcome):
    run = outcome.report.parent
    for name in (
        "run.yaml", "environment.json", "metrics.jsonl", "samples/step-000000/00.png", "samples/step-000002/00.png",
        "report.html", "before_after.png", "final/pytorch_lora_weights.safetensors",
    ):
        assert (run / name).is_file(), name
    assert outcome.lora == run / "final" / "pytorch_lora_weights.safetensors"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2]
    page = outcome.report.read_text(encoding="utf-8")
    for text in ("16 new things", "3 old things", "teddy bear", "Do it with your own pictures"):
        assert text in page
    with Image.open(run / "before_after.png") as picture:
        assert picture.width > 900


def test_class_pictures_stay_in_the_run(outcome):
    folder = outcome.report.parent / "class_pictures"
    assert len(list(folder.glob("*.png"))) == 3
    assert str(folder) in (outcome.report.parent / "run.yaml").read_text(encoding="utf-8")


def test_every_new_thing_is_drawn_before_and_after(outcome):
    assert [case.name for case in outcome.new.cases] == evaluate.load_demo()[0]
    assert len(outcome.old.cases) == 3
    for case in (*outcome.new.cases, *outcome.old.cases):
        assert case.before.size == case.after.size == case.truth.size == (64, 64)
    assert not np.array_equal(np.asarray(outcome.new.cases[0].before), np.asarray(outcome.new.cases[1].before))


def test_what_it_reports_is_what_a_person_can_count(outcome):
    values = outcome.values()
    shares = ["new_before", "new_after", "old_before", "old_after"]
    assert list(values) == [*shares, "seconds", "report", "lora", "captions_right"]
    assert values["new_before"] == sum(case.right_before for case in outcome.new.cases) / 16
    assert values["old_after"] == sum(case.right_after for case in outcome.old.cases) / 3
    assert values["seconds"] == pytest.approx(sum(outcome.parts.values()), abs=0.1)
    table = demo.table(outcome)
    assert "16 new things" in table and "3 old things" in table and "not reached" in table
    assert all(name in table for name in outcome.parts)


def test_the_same_noise_before_and_after(quick, tmp_path):
    """With a learning rate that moves nothing, both drawings are equal."""
    still = [*quick, "optimizer.lr=1e-30", "train.steps=1"]
    outcome = demo.run_demo(tmp_path / "demo", prior=False, old=2, overrides=still)
    for case in (*outcome.new.cases, *outcome.old.cases):
        assert np.array_equal(np.asarray(case.before), np.asarray(case.after))
        assert case.right_before == case.right_after
    assert not (tmp_path / "demo" / "class_pictures").exists()  # prior=False
    assert [source.role for source in load(tmp_path / "demo" / "run.yaml").data] == ["instance"]


def test_a_second_demo_goes_to_a_folder_of_its_own(tmp_path):
    out = tmp_path / "runs" / "demo"
    assert demo.free_folder(out) == out
    out.mkdir(parents=True)
    assert demo.free_folder(out) == out  # an empty folder is free
    (out / "run.yaml").touch()
    assert demo.free_folder(out) == tmp_path / "runs" / "demo-2"
    (tmp_path / "runs" / "demo-2").write_text("a file", encoding="utf-8")
    assert demo.free_folder(out) == tmp_path / "runs" / "demo-3"


def test_the_command_keeps_an_earlier_run_and_ends_with_one_json_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "run.yaml").write_text("kept", encoding="utf-8")
    case = Case("airplane", *[Image.fromarray(PICTURES[0])] * 3, False, True)
    both = Comparison("1 thing", "", [case], "", True)

    def run_demo(folder, prior):
        assert (folder, prior) == (tmp_path / "demo-2", False)
        captions = {"airplane": "airplane", "ribbon": "bow"}
        return demo.Outcome(both, both, captions, {"training": 1.5}, folder / "report.html", folder / "lora")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert demo.command(out, prior=False, as_json=True) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert json.loads(printed.out) == {
        "new_before": 0.0, "new_after": 1.0, "old_before": 0.0, "old_after": 1.0, "captions_right": 0.5,
        "seconds": 1.5,
        "report": str(tmp_path / "demo-2" / "report.html"), "lora": str(tmp_path / "demo-2" / "lora"),
    }
    assert "demo-2" in printed.err and "0 %" in printed.err
    assert "It named 1 of 2 right" in printed.err and "The right names were put in place" in printed.err
    assert (out / "run.yaml").read_text(encoding="utf-8") == "kept"


def test_the_pictures_are_captioned_for_real_and_mended(tmp_path):
    captions = demo.caption_pictures(tmp_path / "pictures")
    names, _ = evaluate.load_demo()
    assert list(captions) == names
    rows = read_rows(tmp_path / "pictures")
    assert [row["text"] for row in rows] == names and [row["caption"] for row in rows] == list(captions.values())
    assert all(captions.values())
    source = load_source(path=tmp_path / "pictures")
    assert [picture.captions for picture in source.pictures] == [(name,) for name in names]


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_drawing_is_right_when_the_thing_asked_for_is_the_nearest():
    names, references, wanted = demo.things(old=2)
    exact = references[wanted]
    shifted = references[[(number + 1) % len(names) for number in wanted]]
    cases = demo.compare(names, references, wanted, shifted, exact)
    assert not any(case.right_before for case in cases)
    assert all(case.right_after for case in cases)
    assert [case.name for case in cases] == [names[number] for number in wanted]


def test_things_are_the_16_new_ones_then_old_ones_by_lot():
    names, references, wanted = demo.things(old=48)
    assert len(names) == len(references) == 301
    assert [names[number] for number in wanted[:16]] == evaluate.load_demo()[0]
    assert len(set(wanted[16:])) == 48 and max(wanted[16:]) < 285
    assert wanted == demo.things(old=48)[2]  # the same lot each time


@pytest.mark.parametrize(
    ("new", "old", "reached"),
    [
        ((0, 20, 20), (20, 19, 20), (True, True)),  # (right before, right after, of)
        ((2, 19, 20), (20, 19, 20), (True, True)),
        ((3, 20, 20), (20, 18, 20), (False, False)),
        ((0, 18, 20), (18, 20, 20), (False, True)),
    ],
)
def test_bars(new, old, reached):
    def cases(before, after, of):
        picture = Image.new("RGB", (8, 8))
        return [Case("x", picture, picture, picture, i < before, i < after) for i in range(of)]

    learned, kept = demo.judge(cases(*new), cases(*old))
    assert (learned.reached, kept.reached) == reached


def test_the_contact_sheet_shows_what_it_is_given():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    cases = [Case("a name that is far too long for a tile", red, blue, blue, False, False)] * 20
    two = [Comparison(title, "", cases, "", True) for title in "ab"]
    sheet = np.asarray(contact_sheet(two, most=(16, 8)))
    reds, blues = ((sheet == colour).all(-1).sum() / 112**2 for colour in ((255, 0, 0), (0, 0, 255)))
    assert (round(reds), round(blues)) == (16, 48)


def test_class_prompts_are_things_that_the_base_knows():
    with open(resolve_asset("assets:class_prompts.txt"), encoding="utf-8") as file:
        prompts = file.read().splitlines()
    assert len(set(prompts)) == len(prompts) == 96
    assert set(prompts) <= set(NAMES)
    (source,) = [source for source in load(demo.RECIPE, [f"model.base={json.dumps(resolve_asset('assets:demo'))}"]).data
                 if source.role == "class"]
    assert (source.prompts, source.generate) == ("assets:class_prompts.txt", 96)


# --- on the shipped base ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (demo.evaluate.ASSETS / "tiny").is_dir(), reason="sdtune/assets/tiny is not there")
def test_the_demo_reaches_its_bars_in_four_minutes(tmp_path):
    began = time.perf_counter()
    command = [sys.executable, "-m", "sdtune", "demo", "--out", str(tmp_path / "demo"), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result["new_before"] <= 0.1 and result["new_after"] >= 0.95
    assert result["old_before"] - result["old_after"] <= 0.07
    assert seconds <= 240
