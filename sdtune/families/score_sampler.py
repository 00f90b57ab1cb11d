"""What stands where other pipelines have a scheduler, when the model is one of scores."""

from collections.abc import Mapping
from typing import Any

from sdtune.diffusion.ve import VarianceExploding, read_schedule
from sdtune.diffusion.ve_sampling import VE_SAMPLERS
from sdtune.errors import WeightsError


class ScoreSampler:
    """A way of `sdtune.diffusion.ve_sampling` from noise to a picture.

    Args:
        schedule: of the model. method: a name of `VE_SAMPLERS`.
    """

    def __init__(self, schedule: VarianceExploding, method: str) -> None:
        self.schedule, self.method = schedule, method

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ScoreSampler":
        """As a `scheduler_config.json` of a score model has it; without `method` the fastest, probability flow.

        Raises:
            WeightsError: a method that is not known.
        """
        schedule, method = read_schedule(config), config.get("method", "probability-flow")
        assert isinstance(schedule, VarianceExploding)
        if method not in VE_SAMPLERS:
            raise WeightsError(
                f"the scheduler's configuration has method = {method!r}; expected one of {', '.join(VE_SAMPLERS)}"
            )
        return cls(schedule, method)
