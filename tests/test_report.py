"""The report of a run: complete, self-contained, escaped, and drawn by a browser at both widths."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sdtune.config import dump
from sdtune.loss_curve import linear_ticks, log_ticks, loss_curve, running_mean
from sdtune.report import LARGEST, STAGES, Case, Comparison, picture_uri, write_report
from sdtune.run_folder import RunFolder
from tests.factories import make_recipe

NASTY = "</title><script>alert('x')</script> & \"quotes\""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def picture(seed, size=(64, 64)):
    noise = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


@pytest.fixture
def run(tmp_path):
    """A finished run of 200 steps with pictures of 2 prompts at 3 steps."""
    folder = RunFolder(tmp_path / "my run")
    recipe = make_recipe(
        tmp_path, tmp_path, folder.path,
        validate={"every": 100, "samples": {"prompts": ["a dog", NASTY], "steps": 2}}, train={"steps": 200},
    )
    folder.start(dump(recipe))
    for step in range(1, 201):
        folder.log({"step": step, "loss": 1.0 / step + 0.1, "lr": 1e-3, "samples_per_second": 7.5})
        if step % 50 == 0:
            folder.log({"step": step, "val_loss": 0.3 - step / 1000})
    for step in (0, 100, 200):
        facts = {"prompts": ["a dog", NASTY], "seeds": [0, 1], "steps": 2, "guidance": 3.0}
        folder.save_samples(step, [picture(step), picture(step + 1, (640, 480))], facts)
    return folder


@pytest.fixture
def comparisons():
    def cases(count):
        return [Case(f"thing {i}", picture(i), picture(i + 1), picture(i + 2), i == 0, i != 1) for i in range(count)]

    return [
        Comparison("4 new things", "What was taught.", cases(4), "at least 95 % after", reached=False),
        Comparison("30 old things", "What was known.", cases(30), "a fall of at most 7 %", reached=True),
    ]


class Page(HTMLParser):
    """What stands in a page: elements with their attributes, and the text outside of style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.inside = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.inside:
            self.words += data

    def all(self, *tags):
        return [attrs for tag, attrs in self.elements if tag in tags]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_holds_everything_and_asks_for_nothing(run, comparisons):
    place = write_report(run, comparisons=comparisons)
    assert place == run.path / "report.html"
    page = read(place)
    pictures = page.all("img")
    assert len(pictures) == 3 * (4 + 30) + 3 * 2
    for attrs in pictures:
        assert attrs["src"].startswith("data:image/")
        assert attrs["alt"].strip()
    assert not page.all("script", "iframe", "object", "embed")
    for _, attrs in page.elements:
        for name in ("src", "href", "srcset", "action"):
            assert attrs.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import", place.read_text(encoding="utf-8"))


def test_it_says_what_was_done_and_what_came_out(run, comparisons):
    words = read(write_report(run, title="A title", intro="An intro.", comparisons=comparisons)).words
    for text in (
        "A title", "An intro.", "LoRA of rank 4 on the attention layers", "200, each of 2 pictures",
        "7.5 pictures a second", "held-out loss", "step 100", "a dog", "thing 3", "adapter:", "torch",
    ):
        assert text in words
    squeezed = " ".join(words.split())
    assert "25 % → before, 75 % after" in squeezed  # 1 and 3 of 4
    assert "at least 95 % after. ✗ Not reached" in squeezed
    assert "a fall of at most 7 %. ✓ Reached" in squeezed


def test_commands_name_this_run_and_can_be_typed(run):
    words = read(write_report(run)).words
    assert f"sdtune sample '{run.path}' --prompt" in words  # the folder's name has a space
    assert f"sdtune train '{run.path / 'run.yaml'}' data.0.path=photos" in words
    assert '{"file_name": "rex.jpg", "text":' in words


def test_texts_are_escaped(run, comparisons):
    case = Case(NASTY, picture(0), picture(1), picture(2), False, True)
    place = write_report(run, title=NASTY, comparisons=[Comparison(NASTY, NASTY, [case], NASTY, True)])
    page = read(place)
    assert not page.all("script")
    assert NASTY in page.words
    assert any(NASTY in attrs["alt"] for attrs in page.all("img"))


