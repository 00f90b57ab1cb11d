"""Adapter `loha`: the update of a weight is the elementwise product of two low-rank matrices, of rank up to rank^2.

Source: Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning".
"""

from typing import Any

from torch import nn

from sdtune.adapters.low_rank import LowRank


class LoHa(LowRank):
    """Beside the weight (out, in) stands alpha / rank * (B1 A1) * (B2 A2), both of that rank."""

    name, kind = "LoHa", "loha"

    def config(self, targets: list[str], ranks: dict[str, int]) -> Any:
        """See `LowRank.config`."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=self.rank,
            alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=targets,
            rank_pattern=ranks,
        )

    def beside(self, layer: nn.Linear | nn.Conv2d) -> int:
        """See `LowRank.beside`."""
        out, into = layer.weight.shape[0], layer.weight[0].numel()
        return 2 * self.rank * (into + out)
