"""Files that appear whole or not at all, in places that the user chose; array files read back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import UserError
from utils.logger import LOGGER


@contextmanager
def atomic_write(path: str | Path, previous: str | Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of ``path`` when the block ends without an error.

    Its folder is made. The file is written beside its place, flushed to the disk, and renamed: a
    failure (disk full, the process killed) leaves an earlier file of that name as it was. With
    ``previous``, a path in the same folder, the earlier file is kept under that name; whatever
    happens, one of the two names is a whole file.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):  # the rename itself reaches the disk with the folder
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        # PyTorch's writer reports a full disk as a RuntimeError.
        if isinstance(error, OSError | RuntimeError):
            raise UserError(
                f"{path} could not be written ({error}); make room, or choose another folder"
            ) from error
        raise


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the file ``path``, which is made, against other processes that would hold it.

    It is free again when this process ends, however that comes. Systems without POSIX record locks
    (Windows) lock nothing.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        try:
            # Unlike flock's, these are not inherited by loading processes, which live on a little.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"{Path(path).parent} is in use by another process; wait for its end, or give "
                "another --date"
            ) from error
        except OSError as error:  # a network file system without locks
            LOGGER.warning("%s cannot be locked (%s): do not train twice into it", path, error)
        yield


def check_writable(path: str | Path) -> None:
    """Make the folder of a file that is to be written later; UserError where that will fail."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written (a folder, or no permission)")


def write_json(path: str | Path, value) -> None:
    """Write a value as JSON by ``atomic_write``.

    Only the lone surrogates of file names that are not UTF-8 are escaped, as JSON has it.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; no pickle is opened.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else, cut off or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except OSError:
        raise
    # zipfile, its decompressors and NumPy raise a dozen kinds for what they do not expect.
    except Exception as error:
        raise ValueError(str(error) or repr(error)) from error


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
