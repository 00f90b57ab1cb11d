"""Stopped at any moment, by kill -9 too, and started again: nothing lost, nothing twice, the same result."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools import caption, caption_result
from data_tools.caption import command
from data_tools.caption_journal import Journal
from data_tools.captioner import Captioner
from sdtune.errors import DataError, UsageError, WeightsError

NAMES = [f"{number % 3}/{number:03d}.png" for number in range(60)]


def result(folder: Path) -> tuple[bytes, bytes]:
    """What a run leaves, but for the dates."""
    assert not (folder / ".caption").exists()
    return (folder / "metadata.jsonl").read_bytes(), (folder / "rejected.jsonl").read_bytes()


def journalled(folder: Path) -> list[str]:
    """Names in all journals; a half line at the end counts for nothing."""
    found: list[str] = []
    for file in (folder / ".caption").glob("done-*.jsonl"):
        found += [json.loads(line)["file_name"] for line in file.read_bytes().split(b"\n")[:-1]]
    return found


def many(fill: Callable[..., Path]) -> Path:
    photos = fill(*NAMES)
    (photos / "0/bad.png").write_bytes(b"no picture")
    return photos


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_killed_again_and_again(fill, blip, tmp_path):
    photos, options = many(fill), {"model": str(blip), "max_tokens": 12, "batch_size": 2, "workers": 1}
    assert command(photos, out=tmp_path / "unbroken", **options) == 1
    out, before = tmp_path / "set", []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "data_tools.caption", "data_tools.captioner"])
    for least in (0, 1, 10, 25, 50):
        child = context.Process(target=command, args=(photos,), kwargs={"out": out, **options})
        child.start()
        deadline = time.monotonic() + 200
        while child.is_alive() and time.monotonic() < deadline:
            if (out / ".caption/job.json").exists() and len(journalled(out)) >= least:
                break
            time.sleep(0.002)
        child.kill()
        child.join()
        assert child.exitcode == -9, "it ended before it was killed"
        now = journalled(out)
        assert set(before) <= set(now) and not (out / "metadata.jsonl").exists()
        captioned = [name for name in now if "bad" not in name]
        assert len(captioned) == len(set(captioned))
        before = now
    assert len(before) >= 50
    assert command(photos, out=out, **options) == 1
    assert result(out) == result(tmp_path / "unbroken")


def test_half_a_line_and_other_processes_journals(fill, blip, tmp_path, monkeypatch):
    photos, options = many(fill), {"model": str(blip), "max_tokens": 4, "num_beams": 1}
    command(photos, out=tmp_path / "unbroken", **options)
    rows = [json.loads(line) for line in result(tmp_path / "unbroken")[0].splitlines()]
    write, seen = Captioner.write, []

    def stop_soon(self: Captioner, prepared: Any, names: Any, size: int) -> Any:
        if len(seen) > 20:
            raise KeyboardInterrupt
        seen.extend(names)
        return write(self, prepared, names, size)

    monkeypatch.setattr(Captioner, "write", stop_soon)
    with pytest.raises(KeyboardInterrupt):
        command(photos, out=tmp_path / "set", **options)
    place = tmp_path / "set/.caption"
    lines = (place / "done-0.jsonl").read_bytes()
    (place / "done-0.jsonl").write_bytes(lines + b'{"file_name": "2/0')
    last = [{"file_name": row["file_name"], "captions": [row["text"]]} for row in rows[-10:]]
    (place / "done-3.jsonl").write_text("".join(json.dumps(line) + "\n" for line in last) + "\0\0\0\n{")
    again: list[str] = []
    monkeypatch.setattr(Captioner, "write", lambda *a: again.extend(a[2]) or write(*a))
    assert command(photos, out=tmp_path / "set", **options) == 1
    assert sorted([*again, *seen, *(line["file_name"] for line in last)]) == sorted(NAMES)
    assert result(tmp_path / "set") == result(tmp_path / "unbroken")


@pytest.mark.parametrize("beside", [True, False])
def test_stopped_while_the_result_is_made(fill, blip, tmp_path, monkeypatch, beside):
    photos = fill("b.png", "a.png")
    out = photos if beside else tmp_path / "set"
    (photos / "metadata.jsonl").write_text('{"file_name": "b.png", "weight": 2.0}\n{"file_name": "b.png", "x": 1}\n')
    (photos / "bad.png").write_bytes(b"")
    for step in ("write_rejected", "add_report"):
        real = getattr(caption_result, step)
        monkeypatch.setattr(caption_result, step, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command(photos, out=out, model=str(blip))
        monkeypatch.setattr(caption_result, step, real)
        first = (out / "metadata.jsonl").read_bytes()
    monkeypatch.setattr(Journal, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command(photos, out=out, model=str(blip))
    monkeypatch.undo()
    assert command(photos, out=out, model=str(blip)) == 1
    assert (out / "metadata.jsonl").read_bytes() == first and first.count(b"\n") == 2
    assert len(json.loads((out / "captions.json").read_text())["runs"]) == 1
    assert not (out / ".caption").exists()


def test_other_settings_are_refused_or_begin_anew(fill, blip, tmp_path, monkeypatch):
    photos, write = fill("a.png", "b.png"), Captioner.write
    monkeypatch.setattr(caption, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command(photos, model=str(blip))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"holds 2 captions of a run that was stopped.*prompt: '' before, 'a dog' now"):
        command(photos, model=str(blip), prompt="a dog")
    assert len(journalled(photos)) == 2
    seen: list[str] = []
    monkeypatch.setattr(Captioner, "write", lambda *a: seen.extend(a[2]) or write(*a))
    assert command(photos, model=str(blip), prompt="a dog", overwrite=True) == 0
    assert seen == ["a.png", "b.png"]
    assert json.loads((photos / "captions.json").read_text())["runs"][0]["prompt"] == "a dog"


def test_what_fails_at_once_leaves_nothing(fill, tmp_path):
    photos = fill("a.png")
    (tmp_path / "nothing").mkdir()
    for out in (photos, tmp_path / "set"):
        with pytest.raises(WeightsError, match="nothing"):
            command(photos, out=out, model=str(tmp_path / "nothing"))
    assert [path.name for path in photos.iterdir()] == ["a.png"] and not (tmp_path / "set").exists()


def test_one_command_at_a_time(fill, blip):
    photos = fill("a.png")
    from filelock import FileLock

    (photos / ".caption").mkdir()
    with FileLock(photos / ".caption/lock"), pytest.raises(DataError, match="another command captions into"):
        command(photos, model=str(blip))
    assert command(photos, model=str(blip)) == 0


def test_two_processes_make_the_same_file(fill, blip, tmp_path):
    photos, options = many(fill), ["--model", str(blip), "--max-tokens", "5", "--sample", "--batch-size", "4"]
    command(photos, out=tmp_path / "one", model=str(blip), max_tokens=5, sample=True, batch_size=4)
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdtune"]
    ran = subprocess.run(
        [*launch, "caption", str(photos), "--out", str(tmp_path / "two"), *options],
        env=environment, capture_output=True, text=True, timeout=600,
    )
    assert "60 captioned, 0 kept, 1 rejected" in ran.stdout, ran.stderr
    assert json.loads((tmp_path / "two/captions.json").read_text())["runs"][0]["processes"] == 2
    assert result(tmp_path / "two") == result(tmp_path / "one")
