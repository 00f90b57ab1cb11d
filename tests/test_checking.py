"""`sdtune check` as a person types it: on folders, data sets and recipes; its exit codes, and what a recipe adds."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from transformers import CLIPTokenizer
from typer.testing import CliRunner

from sdtune import checking
from sdtune.cli import app
from sdtune.config import load, resolve_asset
from sdtune.errors import ConfigError, DataError, UsageError
from sdtune.local_models import CLIP, caption_reader, model_findings, named_models
from sdtune.run import Run
from tests.drawings import drawing, encoded

CLIP_WORDS = Path(__file__).parents[2] / "shared/data/clip-tokenizer"


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return SimpleNamespace(folder=tmp_path / "hub", constants=constants)


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos", range(6))


def make_photos(folder, seeds):
    folder.mkdir(parents=True)
    rows = []
    for seed in seeds:
        (folder / f"{seed}.jpg").write_bytes(encoded(drawing(seed, (96, 80))))
        rows.append({"file_name": f"{seed}.jpg", "text": f"caption {seed}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def recipe(tmp_path, photos, sd):
    """recipe(key=value, ...) -> a file; keys are dotted with __."""

    def make(**changes):
        values = {
            "model": {"base": str(sd)},
            "data": [{"path": str(photos)}],
            "images": {"resolution": 64},
            "optimizer": {"lr": 1e-4},
            "train": {"steps": 30, "batch_size": 2},
            "output": {"dir": str(tmp_path / "runs" / "new"), "trackers": []},
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**values, **changes}))
        return str(file)

    return make


def checked(capsys, *arguments, **options):
    """Exit code and values."""
    code = checking.command(*arguments, as_json=True, **options)
    return code, json.loads(capsys.readouterr().out)


def kinds(values):
    return {finding["kind"]: finding for finding in values["findings"]}


def put_in_cache(hub, repo, source):
    """A folder as a model of the Hub's cache."""
    place = hub.folder / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    shutil.copytree(source, place / "snapshots" / "c0ffee")
    return place / "snapshots" / "c0ffee"


def test_a_good_folder_ends_with_0_and_a_broken_one_with_1(photos):
    answer = CliRunner().invoke(app, ["check", str(photos), "--resolution", "64", "--trigger", "sks dog"])
    assert answer.exit_code == 0 and "nothing stands in the way of training" in answer.stdout
    assert "lacks the trigger word 'sks dog'" in answer.stdout and "to 64 x 64 px" in answer.stdout
    (photos / "3.jpg").write_bytes(b"x")
    answer = CliRunner().invoke(app, ["check", str(photos), "--json"])
    assert answer.exit_code == 1 and json.loads(answer.stdout.splitlines()[-1])["fails"]
    assert kinds(json.loads(answer.stdout))["broken"]["names"] == ["3.jpg (not a picture)"]
    answer = CliRunner().invoke(app, ["dedupe", str(photos)])
    assert answer.exit_code == 0 and "0 groups of pictures that look alike" in answer.stdout


def test_a_cleaned_copy_ends_with_0(photos, tmp_path, capsys):
    (photos / "3.jpg").write_bytes(b"x")
    code, values = checked(capsys, str(photos), fix=tmp_path / "clean")
    assert code == 0 and values["fails"]
    assert values["fixed"] == {"out": str(tmp_path / "clean"), "kept": 5, "dropped": 1}
    assert checked(capsys, str(tmp_path / "clean"))[0] == 0
    assert checking.command(str(photos), fix=tmp_path / "again") == 0
    assert capsys.readouterr().out.endswith(f"training takes the cleaned copy: {tmp_path / 'again'}\n")


def test_splits_of_a_folder_are_checked_together(tmp_path, capsys):
    make_photos(tmp_path / "set" / "train", range(4))
    make_photos(tmp_path / "set" / "test", range(3, 6))
    code, values = checked(capsys, str(tmp_path / "set"), fix=tmp_path / "clean")
    assert code == 0 and kinds(values)["in training and validation"]["names"] == ["test: 3.jpg = train: 3.jpg"]
    assert sorted(path.parent.name for path in (tmp_path / "clean").rglob("*.jpg")) == ["test"] * 2 + ["train"] * 4
    _, values = checked(capsys, str(tmp_path / "clean"))
    assert not kinds(values).keys() & {"in training and validation", "equal"}


