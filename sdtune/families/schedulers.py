"""How a model's pictures are drawn: by its own sampler, by another, or by one for what a run changed of it."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdtune.errors import UsageError, WeightsError, nearest
from sdtune.families import SAMPLERS

if TYPE_CHECKING:
    from torch import Tensor

# What a model samples with that has no sampler of its own: from scratch, or trained as its base's sampler cannot.
SAMPLER = {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,  # not read under trailing spacing, but pipelines warn of any other value
    "timestep_spacing": "trailing",
}
SCORE_SAMPLER = {"_class_name": "ScoreSampler", "method": "probability-flow"}  # the same of score models
OF_SCORES = {"sigma", "data_std", "method"}  # settings of their schedule and sampler


def own_sampler(prediction: str) -> dict[str, Any]:
    """What a model without a sampler draws with, by what it predicts."""
    return SCORE_SAMPLER if prediction == "ve_score" else SAMPLER


def check_settings(config: Mapping[str, Any]) -> None:
    """Raises WeightsError for a key of `model.from_config.scheduler` that no scheduler has: it would be ignored."""
    import diffusers

    names = {"DDIMScheduler", *(each["_class_name"] for each in SAMPLERS.values()), config.get("_class_name")}
    kinds = [getattr(diffusers, name) for name in names if hasattr(diffusers, str(name))]
    known = {key for kind in kinds for key in inspect.signature(kind).parameters} | OF_SCORES
    for key in config:
        if key not in known and not key.startswith("_"):
            raise WeightsError(f"model.from_config.scheduler.{key}: unknown key; {nearest(key, sorted(known))}")


def check_name(name: str | None) -> None:
    """Raises UsageError for a name that is none of SAMPLERS."""
    if name is not None and name not in SAMPLERS:
        raise UsageError(f"the sampler '{name}' is not known; {nearest(name, list(SAMPLERS))}")


def make_sampler(
    scheduler: Mapping[str, Any], name: str | None = None, dynamic_thresholding: float | None = None
) -> Any:
    """The scheduler of diffusers, or `ScoreSampler`, with which a model's pictures are drawn.

    Args:
        scheduler: scheduler_config.json of the model; its betas and what its network predicts are kept.
        name: of SAMPLERS; None is the model's own.
        dynamic_thresholding: a quantile in (0, 1]. In each step the predicted x0 is clipped to [-s, s] and divided by
            s, where s is that quantile of its absolute values, and at least 1. None: it stays as it is.

    Raises:
        UsageError: a name that is not known, or a sampler that cannot draw what this network predicts, or has no
            thresholding.

    Source of thresholding: Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language
    Understanding", section 2.3.
    """
    check_name(name)
    config = {"clip_sample": False} | dict(scheduler) | SAMPLERS.get(name or "", {})
    if name is not None and not can_draw(config):
        fitting = [other for other in SAMPLERS if can_draw(config | SAMPLERS[other])]
        ending = " and whose noisiest latents are nothing but noise" if ends_in_noise(config) else ""
        raise UsageError(
            f"the sampler '{name}' cannot draw with this model, which predicts "
            f"{config.get('prediction_type', 'epsilon')}{ending}; expected one of {', '.join(fitting)}"
        )
    if dynamic_thresholding is not None:
        if not has_thresholding(config):
            able = [other for other in SAMPLERS if has_thresholding(SAMPLERS[other])]
            fitting = [other for other in able if can_draw(config | SAMPLERS[other])]
            way = f"name a sampler that has: {', '.join(fitting)}" if fitting else "leave it out with this model"
            raise UsageError(f"dynamic thresholding: {scheduler_class(config).__name__} has none; {way}")
        # diffusers' sample_max_value of 1 would keep s at 1, which is plain clipping
        config |= {"thresholding": True, "dynamic_thresholding_ratio": dynamic_thresholding}
        config["sample_max_value"] = float("inf")
    return scheduler_class(config).from_config(config)


def has_thresholding(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler knows dynamic thresholding."""
    return "thresholding" in inspect.signature(scheduler_class(config)).parameters


