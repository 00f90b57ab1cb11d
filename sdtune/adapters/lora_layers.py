"""What a LoRA, or a relative of it, does to one layer: the form that files are read into and written from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdtune.errors import WeightsError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoraLayer:
    """The update of one weight W: a product of small factors, times `scale`.

    Attributes:
        factors: by the names of the field. LoRA: down (r, in, ...) and up (out, r, ...). LoHa: hada_w1_a, hada_w1_b,
            hada_w2_a, hada_w2_b. LoKr: lokr_w1 or lokr_w1_a and lokr_w1_b, the same with w2. LoHa and LoKr of a
            convolution may have a core: hada_t1 and hada_t2, lokr_t2.
        scale: what the product is multiplied with, alpha / rank in most files.
        magnitude: of DoRA, the norm of each output row, (out,).

    Source: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA), Hyeon-Woo et al. 2022 (FedPara, the product of LoHa), Yeh
    et al. 2024 (LyCORIS).
    """

    factors: Mapping[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def kind(self) -> str:
        """lora, dora, loha or lokr."""
        if "down" in self.factors:
            return "lora" if self.magnitude is None else "dora"
        return "loha" if "hada_w1_a" in self.factors else "lokr"

    @property
    def rank(self) -> int | None:
        """Width of the factors; None for a LoKr whose two factors are whole."""
        narrow = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((len(self.factors[name]) for name in narrow if name in self.factors), None)

    @property
    def peft_rank(self) -> int:
        """The rank; of a LoKr whose second factor is whole the smallest for which peft keeps it whole."""
        return self.rank if self.rank is not None else -(-max(self.factors["lokr_w2"].shape[:2]) // 2)

    @property
    def alpha(self) -> float:
        """`scale` as files keep it: times the rank."""
        return self.scale * (self.rank or 1)

    @property
    def size(self) -> tuple[int, int]:
        """(out, in) of the weight that this belongs to; `in` counts the whole kernel of a convolution."""
        f = self.factors
        if "down" in f:
            return len(f["up"]), f["down"][0].numel()
        if "hada_w1_a" in f:
            return _size(f, "hada_w1_a", "hada_w1_b", "hada_t1")
        first = _size(f, "lokr_w1_a", "lokr_w1_b") if "lokr_w1_a" in f else (len(f["lokr_w1"]), f["lokr_w1"].shape[1])
        second = _size(f, "lokr_w2_a", "lokr_w2_b", "lokr_t2") if "lokr_w2_a" in f else _flat(f["lokr_w2"])
        return first[0] * second[0], first[1] * second[1]

    def fits(self, shape: Shape) -> bool:
        """Whether it belongs to a weight of that shape: (out, in), or (out, in, height, width) of a convolution."""
        f, (out, *rest) = self.factors, shape
        pairs = (("up", "down"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("lokr_w2_a", "lokr_w2_b"))
        cores = any("_t" in name for name in f)
        joined = cores or all(f[a].shape[1] == len(f[b]) for a, b in pairs if a in f)
        rows = self.magnitude is None or self.magnitude.numel() == out
        return joined and rows and self.size == (out, math.prod(rest))

    def delta(self, shape: Shape) -> Tensor:
        """What is added to a weight of that shape, before a magnitude is looked at; float32."""
        f = {name: tensor.float() for name, tensor in self.factors.items()}
        if "down" in f:
            product = f["up"].flatten(1) @ f["down"].flatten(1)  # (out, in)
        elif "hada_w1_a" in f:
            product = _product(f, "hada_w1_a", "hada_w1_b", "hada_t1")
            product = product * _product(f, "hada_w2_a", "hada_w2_b", "hada_t2")
        else:
            first = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
            second = f["lokr_w2"] if "lokr_w2" in f else _product(f, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
            product = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())
        return self.scale * product.reshape(shape)

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the update in it, in its own precision; computed in float32."""
        whole = weight.float() + self.delta(tuple(weight.shape)).to(weight.device)
        if self.magnitude is not None:
            norm = whole.flatten(1).norm(dim=1)  # (out,)
            factor = self.magnitude.to(whole).flatten() / norm
            whole = whole * factor.view(-1, *[1] * (whole.ndim - 1))
        return whole.to(weight.dtype)

    def baked(self) -> "LoraLayer":
        """The same update with `scale` 1: multiplied into the last factor."""
        name = next(n for n in ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a") if n in self.factors)
        tensor = self.factors[name]
        return replace(self, factors={**self.factors, name: (tensor.float() * self.scale).to(tensor.dtype)}, scale=1.0)

    def to(self, dtype: torch.dtype) -> "LoraLayer":
        """The same in another precision."""
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        return replace(self, factors={n: t.to(dtype) for n, t in self.factors.items()}, magnitude=magnitude)

    def require_lora(self, name: str, what: str) -> None:
        """Raises WeightsError where this is not a plain LoRA, which alone adds up with others of its kind."""
        if self.kind != "lora":
            raise WeightsError(
                f"{name} is a {self.kind}, and {what} knows plain LoRA only; merge it into its base first "
                "(sdtune export ... --format merged), then extract a LoRA: sdtune lora extract"
            )


def _flat(tensor: Tensor) -> tuple[int, int]:
    return len(tensor), tensor[0].numel()


def _size(factors: Mapping[str, Tensor], a: str, b: str, core: str = "") -> tuple[int, int]:
    """(out, in) of the product of two factors, with the core between them if there is one."""
    if core in factors:
        return factors[a].shape[1], factors[b].shape[1] * factors[core][0, 0].numel()
    return len(factors[a]), factors[b].shape[1]


def _product(factors: Mapping[str, Tensor], a: str, b: str, core: str) -> Tensor:
    """The product of two factors, (out, in); with a core, the kernel (out, in, height, width)."""
    if core in factors:
        return torch.einsum("ijkl,ip,jq->pqkl", factors[core], factors[a], factors[b])
    return factors[a] @ factors[b]