def test_columns_and_a_prompt(photos, capsys):
    rows = [{"file_name": f"{number}.jpg", "caption": "x"} for number in range(6)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert checked(capsys, str(photos))[0] == 1
    assert checked(capsys, str(photos), text_column="caption")[0] == 0
    assert checked(capsys, str(photos), prompt="a photo")[1]["captions"] == 6


def test_a_data_set_of_the_hub(tmp_path, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(picture=datasets.Image(), text=datasets.Value("string"))
    table = datasets.Dataset.from_dict(
        {"picture": [Image.new("RGB", (80, 64), colour) for colour in ("red", "red", "blue")], "text": list("abc")},
        features=features,
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda hub, split: table)
    monkeypatch.setattr("sdtune.data.hub.hub_fault", lambda *arguments: "")
    code, values = checked(capsys, "someone/things", image_column="picture")
    assert code == 0 and values["pictures"] == 3 and values["equal"] == [["00000000", "00000001"]]


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (["nothing"], {}, "'nothing' does not exist; expected a folder of pictures, shards"),
        (["lora_tiny"], {"prompt": "x"}, "--prompt is for a data set, and 'lora_tiny' is a recipe"),
        (["lora_tiny"], {"fix": Path("out")}, "--fix cleans a data set.*sdtune check FOLDER --fix out"),
        (["photos", ["a=b"]], {}, "'a=b' is for a recipe, and 'photos' is a data set"),
        (["photos", ["data.0.prompt=a dog"]], {}, "is a data set; write: --prompt 'a dog'"),
        (["photos", ["images.resolution=64"]], {}, "is a data set; write: --resolution 64"),
    ],
)
def test_wrong_usage(arguments, options, says):
    with pytest.raises(UsageError, match=says):
        checking.command(*arguments, **options)


def test_a_recipe_with_faults_tells_them_all(recipe):
    with pytest.raises(ConfigError) as fault:
        checking.command(recipe(), ["train.steps=-1", "data.0.path=nowhere"])
    assert len(fault.value.faults) == 2


def test_a_recipe(recipe, capsys, sd):
    code, values = checked(capsys, recipe(), ["images.resolution=128"])
    assert code == 0 and kinds(values).keys() == {"enlarged"}
    assert values["sizes"]["resize"]["width"] == 128
    assert values["models"] == [{"key": "model.base", "name": str(sd), "here": True, "lacks": []}]
    assert values["samples"] == 60 and values["epochs"] == 10 and values["disk_free_bytes"] > 0
    vae = json.loads((sd / "vae" / "config.json").read_text())
    side = 128 // 2 ** (len(vae["block_out_channels"]) - 1)
    assert values["cached_latents_bytes"] == 6 * 2 * 4 * vae["latent_channels"] * side**2
    assert checking.command(recipe()) == 0
    text = capsys.readouterr().out
    assert "30 steps of 2 = 60 samples, each picture 10 times" in text and "model.base" in text
    assert "the model's own tokenizer" in text


def test_a_warmup_that_outlasts_the_run_is_told_of(recipe, capsys):
    optimizer = {"lr": 1e-4, "warmup": 60}
    code, values = checked(capsys, recipe(optimizer=optimizer))
    assert code == 0 and "ends at 50% of optimizer.lr" in kinds(values)["settings"]["what"]
    assert kinds(values)["settings"]["do"] == "set optimizer.warmup=3"
    assert "settings" not in kinds(checked(capsys, recipe(optimizer=optimizer), ["train.steps=60"])[1])
    answer = CliRunner().invoke(app, ["train", recipe(optimizer=optimizer), "train.steps=2"])
    assert answer.exit_code == 0 and answer.stderr.startswith("warning: optimizer.warmup got 60 steps, and the run has")


