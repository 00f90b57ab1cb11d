"""DreamBooth with several concepts in one run: its losses are those of the published formula, whatever the way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune.data.batches import collate
from sdtune.run import Run
from tests.factories import losses, make_photos, make_recipe, train_on_two_processes

ROOT = Path(__file__).parents[1]
STEPS, SAMPLES = 3, 4  # samples a step, in every way below
WAYS = {
    "whole": {"batch_size": 4},
    "accumulated": {"batch_size": 2, "accumulate": 2},
    "one at a time": {"batch_size": 1, "accumulate": 4},
}


def concepts(folder: Path, prior: tuple[float, float] = (0.4, 0.7)) -> list[dict[str, Any]]:
    """A dog and a cat, of unequal number, repeats and weight, and class pictures of each with a weight of its own."""
    for name, count in (("sks", 3), ("zwx", 2), ("dogs", 4), ("cats", 3)):
        make_photos(folder / name, count, captions=False)
    return [
        {"path": str(folder / "sks"), "prompt": "a sks dog", "repeats": 2},
        {"path": str(folder / "zwx"), "prompt": "a zwx cat", "weight": 2.0},
        {"path": str(folder / "dogs"), "role": "class", "prompt": "a dog", "weight": prior[0]},
        {"path": str(folder / "cats"), "role": "class", "prompt": "a cat", "weight": prior[1]},
    ]


def recipe(sd: Path, folder: Path, name: str, train: dict[str, Any], **sections: Any) -> Any:
    """A run whose weights all but stand still, so that each step's loss can be worked out from the base."""
    return make_recipe(
        sd, "", folder / name, data=concepts(folder), optimizer={"lr": 1e-12}, train={"steps": STEPS} | train,
        adapter={"kind": "lora", "text_encoder": True}, **sections,
    )  # fmt: skip


@torch.no_grad()
def published(run: Run, step: int) -> float:
    """mean(instance losses) + prior_loss_weight * mean(class losses), each picture by itself, with its own weight.

    Source: Ruiz et al. 2023, "DreamBooth", eq. 2, as examples/dreambooth/train_dreambooth.py of diffusers trains it.
    """
    halves: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for number in range(step * SAMPLES, (step + 1) * SAMPLES):
        drawn = run.task.draw(collate([run.training[number]]), run.recipe.train.seed)
        for row, example in enumerate(run.training[number]):
            pixels = example.pixels.float()[None] / 127.5 - 1
            mean, std = run.family.encode_images(pixels)
            x0, eps, t = mean + std * drawn.posterior[row], drawn.noise[row], drawn.t[row : row + 1]
            alpha_bar = run.family.schedule.alpha_bar[t]
            x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
            answer = run.family.predict(x_t, t, run.family.encode_text([example.caption]))
            halves[example.instance].append(example.weight * (answer - eps).square().mean())
    return float(torch.stack(halves[True]).mean() + torch.stack(halves[False]).mean())


def test_every_concept_and_class_comes_with_its_own_words_and_weight(sd: Path, tmp_path: Path) -> None:
    run = Run(recipe(sd, tmp_path, "run", {}))
    seen: dict[tuple[str, float, bool], set[str]] = {}
    for number in range(2 * len(run.training)):
        for example in run.training[number]:
            kind = (example.caption, round(example.weight, 3), example.instance)
            seen.setdefault(kind, set()).add(example.key)
    assert {kind: len(pictures) for kind, pictures in seen.items()} == {
        ("a sks dog", 1.0, True): 3,
        ("a zwx cat", 2.0, True): 2,
        ("a dog", 0.4, False): 4,
        ("a cat", 0.7, False): 3,
    }
    assert len(run.training) == 3 * 2 + 2  # repeats counted


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_each_step_is_the_published_one(sd: Path, tmp_path: Path, way: str) -> None:
    run = Run(recipe(sd, tmp_path, way.replace(" ", "-"), WAYS[way]))
    expected = [published(run, step) for step in range(STEPS)]
    run.complete()
    assert losses(run.folder.path) == pytest.approx(expected, rel=1e-4)


def test_two_processes_have_the_published_loss(sd: Path, tmp_path: Path) -> None:
    one = Run(recipe(sd, tmp_path, "one", {"batch_size": 4}))
    expected = [published(one, step) for step in range(STEPS)]
    train_on_two_processes(recipe(sd, tmp_path, "two", {"batch_size": 1, "accumulate": 2}), tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)


def test_the_weight_of_class_pictures_is_the_prior_loss_weight(sd: Path, tmp_path: Path) -> None:
    """The loss is linear in it: the published `instance_loss + prior_loss_weight * prior_loss`."""
    got = []
    for prior in (0.0, 1.0, 3.0):
        data = concepts(tmp_path, (prior, prior))
        run = Run(make_recipe(sd, "", tmp_path / f"run-{prior}", data=data, train={"steps": 1, "batch_size": 4}))
        got.append(next(run.steps()).loss)
    assert got[2] - got[0] == pytest.approx(3 * (got[1] - got[0]), rel=1e-4)
