"""Gradient checkpointing: the same gradients, and less kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CROSS = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "transformer_layers_per_block": 2,
}
VAE = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 2,
}
CASES = {"UNet2DConditionModel": (CROSS, (2, 4, 16, 16)), "AutoencoderKL": (VAE, (2, 3, 24, 24))}


def call(model: nn.Module, x: Tensor) -> Tensor:
    if type(model).__name__ == "AutoencoderKL":
        return model(x).sample
    text = torch.linspace(-1, 1, len(x) * 7 * 24).reshape(len(x), 7, 24)
    return model(x, torch.tensor([3, 700]), text).sample


def kept(model: nn.Module, x: Tensor) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Bytes of the activations kept for the backward pass (each storage once), the output, and the gradients."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(model, x)
    size = sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)
    model.zero_grad()
    y.square().mean().backward()
    return size, y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_equal_gradients_and_fewer_bytes(name: str, pair: Callable[..., tuple[Any, Any]]) -> None:
    config, shape = CASES[name]
    theirs, ours = pair(name, config)
    torch.manual_seed(1)
    x = torch.randn(shape)
    bytes_before, y_before, gradients_before = kept(ours, x)
    assert not ours.is_gradient_checkpointing
    ours.enable_gradient_checkpointing()
    assert ours.is_gradient_checkpointing
    bytes_after, y_after, gradients_after = kept(ours, x)

    torch.testing.assert_close(y_after, y_before, atol=0, rtol=0)
    for key, gradient in gradients_before.items():
        torch.testing.assert_close(gradients_after[key], gradient, atol=1e-7, rtol=1e-5, msg=key)
    assert bytes_after < 0.5 * bytes_before, (bytes_after, bytes_before)

    theirs.enable_gradient_checkpointing()
    bytes_of_diffusers, _, _ = kept(theirs, x)
    if name == "UNet2DConditionModel":
        assert bytes_after <= bytes_of_diffusers

    ours.disable_gradient_checkpointing()
    assert kept(ours, x)[0] == bytes_before


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_recomputed_without_gradients(name: str, pair: Callable[..., tuple[Any, Any]]) -> None:
    config, shape = CASES[name]
    _, ours = pair(name, config)

    def forbidden(module: nn.Module, *args: Any) -> None:
        raise AssertionError("checkpointed although no gradient is wanted")

    ours.enable_gradient_checkpointing(forbidden)
    with torch.no_grad():
        call(ours, torch.randn(shape))
    with pytest.raises(AssertionError, match="although"):
        call(ours, torch.randn(shape))
