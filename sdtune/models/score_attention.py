"""The score UNet with transformers at its two deepest levels, which look at the class and the time."""

import math
from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from sdtune.models.attention import Transformer2DModel
from sdtune.models.score import ScoreConcat


class ScoreAttention(ScoreConcat):
    """Denoiser `score_attention`: `ScoreConcat` with a transformer after each of the two deepest levels.

    The transformers attend to the pixels, and to two tokens of width `embedding`: the time, and the class.

    Args:
        heads: of attention; must divide the widths of the two deepest levels.
        size, channels, classes, widths, embedding, fourier_scale: as of `ScoreConcat`.
    """

    _supports_gradient_checkpointing = True  # of the transformers

    @register_to_config
    def __init__(
        self,
        size: int | Sequence[int] = 28,
        channels: int = 1,
        classes: Sequence[str] = (),
        widths: Sequence[int] = (32, 64, 128, 256),
        embedding: int = 256,
        fourier_scale: float = 30.0,
        heads: int = 4,
    ) -> None:
        super().__init__(size, channels, classes, widths, embedding, fourier_scale)
        self.transformers = nn.ModuleList(
            Transformer2DModel(width, heads, embedding, depth=1, groups=math.gcd(32, width), linear=True)
            for width in widths[2:]
        )

    def look(self, number: int, h: Tensor, told: Tensor) -> Tensor:
        """See `ScoreConcat.look`."""
        first = len(self.down) - len(self.transformers)
        return h if number < first else self.transformers[number - first](h, told)
