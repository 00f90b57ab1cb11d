"""What the small denoisers are told besides the noisy picture: the time and the class."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdtune.models.layers import TimestepEmbedding, sinusoid

TIMES = 1000  # t in [0, 1] is read as a timestep in [0, 1000], for which the sinusoids' frequencies were chosen


class ClassEmbedding(nn.Module):
    """One learned vector a class, and one for no class, which guidance and label dropout need.

    Args:
        classes: how many there are. The number `classes` is the empty label.
        channels: width of the vectors.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.classes = classes
        self.vectors = nn.Embedding(classes + 1, channels)

    def forward(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """labels: (B,), int64, None where all are empty; like: any tensor of that batch -> (B, C)."""
        if labels is None:
            labels = torch.full((len(like),), self.classes, device=like.device)
        return self.vectors(labels)


class TimeAndClass(nn.Module):
    """The time and, where there are classes, the class, as one embedding.

    Args:
        channels: width of the embedding.
        classes: how many there are; 0: labels are not read.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.time = TimestepEmbedding(channels, channels)
        self.label = ClassEmbedding(classes, channels) if classes else None

    def forward(self, t: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """t: (B,) in [0, 1], labels: (B,), int64, or None -> (B, C) of `dtype`."""
        emb = self.time(sinusoid(TIMES * t, self.channels).to(dtype))
        return F.silu(emb if self.label is None else emb + self.label(labels, t))
