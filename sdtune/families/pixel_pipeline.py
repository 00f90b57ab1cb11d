"""The pipeline of family `pixel`: the loop from noise to a picture, called as diffusers' own pipelines are."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdtune.diffusion.ve_sampling import VE_SAMPLERS, calls
from sdtune.families.base import Conditioning
from sdtune.families.score_sampler import ScoreSampler

if TYPE_CHECKING:
    from sdtune.families.pixel import Pixel


class PixelPipeline(DiffusionPipeline):
    """Draws with a family `pixel`; `scheduler` is one of diffusers, or a `ScoreSampler`."""

    register_modules: Any  # of diffusers, untyped
    progress_bar: Any

    def __init__(self, family: "Pixel", scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=family.modules["denoiser"])
        self.family, self.scheduler = family, scheduler
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompt_embeds: Tensor,
        latents: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        generator: Sequence[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float,
        **others: Any,
    ) -> ImagePipelineOutput:
        """Pictures as the network knows them, (B, C, H, W), for `Family.decode_images`.

        Args:
            prompt_embeds, negative_prompt_embeds: class numbers, int64, (B,). latents: standard normal, (B, C, H, W).
            generator: one a picture, for samplers that add noise.
            others: size and kind of the output, which are not read.
        """

        def answer(x_t: Tensor, t: Tensor) -> Tensor:
            """The network's, guided: (x_t (B, C, H, W), t (B,)) -> (B, C, H, W)."""
            asked = self.family.predict(x_t, t, Conditioning(prompt_embeds))
            if guidance_scale <= 1 or negative_prompt_embeds is None or not self.family.classes:
                return asked
            plain = self.family.predict(x_t, t, Conditioning(negative_prompt_embeds))
            return plain + guidance_scale * (asked - plain)

        def noise() -> Tensor:
            return randn_tensor(latents.shape, list(generator), latents.device, latents.dtype)

        latents = latents.float()  # the steps are, whatever the network's type
        if isinstance(self.scheduler, ScoreSampler):
            x = self.draw_score(answer, noise, latents, num_inference_steps)
        else:
            x = self.draw_discrete(answer, list(generator), latents, num_inference_steps)
        return ImagePipelineOutput(images=x)

    def draw_score(self, answer: Any, noise: Any, latents: Tensor, steps: int) -> Tensor:
        """With a `ScoreSampler`."""
        schedule, method = self.scheduler.schedule, self.scheduler.method
        with self.progress_bar(total=calls(method, steps)) as bar:

            def score(x_t: Tensor, t: Tensor) -> Tensor:
                bar.update()
                return answer(x_t, t)

            first = schedule.std(torch.ones(1, device=latents.device)) * latents
            return VE_SAMPLERS[method](score, first, schedule, steps, noise)

    def draw_discrete(self, answer: Any, generator: list[torch.Generator], latents: Tensor, steps: int) -> Tensor:
        """With a scheduler of diffusers."""
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

        times, _ = retrieve_timesteps(self.scheduler, steps, latents.device)
        x = latents * self.scheduler.init_noise_sigma
        options = {
            "generator": generator,
            # DDIM's own way keeps the noise that belonged to x0 before it was thresholded
            "use_clipped_model_output": getattr(self.scheduler.config, "thresholding", False),
        }
        options = {name: value for name, value in options.items() if takes(self.scheduler, name)}
        for t in self.progress_bar(times):
            scaled = self.scheduler.scale_model_input(x, t)
            x = self.scheduler.step(answer(scaled, t.expand(len(x))), t, x, **options).prev_sample
        return x


def takes(scheduler: Any, option: str) -> bool:
    """Whether a scheduler's step knows an option, such as the generator of the noise that it adds."""
    import inspect

    return option in inspect.signature(scheduler.step).parameters
