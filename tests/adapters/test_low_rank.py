"""LoRA and its relatives: how they start, what they write, and that every other way leads to the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune.adapters import ADAPTERS, SETTINGS, adapter_class
from sdtune.adapters.lora_files import WEIGHTS_NAME
from sdtune.adapters.textual_inversion import TextualInversion
from sdtune.adapters.tokens import Token
from sdtune.building import make_adapter, place
from sdtune.errors import UsageError
from sdtune.families import family_class
from sdtune.opening import open_model
from sdtune.run import Run
from tests.adapters.conftest import LOW_RANK, answers, run_in_two_processes, settings, stock_answers
from tests.factories import losses, make_recipe, weights

CPU = torch.device("cpu")


def test_these_are_all_that_have_a_rank() -> None:
    assert tuple(kind for kind in ADAPTERS if "rank" in SETTINGS[kind]) == LOW_RANK


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOW_RANK)
@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl"])
def test_it_starts_as_the_base_and_from_the_seed(sd: Path, sdxl: Path, name: str, kind: str) -> None:
    def start(seed: int) -> tuple[Any, dict[str, torch.nn.Parameter]]:
        family = family_class(name).load(str(sdxl if name == "sdxl" else sd))
        before = {id(p) for network in family.modules.values() for p in network.parameters()}
        adapter = adapter_class(kind)(rank=4, alpha=6.0, targets="all")
        learning = adapter.attach(family, ["unet", *family.text_encoders], seed)
        parameters = {f"{network}.{key}": p for network, some in learning.items() for key, p in some.items()}
        assert before <= {id(p) for network in family.modules.values() for p in network.parameters()}  # no copies
        asking = [p for network in family.modules.values() for p in network.parameters() if p.requires_grad]
        assert {id(p) for p in asking} == {id(p) for p in parameters.values()}
        assert all(p.dtype == torch.float32 for p in asking)
        return family, parameters

    family, parameters = start(3)
    base = family_class(name).load(str(sdxl if name == "sdxl" else sd))
    assert torch.equal(answers(family), answers(base))
    _, again = start(3)
    _, other = start(4)
    assert all(torch.equal(p, again[key]) for key, p in parameters.items())
    assert any(not torch.equal(p, other[key]) for key, p in parameters.items())


@pytest.mark.parametrize(
    ("targets", "unet", "text"),
    [
        ("attention", {"to_q", "to_k", "to_v", "0"}, {"q_proj", "k_proj", "v_proj", "out_proj"}),
        (
            "attention+feedforward",
            {"to_q", "to_k", "to_v", "0", "proj", "2"},
            {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        ),
        (["conv1"], {"conv1"}, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_targets(sd: Path, targets: Any, unet: set[str], text: set[str]) -> None:
    family = family_class("stable-diffusion").load(str(sd))
    learning = adapter_class("lora")(rank=2, targets=targets).attach(family, ["unet", "text_encoder"], 0)
    for name, expected in (("unet", unet), ("text_encoder", text)):
        assert {key.partition(".lora_")[0].rpartition(".")[2] for key in learning[name]} == expected


@pytest.mark.parametrize("kind", LOW_RANK)
def test_targets_that_are_not_there_are_refused(sd: Path, kind: str) -> None:
    family = family_class("stable-diffusion").load(str(sd))
    with pytest.raises(UsageError, match="no linear or convolution layer of unet ends in qkv; .* to_q"):
        adapter_class(kind)(targets=["qkv"]).attach(family, ["unet"], 0)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_each_target_that_is_named_must_be_there(sd: Path, kind: str) -> None:
    adapter = adapter_class(kind)(targets=["to_q", "to_foo", "attn1.to_k", "attn7.to_v"])
    with pytest.raises(UsageError, match="unet ends in to_foo, attn7.to_v; the endings it has are .*to_k, .*to_v"):
        adapter.attach(family_class("stable-diffusion").load(str(sd)), ["unet"], 0)


@pytest.mark.parametrize("kind", LOW_RANK)
def test_the_numbers_that_learn_are_known_before(sd: Path, photos: Path, tmp_path: Path, kind: str) -> None:
    for rank in (2, 6):
        section = settings(kind) | {"rank": rank} | ({"factor": 4} if kind == "lokr" else {})
        recipe = make_recipe(sd, photos, tmp_path / "run", adapter=section)
        family = family_class("stable-diffusion").load(str(sd))
        expected = make_adapter(recipe).numbers(family.modules["unet"])
        learning = make_adapter(recipe).attach(family, ["unet"], 0)
        assert sum(p.numel() for p in learning["unet"].values()) == expected


# --- what is written --------------------------------------------------------------------------------------------------


STOCK = """
import json
import sys
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors.torch import save_file

found = {}
for job in json.load(open(sys.argv[1])):
    pipeline = StableDiffusionPipeline.from_pretrained(job["base"], safety_checker=None)
    if job["kind"] in ("lokr", "loha"):
        PeftModel.from_pretrained(pipeline.unet, job["final"] + "/unet")
        pipeline.text_encoder.load_adapter(job["final"] + "/text_encoder")
    else:
        pipeline.load_lora_weights(job["final"])
    with torch.no_grad():
        text = pipeline.encode_prompt("a photo of dog", "cpu", 1, False)[0]
        x_t = torch.linspace(-1, 1, 4 * 32 * 32).reshape(1, 4, 32, 32)
        found[job["kind"]] = pipeline.unet(x_t, torch.tensor([300]), text).sample.contiguous()
