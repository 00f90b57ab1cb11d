"""What a command asks of the libraries under it before they are imported: to start fast, and to keep quiet.

Only commands call this; who imports sdtune as a library keeps the libraries as they are.
"""

import logging
import sys
from functools import partial

# Log messages that tell a user of sdtune nothing: (logger, a part of the message).
SAYS_NOTHING = (
    ("transformers.utils.import_utils", "requires torchvision (not installed); falling back to"),  # and rightly so
    ("diffusers.models.modeling_utils", "should be kept in float32: []"),  # an empty list
    ("diffusers.loaders.lora_base", "No LoRA keys associated to"),  # `check_fit` has looked at every key
    ("diffusers.loaders.peft", "No LoRA keys associated to"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),  # it has others
    ("bitsandbytes.autograd._functions", "inputs will be cast from"),  # at every step
)


def prepare(*, eight_bits: bool = False) -> None:
    """Call this first in a command that trains or draws.

    Args:
        eight_bits: bitsandbytes will be needed.
    """
    if eight_bits:
        let_in("bitsandbytes")
    else:
        leave_out("bitsandbytes")
    silence()


def leave_out(package: str) -> None:
    """Let the libraries take a package for one that is not installed, unless it is imported already.

    peft imports bitsandbytes wherever it finds it: 2.5 seconds, and a warning about kernels that nobody asked for.
    """
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def let_in(package: str) -> None:
    """Take `leave_out` back."""
    if sys.modules.get(package, package) is None:
        del sys.modules[package]


def silence() -> None:
    """Keep back the messages of `SAYS_NOTHING`, and the bars of what takes no time. Other warnings stay."""
    for logger, part in SAYS_NOTHING:
        logging.getLogger(logger).addFilter(partial(has_not, part))

    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    diffusers_logging.disable_progress_bar()  # of the parts of a checkpoint in one file
    disable_progress_bar()  # of weights going from the disk to memory; it switches off those of downloads too
    enable_progress_bars()


def has_not(part: str, record: logging.LogRecord) -> bool:
    """Whether a log message is to be shown: it has not this part."""
    return part not in record.getMessage()
