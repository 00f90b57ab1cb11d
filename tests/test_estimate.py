"""What a run will take, held against runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdtune import building, estimate
from sdtune.run import Run
from tests.factories import make_recipe

FULL = {"kind": "full"}


@pytest.mark.parametrize("targets", ["attention", "attention+feedforward", "all"])
def test_learning_numbers_are_those_of_the_run(sd: Path, photos: Path, tmp_path: Path, targets: str) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run", adapter={"rank": 3, "targets": targets})
    network = estimate.make_empty(recipe, estimate.network_config(recipe) or {})
    run = Run(recipe)
    assert building.make_adapter(recipe).numbers(network) == sum(p.numel() for p in run.parameters.values())


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl"])
@pytest.mark.parametrize("kind", ["textual-inversion", "lora"])
def test_learning_numbers_of_tokens(
    sd: Path, sdxl: Path, photos: Path, tmp_path: Path, family: str, kind: str, capsys: Any
) -> None:
    tokens = [{"token": "<a>", "vectors": 3}, {"token": "<b>"}]
    recipe = make_recipe(
        sdxl if family == "sdxl" else sd, photos, tmp_path / "run", adapter={"kind": kind, "tokens": tokens},
        model={"family": family}, data=[{"path": str(photos), "prompt": "<a> <b>"}],
    )  # fmt: skip
    network = estimate.make_empty(recipe, estimate.network_config(recipe) or {})
    learn = sum(p.numel() for p in Run(recipe).parameters.values())
    assert building.make_adapter(recipe).numbers(network) == learn > 0
    assert estimate.run_cost(recipe)["disk_written_bytes"] == 4 * learn


@pytest.mark.parametrize("adapter", [{"kind": "lora", "targets": "all"}, FULL], ids=["lora", "full"])
def test_bytes_written_are_about_those_of_the_run(sd: Path, photos: Path, tmp_path: Path, adapter: Any) -> None:
    recipe = make_recipe(
        sd, photos, tmp_path / "run", adapter=adapter, output={"checkpoint_every": 1, "keep_last": 1},
        train={"steps": 3, "ema": 0.9},
    )  # fmt: skip
    cost = estimate.run_cost(recipe)
    Run(recipe).complete()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000003"]
    weights = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert weights < cost["disk_written_bytes"] * 1.5 and cost["disk_written_bytes"] < 4 * weights
    assert 0 < cost["seconds"] < 60


def test_operations_are_counted_without_weights(sdxl: Path, sd: Path, photos: Path, tmp_path: Path) -> None:
    from sdtune.models import UNet2DConditionModel

    recipe = make_recipe(sd, photos, tmp_path / "run")
    network = estimate.make_empty(recipe, estimate.network_config(recipe) or {})
    assert all(parameter.is_meta for parameter in network.parameters())
    whole = UNet2DConditionModel.from_pretrained(sd / "unet")
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the attention kernel of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        whole(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, 77, 32))
    assert estimate.sample_flops(recipe, network) == pytest.approx(counter.get_total_flops(), rel=0.05)
    four = make_recipe(sd, photos, tmp_path / "run", train={"batch_size": 4, "accumulate": 2}, adapter=FULL)
    assert estimate.run_seconds(four, 100, 1.0) == 4 * 1.5 * estimate.run_seconds(recipe, 100, 1.0)

    large = make_recipe(sdxl, photos, tmp_path / "run", model={"family": "sdxl", "base": str(sdxl)})
    cost = estimate.run_cost(large)
    assert cost["seconds"] is not None and cost["seconds"] > 0
    vae = make_recipe(sd, photos, tmp_path / "run", task="autoencoding", adapter=FULL)
    assert estimate.run_cost(vae)["seconds"] is not None


def test_what_is_not_here_is_not_known(photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe("someone/model", photos, tmp_path / "run")
    assert estimate.run_cost(recipe) == {"seconds": None, "memory_bytes": None, "disk_written_bytes": None}


def test_a_disk_that_is_too_small_is_fatal(
    sd: Path, photos: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from sdtune.checking import command
    from sdtune.config import dump

    file = tmp_path / "recipe.yaml"
    file.write_text(dump(make_recipe(sd, photos, tmp_path / "run")))
    assert command(str(file)) == 0
    said = capsys.readouterr().out
    assert "time " in said and "the run writes about" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert command(str(file)) == 1
    assert "run folders that do not fit on the disk" in capsys.readouterr().out


def test_orders_of_tags_are_counted_as_far_as_a_run_meets_them() -> None:
    captions = ["dog", "dog, one", "dog, one, two", "dog, one, two, three, four"]
    assert [estimate.variants(captions, 1, samples) for samples in (3, 1000)] == [2 + 3, 2 + 2 + 24]
    assert estimate.variants(["dog, " * 9], 0, 10**9) == estimate.VARIANTS


def test_bytes_of_the_cache_are_about_those_of_the_folder(
    sd: Path, photos: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from sdtune.checking import command
    from sdtune.config import dump

    file, cache = tmp_path / "recipe.yaml", tmp_path / "cache"
    recipe = make_recipe(sd, photos, tmp_path / "run", train={"cache_dir": str(cache)}, images={"flip": True})
    file.write_text(dump(recipe))
    assert command(str(file), as_json=True) == 0
    values = json.loads(capsys.readouterr().out)
    Run(recipe)
    written = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    assert values["cache_dir_bytes"] < written < 1.05 * values["cache_dir_bytes"]
    assert values["cached_latents_bytes"] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 100_000))
    command(str(file))
    said = capsys.readouterr().out
    assert "caches that may not fit on the disk" in said
    assert "of which some may be there; 100 KB are free for" in said


@pytest.mark.parametrize(
    ("adapter", "optimizer", "quantize"),
    [
        ({"kind": "lora", "rank": 64, "targets": "all"}, "adamw", None),
        ({"kind": "lora"}, "adamw", "nf4"),
        ({"kind": "lora"}, "prodigy", "int8"),
        (FULL, "adamw8bit", None),
        (FULL, "adafactor", None),
    ],
    ids=str,
)
def test_memory_is_about_that_of_the_run(
    adapter: Any, optimizer: str, quantize: str | None, photos: Path, tmp_path: Path
) -> None:
    from sdtune.families.quantization import weight_bytes

    recipe = make_recipe(
        "tiny", photos, tmp_path / "run", adapter=adapter, optimizer={"name": optimizer, "lr": 1.0},
        model={"quantize": quantize}, train={"steps": 1, "batch_size": 1},
    )  # fmt: skip
    run = Run(recipe)
    next(run.steps())
    state = [each for some in run.optimizer.state.values() for each in some.values() if isinstance(each, torch.Tensor)]
    learning = sum(parameter.nbytes for parameter in run.parameters.values())
    states = sum({each.data_ptr(): each.nbytes for each in state}.values())  # the tables of 8 bits are shared
    held = weight_bytes(run.family.modules["unet"]) + learning + states
    assert estimate.run_cost(recipe)["memory_bytes"] == pytest.approx(held, rel=0.1)
