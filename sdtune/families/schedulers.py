"""Which noise schedule and sampler a model's folder names, when a run changes what its network is asked for."""

from collections.abc import Mapping
from typing import Any

from sdtune.errors import UsageError

# What a model samples with that has no sampler of its own: from scratch, or trained as its base's sampler cannot.
SAMPLER = {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,  # not read under trailing spacing, but pipelines warn of any other value
    "timestep_spacing": "trailing",
}


def adjusted(scheduler: Mapping[str, Any], prediction: str = "auto", zero_terminal_snr: bool = False) -> dict[str, Any]:
    """A `scheduler_config.json` for another prediction or an ending in pure noise; the betas stay.

    For x0 and zero terminal SNR the sampler becomes DDIM with trailing spacing: not every other knows them.

    Args:
        scheduler: of the base.
        prediction: a name of `Prediction`, or auto: as it is.
        zero_terminal_snr: rescale the schedule so that no signal is left at the last timestep.

    Raises:
        UsageError: zero terminal SNR with epsilon, which says nothing of the picture where there is only noise.

    Source of the last: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.
    """
    changed = dict(scheduler)
    if prediction != "auto":
        changed["prediction_type"] = prediction
    if zero_terminal_snr:
        if changed.get("prediction_type", "epsilon") == "epsilon":
            raise UsageError(
                "objective.zero_terminal_snr: the model predicts epsilon, from which no picture follows where there is "
                "nothing but noise; expected v_prediction or sample: objective.prediction=v_prediction"
            )
        changed["rescale_betas_zero_snr"] = True
    if zero_terminal_snr or prediction == "sample":
        changed |= SAMPLER
    return changed
