"""Weights of few bits: how much smaller, how near, that every adapter learns beside them, and that it can be merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdtune import building
from sdtune.adapters import SETTINGS, adapter_class
from sdtune.families import family_class
from sdtune.families.quantization import QuantizedLinear, dequantize, quantize, weight_bytes
from sdtune.opening import open_model
from sdtune.run import Run
from tests.factories import make_recipe

CPU = torch.device("cpu")
KINDS = ["nf4", "int8"]
NEAR = {"nf4": 0.15, "int8": 0.01}  # of a layer's answer, relative
LOW_RANK = ["lora", "rslora", "dora", "lokr", "loha"]


def layer(kind: str, out: int = 48, into: int = 128) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(into, out).requires_grad_(False)
    return plain, QuantizedLinear(plain, kind, CPU)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def load(folder: Path) -> Any:
    return family_class("sdxl" if "sdxl" in folder.name else "stable-diffusion").load(str(folder))


def answer(family: Any) -> torch.Tensor:
    """The denoiser's, through the text encoders."""
    conditioning = family.with_sizes(family.encode_text(["a photo of dog"]), [(64, 64, 0, 0, 64, 64)])
    x_t = torch.linspace(-1, 1, 4 * 32 * 32).reshape(1, 4, 32, 32)
    return family.predict(x_t, torch.tensor([300]), conditioning)