def test_the_buckets_of_a_recipe(recipe, photos, capsys):
    for number in range(2):
        (photos / f"{number}.jpg").write_bytes(encoded(drawing(number, (80, 160))))
    file = recipe(images={"resolution": 64, "buckets": True})
    code, values = checked(capsys, file)
    assert code == 0
    found = {(each["width"], each["height"]): each["pictures"] for each in values["buckets"]}
    assert found == {(48, 80): 2, (72, 56): 4}
    assert values["sizes"]["resize"]["cropped_mean"] < 0.15
    assert checking.command(file) == 0
    shown = capsys.readouterr().out.splitlines()
    table = shown.index("width x height  pictures  cut away")
    rows = [line.split()[:4] for line in shown[table + 1 : table + 3]]
    assert rows == [["48", "x", "80", "2"], ["72", "x", "56", "4"]]
    with pytest.raises(ConfigError, match="images.bucket_step"):
        checking.command(file, ["images.bucket_step=24"])


def test_missing_masks_are_fatal_where_the_recipe_reads_them(recipe, photos, capsys):
    rows = [{"file_name": f"{n}.jpg", "text": "a", "mask_file_name": f"masks/{n}.png"} for n in range(6)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, values = checked(capsys, recipe())
    assert code == 0 and kinds(values)["mask missing"]["level"] == "warning"
    code, values = checked(capsys, recipe(objective={"outside_mask": 0.1}))
    assert code == 1 and kinds(values)["mask missing"]["count"] == 6


def test_what_to_type_for_pictures_without_a_caption(recipe, photos, capsys):
    (photos / "metadata.jsonl").unlink()
    assert "--prompt 'a photo" in kinds(checked(capsys, str(photos))[1])["no caption"]["do"]
    two = recipe(data=[{"path": str(photos)}, {"path": str(photos), "prompt": "x", "role": "class"}])
    assert "data.0.prompt='a photo" in kinds(checked(capsys, two)[1])["no caption"]["do"]


def test_the_folder_of_a_run_is_no_data_set(recipe, tmp_path, capsys):
    run = make_photos(tmp_path / "runs" / "old" / "samples", range(3)).parent
    for name in ("run.yaml", "environment.json"):
        (run / name).write_text("{}")
    for target, changes in ((str(run), []), (recipe(), [f"data.0.path={run}", "data.0.prompt=x"])):
        code, values = checked(capsys, target, changes)
        assert code == 1 and "is the folder of a run" in kinds(values)["refused"]["do"] and values["pictures"] == 0


def test_masks_that_a_recipe_does_not_read_are_told(recipe, photos, capsys):
    rows = [{"file_name": f"{n}.jpg", "text": "a"} for n in range(6)]
    for row in rows[:2]:
        row["mask_file_name"] = f"masks/{row['file_name']}"
        (photos / "masks").mkdir(exist_ok=True)
        shutil.copy(photos / row["file_name"], photos / "masks")
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = kinds(checked(capsys, recipe())[1])["unused masks"]
    assert told["level"] == "note" and told["count"] == 2 and "objective.outside_mask=" in told["do"]
    assert "unused masks" not in kinds(checked(capsys, recipe(objective={"outside_mask": 0.1}))[1])
    assert "unused masks" not in kinds(checked(capsys, str(photos))[1])
    answer = CliRunner().invoke(app, ["train", recipe(), "train.steps=1"])
    assert answer.exit_code == 0 and "note: 2 pictures with a mask that is not used" in answer.stderr


def test_every_shipped_recipe_of_the_tiny_model(capsys):
    for name in ("lora_tiny", "dreambooth_lora_tiny"):
        code, values = checked(capsys, name)
        assert code == 0 and values["pictures"] == 16 and not [f for f in values["findings"] if f["level"] == "fatal"]
    assert values["class_pictures_to_draw"] == 96


def test_pictures_of_another_role_are_no_part_of_the_folder_around_them(recipe, photos, tmp_path, capsys, monkeypatch):
    make_photos(photos / "class", range(10, 12))
    make_photos(photos / "val", range(20, 23))
    make_photos(photos / "more", range(30, 31))
    monkeypatch.chdir(photos)
    data = [
        {"path": "."},
        {"path": "class", "role": "class"},
        {"path": str(photos / "val"), "role": "validation"},
        {"path": "more"},
    ]
    file = recipe(data=data, train={"steps": 1, "cache_dir": "cache"}, output={"dir": "run", "trackers": []})
    code, values = checked(capsys, file)
    assert code == 0 and values["pictures"] == 7 + 2 + 3 + 1
    assert not kinds(values).keys() & {"in training and validation", "unreferenced", "refused"}
    for _ in range(2):  # what the first run leaves in the folder is no picture of the second
        run = Run(load(file))
        assert [len(source.pictures) for source in run.sources] == [7, 2, 1] and len(run.validation.pictures) == 3
        run.complete()
        file = recipe(data=data, train={"steps": 1, "cache_dir": "cache"}, output={"dir": "run2", "trackers": []})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train": {"steps": 1, "cache_dir": "photos/../photos"}}, "train.cache_dir"),
        (
            {"data": [{"path": "photos"}, {"path": "./photos", "role": "class", "prompt": "x", "generate": 9}]},
            "data.1.path",
        ),
    ],
)
def test_what_is_made_goes_into_a_folder_of_its_own(recipe, photos, tmp_path, monkeypatch, changes, key):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as fault:
        checking.command(recipe(**changes))
    assert [name for name, _ in fault.value.faults] == [key] and f"{key}=FOLDER" in str(fault.value)


