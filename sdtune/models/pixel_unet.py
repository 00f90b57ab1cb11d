"""Our UNet as a denoiser of pixels, told of a class instead of a text."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from sdtune.models.layers import sinusoid
from sdtune.models.time_and_class import TIMES, ClassEmbedding
from sdtune.models.unet import UNet2DConditionModel


class PixelUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # the two declare config_name differently
    """A `UNet2DConditionModel` over pixels; the class is added to the time, and is what its transformers attend to.

    Args:
        channels: of the pictures.
        classes: their names; a caption is one of them. (): captions are not read.
        size: height and width of the pictures that it is made for; it takes others too.
        widths: channels of each level, from the full resolution down.
        attention: which levels have transformers; with the lowest, the bottom of the UNet has them too.
        layers: residual blocks a level on the way down; one more on the way up.
        head_width: channels of a head of attention; must divide the widths where there is attention.
        context: width of the class embedding.
        groups: of the normalizations; must divide the widths.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        channels: int = 1,
        classes: Sequence[str] = (),
        size: int = 28,
        widths: Sequence[int] = (32, 64, 128),
        attention: Sequence[bool] = (False, False, True),
        layers: int = 1,
        head_width: int = 32,
        context: int = 64,
        groups: int = 8,
    ) -> None:
        super().__init__()
        self.label = ClassEmbedding(len(classes), context)
        kinds = ["CrossAttn" if attends else "" for attends in attention]
        self.unet = UNet2DConditionModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            mid_block_type="UNetMidBlock2DCrossAttn" if attention[-1] else None,
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            norm_num_groups=groups,
            cross_attention_dim=context,
            attention_head_dim=tuple(
                width // head_width if attends else 1 for width, attends in zip(widths, attention, strict=True)
            ),
            use_linear_projection=True,
            time_cond_proj_dim=context,
        )

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W), t: (B,) in [0, 1], labels: (B,), int64, or None -> (B, C, H, W)."""
        label = self.label(labels, t).to(x_t.dtype)  # (B, D)
        waves = sinusoid(TIMES * t, label.shape[1]).to(x_t.dtype)  # (B, D)
        tokens = torch.stack([label, waves], dim=1)  # (B, 2, D): attention to one token would have nothing to choose
        return self.unet(x_t, TIMES * t, tokens, timestep_cond=label, return_dict=False)[0]
