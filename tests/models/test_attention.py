"""The kernels of attention. Those of xformers need a GPU: what its documentation spells in torch stands in for them."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sdtune.errors import UsageError
from sdtune.models import AutoencoderKL, UNet2DConditionModel
from sdtune.models.attention import attend, recorded_maps, sdpa, use_kernel, xformers
from tests.factories import UNET, VAE

CPU = torch.device("cpu")


def documented(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None) -> Tensor:
    """`memory_efficient_attention` as xformers' documentation spells it: (B, M, H, K) each -> (B, M, H, K)."""
    query = query / query.shape[-1] ** 0.5
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    scores = query @ key.transpose(-2, -1)
    if attn_bias is not None:
        assert attn_bias.shape == scores.shape and attn_bias.dtype == query.dtype and attn_bias.stride(-2) % 8 == 0
        scores = scores + attn_bias
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = documented  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.parametrize("bias", [None, (2, 1, 1, 13), (1, 1, 7, 13)], ids=str)
def test_the_kernels_agree(bias: tuple[int, ...] | None, stand_in: None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 24), torch.randn(2, 13, 24), torch.randn(2, 13, 24)
    added = None if bias is None else torch.randn(bias)
    expected = attend(q, k, v, heads=3, bias=added, kernel=sdpa)
    assert torch.allclose(attend(q, k, v, heads=3, bias=added, kernel=xformers), expected, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_few_tokens_in_bfloat16_are_computed_in_float32_on_a_cpu(autocast: bool, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, tokens, 64).bfloat16().requires_grad_() for tokens in (64, 32, 32))
    bias = torch.randn(4, 1, 1, 32).bfloat16() if masked else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer = attend(q, k, v, heads=2, bias=bias)
    precise = attend(q.float(), k.float(), v.float(), heads=2, bias=None if bias is None else bias.float())
    assert answer.dtype == torch.bfloat16 and torch.equal(answer, precise.bfloat16())
    weights = torch.randn_like(precise).bfloat16()
    found = torch.autograd.grad(answer, (q, k, v), weights)
    expected = torch.autograd.grad(precise, (q, k, v), weights.float())
    assert all(map(torch.equal, found, expected))


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    text, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {"sample": torch.randn(2, 4, 32, 32), "timestep": 5, "encoder_hidden_states": text,
            "encoder_attention_mask": mask}  # fmt: skip


def test_a_network_answers_and_learns_the_same(stand_in: None) -> None:
    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    pixels = torch.randn(1, 3, 64, 64)

    def answers() -> list[Tensor]:
        unet.zero_grad()
        out = unet(**inputs(), return_dict=False)[0]
        out.square().mean().backward()
        gradients = [parameter.grad.clone() for parameter in unet.parameters() if parameter.grad is not None]
        return [out.detach(), vae(pixels, return_dict=False)[0].detach(), *gradients]

    expected = answers()
    for network in (unet, vae):
        use_kernel(network, "xformers", CPU, torch.float32)
        kernels = {part.kernel for part in network.modules() if hasattr(part, "kernel")}
        assert kernels == {xformers}
    got = answers()
    assert len(got) == len(expected) > 50
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(got, expected, strict=True))
    use_kernel(unet, "sdpa", CPU, torch.float32)
    assert torch.equal(answers()[0], expected[0])


def test_recorded_maps_leave_the_answer_as_it_is() -> None:
    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    pixels = torch.randn(1, 3, 64, 64)
    expected = unet(**inputs(), return_dict=False)[0], vae(pixels, return_dict=False)[0]
    with recorded_maps(unet) as maps, recorded_maps(vae) as of_vae:
        got = unet(**inputs(), return_dict=False)[0], vae(pixels, return_dict=False)[0]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(got, expected, strict=True))
    assert {part.kernel for part in unet.modules() if hasattr(part, "kernel")} == {sdpa}
    assert of_vae.keys() == {"encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"}
    for name, each in maps.items():
        tokens = each.shape[-2]  # of the picture
        assert each.shape == (2, each.shape[1], tokens, 5 if name.endswith("attn2") else tokens)
        assert torch.allclose(each.sum(-1), torch.ones(each.shape[:-1]), atol=1e-5)
        if name.endswith("attn2"):
            assert (each[0, ..., 3:] < 1e-6).all()  # padding of the first text


def test_only_the_maps_asked_for_are_recorded_and_they_have_gradients() -> None:
    unet = UNet2DConditionModel(**UNET)
    values = inputs()
    x_t = values.pop("sample").requires_grad_()
    with recorded_maps(unet, lambda name: name.startswith("mid_block") and name.endswith("attn2")) as maps:
        unet(x_t, **values)
    assert list(maps) == ["mid_block.attentions.0.transformer_blocks.0.attn2"]
    (gradient,) = torch.autograd.grad(maps.popitem()[1][..., 1].max(), x_t)
    assert gradient.abs().max() > 0


def test_a_kernel_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = UNet2DConditionModel(**UNET)
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(UsageError, match="xformers does not run here on cpu in torch.float32 .*train.attention=sdpa"):
        use_kernel(unet, "xformers", CPU, torch.float32)

    def no_kernel(*_: Any, **__: Any) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward` with inputs:\n...")

    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.memory_efficient_attention = no_kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    with pytest.raises(UsageError, match="No operator found for .*install the release"):
        use_kernel(unet, "xformers", CPU, torch.float32)


@pytest.mark.parametrize(
    ("installed", "cuda", "told"),
    [
        (False, True, "xformers is not installed: pip install xformers, or set train.attention=sdpa, which saves"),
        (True, False, "xformers has kernels for NVIDIA GPUs only, and this machine has none; set train.attention=sdpa"),
        (True, True, None),
    ],
)
def test_the_recipe_is_refused_before_weights_load(
    installed: bool, cuda: bool, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtune.config import memory_checks
    from sdtune.config.files import check

    monkeypatch.setattr(memory_checks, "is_installed", lambda module: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    values: dict[str, Any] = {"data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4}, "model": {"base": "tiny"}}
    values |= {"train": {"steps": 1, "attention": "xformers"}, "output": {"dir": "run", "trackers": []}}
    faults = dict(check(values)[1])
    assert (faults["train.attention"].startswith(told) if told else faults == {}), faults
