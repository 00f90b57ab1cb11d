"""The numbers of a run: lines in metrics.jsonl, and the same to the trackers of Accelerate."""

import math
from dataclasses import asdict
from typing import Any

from sdtune import distributed
from sdtune.run_folder import RunFolder
from sdtune.train import StepInfo


class Logbook:
    """Where a run's numbers go.

    Args:
        folder: its metrics.jsonl is written by the main process.
        accelerator: knows the trackers. every: steps between two that are written; the first one always is.
    """

    def __init__(self, folder: RunFolder, accelerator: Any, every: int = 1) -> None:
        self.folder, self.accelerator, self.every = folder, accelerator, every

    def step(self, info: StepInfo) -> None:
        """What an optimizer step did."""
        if info.step % self.every == 0 or info.step == 1:
            rates = {"samples_per_second": round(info.samples / info.seconds, 3), "seconds": round(info.seconds, 4)}
            self.write(asdict(info) | rates)

    def write(self, values: dict[str, Any]) -> None:
        """Numbers by name, "step" among them. Those that are not finite, which JSON does not know, are left out."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if distributed.is_main():
            self.folder.log(values)
        if self.accelerator.log_with:
            if not self.accelerator.trackers:  # opened late: their libraries take seconds to import
                self.accelerator.init_trackers("sdtune")
            self.accelerator.log({name: v for name, v in values.items() if name != "step"}, step=values["step"])

    def close(self) -> None:
        """Let the trackers write what they hold back."""
        if self.accelerator.trackers:
            self.accelerator.end_training()
