"""SegNet as a denoiser: what goes over from the encoder to the decoder is where each maximum was, and nothing else.

Source: Badrinarayanan et al. 2017, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation".
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from sdtune.models.time_and_class import TimeAndClass


class ConvBlock(nn.Module):
    """A 3x3 convolution, normalized, told of an embedding, then ReLU."""

    def __init__(self, in_channels: int, channels: int, groups: int, emb_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)
        self.emb = nn.Linear(emb_channels, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C_in, H, W), emb: (B, E) -> (B, C, H, W)."""
        return F.relu(self.norm(self.conv(x)) + self.emb(emb)[:, :, None, None])


class Level(nn.Module):
    """Convolutions one after the other; `widths` are the channels of the first one's input and of each one's output."""

    def __init__(self, *widths: int, groups: int, emb_channels: int) -> None:
        super().__init__()
        pairs = zip(widths, widths[1:], strict=False)
        self.blocks = nn.ModuleList(ConvBlock(before, after, groups, emb_channels) for before, after in pairs)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C_in, H, W), emb: (B, E) -> (B, C_out, H, W)."""
        for block in self.blocks:
            x = block(x, emb)
        return x


class SegNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # the two declare config_name differently
    """An encoder with max-pooling, and a decoder that puts each value back where its maximum was.

    Args:
        channels: of the pictures.
        classes: their names; a caption is one of them. (): captions are not read.
        size: height and width of the pictures that it is made for; it takes others too.
        widths: channels of each level, from the full resolution down. The paper's are 64, 128, 256, 512, 512.
        layers: convolutions a level, on the way down and on the way up. The paper has 2 or 3.
        groups: of the normalizations; must divide the widths.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        classes: Sequence[str] = (),
        size: int = 28,
        widths: Sequence[int] = (64, 128, 256),
        layers: int = 2,
        groups: int = 8,
    ) -> None:
        super().__init__()
        self.smallest = 2 ** len(widths)  # so that one pixel is left at the lowest level
        level = partial(Level, groups=groups, emb_channels=4 * widths[0])
        self.embedding = TimeAndClass(4 * widths[0], len(classes))
        arriving, leaving = (channels, *widths), (widths[0], *widths)  # channels, from above and to above
        self.encoder = nn.ModuleList(level(arriving[i], *[width] * layers) for i, width in enumerate(widths))
        self.decoder = nn.ModuleList(level(*[width] * layers, leaving[i]) for i, width in enumerate(widths))
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t: (B,) in [0, 1], labels: (B,), int64, or None -> (B, C, H, W)."""
        emb, x = self.embedding(t, labels, x_t.dtype), x_t
        pooled = []
        for level in self.encoder:
            x = level(x, emb)  # (B, C, H, W)
            size = x.shape[2:]
            x, where = F.max_pool2d(x, 2, return_indices=True)  # (B, C, H // 2, W // 2), twice
            pooled.append((where, size))
        for level, (where, size) in zip(reversed(self.decoder), reversed(pooled), strict=True):
            x = F.max_unpool2d(x, where, [2, 2], output_size=size)  # (B, C, H, W): zero but where the maxima were
            x = level(x, emb)
        return self.conv_out(x)
