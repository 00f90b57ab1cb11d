"""Which process this is: alone without torch, together under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

ALONE = """
import sys
from sdtune import distributed
assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
distributed.barrier()
assert distributed.from_main([1]) == [1]
print("alone")
assert not {"torch", "accelerate"} & set(sys.modules)
"""

TOGETHER = """
import pathlib, sys, time
from sdtune import distributed
folder = pathlib.Path(sys.argv[1])
if distributed.is_main():
    time.sleep(0.5)
    (folder / "made").touch()
distributed.barrier()
assert (folder / "made").exists()
assert distributed.from_main({"said": distributed.rank()}) == {"said": 0}
(folder / f"{distributed.rank()} of {distributed.world()}").touch()
"""


def test_one_process_needs_neither_torch_nor_accelerate():
    ran = subprocess.run([sys.executable, "-c", ALONE], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "alone\n"


def test_two_processes_on_a_machine_without_gpu(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run([*command, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "0 of 2").exists() and (tmp_path / "1 of 2").exists()