save_file(found, sys.argv[2])
assert not any(name.partition(".")[0] == "sdtune" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def stock(sd: Path, trained: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What stock diffusers and peft answer with the finished runs of each kind."""
    jobs = [{"base": str(sd), "kind": kind, "final": str(trained(kind).folder.final)} for kind in LOW_RANK]
    return stock_answers(jobs, STOCK, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("kind", LOW_RANK)
def test_what_was_trained_is_what_others_and_we_open(
    sd: Path, trained: Callable[[str], Run], stock: dict[str, torch.Tensor], kind: str
) -> None:
    run = trained(kind)
    expected = answers(run.family)
    plain = answers(family_class("stable-diffusion").load(str(sd)))
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(stock[kind], expected)
    torch.testing.assert_close(answers(open_model(str(run.folder.path), device=CPU)), expected)
    torch.testing.assert_close(answers(open_model(str(sd), str(run.folder.path), device=CPU)), expected)


def test_another_adapter_can_stand_beside_it(trained: Callable[[str], Run]) -> None:
    lokr, loha = (str(trained(kind).folder.path) for kind in ("lokr", "loha"))
    both, turned = open_model(lokr, loha, device=CPU), open_model(loha, lokr, device=CPU)
    torch.testing.assert_close(answers(turned), answers(both), atol=1e-4, rtol=1e-4)
    assert (answers(both) - answers(open_model(lokr, device=CPU))).abs().max() > 0.01


def test_the_scale_of_rslora_stands_in_its_file(trained: Callable[[str], Run]) -> None:
    from safetensors import safe_open

    with safe_open(trained("rslora").folder.final / WEIGHTS_NAME, framework="pt") as file:
        noted = json.loads(file.metadata()["lora_adapter_metadata"])
    assert noted["unet.lora_alpha"] / noted["unet.r"] == pytest.approx(6.0 / 4**0.5)
    assert noted["unet.use_rslora"] is False


# --- the same by another way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOW_RANK)
def test_a_stopped_run_goes_on_exactly(sd: Path, photos: Path, tmp_path: Path, kind: str) -> None:
    common: dict[str, Any] = {"adapter": settings(kind), "train": {"steps": 4, "ema": 0.9}}
    whole = Run(make_recipe(sd, photos, tmp_path / "whole", **common))
    whole.complete()
    halves = make_recipe(sd, photos, tmp_path / "halves", output={"checkpoint_every": 2}, **common)
    for info in Run(halves).steps():
        if info.step == 3:
            break
    again = Run(halves, resume=True)
    assert again.step == 2
    again.complete()
    expected, got = weights(whole.folder.final), weights(again.folder.final)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("kind", LOW_RANK)
def test_gradient_checkpointing_changes_nothing(sd: Path, photos: Path, tmp_path: Path, kind: str) -> None:
    for name, change in (("plain", {}), ("less", {"gradient_checkpointing": True})):
        train = {"steps": 3} | change
        Run(make_recipe(sd, photos, tmp_path / name, adapter=settings(kind), train=train)).complete()
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


@pytest.fixture(scope="module")
def pairs(sd: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each kind in one process, "<kind> one", and with half the batch in two, "<kind> two"."""
    folder = tmp_path_factory.mktemp("pairs")

    def recipe(kind: str, name: str, size: int) -> Any:
        train = {"steps": 2, "batch_size": size}
        return make_recipe(sd, photos, folder / f"{kind} {name}", adapter=settings(kind), train=train)

    for kind in LOW_RANK:
        Run(recipe(kind, "one", 2)).complete()
    run_in_two_processes([recipe(kind, "two", 1) for kind in LOW_RANK], folder)
    return folder


@pytest.mark.parametrize("kind", LOW_RANK)
def test_two_processes_are_one_with_twice_the_batch(pairs: Path, kind: str) -> None:
    one, two = pairs / f"{kind} one", pairs / f"{kind} two"
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    expected = weights(one / "final")
    for key, tensor in weights(two / "final").items():
        torch.testing.assert_close(tensor, expected[key], atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", [*LOW_RANK, "textual-inversion"])
def test_frozen_weights_may_be_rounded(sd: Path, kind: str) -> None:
    """As on a GPU in bf16: the base in half precision, what learns in float32."""
    family: Any = family_class("stable-diffusion").load(str(sd))
    inverts = kind == "textual-inversion"
    adapter = TextualInversion([Token("<cat>")]) if inverts else adapter_class(kind)(rank=4, targets="all")
    learning = adapter.attach(family, ["unet", "text_encoder"], 0)
    place(family, CPU, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        x_t = torch.linspace(-1, 1, 4 * 32 * 32).reshape(1, 4, 32, 32)
        family.predict(x_t, torch.tensor([300]), family.encode_text(["a <cat>"])).square().mean().backward()
    assert {p.dtype for p in family.modules["unet"].parameters() if not p.requires_grad} == {torch.bfloat16}
    for some in learning.values():
        for parameter in some.values():
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None and parameter.grad.isfinite().all()
