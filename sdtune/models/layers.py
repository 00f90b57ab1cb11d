"""The layers that the UNet and the VAE share: residual blocks, and halving and doubling of the resolution."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock2D(nn.Module):
    """Two 3x3 convolutions around a skip connection; in the UNet the timestep embedding is added between them.

    Args:
        in_channels, out_channels: of the feature maps; where they differ the skip is a 1x1 convolution.
        groups: of both group norms; must divide both channel counts.
        eps: of both group norms.
        temb_channels: width of the timestep embedding, None where there is none (the VAE).
        dropout: probability, before the second convolution.

    Source: He et al. 2016 in the form of Ho et al. 2020, appendix B.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        temb_channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if temb_channels is None else nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x: (B, C_in, H, W), temb: (B, T) or None -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]  # (B, C_out, 1, 1), the same for every pixel
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nn.Module):
    """Half the height and width, by a 3x3 convolution of stride 2.

    `padding` is 1 in the UNet. The VAE's is 0: there, one row and one column of zeros are added below and on the
    right only, as its weights were trained.
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), with padding 0: floor."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Twice the height and width by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x: (B, C, H, W) -> (B, C, 2H, 2W), or (B, C, *size) where the size to meet was an odd one."""
        if size is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Checkpointed(nn.Module):
    """A module whose children may be recomputed in the backward pass instead of kept.

    The two attributes are the protocol of diffusers' `enable_gradient_checkpointing()`, which sets them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def run(self, module: nn.Module, *args: Any) -> Any:
        """`module(*args)`, keeping only the arguments for the backward pass where checkpointing is on."""
        if self.gradient_checkpointing and self._gradient_checkpointing_func is not None and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)
