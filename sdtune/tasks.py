"""What is learned: a task joins a family with an objective, and answers with one loss a sample.

`TrainStep` is the one module that the loop prepares: mixed precision and several processes see nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sdtune.data.batches import Batch
from sdtune.data.cache import RowCache
from sdtune.data.images import to_float
from sdtune.data.random_masks import random_mask
from sdtune.data.store import Stores
from sdtune.diffusion import draws
from sdtune.diffusion.objectives import (
    PLAIN,
    Objective,
    denoising_loss,
    offset,
    perturb,
    pool_mask,
    reconstruction_loss,
)
from sdtune.errors import WeightsError
from sdtune.families.base import Conditioning, Family
from sdtune.families.inpainting import hidden_and_rest


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch; row i belongs to sample i.

    Attributes:
        posterior: standard normal, (B, C, h, w): which latents stand for a picture; None without an autoencoder.
        noise: standard normal, (B, C, h, w): what is added to them; None for autoencoding.
        t: timesteps of the schedule, (B,); None for autoencoding.
        shown: the noise that the network sees where it is not `noise` (input perturbation), (B, C, h, w).
        hidden: uint8, white is to be painted, (B, 1, H, W); inpainting only.
        rest: standard normal, (B, C, h, w): which latents stand for what is not hidden; inpainting only.
    """

    posterior: Tensor | None = None
    noise: Tensor | None = None
    t: Tensor | None = None
    shown: Tensor | None = None
    hidden: Tensor | None = None
    rest: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """The same on another device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return Draws(**moved)


class Task(Protocol):
    """What the loop asks: which networks take part, random numbers for a batch, losses."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The networks by name."""
        ...

    def draw(self, batch: Batch, seed: int) -> Draws:
        """Random numbers for each sample, a pure function of (seed, its number in the run)."""
        ...

    def draw_fixed(self, batch: Batch, seed: int, total: int) -> Draws:
        """For the held-out loss: the same at every step, timesteps spread evenly over `total` samples."""
        ...

    def losses(self, batch: Batch, drawn: Draws) -> Tensor:
        """One loss a sample, (B,), float32."""
        ...


