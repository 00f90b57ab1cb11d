"""Families: which model a run trains (a file here and a line in `FAMILIES`), and the samplers that it is drawn with."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune.families.base import Family

FAMILIES = {
    "stable-diffusion": "sdtune.families.stable_diffusion:StableDiffusion",
    "sdxl": "sdtune.families.sdxl:StableDiffusionXL",
    "pixel": "sdtune.families.pixel:Pixel",
}

# What `sdtune sample --sampler` and validate.samples.sampler name: a scheduler of diffusers, and what it is set to.
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"_class_name": "DDPMScheduler"},
    "ddim": {"_class_name": "DDIMScheduler"},
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "dpm-solver++": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"},
    "dpm-solver++-sde": {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "deis": {"_class_name": "DEISMultistepScheduler"},
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "euler-ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
    # of score models (families/score_sampler.py)
    "euler-maruyama": {"_class_name": "ScoreSampler", "method": "euler-maruyama"},
    "predictor-corrector": {"_class_name": "ScoreSampler", "method": "predictor-corrector"},
    "probability-flow": {"_class_name": "ScoreSampler", "method": "probability-flow"},
}

# What `model.from_config` holds of each, and the folders of a saved one.
PARTS = {
    "stable-diffusion": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    "pixel": ("denoiser", "scheduler"),
}

# What the sides of pictures are multiples of, as far as it is known before a model is opened.
SIDES = {"stable-diffusion": 8, "sdxl": 8, "pixel": 1}
OURS_ALONE = ("pixel",)  # what stock diffusers has no pipeline for


def family_class(name: str) -> "type[Family]":
    """The class behind a name of `FAMILIES`."""
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)