def test_headings_have_no_gaps(run, comparisons):
    levels = [int(tag[1]) for tag, _ in read(write_report(run, comparisons=comparisons)).elements
              if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_an_older_report_is_replaced_and_a_run_without_losses_or_pictures_has_one_too(tmp_path):
    folder = RunFolder(tmp_path / "empty")
    folder.start(dump(make_recipe(tmp_path, tmp_path, folder.path)))
    write_report(folder, title="first")
    words = read(write_report(folder, title="second")).words
    assert "second" in words and "first" not in words
    assert "Pictures while it learned" not in words
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == []


def test_a_vae_is_not_asked_for_pictures(tmp_path):
    folder = RunFolder(tmp_path / "vae")
    recipe = make_recipe(tmp_path, tmp_path, folder.path, task="autoencoding", adapter={"kind": "full"})
    folder.start(dump(recipe))
    words = read(write_report(folder)).words
    assert "every weight of the VAE" in words
    assert "sdtune sample" not in words


def test_many_stages_are_thinned_to_the_first_the_last_and_some_between(tmp_path):
    folder = RunFolder(tmp_path / "long")
    folder.start(dump(make_recipe(tmp_path, tmp_path, folder.path)))
    for step in range(0, 2100, 100):
        folder.save_samples(step, [picture(step)], {"prompts": ["a dog"]})
    page = read(write_report(folder))
    assert len(page.all("img")) == STAGES
    assert "step 0" in page.words and "step 2,000" in page.words


def test_small_pictures_are_kept_exactly_and_large_ones_shrunk():
    def opened(uri):
        import base64
        import io

        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")

    small = picture(0)
    assert np.array_equal(np.asarray(opened(picture_uri(small))), np.asarray(small))
    assert opened(picture_uri(picture(0, (1024, 768)))).size == (LARGEST, LARGEST * 3 // 4)


# --- the curve --------------------------------------------------------------------------------------------------------


def numbers(path):
    return np.array(re.findall(r"[\d.]+", path), dtype=float).reshape(-1, 2)


def test_the_curve_falls_when_the_loss_falls():
    rows = [{"step": step, "loss": 2.0 - step / 100} for step in range(1, 101)]
    curve = loss_curve(rows + [{"step": 50, "val_loss": 1.6}, {"step": 100, "val_loss": 1.2}])
    for path in (curve.raw, curve.smooth, curve.held_out):
        points = numbers(path)
        assert np.all(np.diff(points[:, 0]) > 0) and np.all(np.diff(points[:, 1]) > 0)  # to the right and down
        assert points.min() >= 0 and points.max() <= 100
    assert numbers(curve.held_out)[0, 0] == pytest.approx(50)
    assert "from 1.975 to 1.015, the held-out loss from 1.6 to 1.2" in curve.words


def test_the_marks_stand_at_their_values():
    curve = loss_curve([{"step": step, "loss": 1.0 + (step == 100)} for step in (1, 50, 100)])
    marks = {text: top for top, text in curve.losses}
    assert marks["2"] == pytest.approx(numbers(curve.raw)[-1, 1], abs=2)
    assert marks["1"] == pytest.approx(numbers(curve.raw)[0, 1], abs=2)


def test_a_loss_over_decades_is_drawn_logarithmically():
    curve = loss_curve([{"step": step, "loss": 10 ** (-step / 50)} for step in range(1, 101)])
    heights = numbers(curve.raw)[:, 1]
    assert np.allclose(np.diff(heights), np.diff(heights)[0], atol=0.02)  # a straight line


@pytest.mark.parametrize("losses", [[0.5, 0.5, 0.5], [0.0, 0.0], [1e-9, 1e9], [0.1, float("nan"), 0.2], [-1.0, 1.0]])
def test_odd_losses_are_drawn_within_the_plot(losses):
    curve = loss_curve([{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)])
    for path in (curve.raw, curve.smooth):
        points = numbers(path)
        assert np.isfinite(points).all() and points.min() >= 0 and points.max() <= 100
    assert all(0 <= top <= 100 for top, _ in curve.losses)


def test_no_curve_of_fewer_than_two_losses():
    assert loss_curve([]) is None
    assert loss_curve([{"step": 1, "loss": 0.5}, {"step": 0, "val_loss": 0.4}]) is None


def test_thousands_of_steps_become_some_hundred_points():
    curve = loss_curve([{"step": step, "loss": 1.0} for step in range(1, 20_001)])
    points = numbers(curve.raw)
    assert len(points) <= 400
    assert points[-1, 0] == 100


def test_running_mean_keeps_length_and_a_constant():
    values = np.array([1.0, 5.0, 3.0, 7.0])
    assert running_mean(values, 1).tolist() == [3.0, 3.0, 5.0, 5.0]
    assert running_mean(np.full(9, 2.0), 4).tolist() == [2.0] * 9


def test_ticks_are_round_numbers_around_the_values():
    assert linear_ticks(0, 664) == [0, 200, 400, 600, 800]
    assert linear_ticks(0.12, 0.31) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35])
    assert log_ticks(0.04, 0.9) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


