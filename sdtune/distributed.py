"""Which of the processes this is, and waiting for the others.

Under `accelerate launch` or `torchrun` a run has several processes; else there is one, and nothing here imports torch
or accelerate.

    if is_main():                   # the main process makes the files, the others then find them
        fill_class_folder(...)
    barrier()
"""

import os
import sys
from typing import Any


def rank() -> int:
    """Number of this process among all of the run, from 0."""
    group = _group()
    return group.get_rank() if group else 0


def world() -> int:
    """How many processes the run has."""
    group = _group()
    return group.get_world_size() if group else 1


def is_main() -> bool:
    """Whether this is the process that writes files and speaks: rank 0."""
    return rank() == 0


def barrier() -> None:
    """Waits until all processes are here."""
    group = _group()
    if group and group.get_backend() == "nccl":
        import torch

        group.barrier(device_ids=[torch.cuda.current_device()])
    elif group:
        group.barrier()


def from_main(value: Any) -> Any:
    """What the main process passes, in all of them: any object that can be pickled."""
    group = _group()
    if not group:
        return value
    values = [value]
    group.broadcast_object_list(values)
    return values[0]


def _group() -> Any:
    """`torch.distributed` where there are several processes, joined on first use; else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _joined():
        import torch
        from accelerate import PartialState

        # Without a GPU accelerate joins only when told to, and each process would take itself for the only one.
        use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
        PartialState(cpu=use_cpu or not torch.accelerator.is_available())
    return sys.modules["torch.distributed"] if _joined() else None


def _joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