def test_class_pictures_are_checked_as_training_takes_them(recipe, photos, tmp_path, capsys):
    drawn = {"path": str(tmp_path / "class"), "role": "class", "prompt": "a dog", "generate": 3}
    file = recipe(data=[{"path": str(photos)}, drawn | {"drawing": {"steps": 1}}])
    code, values = checked(capsys, file)
    assert code == 0 and values["class_pictures_to_draw"] == 3
    (tmp_path / "class").mkdir()
    assert checked(capsys, file)[0] == 0
    Run(load(file))
    shutil.rmtree(tmp_path / "runs")
    code, values = checked(capsys, file)
    assert code == 0 and values["class_pictures_to_draw"] == 0 and values["pictures"] == 9
    assert checking.command(file) == 0 and "which the run draws" not in capsys.readouterr().out
    code, values = checked(capsys, file, ["data.1.generate=5"])
    assert code == 0 and values["class_pictures_to_draw"] == 2 and values["pictures"] == 9
    (tmp_path / "class" / "class-000001.png").unlink()  # its row stays: it is drawn again
    code, values = checked(capsys, file)
    assert code == 0 and values["class_pictures_to_draw"] == 1
    for change in ("data.1.prompt=a cat", "data.1.drawing.steps=2"):
        code, values = checked(capsys, file, [change])
        assert code == 1 and kinds(values)["refused"]["what"] == "data.1: training refuses it"
        with pytest.raises(DataError) as refusal:
            Run(load(file, [change]))
        assert kinds(values)["refused"]["do"] == str(refusal.value)


def test_the_trigger_is_what_class_prompts_lack(recipe, photos, tmp_path, capsys):
    make_photos(tmp_path / "class", range(10, 12))
    data = [
        {"path": str(photos), "prompt": "a photo of sks dog"},
        {"path": str(tmp_path / "class"), "role": "class", "prompt": "a photo of a dog"},
    ]
    samples = {"samples": {"prompts": ["a dog in a garden"]}}
    code, values = checked(capsys, recipe(data=data, validate=samples))
    assert code == 0 and values["trigger"] == "sks" and kinds(values)["samples"]["names"] == ["a dog in a garden"]
    _, values = checked(capsys, recipe(data=[*data, {"path": str(photos)}], validate=samples))
    assert kinds(values)["no trigger word"]["count"] == 6


