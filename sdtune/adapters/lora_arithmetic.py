"""Arithmetic with LoRA: weighted sums, smaller ranks, and the difference of two models as one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdtune.adapters.lora_files import named_weights
from sdtune.adapters.lora_layers import LoraLayer
from sdtune.errors import WeightsError

Layers = dict[str, LoraLayer]


def merge(loras: Sequence[Mapping[str, LoraLayer]], weights: Sequence[float]) -> Layers:
    """The weighted sum of several LoRA, exact: ranks stand side by side.

    Args:
        loras: their layers. weights: as many.

    Raises:
        WeightsError: one is no plain LoRA, or layers of one name differ in size.
    """
    parts: dict[str, list[LoraLayer]] = {}
    for layers, weight in zip(loras, weights, strict=True):
        for name, layer in layers.items():
            layer.require_lora(name, "merging")
            scaled = LoraLayer({part: tensor.float() for part, tensor in layer.factors.items()}, layer.scale * weight)
            parts.setdefault(name, []).append(scaled.baked())
    merged = {}
    for name, some in parts.items():
        if len({layer.size for layer in some}) > 1:
            sizes = " and ".join(str(layer.size) for layer in some)
            raise WeightsError(f"the LoRA are for different models: {name} is of sizes {sizes}")
        down, up = some[0].factors["down"], some[0].factors["up"]
        downs = [layer.factors["down"].reshape(-1, *down.shape[1:]) for layer in some]  # (r, in, ...)
        ups = [layer.factors["up"].reshape(len(up), -1, *up.shape[2:]) for layer in some]  # (out, r, ...)
        merged[name] = LoraLayer({"down": torch.cat(downs), "up": torch.cat(ups, dim=1)})
    return merged


@dataclass
class Energy:
    """How much of what there was is kept: sums of squares of the updates' elements."""

    kept: float = 0.0
    total: float = 0.0

    @property
    def share(self) -> float:
        """Kept, of all; 1 where there was nothing."""
        return self.kept / self.total if self.total else 1.0


def resize(layers: Mapping[str, LoraLayer], rank: int | None = None, fraction: float = 1.0) -> tuple[Layers, Energy]:
    """The nearest LoRA of a smaller rank, by singular values.

    Args:
        rank: at most so many columns a layer; None: no limit.
        fraction: of a layer's energy (sum of squares) to be kept; the smallest rank that keeps it is taken.

    Raises:
        WeightsError: it is no plain LoRA.

    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    smaller, energy = {}, Energy()
    for name, layer in layers.items():
        layer.require_lora(name, "resizing")
        down, up = (layer.factors[part].float().flatten(1) for part in ("down", "up"))
        # svd(up down) through the small middle of two QR decompositions: (out, r) (r, r) (r, in)
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down.T)
        u, s, v = torch.linalg.svd(layer.scale * r_up @ r_down.T, full_matrices=False)
        smaller[name] = truncated(q_up @ u, s, v @ q_down.T, layer.factors["down"].shape, rank, fraction, energy)
    return smaller, energy


def truncated(
    u: Tensor, s: Tensor, v: Tensor, kernel: Sequence[int], rank: int | None, fraction: float, energy: Energy
) -> LoraLayer:
    """The first columns of a singular value decomposition as a LoRA, its singular values shared by both factors.

    Args:
        u, s, v: (out, n), (n,), (n, in). kernel: shape of the new `down` but for its first side.
    """
    squares = s.square()
    total = squares.sum()
    energy.total += total.item()
    enough = int((squares.cumsum(0) < fraction * total * (1 - 1e-6)).sum()) + 1 if fraction < 1 else len(s)
    count = max(1, min(enough, rank or len(s), len(s)))
    energy.kept += squares[:count].sum().item()
    root = s[:count].sqrt()
    ones = [1] * (len(kernel) - 2)
    return LoraLayer(
        {
            "down": (root[:, None] * v[:count]).reshape(count, *kernel[1:]),
            "up": (u[:, :count] * root).reshape(-1, count, *ones),
        }
    )


@torch.no_grad()
def extract(base: Mapping[str, Any], tuned: Mapping[str, Any], rank: int) -> tuple[Layers, Energy]:
    """The difference of two models as a LoRA of that rank.

    Args:
        base, tuned: networks by name; UNet and text encoders are looked at.

    Returns:
        The layers that differ, and what share of the whole difference they keep; biases, norms and embeddings, which a
        LoRA cannot hold, count as lost.

    Raises:
        WeightsError: the models are of different kinds, or equal.
    """
    first, second = _networks(base), _networks(tuned)
    weights, layers, energy = named_weights(second), {}, Energy()
    named = {id(weight): name for name, weight in named_weights(first).items()}
    pairs = dict(_pairs(first, second))
    for parameter, other in pairs.items():
        difference = other.float() - parameter.float()
        name = named.get(id(parameter))
        if name is None or difference.ndim not in (2, 4) or "embedding" in name:
            energy.total += difference.square().sum().item()
        elif difference.any():
            u, s, v = singular_values(difference.flatten(1))
            layers[name] = truncated(u, s, v, tuple(weights[name].shape), rank, 1.0, energy)
    if not layers:
        raise WeightsError("the two models have equal weights; there is nothing to extract")
    return layers, energy


def singular_values(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition u diag(s) v of a matrix (out, in), n = min(out, in), the largest first.

    Through the eigenvalues of the smaller of M M^T and M^T M in float64: several times faster than torch.linalg.svd for
    the flat matrices of convolutions. Singular values below 1e-8 of the largest are noise.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = singular_values(matrix.T)
        return u.T, s, v.T
    wide = matrix.double()  # (n, m)
    squares, u = torch.linalg.eigh(wide @ wide.T)
    squares, u = squares.flip(0).clamp(min=0), u.flip(1)
    s = squares.sqrt()
    v = u.T @ wide / s.clamp(min=1e-12 * float(s[0]) or 1.0)[:, None]
    return u.float(), s.float(), v.float()


def _networks(modules: Mapping[str, Any]) -> dict[str, Any]:
    return {name: network for name, network in modules.items() if name != "vae"}


def _pairs(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter of one model with its like of the other. Raises WeightsError."""
    if base.keys() != tuned.keys():
        raise WeightsError(f"the models are of different kinds: one has {', '.join(base)}, one {', '.join(tuned)}")
    for name, network in base.items():
        others = dict(tuned[name].named_parameters())
        for key, parameter in network.named_parameters():
            more = len(others.get(key, parameter)) - len(parameter) if key.endswith("token_embedding.weight") else 0
            if more > 0:
                raise WeightsError(
                    f"the tuned model has new tokens ({more} more in {name}), for which a LoRA has no place; write "
                    "what its run learned, LoRA and tokens, with: sdtune export RUN --format diffusers --out FOLDER"
                )
            if key not in others or others[key].shape != parameter.shape:
                raise WeightsError(f"the models are of different kinds: {name}.{key} differs in shape or is missing")
            yield parameter, others[key]
