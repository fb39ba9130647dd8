"""Files that are written whole or not at all, and array files that are damaged."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import files
from utils.errors import UserError
from utils.files import (
    atomic_write,
    check_writable,
    csv_bytes,
    load_arrays,
    read_bytes,
    write_json,
)


@pytest.mark.parametrize("name", "pipe /dev/zero folder missing large a\0b \ud800".split())
def test_only_a_regular_file_is_read(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="list"):
        read_bytes(tmp_path / name, "list", limit=4)
    assert read_bytes(tmp_path / "large", limit=5) == b"12345"


def test_arrays_are_read_and_nothing_else_is(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(3), y=np.array("text"))
    arrays = load_arrays(path)
    assert list(arrays) == ["x", "y"] and arrays["x"].tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="none.npz"):
        load_arrays(tmp_path / "none.npz")
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_arrays(path)
    np.save(path.open("wb"), np.ones(3))
    with pytest.raises(ValueError, match="."):
        load_arrays(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="No data left"):
        load_arrays(path)


def test_json_holds_every_name_and_text_as_it_is(tmp_path):
    path, value = tmp_path / "a.json", {"é漢😀": ["\n", 1.5, None]}
    write_json(path, value)
    assert path.read_bytes() == '{\n "é漢😀": [\n  "\\n",\n  1.5,\n  null\n ]\n}\n'.encode()
    value = {os.fsdecode(b"a\xff"): "\ud800é"}  # a name that is not UTF-8, and half a character
    write_json(path, value)
    assert json.loads(path.read_bytes().decode("utf-8")) == value
    assert "\\ud800é" in path.read_text("utf-8")


def test_no_text_of_a_table_is_a_formula():
    texts = [start + "1+cmd|' /C calc'!A0" for start in "=+-@＝＋－＠"]
    others = ["a=1", "", "-1.50", "-1e-05", "12", -3, 0.5, "- 1.jpg", "-.1.jpg", "\r=1", "\ud800"]
    rows = list(csv.reader(io.StringIO(csv_bytes([texts, others]).decode(), newline="")))
    assert rows[0] == ["'" + text for text in texts]
    assert rows[1] == [*map(str, others[:-4]), "'- 1.jpg", "'-.1.jpg", r"\r=1", r"\ud800"]


class Refused(Exception):
    """Raised inside a block."""


@pytest.fixture
def full_disk():
    """No file can grow over 20 kB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"),
     FileNotFoundError(2, "No such file or directory", "image.jpg"), Refused("other"),
     KeyboardInterrupt()],
    ids=repr)
def test_an_error_inside_the_block_keeps_its_type_and_text(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"earlier")
    with pytest.raises(type(error)) as raised, atomic_write(path) as file:
        file.write(b"x" * 100_000)
        raise error
    assert raised.value is error
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"earlier"


@pytest.mark.parametrize("write", [
    lambda file: file.write(bytes(100_000)),
    lambda file: file.write(bytes(21_000)),  # part of it is still in memory at the end
    lambda file: torch.save(torch.zeros(100_000), file),
    lambda file: np.savez(file, np.zeros(100_000)),
], ids=["bytes", "buffered", "torch", "numpy"])
def test_a_full_disk_is_told_with_the_file_and_leaves_the_earlier_one(tmp_path, full_disk, write):
    path = tmp_path / "a"
    path.write_bytes(b"earlier")
    with pytest.raises(UserError, match="make room") as raised, atomic_write(path) as file:
        write(file)
    assert str(path) in str(raised.value) and "File too large" in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"earlier"


def test_an_error_inside_the_block_is_not_taken_for_the_disk_that_is_full_as_well(tmp_path,
                                                                                  full_disk):
    with pytest.raises(Refused), atomic_write(tmp_path / "a") as file:
        file.raw.write(bytes(20_000))
        file.write(b"this is in memory")
        raise Refused
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as raised, atomic_write(tmp_path / "file" / "a"):
        raise AssertionError("not entered")
    assert str(tmp_path / "file" / "a") in str(raised.value)


def _atomic(path):
    with atomic_write(path):
        pass


@pytest.mark.parametrize("write", [check_writable, _atomic])
def test_a_folder_without_permission_is_told_with_the_folder_that_lacks_it(tmp_path, monkeypatch,
                                                                         write):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # the modes of folders do not bind root
    with pytest.raises(UserError) as raised:
        write(tmp_path / "new" / "a")
    assert f"{tmp_path / 'new' / 'a'}: cannot be written (Permission denied)" in str(raised.value)
    assert f"allow writing in {tmp_path}, or choose another folder" in str(raised.value)


def test_two_writers_of_one_file_each_write_a_whole_one(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as first:
        first.write(b"first" * 10_000)
        with atomic_write(path) as second:
            second.write(b"second" * 10_000)
        assert path.read_bytes() == b"second" * 10_000
        first.write(b"end")
    assert path.read_bytes() == b"first" * 10_000 + b"end"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(files.fcntl is None, reason="Windows renames no open file")
def test_a_file_is_not_taken_for_abandoned_while_it_is_renamed(tmp_path, monkeypatch):
    real, call = os.replace, "import sys; from pathlib import Path; from utils import files; "

    def replace(*paths):
        call_of = [sys.executable, "-c", f"{call}files.remove_abandoned(Path(sys.argv[1]))"]
        subprocess.run([*call_of, tmp_path], check=True, cwd=Path(__file__).parent.parent)
        real(*paths)

    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(files.os, "replace", replace)
    with files.atomic_write(tmp_path / "a", tmp_path / "b") as file:
        file.write(b"2")
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [b"2", b"1"]


def test_the_longest_name_of_a_file_can_be_written(tmp_path):
    path = tmp_path / ("東" * 85)
    assert len(os.fsencode(path.name)) == 255
    write_json(path, 1)
    assert json.loads(path.read_bytes()) == 1


ABANDON = """
import os, signal, sys
from pathlib import Path
from utils.files import atomic_write, temporary_folder
with temporary_folder(Path(sys.argv[1]).parent) as folder, atomic_write(sys.argv[1]) as file:
    (folder / "a").write_text("part")
    file.write(b"x" * 100_000)
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_is_deleted_and_what_is_being_written_is_not(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", ABANDON, tmp_path / "a"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    write_json(tmp_path / "b", 1)
    with files.temporary_folder(tmp_path) as folder:
        assert len(list(tmp_path.glob("*/a"))) == 1 and not list(folder.iterdir())
    assert len(list(tmp_path.iterdir())) == 1 + 1 + 2  # the file, and the folder with its lock
    writer.kill()
    writer.communicate()
    files.remove_abandoned.cache_clear()
    write_json(tmp_path / "c", 1)
    assert {p.name for p in tmp_path.iterdir()} == {"b", "c"}
