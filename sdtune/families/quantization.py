"""Frozen weights in 4 or 8 bits: the linear layers of a network are replaced after loading, before an adapter comes.

bitsandbytes packs and unpacks. Its own layers (0.50.2) are not used: peft's LoKr and LoHa read the shape of a layer's
weight, and there a packed one has another; DoRA over its 8-bit layer fails at the second step; and on CPUs with
AVX512-BF16 its 4-bit layer, once evaluated, gives no gradient any more.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64  # numbers that share a scale in nf4
BYTES = {"nf4": 0.5 + 4 / BLOCK, "int8": 1.0}  # of a number; int8's scales, one a row, hardly count


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept packed and is unpacked for each use.

    `weight` is the unpacked weight, made anew each time: to change it changes nothing, so merge after `dequantize`.

    Args:
        layer: whose weight and bias are taken.
        kind: nf4, 4 bits and a scale for every 64 numbers (Dettmers et al. 2023, "QLoRA"), or int8, 8 bits and a scale
            for every row (Dettmers et al. 2022, "LLM.int8()", of the weights alone).
        device: where the packed weight is made, and lies.
    """

    def __init__(self, layer: nn.Linear, kind: str, device: torch.device) -> None:
        from bitsandbytes import functional

        nn.Module.__init__(self)  # not Linear's, which would make a weight
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.bias = layer.bias
        weight = layer.weight.detach().to(device)
        # No parameters: nobody may round them to another type, or send them between processes at every step.
        if kind == "nf4":
            self.packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
            self.scales = state.absmax
        else:
            self.packed, self.scales, _ = functional.int8_vectorwise_quant(weight.half())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features), float32."""
        return self.unpacked(torch.float32)

    @property
    def packed_bytes(self) -> int:
        """Bytes of memory of the packed weight."""
        return self.packed.nbytes + self.scales.nbytes

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight as numbers of that type, (out_features, in_features)."""
        from bitsandbytes import functional

        if self.kind == "int8":
            return functional.int8_vectorwise_dequant(self.packed, self.scales).to(dtype)
        shape = torch.Size([self.out_features, self.in_features])
        state = functional.QuantState(self.scales, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return functional.dequantize_4bit(self.packed, state)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        out = _Product.apply(input.to(dtype), self)
        return out if self.bias is None else out + self.bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Moves the packed weight too, and leaves its type."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.packed.device)).device
        self.packed, self.scales = self.packed.to(device), self.scales.to(device)
        return self


class _Product(torch.autograd.Function):
    """x W^T. Nothing is kept for the backward pass but the packed W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.unpacked(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


def quantize(network: nn.Module, kind: str, device: torch.device) -> None:
    """Replace the linear layers of a frozen network; convolutions, embeddings and norms stay.

    (So do linear layers of odd width, which no pretrained model has: bitsandbytes would compile a kernel for them.)

    Args:
        kind: nf4 or int8. device: where the packed weights come to lie.
    """
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % 2 == 0:
            network.set_submodule(name, QuantizedLinear(layer, kind, device))


def dequantize(network: nn.Module) -> None:
    """Take `quantize` back, with what was lost in the rounding; layers inside adapters too, so that these can merge."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, QuantizedLinear):
            network.set_submodule(name, dequantized(layer))


def dequantized(layer: QuantizedLinear) -> nn.Linear:
    """An ordinary frozen layer, in float32, of the same answers."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
    return plain


def packed_weights(network: nn.Module) -> dict[str, Tensor]:
    """The packed weights of a network and their scales, which its `state_dict` lacks; the kind is part of a name."""
    return {
        f"{name}.{layer.kind}.{part}": tensor
        for name, layer in network.named_modules()
        if isinstance(layer, QuantizedLinear)
        for part, tensor in (("packed", layer.packed), ("scales", layer.scales))
    }


def weight_bytes(network: nn.Module) -> int:
    """Bytes of memory of a network's weights, packed ones too."""
    packed = sum(layer.packed_bytes for layer in network.modules() if isinstance(layer, QuantizedLinear))
    return packed + sum(parameter.nbytes for parameter in network.parameters())
