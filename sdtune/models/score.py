"""Two small UNets for pictures of about 28 px, as the well-known tutorial on score-based models builds them.

Four convolutions take the picture down, four transposed ones take it up again; every level is told of the time. They
differ in how the way up is joined with what the way down saw: as further channels (`ScoreConcat`), or by adding it
(`ScoreAdd`).

Source: Song 2021, "Generative Modeling by Estimating Gradients of the Data Distribution", and its tutorial notebook.
"""

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from sdtune.errors import WeightsError
from sdtune.models.config import each
from sdtune.models.time_and_class import ClassEmbedding

SMALLEST = 25  # pixels of a side, so that two are left at the deepest level: a norm of one number is 0


class GaussianFourierFeatures(nn.Module):
    """Sines and cosines of the time, at frequencies that are drawn once and never learn.

    Args:
        width: of the answer, an even number.
        scale: deviation of the frequencies.

    Source: Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
    Domains", section 5.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 30.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        """Features (B, width) of times (B,)."""
        angles = 2 * math.pi * t[:, None] * self.frequencies  # (B, width / 2)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimedConvolution(nn.Module):
    """A convolution, then the time as one number a channel, group norm and swish.

    Args:
        convolution: nn.Conv2d or nn.ConvTranspose2d.
        embedding: width of what is known of the time.
        groups: of the norm; as many as fit where the channels are no multiple of them.
    """

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d, embedding: int, groups: int) -> None:
        super().__init__()
        self.convolution = convolution
        self.time = nn.Linear(embedding, convolution.out_channels)
        self.norm = nn.GroupNorm(math.gcd(groups, convolution.out_channels), convolution.out_channels)

    def forward(self, x: Tensor, embedding: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W'); `size` is (H', W') of a transposed convolution."""
        h = self.convolution(x) if size is None else self.convolution(x, output_size=list(size))
        return F.silu(self.norm(h + self.time(embedding)[:, :, None, None]))


class ScoreConcat(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Denoiser `score_concat`: the way up sees the channels of the way down beside its own.

    Args:
        size: side of the pictures, or (height, width), in pixels. (Others, of at least 25, are taken too.)
        channels: of the pictures.
        classes: names of what may be asked for; () knows no classes.
        widths: channels of the four levels, the largest level first.
        embedding: width of what is known of time and class.
        fourier_scale: deviation of the frequencies that the time is measured with.
    """

    smallest = SMALLEST
    joined = 2  # the channels of a level after joining, in times of its own

    @register_to_config
    def __init__(
        self,
        size: int | Sequence[int] = 28,
        channels: int = 1,
        classes: Sequence[str] = (),
        widths: Sequence[int] = (32, 64, 128, 256),
        embedding: int = 256,
        fourier_scale: float = 30.0,
    ) -> None:
        super().__init__()
        if min(each(size)) < SMALLEST:
            raise WeightsError(f"a score network halves three times; got a size of {size}, expected {SMALLEST} or more")
        self.features = GaussianFourierFeatures(embedding, fourier_scale)
        self.features_to_embedding = nn.Linear(embedding, embedding)
        self.label = ClassEmbedding(len(classes), embedding) if classes else None

        first, second, third, deepest = widths
        self.down = nn.ModuleList(
            TimedConvolution(nn.Conv2d(before, after, 3, stride, bias=False), embedding, groups)
            for before, after, stride, groups in (
                (channels, first, 1, 4),
                (first, second, 2, 32),
                (second, third, 2, 32),
                (third, deepest, 2, 32),
            )
        )
        self.up = nn.ModuleList(
            TimedConvolution(nn.ConvTranspose2d(before, after, 3, 2, bias=False), embedding, 32)
            for before, after in ((deepest, third), (third * self.joined, second), (second * self.joined, first))
        )
        self.to_picture = nn.ConvTranspose2d(first * self.joined, channels, 3)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the schedule asks for, (B, C, H, W).

        Args:
            x_t: noisy pictures, (B, C, H, W).
            t: time in [0, 1], (B,).
            labels: class numbers, int64, (B,); the number of classes, or None for all, stands for no class.
        """
        told = [self.features_to_embedding(self.features(t).to(x_t.dtype))]
        if self.label is not None:
            told.append(self.label(labels, t))
        tokens = torch.stack(told, dim=1)  # (B, 1 or 2, embedding)
        embedding = F.silu(tokens.sum(dim=1))  # (B, embedding)
        seen, h = [], x_t
        for number, level in enumerate(self.down):
            h = self.look(number, level(h, embedding), tokens)  # 28 -> 26 -> 12 -> 5 -> 2
            seen.append(h)
        seen.pop()  # the deepest is where the way up begins
        for level in self.up:
            skip = seen.pop()
            h = self.join(level(h, embedding, skip.shape[-2:]), skip)  # 2 -> 5 -> 12 -> 26
        return self.to_picture(h)  # 26 -> 28

    def look(self, number: int, h: Tensor, told: Tensor) -> Tensor:
        """What level `number` of the way down answered, (B, C, H, W), after a look at what is told: nothing more here.

        Args:
            told: the time and, with classes, the class, (B, 1 or 2, embedding).
        """
        return h

    @staticmethod
    def join(h: Tensor, skip: Tensor) -> Tensor:
        """What came up, (B, C, H, W), and what went down there, (B, C, H, W) -> (B, 2 C, H, W)."""
        return torch.cat([h, skip], dim=1)


class ScoreAdd(ScoreConcat):
    """Denoiser `score_add`: on the way up, what the way down saw is added. Arguments as of `ScoreConcat`."""

    joined = 1

    @staticmethod
    def join(h: Tensor, skip: Tensor) -> Tensor:
        """What came up and what went down there, (B, C, H, W) each -> (B, C, H, W)."""
        return h + skip
