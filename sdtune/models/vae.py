"""The variational autoencoder of latent diffusion: pictures to latents that are 8 times smaller, and back.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from sdtune.models.attention import SpatialAttention
from sdtune.models.config import StockModel
from sdtune.models.layers import Checkpointed, Downsample2D, ResnetBlock2D, Upsample2D

EPS = 1e-6  # of every group norm in the VAE

# Gradient checkpointing is by layer and not by level: at full resolution the backward pass of a whole level needs
# more memory than keeping the inputs of its layers.


@dataclass
class DecoderOutput(BaseOutput):
    """sample: the decoded pictures, (B, C, H, W)."""

    sample: Tensor


class DiagonalGaussianDistribution:
    """q(z | x): an independent normal distribution for every element of the latents.

    Args:
        parameters: mean and logarithm of the variance, stacked: (B, 2 * C, H, W).
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)  # each (B, C, H, W)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """One draw, (B, C, H, W)."""
        mean = self.mean
        return mean + self.std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)

    def mode(self) -> Tensor:
        """The most likely latents, (B, C, H, W)."""
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Divergence from `other`, by default N(0, 1), in nats, summed over a picture's latents. Shape (B,)."""
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            ratio = ((self.mean - other.mean) ** 2 + self.var) / other.var
            terms = ratio - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class DownEncoderBlock2D(Checkpointed):
    """Residual blocks at one resolution, then half of it."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(
            ResnetBlock2D(widths[i], out_channels, groups=groups, eps=EPS) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)]) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C_in, H, W) -> (B, C_out, H // 2, W // 2), or the same size without downsampler."""
        for layer in (*self.resnets, *(self.downsamplers or ())):
            x = self.run(layer, x)
        return x


class UpDecoderBlock2D(Checkpointed):
    """Residual blocks at one resolution, then twice of it."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(
            ResnetBlock2D(widths[i], out_channels, groups=groups, eps=EPS) for i in range(layers)
        )
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C_in, H, W) -> (B, C_out, 2H, 2W), or the same size without upsampler."""
        for layer in (*self.resnets, *(self.upsamplers or ())):
            x = self.run(layer, x)
        return x


class UNetMidBlock2D(Checkpointed):
    """Two residual blocks at the lowest resolution, with attention between them or without."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups, eps=EPS)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups=groups, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = self.run(layer, x)
        return x


class Encoder(nn.Module):
    """Pictures (B, C_in, H, W) to the unmixed parameters of q(z | x), (B, C_out, H / f, W / f)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        steps = list(zip((widths[0], *widths), widths, strict=False))  # (channels before, channels after) of a level
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(before, after, layers, groups, downsample=i < len(widths) - 1)
            for i, (before, after) in enumerate(steps)
        )
        self.mid_block = UNetMidBlock2D(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, C_in, h, w) to pictures (B, C_out, h * f, w * f)."""

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        widths = widths[::-1]  # from the lowest resolution up
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(widths[0], groups, attention)
        steps = list(zip((widths[0], *widths), widths, strict=False))
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(before, after, layers + 1, groups, upsample=i < len(widths) - 1)
            for i, (before, after) in enumerate(steps)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            z = block(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class AutoencoderKL(StockModel):
    """Pictures to latents and back; the parameter names, configuration and calls are diffusers' `AutoencoderKL`.

    The arguments are the keys of its `config.json`, as in diffusers 0.42. The number of levels is the length of
    `block_out_channels`; each but the last halves the resolution. Latents are *not* scaled here: `scaling_factor`,
    `shift_factor`, `latents_mean` and `latents_std` say what whoever uses them applies, `(z - shift) * scaling`.

    Raises:
        WeightsError: a key or value that this class would not compute as diffusers does.
    """

    SUPPORTED = {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "act_fn": ("silu", "swish"),
    }
    WHOLE = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block",
             "norm_num_groups")  # fmt: skip
    PER_LEVEL = ("down_block_types", "up_block_types")

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        widths, groups = tuple(block_out_channels), norm_num_groups
        layers, attention, z = layers_per_block, mid_block_add_attention, latent_channels
        self.encoder = Encoder(in_channels, 2 * z, widths, layers, groups, attention)
        self.decoder = Decoder(z, out_channels, widths, layers, groups, attention)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(z, z, 1) if use_post_quant_conv else None
        self.use_slicing = False

    def enable_slicing(self) -> None:
        """Encode and decode one picture at a time: less memory for a batch, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode the whole batch at once."""
        self.use_slicing = False

    def _sliced(self, module: nn.Module, x: Tensor) -> Tensor:
        if not self.use_slicing:
            return module(x)
        return torch.cat([module(picture) for picture in x.split(1)])

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of pictures.

        Args:
            x: pictures in [-1, 1], (B, in_channels, H, W).
            return_dict: False gives a tuple of one.

        Returns:
            `.latent_dist`, of latents (B, latent_channels, H / f, W / f) with f = 2 ** (levels - 1).
        """
        moments = self._sliced(self.encoder, x)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple[Tensor]:
        """Pictures from latents.

        Args:
            z: unscaled latents, (B, latent_channels, h, w).
            return_dict: False gives a tuple of one.
            generator: taken because pipelines pass it; decoding draws nothing.

        Returns:
            `.sample`: pictures in about [-1, 1], (B, out_channels, h * f, w * f).
        """
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        x = self._sliced(self.decoder, z)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode pictures; through a draw from q(z | x) with `sample_posterior`, else through its mode."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)
