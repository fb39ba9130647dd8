"""Files that are written whole or not at all, in places that the user chose; array files."""

import csv
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.console import printable
from utils.errors import UserError, first_line
from utils.logger import LOGGER

INFLATED = 1 << 28  # bytes to which a compressed file of any size may inflate

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FORMULA = re.compile(r"(?!-?[\d.]+(e[+-]?\d+)?$)[=+\-@＝＋－＠]")
"""The start of a text that may be a formula; a number is none."""


@contextmanager
def atomic_write(path: str | Path, previous: str | Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends without an error.

    The folder is created. The data goes to a temporary file in that folder, is flushed to the disk
    and renamed. If the block fails, the disk is full or the process is killed, an earlier file
    ``path`` stays as it was. With ``previous``, a path in the same folder, the earlier file is kept
    under that name. At every moment one of the two names is a whole file.

    An exception of the block is re-raised as it is, unless a write to the file has failed.
    Raises UserError: the file cannot be written.
    """
    path = Path(path)
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        part, raw = create_temporary(path.parent)
    file = io.BufferedWriter(raw)
    try:
        try:
            yield file
        except Exception as error:
            # PyTorch and zipfile report a failed write by errors of their own.
            if raw.failure is None:
                raise
            raise _not_written(path, raw.failure) from error
        with write_errors_named(path):
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file
                file.close()
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(part, path)  # still locked: no other process takes it for abandoned
            file.close()
            _sync_folder(path.parent)
    except BaseException:
        raw.close()  # closing ``file`` first would write again
        with suppress(OSError):
            part.unlink()
        raise


class _RecordingFile(io.FileIO):
    """A file that remembers the error of a failed write."""

    failure: OSError | None = None

    def write(self, data: bytes | memoryview) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Create a folder in ``parent`` that is deleted at the end of the block.

    A locked file beside it shows that it is in use. The folder of a killed process is deleted when
    another one writes into ``parent``. Raises UserError: ``parent`` cannot be written.
    """
    with write_errors_named(parent):
        remove_abandoned(parent)
        lock, file = create_temporary(parent)
    folder = lock.with_suffix("")
    try:
        with write_errors_named(parent):
            folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        file.close()
        lock.unlink(missing_ok=True)


def create_temporary(folder: Path) -> tuple[Path, _RecordingFile]:
    """Create a file, locked to show other processes that it is in use.

    Its name is short: the name of the final file may be as long as the file system allows.
    """
    while True:
        part = folder / f".ssd-{uuid.uuid4().hex[:8]}.part"
        raw = _RecordingFile(part, "x")
        _lock(raw)
        if part.exists():  # else another process deleted it before it was locked
            return part, raw
        raw.close()


@functools.cache
def remove_abandoned(folder: Path) -> None:
    """Delete the temporary files and folders of killed processes in a folder; once per process."""
    for part in folder.glob(f".ssd-{'[0-9a-f]' * 8}.part"):
        with suppress(OSError):  # Windows deletes no file that is open
            with open(part, "r+b") as file:
                abandoned = _lock(file)
            if abandoned:
                part.unlink()
                shutil.rmtree(part.with_suffix(""), ignore_errors=True)  # of `temporary_folder`


def _lock(file: io.FileIO | BinaryIO) -> bool:
    """Lock an open file until it is closed, where the system can; False if it is locked already."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also on a file system without locks
        return False
    return True


def _not_written(path: Path, error: OSError) -> UserError:
    why = error.strerror or error  # the error itself names the temporary file
    # EFBIG, EDQUOT: the limit of a file's size, and of a user's room
    full = error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
    denied = error.errno in (errno.EACCES, errno.EPERM)
    parents = path.absolute().parents
    there = next((each for each in parents if os.path.isdir(each)), path.parent)
    fix = "make room, or " if full else f"allow writing in {there}, or " if denied else ""
    return UserError(f"{path}: cannot be written ({why}); {fix}choose another folder")


@contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """Turn an error of the system in the block into a UserError: ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise _not_written(path, error) from error
    except ValueError as error:  # NUL in the name
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error


def _sync_folder(folder: Path) -> None:
    """Flush renames in a folder to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(path: str | Path, option: str) -> Iterator[None]:
    """Hold a lock on the file ``path``, which is created, to the end of the block or process.

    option: what names another folder, for messages. Windows, which has no POSIX record locks, locks
    nothing. Raises UserError if another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    with write_errors_named(Path(path)):
        file = open(path, "a")
    with file:
        try:
            # Not flock: loading processes, which may outlive this one, would inherit its lock.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{Path(path).parent} is in use by another process; wait for its end, "
                            f"or give another {option}") from error
        except OSError as error:  # a network file system without locks
            LOGGER.warning("%s cannot be locked (%s): let one process at a time write into its "
                           "folder", path, error)
        yield


