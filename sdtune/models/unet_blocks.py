"""The levels of the UNet: on the way down, at the bottom, and on the way up."""

from dataclasses import dataclass

from torch import Tensor, nn

from sdtune.models.attention import Transformer2DModel
from sdtune.models.layers import Checkpointed, Downsample2D, ResnetBlock2D, Upsample2D


@dataclass(frozen=True)
class Conditioning:
    """What every block of the UNet sees besides the picture.

    Args:
        temb: SiLU of the timestep embedding, (B, T).
        context: tokens of the text, (B, M, C_context); None where no block attends to a text.
        bias: added to the scores of self-attention, (B, 1, 1, H * W), or None.
        context_bias: added to the scores of attention to the text, (B, 1, 1, M), or None.
    """

    temb: Tensor
    context: Tensor | None = None
    bias: Tensor | None = None
    context_bias: Tensor | None = None


@dataclass(frozen=True)
class Level:
    """The sizes of one level of the UNet.

    Args:
        channels: of its feature maps.
        layers: residual blocks on the way down; there is one more on the way up.
        heads, depth: of its transformers: heads of attention, and blocks.
        context_channels: width of the text's tokens.
        linear: its transformers project by linear layers, not by 1x1 convolutions.
        temb_channels, groups, eps, dropout: of its residual blocks.
    """

    channels: int
    layers: int
    heads: int
    depth: int
    context_channels: int
    linear: bool
    temb_channels: int
    groups: int
    eps: float
    dropout: float

    def resnet(self, in_channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels,
            self.channels,
            groups=self.groups,
            eps=self.eps,
            temb_channels=self.temb_channels,
            dropout=self.dropout,
        )

    def transformers(self, count: int) -> nn.ModuleList:
        return nn.ModuleList(
            Transformer2DModel(
                self.channels,
                self.heads,
                self.context_channels,
                depth=self.depth,
                groups=self.groups,
                linear=self.linear,
            )
            for _ in range(count)
        )


class UNetBlock(Checkpointed):
    """Residual blocks, each followed by a transformer where the level attends to the text."""

    attentions: nn.ModuleList | None
    resnets: nn.ModuleList

    def layer(self, i: int, x: Tensor, c: Conditioning, skip: Tensor | None = None) -> Tensor:
        """The i-th residual block and its transformer. x: (B, C_in, H, W) -> (B, C, H, W)."""
        x = self.run(self.resnets[i], x, c.temb, skip)
        return x if self.attentions is None else self.attentions[i](x, c.context, c.bias, c.context_bias)


class DownBlock(UNetBlock):
    """A level on the way down: `DownBlock2D`, and with attention `CrossAttnDownBlock2D`, of the configuration.

    Args:
        in_channels: of the feature map that comes from the level above.
        level: its own sizes.
        attention: with transformers.
        downsample: half the resolution at the end; None at the lowest level, else the padding of that convolution.
    """

    def __init__(self, in_channels: int, level: Level, attention: bool, downsample: int | None) -> None:
        super().__init__()
        widths = [in_channels] + [level.channels] * (level.layers - 1)
        self.attentions = level.transformers(level.layers) if attention else None
        self.resnets = nn.ModuleList(level.resnet(width) for width in widths)
        self.downsamplers = None if downsample is None else nn.ModuleList([Downsample2D(level.channels, downsample)])

    def forward(self, x: Tensor, c: Conditioning) -> list[Tensor]:
        """x: (B, C_in, H, W) -> every feature map on the way, for the skips; the last is what the next level gets."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, c)
            outputs.append(x)
        for downsampler in self.downsamplers or ():
            outputs.append(downsampler(x))
        return outputs


class MidBlock(UNetBlock):
    """The bottom: residual block, transformer, residual block (`UNetMidBlock2DCrossAttn`)."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.attentions = level.transformers(1)
        self.resnets = nn.ModuleList(level.resnet(level.channels) for _ in range(2))

    def forward(self, x: Tensor, c: Conditioning) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        return self.run(self.resnets[1], self.layer(0, x, c), c.temb)


class UpBlock(UNetBlock):
    """A level on the way up: `UpBlock2D`, and with attention `CrossAttnUpBlock2D`, of the configuration.

    Args:
        in_channels: of the feature map that comes from the level below.
        skip_channels: of the feature maps that come over from the way down, in the order in which they are used.
        level: its own sizes.
        attention: with transformers.
        upsample: twice the resolution at the end; False at the highest level.
    """

    def __init__(
        self, in_channels: int, skip_channels: list[int], level: Level, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [level.channels] * (len(skip_channels) - 1)
        self.attentions = level.transformers(len(skip_channels)) if attention else None
        self.resnets = nn.ModuleList(
            level.resnet(width + skip) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(level.channels)]) if upsample else None

    def forward(self, x: Tensor, skips: list[Tensor], c: Conditioning) -> Tensor:
        """x: (B, C_in, H, W) -> (B, C, 2H, 2W).

        Takes its skips from the end of `skips`. The new size is that of the skip which then is the last, because
        a size that was odd on the way down is not twice the halved one.
        """
        for i in range(len(self.resnets)):
            x = self.layer(i, x, c, skips.pop())
        for upsampler in self.upsamplers or ():
            x = upsampler(x, skips[-1].shape[2:])
        return x