class LateStart:
    """A scheduler of diffusers without its first steps, for what begins with a picture in place of noise.

    All else is the scheduler's own, so that it stands in its place in any pipeline.

    Args:
        scheduler: which one.
        strength: the share of the steps that are taken, in (0, 1]; at least one is.

    Raises:
        UsageError: the scheduler is that of a score model, whose ways to a picture begin in noise alone.

    Source: Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations".
    """

    def __init__(self, scheduler: Any, strength: float) -> None:
        if not hasattr(scheduler, "set_timesteps"):
            raise UsageError(
                "--init-image: a score model begins in noise alone; expected a model that predicts epsilon, v or x0"
            )
        self.scheduler, self.strength, self.left_out = scheduler, strength, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def set_timesteps(self, steps: int, *rest: Any, **options: Any) -> None:
        """As the scheduler's; `timesteps` are those that are left."""
        self.scheduler.set_timesteps(steps, *rest, **options)
        self.left_out = (steps - max(1, int(steps * self.strength))) * self.scheduler.order
        self.set_begin_index()

    def set_begin_index(self, index: int = 0) -> None:
        """As the scheduler's, for those that count steps; counted from the first that is taken."""
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.left_out + index)

    @property
    def timesteps(self) -> "Tensor":
        """Of the steps that are taken."""
        return self.scheduler.timesteps[self.left_out :]

    def begin(self, x0: "Tensor", noise: "Tensor", steps: int) -> "Tensor":
        """What a pipeline is given as its noise so that it begins with x0, noisy as the first step expects it.

        Args:
            x0: scaled latents, (B, C, h, w). noise: standard normal, of the same shape. steps: as many as the pipeline
                will be asked for.
        """
        self.set_timesteps(steps)
        x_t = self.scheduler.add_noise(x0, noise, self.timesteps[:1].expand(len(x0)))
        return x_t / self.scheduler.init_noise_sigma  # which the pipeline multiplies with


def scheduler_class(config: Mapping[str, Any]) -> Any:
    """The class that a scheduler_config.json names: one of diffusers, or for score models our `ScoreSampler`."""
    if config["_class_name"] == "ScoreSampler":
        from sdtune.families.score_sampler import ScoreSampler

        return ScoreSampler
    import diffusers

    return getattr(diffusers, config["_class_name"])


def ends_in_noise(config: Mapping[str, Any]) -> bool:
    """Whether next to nothing is left of the picture at the last timestep; of Stable Diffusion 1.5 it is 1 in 200."""
    from sdtune.diffusion.schedule import NoiseSchedule
    from sdtune.diffusion.ve import read_schedule

    schedule = read_schedule(config)
    return isinstance(schedule, NoiseSchedule) and schedule.alpha_bar[-1].item() < 1e-4


def can_draw(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler takes what the network predicts, tried in one step, and where its schedule ends."""
    import torch

    kind = scheduler_class(config)
    predicts_score = config.get("prediction_type") == "ve_score"
    if predicts_score or kind.__name__ == "ScoreSampler":
        return predicts_score and kind.__name__ == "ScoreSampler"
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        return False
    if kind.__name__ == "HeunDiscreteScheduler" and ends_in_noise(config):
        return False  # it multiplies what two answers differ by with sigma_0 / (2 sigma_1), here some thousand
    scheduler, x_t = kind.from_config(config), torch.zeros(1, 1, 8, 8)
    scheduler.set_timesteps(2)
    try:
        scheduler.step(x_t, scheduler.timesteps[0], x_t)
    except (NotImplementedError, ValueError):  # what they raise for a prediction_type that they do not know
        return False
    return True


def adjusted(scheduler: Mapping[str, Any], prediction: str = "auto", zero_terminal_snr: bool = False) -> dict[str, Any]:
    """A `scheduler_config.json` for another prediction or an ending in pure noise; the betas stay.

    For x0 and zero terminal SNR the sampler becomes DDIM with trailing spacing: not every other knows them. What
    becomes a score model, or ceases to be one, gets the sampler of its new kind.

    Args:
        scheduler: of the base.
        prediction: a name of `Prediction`, or auto: as it is.
        zero_terminal_snr: rescale the schedule so that no signal is left at the last timestep.

    Raises:
        UsageError: zero terminal SNR with epsilon, which says nothing of the picture where there is only noise, or with
            the score, whose noise has no end.

    Source of the last: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.
    """
    changed = dict(scheduler)
    if prediction != "auto":
        changed["prediction_type"] = prediction
    before, predicts = (config.get("prediction_type", "epsilon") for config in (scheduler, changed))
    if zero_terminal_snr:
        if predicts == "ve_score":
            raise UsageError(
                "objective.zero_terminal_snr: the model predicts ve_score, and variance exploding noise buries a "
                "picture without taking it away; remove it"
            )
        if predicts == "epsilon":
            raise UsageError(
                "objective.zero_terminal_snr: the model predicts epsilon, from which no picture follows where there is "
                "nothing but noise; expected v_prediction or sample: objective.prediction=v_prediction"
            )
        changed["rescale_betas_zero_snr"] = True
    if zero_terminal_snr or prediction == "sample" or (predicts != before and "ve_score" in (before, predicts)):
        changed |= own_sampler(predicts)
    return changed