class TrainStep(nn.Module):
    """A task as one module: `forward(batch, draws)` returns its losses, (B,)."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.networks = nn.ModuleDict(task.modules)

    def forward(self, batch: Batch, drawn: Draws) -> Tensor:
        """Losses of shape (B,), float32."""
        return self.task.losses(batch, drawn)


class DenoisingTask:
    """Learn to predict the noise in noisy latents, told of a caption.

    Args:
        family: the model.
        objective: how the answers are judged.
        cache: keep the latents of pictures, and the embeddings of captions while no text encoder learns, in memory.
            (Not those of pictures with a part hidden: they are encoded at every step.)
        cache_text: of those the embeddings too. (Not where averages of a text encoder's weights take their place.)
        own_masks: for inpainting: the pictures' own masks say what is hidden; else it is drawn at random.
        stores: where those stand that were made before the training.
    """

    def __init__(
        self,
        family: Family,
        *,
        objective: Objective = PLAIN,
        cache: bool = True,
        cache_text: bool = True,
        own_masks: bool = False,
        stores: Stores | None = None,
    ) -> None:
        self.family, self.objective, self.own_masks = family, objective, own_masks
        self.modules = family.modules
        self.schedule = family.schedule
        keep = cache and family.autoencoder is not None  # without one there is nothing that would take long
        self.latents = RowCache(stores.latents if stores else None) if keep else None
        made_before = stores.text if stores and not self.text_learns else None
        self.text = RowCache(made_before) if cache and cache_text else None

    @property
    def text_learns(self) -> bool:
        """Whether a text encoder learns now: it may stop in the middle of a run."""
        return any(p.requires_grad for name in self.family.text_encoders for p in self.modules[name].parameters())

    def draw(self, batch: Batch, seed: int) -> Draws:
        """See `Task.draw`."""
        rows = [(number, int(i >= batch.instances)) for i, number in enumerate(batch.numbers)]  # 1: class pictures
        t = [self.schedule.time(draws.uniform(seed, "timestep", *row)) for row in rows]
        drawn = self.noises(batch, seed, "", rows, t)
        strength = self.objective.input_perturbation
        if strength == 0 or drawn.noise is None:
            return drawn
        more = [draws.normal(drawn.noise.shape[1:], seed, "input perturbation", *row) for row in rows]
        return replace(drawn, shown=perturb(drawn.noise, torch.stack(more), strength))

    def draw_fixed(self, batch: Batch, seed: int, total: int) -> Draws:
        """See `Task.draw_fixed`."""
        rows = [(number,) for number in batch.numbers]
        order = draws.permutation(total, seed, "validation timesteps")  # pictures are often sorted by what they show
        t = [self.schedule.time((order[number] + 0.5) / total) for number in batch.numbers]
        return self.noises(batch, seed, "validation ", rows, t)

    def noises(self, batch: Batch, seed: int, purpose: str, rows: Sequence[tuple[int, ...]], t: list[float]) -> Draws:
        """Posterior draw and noise of each row, beside given timesteps."""
        shape = self.family.latent_shape(*batch.frame)
        posterior = None
        if self.family.autoencoder is not None:
            posterior = torch.stack([draws.normal(shape, seed, f"{purpose}posterior", *row) for row in rows])
        noise = torch.stack([draws.normal(shape, seed, f"{purpose}noise", *row) for row in rows])
        if self.objective.offset_noise > 0:
            levels = [draws.normal((shape[0], 1, 1), seed, f"{purpose}offset noise", *row) for row in rows]
            noise = offset(noise, torch.stack(levels), self.objective.offset_noise)
        drawn = Draws(posterior, noise, torch.tensor(t))  # (B, C, h, w), (B, C, h, w), (B,)
        if not self.family.inpaints:
            return drawn
        rest = torch.stack([draws.normal(shape, seed, f"{purpose}posterior of the rest", *row) for row in rows])
        return replace(drawn, hidden=self.hidden(batch, seed, f"{purpose}mask", rows), rest=rest)

    def hidden(self, batch: Batch, seed: int, purpose: str, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """What is hidden of each picture, (B, 1, H, W); of one without a mask of its own everything."""
        if not self.own_masks:
            return torch.stack([random_mask(*batch.frame, seed, purpose, *row) for row in rows])
        if batch.masks is None:
            return torch.full((len(batch), 1, *batch.frame), 255, dtype=torch.uint8)
        return batch.masks

    def losses(self, batch: Batch, drawn: Draws) -> Tensor:
        """See `Task.losses`."""
        assert drawn.noise is not None and drawn.t is not None
        mean, std = self.encode_images(batch)
        x0 = mean if drawn.posterior is None else mean + std * drawn.posterior  # (B, C, h, w)
        conditioning = self.family.with_sizes(self.encode_text(batch.captions), sizes(batch))
        if drawn.hidden is not None and drawn.rest is not None and batch.pixels is not None:
            with torch.no_grad():
                beside = hidden_and_rest(self.family, to_float(batch.pixels), drawn.hidden, drawn.rest)
            conditioning = replace(conditioning, beside=beside)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return self.family.predict(x_t, t, conditioning)

        return denoising_loss(
            predict, x0, drawn.noise, drawn.t, self.schedule, self.objective, drawn.shown, self.mask(batch, x0)
        )

    def mask(self, batch: Batch, x0: Tensor) -> Tensor | None:
        """Where the error counts in full, (B, 1, h, w); None where that is everywhere."""
        if self.objective.outside_mask is None or batch.masks is None:
            return None
        return pool_mask(batch.masks, *x0.shape[-2:])

    @torch.no_grad()
    def encode_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, (B, C, h, w) each; from memory where they are known."""

        def compute(rows: list[int]) -> tuple[Tensor, ...]:
            assert batch.pixels is not None
            return self.encode_pixels(batch.pixels[rows])

        device = batch.weights.device
        if self.latents is None:
            return compute(list(range(len(batch.keys))))  # type: ignore[return-value]
        return self.latents.get(batch.keys, compute, device)  # type: ignore[return-value]

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, (B, C, h, w) each, of pixels (B, 3, H, W), uint8, on any device."""
        encoder: Any = self.modules[self.family.autoencoder or self.family.denoiser]
        return self.family.encode_images(to_float(pixels.to(encoder.device)))

    def encode_text(self, captions: list[str]) -> Conditioning:
        """Embeddings of captions; from memory where they are known and cannot change."""
        if self.text_learns:
            return self.family.encode_text(captions)

        with torch.no_grad():
            if self.text is None:
                return self.family.encode_text(captions)
            device = next(self.modules[self.family.denoiser].parameters()).device
            return Conditioning(*self.text.get(captions, lambda rows: self.embed([captions[i] for i in rows]), device))

    def embed(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Token embeddings (B, L, D) and, of SDXL, pooled ones (B, P)."""
        found = self.family.encode_text(captions)
        return (found.text,) if found.pooled is None else (found.text, found.pooled)


class AutoencodingTask:
    """Learn to give a picture back from its latents.

    Args:
        family: holds the VAE. l1, l2, kl: weights of the loss terms.
    """

    def __init__(self, family: Family, *, l1: float = 1.0, l2: float = 1.0, kl: float = 1e-4) -> None:
        if family.autoencoder is None or family.autoencoder not in family.modules:
            raise WeightsError(
                "task autoencoding trains a VAE, and the model has none; give model.from_config.vae or model.base"
            )
        self.family = family
        self.modules = {"vae": family.modules["vae"]}
        self.weights = {"l1": l1, "l2": l2, "kl": kl}

    def draw(self, batch: Batch, seed: int) -> Draws:
        """See `Task.draw`."""
        return self.posterior(batch, seed, "posterior")

    def draw_fixed(self, batch: Batch, seed: int, total: int) -> Draws:
        """See `Task.draw_fixed`."""
        return self.posterior(batch, seed, "validation posterior")

    def posterior(self, batch: Batch, seed: int, purpose: str) -> Draws:
        """Which latents stand for each picture."""
        shape = self.family.latent_shape(*batch.frame)
        return Draws(torch.stack([draws.normal(shape, seed, purpose, number) for number in batch.numbers]))

    def losses(self, batch: Batch, drawn: Draws) -> Tensor:
        """See `Task.losses`."""
        vae = self.modules["vae"]
        assert batch.pixels is not None and drawn.posterior is not None
        pixels = to_float(batch.pixels)  # (B, 3, H, W)
        posterior = vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * drawn.posterior  # (B, C, h, w)
        return reconstruction_loss(pixels, vae.decode(z).sample, posterior.mean, posterior.logvar, **self.weights)

    @torch.no_grad()
    def set_scaling_factor(self, batches: Sequence[Batch]) -> float:
        """Write 1 / deviation of all latents into the VAE's configuration, so that scaled latents have deviation 1.

        Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G.
        """
        vae = self.modules["vae"]
        pixels = [to_float(batch.pixels) for batch in batches if batch.pixels is not None]
        latents = torch.cat([vae.encode(some).latent_dist.mean.float().cpu().flatten() for some in pixels])
        factor = 1.0 / latents.std().item()
        vae.register_to_config(scaling_factor=factor)
        return factor


def sizes(batch: Batch) -> list[tuple[int, ...]]:
    """Original size, crop and target size of each picture, as `Conditioning.time_ids` has them."""
    return [size + batch.frame for size in batch.sizes]
