"""benchmarks/small_denoisers.py and class_agreement.py: trained, drawn, judged, on a handful of pictures."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script in a folder with data and a classifier; two numbers a picture stand for the features."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    split = pixels, np.arange(20, dtype=np.uint8) % 10
    script(ROOT / "examples" / "mnist" / "build_data.py").build(
        {"train": split, "test": split}, CLOTHES, Path("data/fashion_mnist")
    )
    module = script(ROOT / "benchmarks" / "small_denoisers.py")
    monkeypatch.setattr(module, "TRIED", 1)
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "Features", lambda: two_numbers)
    torch.manual_seed(0)
    Path("runs").mkdir()
    weights = importlib.import_module("classifier").Classifier(10).state_dict()
    classes = {"classes": json.dumps(sorted(CLOTHES))}
    save_file(weights, "runs/classifier-fashion_mnist.safetensors", metadata=classes)
    return module


def two_numbers(pictures: np.ndarray) -> torch.Tensor:
    grey = torch.from_numpy(pictures.copy()).float().flatten(1)
    return torch.stack([grey.mean(1), grey.std(1)], dim=1)


def test_networks_are_trained_drawn_and_judged_once(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kinds", "resnet_decoder", "segnet", "--seconds", "0.01", "--samples", "20", "--halvings", "1"]
    arguments += ["--set", "train.batch_size=4", "train.precision=fp32", "optimizer.warmup=0"]
    result = benchmark.main(arguments)
    *_, smallest, line = capsys.readouterr().out.splitlines()
    assert json.loads(line) == result
    able = [row for row in result["networks"] if row["agreement"] >= 0.8]  # by chance
    assert ("can draw" in smallest) == bool(able)
    resnet, segnet, _, thinner = result["networks"]
    assert thinner["parameters"] < segnet["parameters"] / 3
    assert (resnet["network"], segnet["network"]) == ("resnet_decoder", "segnet")
    assert resnet["parameters"] > segnet["parameters"] > 100_000
    assert all(0 <= row["least"] <= row["agreement"] <= 1 and row["distance"] > 1 for row in result["networks"])
    assert result["real"]["distance"] == pytest.approx(0, abs=1e-6)  # here train and test are the same
    with Image.open("runs/small_denoisers/sheet.png") as sheet:
        assert np.asarray(sheet).std() > 10
    again = benchmark.main(arguments)
    assert again["networks"] == result["networks"]


def test_channels_are_halved(benchmark: Any) -> None:
    def network(kind: str, halvings: int) -> dict[str, Any]:
        return benchmark.recipe(kind, halvings, Path("runs/x"), []).model.from_config["denoiser"]

    assert network("unet", 0)["widths"] == [16, 32, 64] and network("unet", 1)["widths"] == [8, 16, 32]
    assert network("segnet", 3)["widths"] == [4, 8, 16] and network("segnet", 3)["groups"] == 4
    assert network("resnet_decoder", 2)["width"] == 4


def test_the_distance_is_that_of_two_gaussians(benchmark: Any) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 3).double() @ torch.randn(3, 3).double(), torch.rand(40, 3).double() + 1
    covariances = [each.T.cov() for each in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ values.sqrt().diag() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ covariances[1] @ root).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(each.trace() for each in covariances) - 2 * middle
    assert benchmark.frechet(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert benchmark.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_a_run_is_judged_at_several_guidances(benchmark: Any) -> None:
    benchmark.main(["--kinds", "segnet", "--seconds", "0.01", "--samples", "10", "--set", "train.batch_size=4"])
    agreement = importlib.import_module("class_agreement")
    weights = "runs/classifier-fashion_mnist.safetensors"
    arguments = ["runs/small_denoisers/segnet-0", "--classifier", weights, "--count", "20", "--steps", "2"]
    result = agreement.main([*arguments, "--guidance", "1", "3"])
    assert [row["guidance"] for row in result["results"]] == [1.0, 3.0]
    for row in result["results"]:  # as many pictures of each class
        assert sum(row["each"].values()) / len(row["each"]) == pytest.approx(row["agreement"], abs=1e-3)
    with Image.open("runs/class_agreement/guidance-3.png") as grid:
        assert grid.size == (10 * 56, 8 * 56)


def test_what_is_missing_is_said_with_the_command(benchmark: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="build_data.py --fashion"):
        benchmark.main(["--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="benchmarks/classifier.py"):
        benchmark.main(["--classifier", str(tmp_path / "none")])
