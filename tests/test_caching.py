"""Latents and embeddings on disk: encoded once, again when what they depend on changed, and as good as fresh ones."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtune import building, caching
from sdtune.config import Recipe, dump
from sdtune.config.files import check
from sdtune.data import dataset, filling
from sdtune.errors import DataError
from sdtune.run import Run, command
from sdtune.tasks import DenoisingTask
from tests.factories import SIZE, losses, make_photos, make_recipe, weights

NOTHING = Counter[str]()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Rows that go through any VAE's encoder and any text encoder, and how often these are called."""
    counts = Counter[str]()

    def note(network: Any, inputs: Any, output: Any) -> None:
        kind = {"Encoder": "pictures", "CLIPTextModel": "captions"}.get(type(network).__name__)
        if kind:
            rows = len(inputs[0] if kind == "pictures" else output[0])
            counts.update({kind: rows, f"calls for {kind}": 1})

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield counts
    finally:
        handle.remove()


def recipe_of(sd: Path, photos: Path, work: Path, **sections: Any) -> Recipe:
    train = {"cache_dir": str(work / "cache")} | sections.pop("train", {})
    return make_recipe(sd, photos, work / "run", train=train, **sections)


def filled(recipe: Recipe) -> tuple[int, int]:
    """Fill the cache as a run does; how many pictures and captions were encoded for it."""
    family = building.make_family(recipe)
    stores = caching.open_stores(recipe, family)
    task = building.make_task(recipe, family, stores)
    assert stores is not None and isinstance(task, DenoisingTask)
    sources = [building.make_source(recipe, each) for each in recipe.data]
    known = caching.known_views(recipe, stores, sources)
    training = building.make_training_set(recipe, sources, known=known)
    with counted() as counts:
        caching.fill_stores(stores, known, task, training.views(), training.captions(recipe.train.steps))
    return counts["pictures"], counts["captions"]


@pytest.fixture
def mine(photos: Path, tmp_path: Path) -> Path:
    """Photos to change."""
    return shutil.copytree(photos, tmp_path / "mine")


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_encodes_all_before_its_first_step_and_never_again(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        sd, photos, tmp_path, images={"flip": True, "caption_dropout": 0.5}, validate={"fraction": 0.2},
        train={"steps": 6},
    )  # fmt: skip
    with counted() as counts:
        run = Run(recipe)
    assert counts["pictures"] == 4 * 2 + 1 and counts["captions"] == 5 + 1  # mirrored ones; the empty caption
    assert counts["calls for pictures"] == counts["calls for captions"] == 1
    with counted() as counts:
        run.complete()
    assert counts == NOTHING
    assert len(losses(run.folder.path)) == 6
    with counted() as counts:
        Run(recipe.model_copy(update={"output": recipe.output.model_copy(update={"dir": str(tmp_path / "again")})}))
    assert counts == NOTHING


def test_pictures_are_not_needed_once_the_cache_is_full(sd: Path, mine: Path, tmp_path: Path) -> None:
    run = Run(recipe_of(sd, mine, tmp_path, validate={"fraction": 0.2}))
    for picture in mine.glob("*.png"):
        picture.unlink()
    (example,) = pickle.loads(pickle.dumps(run.training))[0]  # as worker processes get it
    assert example.pixels is None and example.frame == (SIZE, SIZE)
    run.complete()
    assert len(losses(run.folder.path)) == 2


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_losses_are_those_without_a_cache(
    base: str, tmp_path: Path, request: pytest.FixtureRequest, photos: Path
) -> None:
    wide = make_photos(tmp_path / "wide", 4, size=(2 * SIZE, SIZE + 9))
    model = {"family": {"sd": "stable-diffusion", "sdxl": "sdxl"}[base]}
    common: dict[str, Any] = {"model": model, "images": {"flip": True, "caption_dropout": 0.3}}
    folder = request.getfixturevalue(base)
    Run(make_recipe(folder, wide, tmp_path / "plain", train={"steps": 4}, **common)).complete()
    Run(recipe_of(folder, wide, tmp_path, train={"steps": 4}, **common)).complete()
    # float16 on disk changes the fourth digit of nothing
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=2e-5)


def test_a_resumed_run_is_bit_equal(sd: Path, photos: Path, tmp_path: Path) -> None:
    def recipe(name: str) -> Recipe:
        return make_recipe(
            sd, photos, tmp_path / name, train={"steps": 4, "cache_dir": str(tmp_path / "cache")},
            output={"checkpoint_every": 2},
        )  # fmt: skip

    Run(recipe("whole")).complete()
    steps = Run(recipe("stopped")).steps()
    next(steps), next(steps)
    Run(recipe("stopped"), resume=True).complete()
    whole, resumed = (weights(tmp_path / name / "final") for name in ("whole", "stopped"))
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())


