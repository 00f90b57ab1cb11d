"""What the loop asks of a model family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sdtune.diffusion.ve import Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told besides the noisy latents; row i belongs to sample i.

    Attributes:
        text: token embeddings, (B, L, D); of families that know classes their numbers, int64, (B,).
        pooled: one embedding a caption, (B, P); SDXL only.
        time_ids: original height and width, crop top and left, target height and width in pixels, (B, 6); SDXL only.
        beside: channels that stand beside the noisy latents (`hidden_and_rest`), (B, 1 + C, h, w); inpainting only.
    """

    text: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    beside: Tensor | None = None


class Family(Protocol):
    """A kind of diffusion model: loads or makes its networks, encodes, predicts, saves.

    `modules` holds the networks by the name of their folder in a diffusers pipeline. `denoiser` and `text_encoders`
    name those that adapters may train. `encode_images` and `encode_text` are pure for each row, so that caches can
    stand before them.
    """

    modules: Mapping[str, Any]  # nn.Module; each has a config of its own kind
    denoiser: str
    autoencoder: str | None  # the network that makes latents; None where pictures are denoised as they are
    text_encoders: tuple[str, ...]
    parts: tuple[str, ...]  # of a pipeline folder, and of from_config
    factor: int  # how many pixels lie along the side of a latent
    smallest: int  # side of a picture that it can take, in pixels
    pipeline_names: tuple[str, ...]  # the diffusers pipelines that it opens, as model_index.json names them
    schedule: Schedule
    scheduler: dict[str, Any]  # scheduler_config.json
    tokenizers: Mapping[str, Any]
    classes: tuple[str, ...]  # the only captions that it knows, besides ""; empty where it reads any, or none
    max_tokens: int  # of a caption that are read, in chunks of 75

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser is given a mask and the masked picture beside the noisy latents."""
        ...

    @classmethod
    def load(cls, base: str, *, parts: Sequence[str] | None = None, **options: Any) -> "Family":
        """Open a diffusers folder, hub id or single file. `parts` limits what is read, e.g. ["vae"].

        Raises:
            WeightsError: not a model of this family, or damaged. HubError: the Hub has no answer.
        """
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, seed: int, **options: Any) -> "Family":
        """Make the networks from their configurations, with weights drawn from `seed`."""
        ...

    @classmethod
    def build(cls, part: str, config: Mapping[str, Any]) -> Any:
        """A network with whatever weights, from what `from_config` or a config.json says of it."""
        ...

    @staticmethod
    def inputs(config: Any, height: int, width: int, tokens: int) -> dict[str, Any]:
        """Arguments of the denoiser of that configuration for one sample of h x w latents, without values."""
        ...

    def picture_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the pictures that the model was made for."""
        ...

    def note_size(self, height: int, width: int) -> None:
        """Write that size into the denoiser's configuration, where it says none."""
        ...

    def unread(self, name: str) -> tuple[str, ...]:
        """Parts of parameter names of a network that `predict` and `encode_text` never come by: they cannot learn."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that size in pixels."""
        ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents, (B, C, h, w) each, of pixels (B, 3, H, W) in [-1, 1].

        Without an autoencoder the deviation is 0.
        """
        ...

    def decode_images(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about in [-1, 1], of scaled latents (B, C, h, w)."""
        ...

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Embeddings of captions, with `time_ids` still empty."""
        ...

    def latents_fingerprint(self) -> str:
        """Equal where `encode_images` answers the same: of the VAE's weights and configuration."""
        ...

    def text_fingerprint(self) -> str:
        """Equal where `encode_text` answers the same: of text encoders, tokenizers and what else it reads."""
        ...

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[Sequence[int]]) -> Conditioning:
        """Add what the family wants to know of the pictures' sizes; nothing for most.

        Args:
            sizes: six numbers a picture, as `Conditioning.time_ids` has them.
        """
        ...

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's answer (epsilon, v, x0 or score, as `schedule.prediction` says), (B, C, h, w)."""
        ...

    def pipeline(self) -> "DiffusionPipeline":
        """A diffusers pipeline over these very networks, for sampling."""
        ...

    def save(self, folder: Path, dtype: str | None = None) -> None:
        """Write a folder that stock diffusers opens."""
        ...
