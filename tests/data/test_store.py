"""Rows on disk: read as they were written, by anybody, and whole whatever happens to the writer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdtune.data.store import Store
from sdtune.errors import DataError

ROOT = Path(__file__).parents[2]
COLUMNS = ("mean", "std")


def row(number: int, side: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2, side, side), float(number)), torch.full((2, side, side), number / 8)


def test_rows_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows", COLUMNS)
    assert "a" not in store and len(store) == 0 and not store.folder.exists()
    store.write({"a": row(1), "b": row(2), "wide": row(3, side=6)}, {"a": (480, 640)})
    for one in (store, Store(tmp_path / "rows", COLUMNS)):
        assert len(one) == 3 and one.note("a") == [480, 640] and one.note("b") == [] and one.note("c") is None
        for key, expected in {"a": row(1), "b": row(2), "wide": row(3, side=6)}.items():
            assert all(torch.equal(got, part) for got, part in zip(one.read(key), expected, strict=True))
    with pytest.raises(KeyError):
        store.read("c")


def test_what_is_rounded_and_what_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path, ("x",))
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1000, generator=generator)
    brain = torch.randn(1000, generator=generator).bfloat16()
    large = torch.tensor([1e5, 1.0 / 3])
    store.write({"plain": (plain,), "brain": (brain,), "large": (large,)})
    (read,) = store.read("plain")
    assert read.dtype == torch.float32 and torch.equal(read, plain.half().float())
    assert torch.equal(store.read("brain")[0], brain)  # in their own format
    assert torch.equal(store.read("large")[0], large)  # beyond float16: as they are
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert sizes[-1] < 2500  # 1000 numbers of 2 bytes, and a header


def test_others_write_too(tmp_path: Path) -> None:
    mine, theirs = Store(tmp_path, COLUMNS), Store(tmp_path, COLUMNS)
    theirs.write({"a": row(1)})
    mine.write({"a": row(7), "b": row(2)})  # looks first: what is there stays
    assert torch.equal(mine.read("a")[0], row(1)[0])
    assert "b" not in theirs
    theirs.refresh()
    assert "b" in theirs and len(list(tmp_path.glob("*.safetensors"))) == 2
    mine.write({"a": row(7)})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_the_first_of_two_counts_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [Store(tmp_path, COLUMNS) for _ in range(2)]
    monkeypatch.setattr(Store, "refresh", lambda self: None)  # both look before one of them has written
    for number, store in enumerate(stores):
        store.write({"a": row(number)})
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert torch.equal(Store(tmp_path, COLUMNS).read("a")[0], row(0)[0])


WRITER = """
import sys, torch
from pathlib import Path
from sdtune.data.store import Store
store = Store(Path(sys.argv[1]), ("x",))
for number in range(100_000):
    store.write({f"{number} {i}": (torch.full((50_000,), float(number)),) for i in range(4)})
    print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_shards(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        written = 0
        while written < 5:
            written = int(writer.stdout.readline())
        time.sleep(0.013)
        writer.send_signal(signal.SIGKILL)
        written = max([written, *(int(line) for line in writer.stdout.read().split() if line.isdigit())])
    store = Store(tmp_path, ("x",))
    assert len(store) >= 4 * (written + 1) and len(store) % 4 == 0
    for number in range(len(store) // 4):
        assert all((store.read(f"{number} {i}")[0] == number).all() for i in range(4))


def test_what_killed_writers_began_is_removed(tmp_path: Path) -> None:
    for name, age in ((".old.part", 7200), (".new.part", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Store(tmp_path, COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == [".new.part"]


def test_damage_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows", COLUMNS)
    store.write({"a": row(1)})
    (shard,) = store.folder.iterdir()
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match=r"a part of the cache, cannot be read .*; remove it if it is there"):
        store.read("a")
    (store.folder / "cut.safetensors").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"cut.safetensors, a part of the cache, cannot be read .*; remove it"):
        Store(store.folder, COLUMNS)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*; .* bytes were to be added.*train.cache_dir=FOLDER"):
        Store(tmp_path / "file" / "rows", COLUMNS).write({"a": row(1)})