def read_bytes(path: str | Path, what: str = "file", limit: int = 2**32) -> bytes:
    """Return the content of a regular file; a FIFO or a device, which may block, is not opened.

    what: what messages call the file, such as "image".
    Raises UserError: the file is missing, not regular, larger than ``limit`` bytes or unreadable.
    """
    try:
        status, fault = os.stat(path), None
        if stat.S_ISDIR(status.st_mode):
            fault = "a folder"
        elif not stat.S_ISREG(status.st_mode):
            fault = "a pipe or a device"
        elif status.st_size > limit:
            fault = f"{status.st_size:,} bytes, more than {limit:,}"
        if fault:
            raise UserError(f"{path}: cannot read the {what} ({fault}); give another file")
        with open(path, "rb", opener=_open_at_once) as file:
            return file.read() or b""
    except OSError as error:
        fix = "; copy it there, or correct the name" * isinstance(error, FileNotFoundError)
        raise UserError(f"{path}: cannot read the {what} ({error.strerror}){fix}") from error
    except ValueError as error:  # NUL or a lone surrogate in the name
        raise UserError(f"{str(path)!a}: cannot be the name of the {what} ({error})") from error


def _open_at_once(path: str, flags: int) -> int:
    """Open a file so that reading never waits; files of /proc, which look regular, may."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | Path, what: str = "file", limit: int = 2**32) -> str:
    """Return the text of a regular file; see `read_bytes` and `decode`."""
    return decode(read_bytes(path, what, limit), path)


_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32",
          b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"<\0": "utf-16-le",
          b"\0<": "utf-16-be"}  # the last two begin XML without a byte order mark


def decode(data: bytes, path: str | Path, encoding: str = "utf-8") -> str:
    """Return the text in ``data``, the content of a file. A byte order mark decides the encoding.

    Raises UserError: Python does not know the encoding, or the text is not written in it.
    """
    if data.startswith(tuple(_MARKS)):
        encoding = next(name for mark, name in _MARKS.items() if data.startswith(mark))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: byte 0x{data[error.start]:02X} is not {encoding}"
                        f" ({error.reason}); save the file as UTF-8") from error
    except Exception as error:  # whatever a codec does, such as not being one of text
        raise UserError(f'{path}: encoding "{encoding}" cannot be read ({error}); save the file as'
                        " UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL character; save the file as UTF-8 text")
    return text


def check_writable(path: str | Path) -> None:
    """Create the folder of a file that will be written later; raise UserError if it cannot be."""
    path = Path(path)
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"{path}: cannot be written (a folder); give the name of a file")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON by ``atomic_write``.

    Only lone surrogates, which come from file names that are not UTF-8, are escaped.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def check_archive(path: str | Path) -> None:
    """Compare a zip file's contents with its checksums; pass any other file.

    Raises Exception: of some type: the file is damaged, or would inflate beyond any honest size.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise FileNotFoundError(f"{path} is missing, or no regular file")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return
        with zipfile.ZipFile(file) as archive:
            inflated = sum(info.file_size for info in archive.infolist())
            if inflated > max(INFLATED, 50 * os.path.getsize(path)):
                raise ValueError(f"its {os.path.getsize(path)} bytes inflate to {inflated}")
            # PyTorch writes all of them as 0 if it is told to compute none.
            if any(info.CRC for info in archive.infolist()) and (name := archive.testzip()):
                raise ValueError(f"{name} in it does not match its checksum")


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """Return rows as CSV, control characters escaped.

    A ' stands before a text that spreadsheets would take for a formula, as OWASP says.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        ["'" * bool(_FORMULA.match(cell)) + cell for cell in map(printable, row)] for row in rows
    )
    return text.getvalue().encode()


def load_arrays(path: str | Path, **kinds: tuple[str, int]) -> dict[str, np.ndarray]:
    """Return all arrays of an .npz file; no pickle is opened.

    kinds: name of an array that must be there -> letters of its NumPy kinds, and its dimensions.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no .npz file, cut off or damaged, or an array is of another kind.
    """
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except OSError:
        raise
    # zipfile, its decompressors and NumPy raise a dozen types for damaged files.
    except Exception as error:
        raise ValueError(str(error) or repr(error)) from error
    for name, (letters, dimensions) in kinds.items():
        found = arrays.get(name)
        if found is None or found.dtype.kind not in letters or found.ndim != dimensions:
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"the array {name!r} is {what}")
    return arrays


def file_digest(path: str | Path, name: str) -> str:
    """Return the hex digest of a file; ``name`` is "md5", "sha256" or "git" (a blob id)."""
    path = Path(path)
    if name == "git":
        # Git hashes the size before the bytes.
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        digest = {"md5": hashlib.md5, "sha256": hashlib.sha256}[name](usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