def test_masks_are_cut_as_the_pictures_were(sd: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 3, size=(2 * SIZE, SIZE + 9))
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        mask = Image.new("L", (2 * SIZE, SIZE + 9))
        mask.paste(255, (60, 20, 90 + number, 60))
        mask.save(photos / f"mask-{number}.png")
        row["mask_file_name"] = f"mask-{number}.png"
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {"objective": {"outside_mask": 0.1}, "images": {"flip": True}}
    fresh = Run(make_recipe(sd, photos, tmp_path / "fresh", **common)).training
    stored = Run(recipe_of(sd, photos, tmp_path, **common)).training
    for number in range(12):
        (one,), (other,) = fresh[number], stored[number]
        assert other.pixels is None and one.size == other.size and one.mask is not None and other.mask is not None
        assert torch.equal(one.mask, other.mask)


def test_a_learning_text_encoder_is_not_cached(sd: Path, photos: Path, tmp_path: Path) -> None:
    run = Run(recipe_of(sd, photos, tmp_path, adapter={"text_encoder": True}))
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["latents", "pictures"]
    with counted() as counts:
        run.complete()
    assert counts["pictures"] == 0 and counts["captions"] == 4


def test_buckets_tags_and_class_pictures(sd: Path, tmp_path: Path) -> None:
    wide = make_photos(tmp_path / "photos", 3, size=(2 * SIZE, SIZE))
    for number, picture in enumerate(make_photos(tmp_path / "tall", 2, size=(SIZE, 2 * SIZE)).glob("*.png")):
        picture.rename(wide / f"tall {number}.png")
    rows = [{"file_name": p.name, "text": f"{p.stem}, a dog, grey"} for p in sorted(wide.glob("*.png"))]
    (wide / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    classes = make_photos(tmp_path / "classes", 2, captions=False)
    with counted() as counts:
        run = Run(
            recipe_of(
                sd, wide, tmp_path, images={"buckets": True, "tag_shuffle": True, "caption_dropout": 0.1},
                data=[{"path": str(wide)}, {"path": str(classes), "role": "class", "prompt": "a photo of a dog"}],
                train={"steps": 3, "batch_size": 1},
            )
        )  # fmt: skip
    assert counts["pictures"] == 5 + 2 * 2  # a class picture has the size of the instance beside it
    with counted() as counts:
        run.complete()
    assert counts == NOTHING


def test_shuffled_tags_are_stored(sd: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["dog, one, two, three, four", "dog, five, six, seven, eight", "dog", "a cat", "dog, nine"]
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    (mine / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def started(name: str, steps: int) -> tuple[Run, int]:
        images = {"tag_shuffle": True, "keep_tags": 1}
        train = {"steps": steps, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
        with counted() as counts:
            run = Run(make_recipe(sd, mine, tmp_path / name, images=images, train=train))
        return run, counts["captions"]

    run, encoded = started("first", 10)
    assert encoded == len(run.training.captions(10)) > 3 + 2  # each of two captions in several orders
    with counted() as counts:
        run.complete()
    assert counts == NOTHING
    assert started("second", 10)[1] == 0
    run, encoded = started("longer", 20)
    assert 0 < encoded <= 10 * 2
    monkeypatch.setattr(dataset, "VARIANTS", 2)
    assert len(run.training.captions(20)) == 3 + 2  # those of one order, and two of those drawn
    shutil.rmtree(tmp_path / "cache")
    run, encoded = started("little", 10)
    with counted() as counts:
        run.complete()
    assert encoded == 3 + 2 and counts["captions"] > 0  # the others as they come


# --- exactly what changed is made again -------------------------------------------------------------------------------


def test_what_changed_in_the_data_is_encoded_again(sd: Path, mine: Path, tmp_path: Path) -> None:
    recipe = recipe_of(sd, mine, tmp_path)
    assert filled(recipe) == (5, 5)
    assert filled(recipe) == (0, 0)

    rows = (mine / "metadata.jsonl").read_text()
    (mine / "metadata.jsonl").write_text(rows.replace("dog 3", "cat 3"))
    assert filled(recipe) == (0, 1)

    stat = (mine / "2.png").stat()
    Image.new("RGB", (SIZE, SIZE), "blue").save(mine / "2.png")
    os.utime(mine / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert filled(recipe) == (1, 0)

    (mine / "metadata.jsonl").write_text(rows)
    assert filled(recipe) == (0, 0)  # the old caption is still there
    (mine / "1.png").rename(mine / "renamed.png")
    (mine / "metadata.jsonl").write_text(rows.replace("1.png", "renamed.png"))
    assert filled(recipe) == (0, 0)  # the name does not matter
    shutil.copyfile(mine / "0.png", mine / "3.png")
    assert filled(recipe) == (0, 0)  # nor does a copy


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"images": {"resolution": 32}}, (5, 0)),
        ({"images": {"resolution": [64, 32]}}, (5, 0)),
        ({"images": {"flip": True}}, (5, 0)),  # the mirrored ones
        ({"images": {"background": "black"}}, (5, 0)),
        ({"images": {"caption_dropout": 0.1}}, (0, 1)),  # the empty caption
        ({"images": {"max_tokens": 150}}, (0, 10)),  # in two chunks
        ({"model": {"clip_skip": 1}}, (0, 5)),
        ({"train": {"precision": "bf16"}}, (0, 5)),
        ({"train": {"batch_size": 1, "seed": 3}, "objective": {"snr_gamma": 5.0}, "adapter": {"rank": 2}}, (0, 0)),
    ],
    ids=lambda change: str(change),
)
def test_what_changed_in_the_settings_is_encoded_again(
    change: dict[str, Any], again: tuple[int, int], sd: Path, photos: Path, tmp_path: Path
) -> None:
    assert filled(recipe_of(sd, photos, tmp_path)) == (5, 5)
    assert filled(recipe_of(sd, photos, tmp_path, **change)) == again
    assert filled(recipe_of(sd, photos, tmp_path)) == (0, 0)


@pytest.mark.parametrize(
    ("file", "key", "again"),
    [
        ("vae", "encoder.conv_in.bias", (5, 0)),
        ("vae", "decoder.conv_in.bias", (0, 0)),  # is not asked
        ("text_encoder", "final_layer_norm.bias", (0, 5)),
        ("unet", "conv_in.bias", (0, 0)),
    ],
)
def test_other_weights_are_noticed(
    file: str, key: str, again: tuple[int, int], sd: Path, photos: Path, tmp_path: Path
) -> None:
    assert filled(recipe_of(sd, photos, tmp_path)) == (5, 5)
    other = shutil.copytree(sd, tmp_path / "other")
    assert filled(recipe_of(other, photos, tmp_path)) == (0, 0)  # the place does not matter
    (weights_file,) = (other / file).glob("*.safetensors")
    tensors = load_file(weights_file)
    (name,) = (name for name in tensors if name.endswith(key))
    save_file(tensors | {name: tensors[name] + 0.01}, weights_file, {"format": "pt"})
    assert filled(recipe_of(other, photos, tmp_path)) == again


def test_other_settings_of_the_model_are_noticed(sd: Path, photos: Path, tmp_path: Path) -> None:
    assert filled(recipe_of(sd, photos, tmp_path)) == (5, 5)
    other = shutil.copytree(sd, tmp_path / "other")
    config = other / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    assert filled(recipe_of(other, photos, tmp_path)) == (5, 0)
    tokenizer = other / "tokenizer" / "tokenizer.json"
    rules = json.loads(tokenizer.read_text())
    rules["model"]["merges"].pop()  # "do" and "g"
    tokenizer.write_text(json.dumps(rules))
    assert filled(recipe_of(other, photos, tmp_path)) == (0, 5)


def test_runs_of_other_packed_weights_share_no_text(sd: Path, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found: dict[tuple[str, str], list[float]] = {}
    for kind in ("nf4", "int8"):
        for cache in ("shared", kind):
            train = {"steps": 2, "cache_dir": str(tmp_path / cache)}
            run = make_recipe(sd, photos, tmp_path / f"{kind} {cache}", model={"quantize": kind}, train=train)
            found[kind, cache] = losses(Run(run).complete())
        assert found[kind, "shared"] == found[kind, kind]
    assert found["nf4", "shared"] != found["int8", "shared"]


# --- filling ----------------------------------------------------------------------------------------------------------


def test_a_stop_loses_nothing_that_was_encoded(
    sd: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "MOST", 2)
    monkeypatch.setattr(filling, "AHEAD", 0)
    monkeypatch.setattr(filling.secrets, "randbelow", lambda count: 0)
    recipe = recipe_of(sd, mine, tmp_path)
    (mine / "4.png").write_bytes((mine / "4.png").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"4.png cannot be read as a picture"):
        filled(recipe)
    make_photos(mine, 5)
    assert filled(recipe) == (1, 5)


KILLED = """
import sys, time
from sdtune.data import atomic, filling
from sdtune.run import command

def flush(file, plain=atomic.flush):
    if any(file.parent.glob("*.safetensors")) and file.parent.name.startswith(sys.argv[2]):
        print("half written", flush=True)
        time.sleep(600)
    plain(file)

atomic.flush, filling.MOST, filling.CAPTIONS, filling.SHARD_BYTES = flush, 1, 1, 1
command(sys.argv[1], [])
"""


@pytest.mark.parametrize(("kind", "left"), [("latents", (4, 5)), ("text", (0, 4))])
def test_a_run_killed_while_it_fills_goes_on_where_it_was(
    kind: str, left: tuple[int, int], sd: Path, photos: Path, tmp_path: Path
) -> None:
    recipe, file = recipe_of(sd, photos, tmp_path), tmp_path / "recipe.yaml"
    file.write_text(dump(recipe))
    with subprocess.Popen([sys.executable, "-c", KILLED, str(file), kind], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "half written\n"
        run.kill()  # kill -9, with one shard there, and the second beside its place
    assert len(list(tmp_path.glob(f"cache/{kind}-*/*.safetensors"))) == 1
    assert len(list(tmp_path.glob(f"cache/{kind}-*/.*.part"))) == 1
    with counted() as counts:
        assert command(str(file), []) == 0
    assert (counts["pictures"], counts["captions"]) == left
    assert len(losses(tmp_path / "run")) == 2
    assert filled(recipe) == (0, 0)


def test_a_picture_that_changes_meanwhile_is_told(sd: Path, mine: Path, tmp_path: Path) -> None:
    recipe = recipe_of(sd, mine, tmp_path)
    family = building.make_family(recipe)
    stores = caching.open_stores(recipe, family)
    assert stores is not None
    source = building.make_source(recipe, recipe.data[0])
    known = caching.known_views(recipe, stores, [source])
    Image.new("RGB", (SIZE, SIZE), "blue").save(mine / "2.png")
    task, training = building.make_task(recipe, family, stores), building.make_training_set(recipe, [source])
    assert isinstance(task, DenoisingTask)
    with pytest.raises(DataError, match=r"2.png was changed while the cache was filled; run the same command again"):
        caching.fill_stores(stores, known, task, training.views(), [])


def test_too_little_room_is_told_before_the_work(
    sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"needs 0.0 GB more, and 0.0 GB are free. Make room, .*train.cache_dir=FOLDER"):
        filled(recipe_of(sd, photos, tmp_path))


def test_pictures_of_other_rows_are_decoded_ahead_and_in_order() -> None:
    batches = [[1, 2], [3], [4, 5, 6], [7], [8], [9]]
    found = list(filling.ahead(lambda number: number * 10, batches))
    assert found == [(batch, [number * 10 for number in batch]) for batch in batches]


def test_two_processes_share_the_work(sd: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 70)  # two batches of pictures, three of captions
    for number in range(70):  # no two alike
        Image.new("RGB", (SIZE, SIZE), (number, 3 * number, 90)).save(photos / f"{number}.png")
    alone = make_recipe(sd, photos, tmp_path / "alone", train={"cache_dir": str(tmp_path / "one")})
    with counted() as counts:
        Run(alone).complete()
    assert counts["calls for pictures"] == 2 and counts["calls for captions"] == 3
    train = {"batch_size": 1, "cache_dir": str(tmp_path / "two")}
    together = make_recipe(sd, photos, tmp_path / "together", train=train)
    (tmp_path / "together.yaml").write_text(dump(together))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdtune"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "train", str(tmp_path / "together.yaml")], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for kind, most in (("latents", 64), ("text", 64)):
        (one,), (two,) = (list((tmp_path / name).glob(f"{kind}-*")) for name in ("one", "two"))
        assert len(list(one.glob("*.safetensors"))) == 1
        parts = [load_file(shard) for shard in two.glob("*.safetensors")]
        sizes = [len(next(iter(part.values()))) for part in parts]
        assert len(sizes) == 2 and sum(sizes) == 70 and max(sizes) <= most
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), abs=1e-6)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": {"crop": "random"}}, "each sample is cut out anew"),
        ({"train": {"cache": False}}, "got a folder and train.cache: false"),
        ({"task": "autoencoding", "adapter": {"kind": "full"}}, "an autoencoding run changes the VAE in each step"),
        ({"train": {"cache_dir": "PHOTO"}}, "is a file, expected a folder"),
    ],
    ids=["random crop", "no cache", "autoencoding", "a file"],
)
def test_what_cannot_be_cached_is_refused(change: Any, told: str, sd: Path, photos: Path, tmp_path: Path) -> None:
    train = {"steps": 2, "cache_dir": str(tmp_path / "cache")} | change.pop("train", {})
    train["cache_dir"] = train["cache_dir"].replace("PHOTO", str(photos / "0.png"))
    values = {"model": {"base": str(sd)}, "data": [{"path": str(photos)}], "optimizer": {"lr": 1e-3}, "train": train}
    _, faults = check(values | {"output": {"dir": str(tmp_path / "run"), "trackers": []}} | change)
    assert [key for key, _ in faults] == ["train.cache_dir"] and told in faults[0][1]
