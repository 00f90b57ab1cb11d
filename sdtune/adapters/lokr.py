"""Adapter `lokr`: the update of a weight is the Kronecker product of two small matrices.

Source: Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sdtune.adapters.low_rank import LowRank


class LoKr(LowRank):
    """Beside the weight (out, in) stands alpha / rank * W1 (x) W2, where W2 is B A of that rank if that is smaller.

    Args:
        rank, alpha, targets, init_from: see `LowRank`.
        factor: about the side of W1, at most; -1 makes the sides of W1 and W2 as equal as they go.
    """

    name, kind = "LoKr", "lokr"

    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        targets: str | Sequence[str] = "attention",
        init_from: Path | None = None,
        factor: int = -1,
    ) -> None:
        super().__init__(rank, alpha, targets, init_from)
        self.factor = factor

    def config(self, targets: list[str], ranks: dict[str, int]) -> Any:
        """See `LowRank.config`."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=targets,
            rank_pattern=ranks,
            decompose_factor=self.factor,
        )

    def beside(self, layer: nn.Linear | nn.Conv2d) -> int:
        """See `LowRank.beside`."""
        from peft.tuners.lokr.layer import factorization

        out, into, *kernel = layer.weight.shape
        out1, out2 = factorization(out, self.factor)
        into1, into2 = factorization(into, self.factor)
        side = into2 * layer.weight[0, 0].numel()
        second = out2 * side if self.rank >= max(out2, into2) / 2 else self.rank * (out2 + side)
        return out1 * into1 + second
