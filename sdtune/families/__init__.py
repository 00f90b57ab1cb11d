"""Families: which model a run trains (a file here and a line in `FAMILIES`), and the samplers that it is drawn with."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdtune.families.base import Family

FAMILIES = {
    "stable-diffusion": "sdtune.families.stable_diffusion:StableDiffusion",
    "sdxl": "sdtune.families.sdxl:StableDiffusionXL",
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
}


def family_class(name: str) -> "type[Family]":
    """The class behind a name of `FAMILIES`."""
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)
