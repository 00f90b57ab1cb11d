"""metadata.jsonl: written whole, read with the line of the fault."""

import json
import os

import pytest

from sdtune.data.atomic import write_atomically
from sdtune.data.metadata import list_files, read_rows, write_rows
from sdtune.errors import DataError

ROWS = [
    {"file_name": "dogs/rex.jpg", "text": "a dog – größer als “zwei” \u2028 Katzen", "weight": 0.5, "box": [1, 2]},
    {"file_name": "dogs/rex.jpg", "text": "Rex", "mask_file_name": "masks/rex.png"},
    {"file_name": "cat.png"},
]


def test_rows_come_back_as_they_were(tmp_path):
    write_rows(tmp_path, ROWS)
    assert read_rows(tmp_path) == ROWS
    assert read_rows(tmp_path / "metadata.jsonl") == ROWS
    content = (tmp_path / "metadata.jsonl").read_bytes()
    assert content.endswith(b"}\n") and b"\r" not in content and content.count(b"\n") == 3
    assert "größer" in content.decode()


def test_names_have_forward_slashes(tmp_path):
    write_rows(tmp_path, [{"file_name": "dogs\\rex.jpg", "mask_file_name": "masks\\rex.png", "text": "a\\b"}])
    expected = [{"file_name": "dogs/rex.jpg", "mask_file_name": "masks/rex.png", "text": "a\\b"}]
    assert [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()] == expected
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a\\\\b.png"}\n')
    assert read_rows(tmp_path)[0]["file_name"] == "a/b.png"


def test_byte_order_mark_and_missing_last_newline(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.png"}\r\n\r\n{"file_name": "b.png"}')
    assert [row["file_name"] for row in read_rows(tmp_path)] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "b.png", "text": }', "line 2 is not JSON"),
        ('["b.png"]', "line 2 names no picture"),
        ('{"text": "no name"}', "line 2 names no picture"),
        ('{"file_name": 7}', "line 2 names no picture"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + line)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path)


def test_no_file_and_not_text(tmp_path):
    with pytest.raises(DataError, match=r"metadata\.jsonl does not exist; make it with: sdtune caption"):
        read_rows(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_rows(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_rows(tmp_path, ROWS)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DataError, match="No space left on device; make room"):
        write_rows(tmp_path, ROWS[:1])
    assert read_rows(tmp_path) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_what_is_written(tmp_path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "deep" / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "file").stat().st_mode & 0o777 == 0o644


def test_hidden_files_are_not_listed(tmp_path):
    for name in ["b.png", "a/c.png", ".hidden.png", ".git/d.png", "__MACOSX/e.png", "__f.png"]:
        write_atomically(tmp_path / name, b"")
    assert list_files(tmp_path) == ["__f.png", "a/c.png", "b.png"]


def test_links_to_folders_are_followed_but_not_round_and_round(tmp_path):
    photos, other = tmp_path / "photos", tmp_path / "other"
    for name in ["photos/a.png", "photos/sub/b.png", "other/c.png"]:
        write_atomically(tmp_path / name, b"")
    for link, to in [("x", photos), ("y", photos), ("sub/up", photos), ("more", other), ("again", other)]:
        (photos / link).symlink_to(to)
    (other / "back").symlink_to(photos / "sub")
    assert list_files(photos) == [
        *("a.png", "again/back/b.png", "again/c.png", "more/back/b.png", "more/c.png", "sub/b.png"),
    ]