def test_a_copy_on_both_sides_of_the_held_out_part(recipe, photos, capsys):
    for number in range(1, 6):
        shutil.copy(photos / "0.jpg", photos / f"{number}.jpg")
    for fraction, found in [(0.0, False), (0.5, True)]:
        _, values = checked(capsys, recipe(validate={"fraction": fraction}), ["train.seed=1"])
        assert ("in training and validation" in kinds(values)) == found


def test_tokens_are_counted_by_the_models_own_tokenizer(recipe, photos, capsys, sd):
    length = caption_reader(load(recipe()).model, 75).limit
    rows = [{"file_name": f"{n}.jpg", "text": f"{n} " + "dog " * (length + 2 if n == 4 else 3)} for n in range(6)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, values = checked(capsys, recipe())
    assert [name.split(" (loses")[0] for name in kinds(values)["captions cut"]["names"]] == ["4.jpg"]
    _, values = checked(capsys, recipe(images={"resolution": 64, "max_tokens": 150}))
    assert "captions cut" not in kinds(values)


def test_clips_tokenizer_counts_where_there_is_no_model(recipe, tmp_path):
    reader = caption_reader(None, 150)
    assert reader.exact and reader.limit == 150 and "CLIP" in reader.name
    assert reader.count(["a photo of a cat", ""]) == [5, 0]
    assert not caption_reader(load(recipe(model={"base": "someone/model"})).model, 75).exact
    (tmp_path / "model.safetensors").touch()
    recipe_of_file = load(recipe(model={"base": str(tmp_path / "model.safetensors")}))
    assert caption_reader(recipe_of_file.model, 75).exact and named_models(recipe_of_file)[0].here


def test_models_that_are_not_here(recipe, hub, sd, capsys, monkeypatch):
    named = recipe(model={"base": "someone/model", "vae": "someone/vae"})
    code, values = checked(capsys, named)
    assert code == 1 and kinds(values)["model"]["level"] == "fatal" and kinds(values)["model"]["count"] == 2
    assert "hf download someone/model" in kinds(values)["model"]["do"]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sdtune.local_models.unreachable", lambda endpoint: "")
    code, values = checked(capsys, named)
    assert code == 0 and kinds(values)["model"]["level"] == "warning" and "downloads" in kinds(values)["model"]["do"]

    snapshot = put_in_cache(hub, "someone/model", sd)
    put_in_cache(hub, "someone/vae", sd / "vae")
    assert all(each.here for each in named_models(load(named)))
    assert not model_findings(named_models(load(named)))
    shutil.rmtree(snapshot / "unet")
    (found,) = model_findings(named_models(load(named)))
    assert found.names == ("model.base 'someone/model' (lacks unet)",)


def test_a_folder_that_lacks_a_part(recipe, sd, tmp_path, capsys):
    base = shutil.copytree(sd, tmp_path / "base")
    next((base / "text_encoder").glob("*.safetensors")).unlink()
    code, values = checked(capsys, recipe(model={"base": str(base)}))
    assert code == 1 and kinds(values)["model incomplete"]["names"] == [f"model.base '{base}' lacks text_encoder"]


@pytest.mark.parametrize("folder", [CLIP_WORDS, Path(resolve_asset(CLIP))], ids=["words", "shipped"])
def test_tokens_are_counted_as_transformers_counts_them(folder, recipe, sd):
    texts = ["", "a photo of a cat", "  Ünïcode\n 😀's   [test]  don't ", "<|startoftext|> sks dog, 1girl" * 40]
    theirs = CLIPTokenizer(vocab=str(CLIP_WORDS / "vocab.json"), merges=str(CLIP_WORDS / "merges.txt"))
    expected = theirs(texts, add_special_tokens=False, truncation=False)["input_ids"]
    parts = dict.fromkeys(["unet", "vae", "text_encoder", "scheduler"], str(sd)) | {"tokenizer": str(folder)}
    own = recipe(model={"from_config": parts})
    reader = caption_reader(load(own).model, 75)
    assert reader.exact and reader.count(texts) == [len(ids) for ids in expected]
