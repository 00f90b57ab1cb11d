"""What a run does about its pictures: refused before anything is made, and read no further than its last step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.config import DataSource
from sdtune.data.images import to_float
from sdtune.data.metadata import read_rows, write_rows
from sdtune.errors import DataError, RunError
from sdtune.run import Run
from tests.factories import VAE, make_photos, make_recipe


def test_broken_pictures_are_refused_before_anything_is_made(sd: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    for name in ("1.png", "3.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:60])
    with pytest.raises(DataError, match=r"^2 pictures cannot be read: .*1\.png .*3\.png .*Nothing was begun") as fault:
        Run(make_recipe(sd, photos, tmp_path / "run"))
    assert fault.value.exit_code == 1 and not (tmp_path / "run").exists()


def test_a_fault_names_its_entry_of_the_recipe(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run")
    recipe.data.append(DataSource(path=str(make_photos(tmp_path / "bare", 1, captions=False)), role="class"))
    with pytest.raises(DataError, match=r"data\.1\.prompt="):
        Run(recipe)


def test_nothing_is_read_ahead_of_the_last_step(sd: Path, photos: Path, tmp_path: Path) -> None:
    run = Run(make_recipe(sd, photos, tmp_path / "run", train={"steps": 2, "batch_size": 1, "workers": 1}))
    asked, training = tmp_path / "asked", run.training

    class Noting:
        def __getitem__(self, number: int) -> Any:
            with open(asked, "a") as file:
                file.write(f"{number}\n")
            return training[number]

    run.training = Noting()  # type: ignore[assignment]
    run.complete()
    assert asked.read_text().split() == ["0", "1"]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Pictures of three shapes, wide ones with a mask."""
    folder = make_photos(tmp_path / "masked", 4, size=(120, 60))
    rows = read_rows(folder)
    for row in rows:
        row["mask_file_name"] = f"masks/{row['file_name']}"
        mask = np.zeros((60, 120), np.uint8)
        mask[10:50, 20:60] = 255
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / row["mask_file_name"])
    for number, size in enumerate([(60, 120), (80, 80), (40, 50)]):
        Image.effect_noise(size, 80).save(folder / f"more{number}.png")
        rows.append({"file_name": f"more{number}.png", "text": "noise, grey, fine"})
    write_rows(folder, rows)
    return folder


