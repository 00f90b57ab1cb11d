"""Small pictures, denoised as they are: no autoencoder, no text encoder, class names in place of captions."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdtune.diffusion.schedule import Prediction
from sdtune.diffusion.ve import Schedule, read_schedule
from sdtune.errors import UsageError, WeightsError
from sdtune.families import PARTS, fingerprints
from sdtune.families.base import Conditioning
from sdtune.families.loading import freeze, make_network, open_network, part_folder, read_index, read_settings
from sdtune.families.saving import save_network
from sdtune.families.schedulers import check_settings, own_sampler, scheduler_class
from sdtune.models import DENOISERS, denoiser_class
from sdtune.models.config import each

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue are; ITU-R BT.601


class Pixel:
    """Family `pixel`: one network of `sdtune.models.DENOISERS` over the pixels.

    Args:
        modules: the network, under the name denoiser.
        scheduler: scheduler_config.json as a dict; `prediction_type: ve_score` makes it a score model.
    """

    denoiser = "denoiser"
    autoencoder = None
    text_encoders: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS["pixel"]
    pipeline_names: tuple[str, ...] = ("PixelPipeline",)
    factor = 1
    inpaints = False
    max_tokens = 0

    def __init__(self, modules: Mapping[str, nn.Module], scheduler: Mapping[str, Any]) -> None:
        self.modules: dict[str, Any] = dict(modules)
        self.tokenizers: dict[str, Any] = {}
        self.scheduler = dict(scheduler)
        freeze(self.modules)

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, base: str, *, parts: Sequence[str] | None = None, revision: str | None = None, **options: Any
    ) -> "Pixel":
        """Open a folder or hub id that `save` wrote; see `Family.load`. Settings of text and VAE are refused."""
        refuse(options)
        index = read_index(base, revision)
        if index.get("_class_name") not in cls.pipeline_names:
            raise WeightsError(
                f"'{base}' is a {index.get('_class_name')}; this family opens {' or '.join(cls.pipeline_names)}. "
                "Set model.family to the one that fits (sdtune recipes ls shows recipes for each)"
            )
        config = cls.read_config("denoiser", base, revision)
        network = open_network(network_class(config), base, "denoiser", revision=revision)
        return cls({"denoiser": network}, read_settings(base, "scheduler", "scheduler_config.json", revision))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, seed: int, **options: Any) -> "Pixel":
        """A network from scratch, or with `denoiser` as text that of a folder or hub id; see `Family.from_config`."""
        refuse(options)
        denoiser, scheduler = config["denoiser"], config["scheduler"]
        if isinstance(scheduler, str):
            scheduler = read_settings(scheduler, part_folder(scheduler, "scheduler"), "scheduler_config.json")
        else:
            check_settings(scheduler)
        if isinstance(denoiser, str):
            subfolder = part_folder(denoiser, "denoiser")
            own = read_settings(denoiser, subfolder, "config.json")
            network = open_network(network_class(own), denoiser, subfolder)
        else:
            settings = {key: value for key, value in denoiser.items() if key != "kind"}
            if (channels := settings.get("channels", 1)) not in (1, 3):
                raise WeightsError(
                    f"model.from_config.denoiser.channels: got {channels!r}, expected 1 (grey) or 3 (red, green, blue)"
                )
            network = make_network(network_class(denoiser), settings, seed, "denoiser")
        return cls({"denoiser": network}, own_sampler(scheduler.get("prediction_type", "epsilon")) | scheduler)

    @classmethod
    def read_config(cls, part: str, base: str, revision: str | None = None, allow_pickle: bool = False) -> Any:
        """config.json of one part of a base, a folder or hub id."""
        return read_settings(base, part, "config.json", revision)

    @classmethod
    def build(cls, part: str, config: Mapping[str, Any]) -> Any:
        """See `Family.build`."""
        return network_class(config)(**{key: value for key, value in config.items() if key[0] != "_" and key != "kind"})

    @staticmethod
    def inputs(config: Any, height: int, width: int, tokens: int) -> dict[str, Any]:
        """See `Family.inputs`."""
        return {"x_t": torch.empty(1, config.channels, height, width), "t": torch.empty(1)}

    # --- what the loop asks -----------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The noise schedule the model was trained with."""
        return read_schedule(self.scheduler)

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Family.classes`; none of an unconditional model."""
        return tuple(self.modules["denoiser"].config.classes)

    def picture_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the pictures that the model was made for."""
        height, width = each(self.modules["denoiser"].config.size, 2)
        return height, width

    @property
    def smallest(self) -> int:
        """See `Family.smallest`: what the network is still left with after its last halving."""
        return getattr(self.modules["denoiser"], "smallest", 1)

    def note_size(self, height: int, width: int) -> None:
        """See `Family.note_size`: the network always says one."""

    def unread(self, name: str) -> tuple[str, ...]:
        """See `Family.unread`: all is read."""
        return ()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W): the network's channels, and the pixels themselves."""
        return self.modules["denoiser"].config.channels, height, width

    @property
    def lowest(self) -> float:
        """What black is to the network: 0 under the variance exploding schedule, -1 else; white is 1."""
        return 0.0 if self.schedule.prediction is Prediction.SCORE else -1.0

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures in the network's channels (1: grey) and range, (B, C, H, W), and deviations of 0."""
        if self.modules["denoiser"].config.channels == 1:
            grey = pixels.new_tensor(GREY).view(1, 3, 1, 1)
            pixels = (pixels * grey).sum(dim=1, keepdim=True)  # (B, 1, H, W)
        x0 = pixels * (1 - self.lowest) / 2 + (1 + self.lowest) / 2
        return x0, torch.zeros_like(x0)

    def decode_images(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about in [-1, 1]."""
        pixels = (2 * latents.float() - (1 + self.lowest)) / (1 - self.lowest)
        return pixels.expand(-1, 3, -1, -1)

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Class numbers, int64, (B,); of an empty caption the number of classes, which stands for none of them.

        An unconditional model reads no captions. Raises UsageError for a caption that is no class.
        """
        numbers = {name: number for number, name in enumerate(self.classes)} | {"": len(self.classes)}
        if not self.classes:
            captions = [""] * len(captions)
        for caption in captions:
            if caption not in numbers:
                raise UsageError(
                    f"'{caption}' is no class of this model; expected one of {', '.join(self.classes)}, or nothing for "
                    "any of them"
                )
        device = self.modules["denoiser"].device
        return Conditioning(torch.tensor([numbers[caption] for caption in captions], device=device))

    def latents_fingerprint(self) -> str:
        """See `Family.latents_fingerprint`."""
        return fingerprints.fingerprint("pixel", self.modules["denoiser"].config.channels, self.lowest)

    def text_fingerprint(self) -> str:
        """See `Family.text_fingerprint`."""
        return fingerprints.fingerprint("pixel", self.classes)

    def with_sizes(self, conditioning: Conditioning, sizes: Sequence[Sequence[int]]) -> Conditioning:
        """The network is not told of sizes."""
        return conditioning

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """What the schedule makes of the network's answer, (B, C, H, W), in the type of x_t."""
        network, labels = self.modules["denoiser"], conditioning.text if self.classes else None

        def answer(x_t: Tensor, t: Tensor) -> Tensor:
            return network(x_t.to(network.dtype), t, labels).to(x_t.dtype)

        return self.schedule.answer(answer, x_t, t)

    # --- handing it on ----------------------------------------------------------------------------------------------

    def pipeline(self) -> "DiffusionPipeline":
        """A diffusers pipeline over this network."""
        from sdtune.families.pixel_pipeline import PixelPipeline

        return PixelPipeline(self, self.sampler())

    def sampler(self) -> Any:
        """What the model's folder names: a scheduler of diffusers or, of a score model, a `ScoreSampler`."""
        return scheduler_class(self.scheduler).from_config(self.scheduler)

    def save(self, folder: Path, dtype: str | None = None) -> None:
        """Write a folder that `load` opens, laid out as a diffusers pipeline."""
        network = self.modules["denoiser"]
        save_network(network, folder / "denoiser", dtype)
        parts = {"denoiser": [type(network).__module__, type(network).__name__]}
        for name, values in (
            ("model_index.json", {"_class_name": self.pipeline_names[0], **parts}),
            ("scheduler/scheduler_config.json", self.scheduler),
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def network_class(config: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """The class that a denoiser's configuration names, as `kind` or, in a config.json, as `_class_name`.

    Raises:
        WeightsError: it is none of `DENOISERS`.
    """
    kinds = {place.partition(":")[2]: name for name, place in DENOISERS.items()}
    name = config.get("kind", kinds.get(config.get("_class_name", "")))
    if name not in DENOISERS:
        got = config.get("kind", config.get("_class_name"))
        raise WeightsError(f"model.from_config.denoiser.kind: got {got!r}, expected one of {', '.join(DENOISERS)}")
    return denoiser_class(name)


def refuse(options: Mapping[str, Any]) -> None:
    """Raises UsageError for settings of models with text encoder and VAE. (max_tokens is nobody's choice here.)"""
    for name in ("vae", "clip_skip", "variant", "allow_pickle"):
        if options.get(name):
            raise UsageError(f"model.{name}: a model of family pixel has nothing that it is for; remove it")
