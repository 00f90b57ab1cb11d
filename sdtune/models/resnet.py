"""A denoiser whose encoder is a ResNet18 and whose decoder is three transposed convolutions."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from sdtune.models.time_and_class import TimeAndClass

Norm = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection; where there is an embedding, it is added between them.

    Args:
        in_channels, channels: of the feature maps; where they differ the skip is a 1x1 convolution.
        stride: of the first convolution and of the skip.
        norm: makes a normalization of that many channels.
        emb_channels: width of the embedding, None where there is none.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.1.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm, emb_channels: int | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.emb = None if emb_channels is None else nn.Linear(emb_channels, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = (
            None
            if in_channels == channels
            else nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm(channels))
        )

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x: (B, C_in, H, W), emb: (B, E) -> (B, C, ceil(H / stride), ceil(W / stride))."""
        h = self.bn1(self.conv1(x))
        if self.emb is not None and emb is not None:
            h = h + self.emb(emb)[:, :, None, None]
        h = self.bn2(self.conv2(F.relu(h)))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """The feature maps of a ResNet18; parameters are named as torchvision's, whose weights (without `fc`) it loads.

    Args:
        channels: of the pictures.
        width: of the first level; the others have 2, 4 and 8 times as many channels. 64 in the paper.
        stem: "imagenet": a 7x7 convolution of stride 2 and pooling, so that the first level is at a quarter of the
            resolution. "small": a 3x3 convolution at full resolution, for pictures of about 32 pixels.
        norm: makes a normalization of that many channels; the paper's is over the batch.
        emb_channels: width of an embedding that every block is told, None without.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        *,
        stem: str = "imagenet",
        norm: Norm = nn.BatchNorm2d,
        emb_channels: int | None = None,
    ) -> None:
        super().__init__()
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1)}[stem]
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = norm(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()

        def level(in_channels: int, channels: int, stride: int) -> nn.ModuleList:
            first = BasicBlock(in_channels, channels, stride, norm, emb_channels)
            return nn.ModuleList([first, BasicBlock(channels, channels, 1, norm, emb_channels)])

        self.layer1 = level(width, width, 1)
        self.layer2 = level(width, 2 * width, 2)
        self.layer3 = level(2 * width, 4 * width, 2)
        self.layer4 = level(4 * width, 8 * width, 2)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> list[Tensor]:
        """x: (B, C, H, W), emb: (B, E) -> the map of each level: (B, W, h, w), (B, 2W, h / 2, w / 2), ..."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        maps = []
        for level in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in level:
                x = block(x, emb)
            maps.append(x)
        return maps


class TransposedBlock(nn.Module):
    """A transposed 3x3 convolution of stride 2, normalized and told of an embedding."""

    def __init__(self, in_channels: int, channels: int, norm: Norm, emb_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm = norm(channels)
        self.emb = nn.Linear(emb_channels, channels)

    def forward(self, x: Tensor, emb: Tensor, like: Tensor) -> Tensor:
        """x: (B, C_in, ceil(H / 2), ceil(W / 2)), like: (B, C, H, W), for its size -> (B, C, H, W)."""
        h = self.norm(self.conv(x, output_size=like.shape[2:]))
        return F.relu(h + self.emb(emb)[:, :, None, None])


class ResNetDecoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # the two declare config_name differently
    """ResNet18 and three transposed convolutions, with what they need to draw: the time, the class and skips.

    The normalization is over groups of channels: over a batch, a picture's loss would depend on the others' times.

    Args:
        channels: of the pictures.
        classes: their names; a caption is one of them. (): captions are not read.
        size: height and width of the pictures that it is made for; it takes others too.
        width: channels of the first level; a ResNet18 has 64.
        groups: of the normalizations; must divide `width`.
        skips: add the encoder's map of the same resolution after each transposed convolution.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        classes: Sequence[str] = (),
        size: int = 28,
        width: int = 64,
        groups: int = 8,
        skips: bool = True,
    ) -> None:
        super().__init__()
        norm, emb_channels = partial(nn.GroupNorm, groups), 4 * width
        self.skips = skips
        self.embedding = TimeAndClass(emb_channels, len(classes))
        self.encoder = ResNet18(channels, width, stem="small", norm=norm, emb_channels=emb_channels)
        self.decoder = nn.ModuleList(
            TransposedBlock(2 * below, below, norm, emb_channels) for below in (4 * width, 2 * width, width)
        )
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t: (B,) in [0, 1], labels: (B,), int64, or None -> (B, C, H, W)."""
        emb = self.embedding(t, labels, x_t.dtype)  # (B, E)
        *maps, x = self.encoder(x_t, emb)
        for block, skip in zip(self.decoder, reversed(maps), strict=True):
            x = block(x, emb, like=skip)
            x = x + skip if self.skips else x
        return self.conv_out(x)