def test_buckets_and_masks_from_end_to_end(masked: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = make_recipe(
        "tiny",
        masked,
        tmp_path / "run",
        objective={"outside_mask": 0.1},
        images={"buckets": True, "crop": "random", "flip": True, "tag_shuffle": True, "keep_tags": 1},
        data=[{"path": str(masked)}, {"path": str(photos), "role": "class", "prompt": "a dog"}],
        train={"steps": 4, "batch_size": 2},
        validate={"every": 4, "fraction": 0.3, "count": 8, "samples": {"prompts": ["noise"], "steps": 1}},
    )
    run = Run(recipe)
    said = capsys.readouterr().err
    infos = list(run.steps())
    run.finish()
    assert len(infos) == 4 and all(np.isfinite(info.loss) for info in infos)
    table = json.loads((run.folder.path / "buckets.json").read_text())
    assert all(f"{each['width']} x {each['height']}" in said for each in table)
    learnt = sum(len(source.pictures) for source in run.sources if source.role == "instance")
    assert sum(each["pictures"] for each in table) == learnt < 7
    assert {(each["height"], each["width"]) for each in table} <= {(48, 80), (80, 48), (64, 64), (48, 40)}
    frames = {batch.frame for batch in run.held_out}
    assert sum(len(batch) for batch in run.held_out) == 7 - learnt and len(frames) == len(run.held_out)
    with Image.open(run.folder.path / "samples" / "step-000004" / "00.png") as sample:
        assert sample.size == (64, 64)  # samples keep images.resolution


def test_shuffled_and_dropped_captions_have_embeddings_of_their_own(sd: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    write_rows(photos, [{"file_name": "0.png", "text": text} for text in ("sks, dog, photo", "sks, of, hot, dog")])
    found = []
    for cache in (True, False):
        recipe = make_recipe(
            sd,
            photos,
            tmp_path / str(cache),
            images={"tag_shuffle": True, "keep_tags": 1, "caption_dropout": 0.3},
            train={"steps": 6, "batch_size": 2, "cache": cache},
        )
        run = Run(recipe)
        seen = {run.training[number][0].caption for number in range(12)}
        assert "" in seen and len(seen) > 4
        found.append([info.loss for info in run.steps()])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_sdxl_is_told_the_sizes_of_buckets(sdxl: Path, tmp_path: Path) -> None:
    """Wide pictures of 120 x 60 cover 80 x 48 at 96 x 48, square ones of 64 x 64 are as they are."""
    wide, square = make_photos(tmp_path / "wide", 2, size=(120, 60)), make_photos(tmp_path / "square", 2)
    recipe = make_recipe(
        sdxl,
        "",
        tmp_path / "run",
        model={"family": "sdxl"},
        data=[{"path": str(wide)}, {"path": str(square)}],
        images={"buckets": True, "crop": "random", "flip": True},
        train={"steps": 4},
    )
    run, seen = Run(recipe), []
    run.family.modules["unet"].register_forward_pre_hook(
        lambda _, args, kw: seen.append((kw["added_cond_kwargs"]["time_ids"], args[0].shape)), with_kwargs=True
    )
    run.complete()
    for time_ids, (_, _, height, width) in seen:
        told = {tuple(ids) for ids in time_ids.tolist()}
        if (height, width) == (48 // run.family.factor, 80 // run.family.factor):
            assert all(ids == (60, 120, 0, ids[3], 48, 80) and 0 <= ids[3] <= 16 for ids in told)
        else:
            assert told == {(64, 64, 0, 0, 64, 64)}
    assert len({shape for _, shape in seen}) == 2 and len(seen) == 4


def test_a_vae_of_several_sizes_gets_one_scaling_factor(sd: Path, tmp_path: Path) -> None:
    wide, square = make_photos(tmp_path / "wide", 2, size=(120, 60)), make_photos(tmp_path / "square", 2)
    recipe = make_recipe(
        "",
        "",
        tmp_path / "run",
        task="autoencoding",
        model={"from_config": {"vae": {key: value for key, value in VAE.items() if key != "scaling_factor"}}},
        adapter={"kind": "full"},
        data=[{"path": str(wide)}, {"path": str(square)}],
        images={"buckets": True},
    )
    run = Run(recipe)
    run.complete()
    vae, numbers = run.family.modules["vae"], range(4)
    with torch.no_grad():
        examples = {e.key: to_float(e.pixels)[None] for n in numbers for e in run.training[n] if e.pixels is not None}
        latents = torch.cat([vae.encode(pixels).latent_dist.mean.flatten() for pixels in examples.values()])
    assert len(examples) == 4 and vae.config.scaling_factor == pytest.approx(1 / latents.std().item(), rel=1e-4)


def test_masks_change_what_is_learned(masked: Path, tmp_path: Path) -> None:
    losses = []
    for weight in (None, 1.0, 0.0):
        run = Run(make_recipe("tiny", masked, tmp_path / str(weight), objective={"outside_mask": weight}))
        losses.append(next(run.steps()).loss)
    assert losses[0] == pytest.approx(losses[1]) and losses[0] != pytest.approx(losses[2])


def test_a_mask_of_another_shape_is_refused_where_masks_are_used(masked: Path, tmp_path: Path) -> None:
    Image.new("L", (60, 120)).save(masked / "masks" / "1.png")
    Run(make_recipe("tiny", masked, tmp_path / "without"))
    with pytest.raises(DataError, match=r"1 mask is of another shape than the picture: .*masks/1\.png is 60 x 120"):
        Run(make_recipe("tiny", masked, tmp_path / "run", objective={"outside_mask": 0.0}))
    assert not (tmp_path / "run").exists()


def test_a_run_whose_pictures_have_other_sizes_does_not_go_on(masked: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        "tiny", masked, tmp_path / "run", images={"buckets": True}, output={"checkpoint_every": 1}, train={"steps": 2}
    )
    next(Run(recipe).steps())
    with Image.open(masked / "0.png") as picture:
        picture.resize((90, 90)).save(masked / "0.png")
    with pytest.raises(RunError, match=r"pictures of each size: .*4 of 80 x 48.* then, .*3 of 80 x 48.* now"):
        Run(recipe, resume=True)
