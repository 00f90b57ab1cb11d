"""The layers of which the UNet and the VAE are made, apart from attention."""

import math
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
        temb_channels: width of the timestep embedding, None where there is none (in the VAE).
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

    def forward(self, x: Tensor, temb: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """x: (B, C_in, H, W), temb: SiLU of the timestep embedding, (B, T) -> (B, C_out, H, W).

        With `skip`, the input is x and skip with their channels one after the other; joined here so that gradient
        checkpointing need not keep them a second time.
        """
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]  # (B, C_out, 1, 1): the same for every pixel
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


def sinusoid(t: Tensor, dim: int, *, cos_first: bool = True, freq_shift: float = 0) -> Tensor:
    """Numbers as sines and cosines of `dim // 2` frequencies, from 1 down to about 1 / 10000.

    Args:
        t: timesteps, or sizes in pixels. Shape (B,), any number type.
        dim: width of the result; an odd one is filled up with a zero.
        cos_first: cosines before sines (`flip_sin_to_cos` of the configuration).
        freq_shift: 1 makes the lowest frequency exactly 1 / 10000.

    Returns:
        (B, dim), float32.

    Source: Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / (half - freq_shift))  # (B, half)
    waves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Two linear layers that make of a sinusoid the embedding that every residual block sees.

    Args:
        in_channels: width of the sinusoid.
        out_channels: width of the embedding.
        cond_channels: width of a guidance embedding to be added to the input (LCM), None without.
    """

    def __init__(self, in_channels: int, out_channels: int, cond_channels: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        self.cond_proj = None if cond_channels is None else nn.Linear(cond_channels, in_channels, bias=False)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def forward(self, waves: Tensor, condition: Tensor | None = None) -> Tensor:
        """waves: (B, C_in), condition: (B, C_cond) -> (B, C_out)."""
        if self.cond_proj is not None and condition is not None:
            waves = waves + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(waves)))


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
