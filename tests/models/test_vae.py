"""Our AutoencoderKL against diffusers'."""

import diffusers
import pytest
import torch

from sdtune.models import AutoencoderKL

LEVELS = {n: {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
          for n in (1, 2, 3, 4)}  # fmt: skip


@pytest.mark.parametrize(
    "config, size",
    [
        ({**LEVELS[2], "block_out_channels": (32, 64)}, (32, 32)),
        ({**LEVELS[2], "block_out_channels": (32, 64), "latent_channels": 16, "norm_num_groups": 8}, (36, 44)),
    ],
)
def test_same_as_diffusers(config: dict, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs, ours = diffusers.AutoencoderKL(**config), AutoencoderKL(**config)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(ours(x).sample, theirs(x).sample, atol=1e-4, rtol=0)
