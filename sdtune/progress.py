"""What a person sees of a running run: a progress bar, and Ctrl-C that loses nothing."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdtune import distributed

if TYPE_CHECKING:
    from sdtune.run import Run
    from sdtune.train import StepInfo


def show_progress(run: "Run") -> "StepInfo | None":
    """Train under a progress bar with loss, learning rate, rate and time left; returns what the last step did.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the step was ended and a checkpoint written before. It says how to go on.
    """
    from tqdm import tqdm

    info = None
    total = run.recipe.train.steps
    bar = tqdm(total=total, initial=run.step, unit="step", disable=not distributed.is_main(), mininterval=0.5)
    with bar, interrupts() as interrupted:
        for info in run.steps():
            bar.set_postfix(loss=f"{info.loss:.4f}", lr=f"{info.lr:.1e}", refresh=False)
            bar.update()
            if interrupted.is_set() and run.step < total:
                run.keep()
                again = f"sdtune train {run.folder.path / 'run.yaml'} --resume"
                raise KeyboardInterrupt(f"stopped after step {run.step}; go on with: {again}")
    return info


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Within: the first Ctrl-C sets the event, so that the step can end; the second interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)
        print("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