def attach(family: Any, kind: str, seed: int = 0) -> dict[str, nn.Parameter]:
    """An adapter on denoiser and text encoders, moved off its beginning; its parameters."""
    settings = {"rank": 4, "alpha": 6.0, "targets": "all"}
    adapter = adapter_class(kind)(**{name: settings[name] for name in SETTINGS[kind] if name in settings})
    learning = adapter.attach(family, [family.denoiser, *family.text_encoders], seed)
    found = {f"{name}.{key}": p for name, some in learning.items() for key, p in some.items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in found.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def gradients(family: Any, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    answer(family).square().mean().backward()
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


# --- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 128), (20, 56), (7, 10)], ids=str)
def test_answers_are_near_and_gradients_those_of_the_unpacked_weight(kind: str, shape: tuple[int, int]) -> None:
    plain, packed = layer(kind, *shape)
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    assert error(packed(x), plain(x)) < NEAR[kind]
    unpacked = nn.functional.linear(x, packed.weight, plain.bias)
    assert torch.allclose(packed(x), unpacked, atol=1e-6)
    weights = torch.randn_like(unpacked)
    (got,) = torch.autograd.grad(packed(x), x, weights)
    (expected,) = torch.autograd.grad(unpacked, x, weights)
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4 + 32 / 64), ("int8", 8 + 32 / 128)])
def test_bytes_of_a_weight(kind: str, bits: float) -> None:
    plain, packed = layer(kind)
    assert packed.packed_bytes == plain.weight.numel() * bits / 8
    assert weight_bytes(packed) == packed.packed_bytes + plain.bias.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_rounds_or_loses_the_packed_weight(kind: str) -> None:
    plain, packed = layer(kind)
    before, scales, x = packed.packed.clone(), packed.scales.clone(), torch.randn(3, 128)
    building.move(packed, CPU, torch.bfloat16)
    packed.half().eval()(x.half())
    packed.float().train()
    assert torch.equal(packed.packed, before) and packed.scales.dtype == torch.float32
    assert torch.equal(packed.scales, scales)
    packed.to("meta")  # stands for another device
    assert packed.packed.is_meta and packed.scales.is_meta and packed.packed.dtype == before.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_answers_in_its_type(kind: str) -> None:
    plain, packed = layer(kind)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = packed(x), plain(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert error(got.float(), expected.float()) < NEAR[kind] + 0.01
    got.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


# --- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["sd", "sdxl"])
def test_a_model_is_smaller_and_answers_nearly_the_same(
    kind: str, folder: str, request: pytest.FixtureRequest
) -> None:
    family = load(request.getfixturevalue(folder))
    names = [family.denoiser, *family.text_encoders]
    linear = {n: sum(m.weight.numel() for m in family.modules[n].modules() if type(m) is nn.Linear) for n in names}
    with torch.no_grad():
        expected = answer(family)
        for name in names:
            before = weight_bytes(family.modules[name])
            quantize(family.modules[name], kind, CPU)
            saved = before - weight_bytes(family.modules[name])
            assert saved > linear[name] * (3.3 if kind == "nf4" else 2.8)  # of 4 bytes; the rows here are short
        assert 0 < error(answer(family), expected) < 2 * NEAR[kind]
        dequantize(family.modules[family.denoiser])
        assert not any(isinstance(part, QuantizedLinear) for part in family.modules[family.denoiser].modules())


def test_packed_weights_are_part_of_the_fingerprint(sd: Path) -> None:
    def found(kind: str, factor: float) -> str:
        family = load(sd)
        (name,) = family.text_encoders
        for layer in family.modules[name].modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data *= factor
        quantize(family.modules[name], kind, CPU)
        return family.text_fingerprint()

    assert found("nf4", 1.0) == found("nf4", 1.0)
    assert len({found("nf4", 1.0), found("nf4", 3.0), found("int8", 1.0), found("int8", 3.0)}) == 4


@pytest.mark.parametrize("adapter", LOW_RANK)
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_learns_beside_it_and_can_be_merged(kind: str, adapter: str, sd: Path) -> None:
    family = load(sd)
    for name in (family.denoiser, *family.text_encoders):
        quantize(family.modules[name], kind, CPU)
    parameters = attach(family, adapter)
    with torch.no_grad():  # in evaluation mode, as a run does between its steps
        for name in (family.denoiser, *family.text_encoders):
            family.modules[name].eval()
        answer(family)
    found = gradients(family, parameters)
    assert found.keys() == parameters.keys() and all(gradient.abs().sum() > 0 for gradient in found.values())
    with torch.no_grad():
        before = answer(family)
        for name in (family.denoiser, *family.text_encoders):
            dequantize(family.modules[name])
        assert torch.allclose(answer(family), before, atol=1e-5)
        for name in (family.denoiser, *family.text_encoders):
            for part in family.modules[name].modules():
                if hasattr(part, "merge"):
                    part.merge()
        assert torch.allclose(answer(family), before, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [*((adapter, None) for adapter in ("full", *LOW_RANK)), *((adapter, "nf4") for adapter in LOW_RANK)],
)
def test_gradient_checkpointing_changes_no_gradient(adapter: str, kind: str | None, sd: Path) -> None:
    family = load(sd)
    networks = [family.modules[name] for name in (family.denoiser, *family.text_encoders)]
    for network in networks:
        if kind is not None:
            quantize(network, kind, CPU)
    parameters = attach(family, adapter)
    expected = gradients(family, parameters)
    building.save_memory(networks)
    found = gradients(family, parameters)
    assert found.keys() == expected.keys() and len(found) >= 0.9 * len(parameters)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_its_lora_is_drawn_with(kind: str, sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        sd, photos, tmp_path / "run", model={"quantize": kind}, adapter={"text_encoder": True},
        train={"steps": 3}, validate={"fraction": 0.3, "every": 1}, output={"checkpoint_every": 2},
    )  # fmt: skip
    run = Run(recipe)
    run.complete()
    assert any(isinstance(part, QuantizedLinear) for part in run.family.modules["unet"].modules())
    assert any(isinstance(part, QuantizedLinear) for part in run.family.modules["text_encoder"].modules())
    opened = open_model(str(tmp_path / "run"), device=CPU)  # the base as it is: other tools will draw so too
    assert not any(isinstance(part, QuantizedLinear) for part in opened.modules["unet"].modules())
    with torch.no_grad():
        assert 0 < error(answer(opened), answer(run.family)) < 2 * NEAR[kind]


def test_a_run_begins_from_a_lora(sd: Path, photos: Path, tmp_path: Path) -> None:
    first = Run(make_recipe(sd, photos, tmp_path / "first", adapter={"text_encoder": True}))
    first.complete()
    start = {"adapter": {"rank": None, "text_encoder": True, "init_from": str(tmp_path / "first")}}
    second = Run(make_recipe(sd, photos, tmp_path / "second", model={"quantize": "nf4"}, **start))
    assert all(torch.equal(second.parameters[name], parameter) for name, parameter in first.parameters.items())


def faults(monkeypatch: pytest.MonkeyPatch, installed: bool, **sections: Any) -> dict[str, str]:
    from sdtune.config import memory_checks
    from sdtune.config.files import check

    monkeypatch.setattr(memory_checks, "is_installed", lambda module: installed)
    values: dict[str, Any] = {"data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4}, "train": {"steps": 1}}
    values |= {"model": {"base": "tiny", "quantize": "nf4"}, "output": {"dir": "run", "trackers": []}}
    return dict(check(values | sections)[1])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "full all weights learn" in faults(monkeypatch, True, adapter={"kind": "full"})["model.quantize"]
    assert faults(monkeypatch, False)["model.quantize"].endswith("pip install bitsandbytes")
    assert faults(monkeypatch, True) == {}
