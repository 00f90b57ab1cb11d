"""Digests of pictures: read once, and again when anything about the file changed."""

import os
import time
from pathlib import Path

import pytest

from sdtune.data import contents
from sdtune.data.contents import content_digest, content_digests
from sdtune.data.picture import Picture
from sdtune.errors import DataError


def picture(path: Path) -> Picture:
    return Picture(path.name, ("a dog",), 1.0, lambda: str(path), str(path.parent))


@pytest.fixture
def old(tmp_path: Path) -> list[Path]:
    """Three files; the test goes on when they are no longer young."""
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * 10)
    return files


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on all files are old enough to be trusted."""
    monkeypatch.setattr(contents, "YOUNG", -1.0)


def test_equal_bytes_have_equal_digests(tmp_path: Path, old: list[Path]) -> None:
    in_archive = Picture("x", ("a dog",), 1.0, lambda: bytes([1]) * 10, "somewhere")
    found = content_digests([*map(picture, old), picture(old[0]), in_archive], tmp_path / "notes")
    assert len(found) == 4 and len(set(found.values())) == 3
    assert found["somewhere", "x"] == found[str(tmp_path), "1.png"] == content_digest(bytes([1]) * 10)


def test_files_are_read_once(tmp_path: Path, old: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    notes = tmp_path / "notes"
    before = content_digests(map(picture, old), notes)
    (book,) = notes.iterdir()
    written = book.stat().st_mtime_ns
    real, reads = content_digest, []
    monkeypatch.setattr(contents, "content_digest", lambda content: reads.append(content) or real(content))
    assert content_digests(map(picture, old), notes) == before
    assert len(reads) == 1 and reads[0] == str(tmp_path).encode()  # the name of the notebook
    assert book.stat().st_mtime_ns == written


def test_other_bytes_under_the_same_name_size_and_date(
    tmp_path: Path, old: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    before = content_digests(map(picture, old), tmp_path / "notes")
    stat = old[1].stat()
    time.sleep(0.02)  # longer than a tick of the file system's clock
    old[1].write_bytes(b"y" * 10)
    os.utime(old[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert old[1].stat().st_size == stat.st_size and old[1].stat().st_mtime_ns == stat.st_mtime_ns
    after = content_digests(map(picture, old), tmp_path / "notes")
    assert [key for key in before if before[key] != after[key]] == [(str(tmp_path), "1.png")]


def test_young_files_are_not_trusted(tmp_path: Path, old: list[Path]) -> None:
    content_digests(map(picture, old), tmp_path / "notes")
    assert not (tmp_path / "notes").exists()


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.png cannot be read \(No such file or directory\); put it back"):
        content_digests([picture(tmp_path / "gone.png")], tmp_path / "notes")