# --- in a browser -----------------------------------------------------------------------------------------------------

CHECK = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
{frames}<pre id="result"></pre>
<script>addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    const pictures = [...page.images];
    const beyond = [...page.body.querySelectorAll("*")].filter(e =>
      e.getBoundingClientRect().right > root.clientWidth + 1 && getComputedStyle(e).position != "absolute");
    return {{width: root.clientWidth, scroll: root.scrollWidth, pictures: pictures.length,
      broken: pictures.filter(p => !(p.complete && p.naturalWidth > 0)).length,
      narrow: pictures.filter(p => p.getBoundingClientRect().width < 40).length,
      beyond: beyond.map(e => e.tagName + "." + e.className),
      small: [...page.querySelectorAll("p, dd, dt, h1, h2, h3, figcaption, .plot span, code")].filter(
        e => parseFloat(getComputedStyle(e).fontSize) < 11).length}};
  }});
  document.getElementById("result").textContent = "FOUND" + JSON.stringify(found) + "END";
}});</script>"""


def browse(tmp_path, page, *widths):
    """Let Chromium draw a page in frames of these widths; returns what it printed."""
    frame = '<iframe style="width: {}px; height: 900px; border: 0" srcdoc="{}"></iframe>'
    check = tmp_path / "check.html"
    frames = "".join(frame.format(width, html.escape(page)) for width in widths)
    check.write_text(CHECK.format(frames=frames), encoding="utf-8")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *quiet,
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
               "--virtual-time-budget=20000", "--window-size=1500,1000", "--dump-dom", check.as_uri()]
    environment = os.environ | dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), str(tmp_path))
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the report is not opened in a browser")
def test_a_browser_draws_the_report_at_phone_and_desk_width(run, comparisons, tmp_path):
    page = write_report(run, comparisons=comparisons).read_text(encoding="utf-8")
    answer = browse(tmp_path, page, 400, 1400)
    assert "CONSOLE" not in answer.stderr, answer.stderr
    found = re.search(r"FOUND(\[.*\])END", answer.stdout, re.DOTALL)
    assert found, answer.stdout[-2000:] + answer.stderr[-2000:]
    for width, frame in zip((400, 1400), json.loads(html.unescape(found[1])), strict=True):
        assert width - 20 <= frame["width"] <= width  # the rest is the scroll bar
        assert frame["scroll"] <= frame["width"], f"at {width} px the page is {frame['scroll']} px wide"
        assert frame["beyond"] == []
        assert frame["pictures"] == 108 and frame["broken"] == 0 and frame["narrow"] == 0
        assert frame["small"] == 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the report is not opened in a browser")
def test_the_browser_check_finds_faults(tmp_path):
    """What the test above relies on: a missing picture, a console error and an overflow are seen."""
    picture = '<img src="data:image/png;base64,AAAA" alt="x">'
    answer = browse(tmp_path, f'<body>{picture}<div style="width: 2000px">x</div><script>oops()</script>', 400)
    assert "CONSOLE" in answer.stderr
    frame = json.loads(html.unescape(re.search(r"FOUND(\[.*\])END", answer.stdout, re.DOTALL)[1]))[0]
    assert frame["broken"] == 1
    assert frame["scroll"] > frame["width"]
