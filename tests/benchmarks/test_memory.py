"""benchmarks/memory.py: its counts, on single steps."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def test_counts_show_what_is_saved() -> None:
    spec = importlib.util.spec_from_file_location("memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(memory)
    plain, checkpointed, packed = (
        memory.measure(memory.ROWS[row], steps=1, batch=1)
        for row in ("LoRA", "LoRA, gradient checkpointing", "LoRA, quantize nf4")
    )
    assert 4 * packed["weights_bytes"] < 2.5 * plain["weights_bytes"]
    assert checkpointed["weights_bytes"] == plain["weights_bytes"]
    assert 2 * checkpointed["kept_bytes"] < plain["kept_bytes"]
    assert plain["state_bytes"] >= 8 * plain["learning"]
