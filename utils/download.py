"""Verified downloads and safe unpacking."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from utils.errors import UserError
from utils.files import file_digest

SECONDS_OF_SILENCE = 30
"""A server that sends nothing for so long is given up."""
_DRIVE = re.compile(r"https://drive\.google\.com/file/d/([\w-]+)")


def fetch(url: str, path: str | Path, checksum: str | None,
          check: Callable[[Path], str] | None = None) -> Path:
    """Download ``url`` to ``path``, verify it, and return the path. A good file is kept as it is.

    The file takes its place after it was verified; until then an earlier file stays. Files of
    Google Drive (https://drive.google.com/file/d/ID/view) need the package gdown, which resumes a
    download that was cut short. Other files start anew.

    Args:
        checksum: "md5:", "sha256:" or "git:" (a blob id), and the hex digest or its beginning; None
            if none is known.
        check: returns what else is wrong with a file, "" if nothing is.

    Raises:
        UserError: the file cannot be downloaded, written or verified.
        ValueError: neither a checksum nor a check.
    """
    if checksum is None and check is None:
        raise ValueError(f"nothing would verify {url}; give a checksum or a check")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    by_hand = f"download it by hand and put it at {path}"
    try:
        if path.is_file():
            reason = _fault(path, checksum, check)
            if not reason:
                return path
            print(f"{path} is not the file wanted ({reason}): replacing it", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        if drive := _DRIVE.match(url):
            _download_from_drive(drive[1], url, part, by_hand)
        else:
            _download(url, part)
        if reason := _fault(part, checksum, check):
            raise UserError(
                f"{url} gave {part.stat().st_size} bytes that are not {path.name} ({reason}); try "
                f"again later or another mirror, or {by_hand}"
            )
        os.replace(part, path)
        return path
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"cannot download {url} ({error}); try again, or {by_hand}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _fault(path: Path, checksum: str | None, check: Callable[[Path], str] | None) -> str:
    """Return what is wrong with a file, "" if nothing is."""
    with path.open("rb") as file:
        start = file.read(100).lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page"
    if checksum is not None:
        name, _, expected = checksum.partition(":")
        found = file_digest(path, name)
        if not found.startswith(expected):
            return f"it has the {name} {found}, not {expected}"
    return check(path) if check else ""


def _download(url: str, part: Path) -> None:
    from torch.hub import download_url_to_file

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)  # torch.hub sets none
    try:
        # In a folder of its own: torch.hub leaves a temporary file behind if the URL is not valid.
        with TemporaryDirectory(dir=part.parent) as folder, redirect_stderr(sys.__stderr__):
            file = Path(folder, part.name)
            download_url_to_file(url, str(file), progress=sys.stderr.isatty())
            os.replace(file, part)
    finally:
        socket.setdefaulttimeout(before)


def _download_from_drive(file_id: str, url: str, part: Path, by_hand: str) -> None:
    """Download by gdown, which knows Google Drive's confirmation pages."""
    try:
        import gdown
    except ImportError as error:
        raise UserError(
            f"{url} has a page to confirm before the download, which the package gdown can do: "
            f"pip install gdown and run again, or {by_hand}"
        ) from error
    try:
        with redirect_stderr(sys.__stderr__):  # its progress needs control characters
            # Without the cookies of the user's browser.
            done = gdown.download(id=file_id, output=str(part), resume=True, use_cookies=False)
    except Exception as error:  # gdown and requests raise various types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot download {url} ({reason}); try again, or {by_hand}") from error
    if done is None:  # releases before 5.0 print the reason
        raise UserError(f"cannot download {url}: Google Drive refuses it at present; {by_hand}")


def unpacking_mark(path: str | Path, directory: str | Path) -> Path:
    """Return the file that exists in ``directory`` until ``path`` is unpacked whole."""
    return Path(directory) / f".{Path(path).name}.unpacking"


def extract_tar(path: str | Path, directory: str | Path) -> None:
    """Unpack an uncompressed tar archive into ``directory``, over files of the same names.

    Python's filter "data" must accept every member, so nothing is written elsewhere; otherwise
    nothing is unpacked. ``unpacking_mark`` stays if the work is cut short.

    Raises:
        UserError: no whole tar archive, a refused member, no room, or a Python without the filter.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"{path} cannot be unpacked safely by Python {platform.python_version()}; use 3.10.12, "
            "3.11.4 or newer"
        )
    mark = unpacking_mark(path, directory)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                tarfile.data_filter(member, str(directory))
                # The filter lets links pass, and has had holes for them; no data set needs any.
                if not (member.isreg() or member.isdir()):
                    raise UserError(f"{path}: refused to unpack ({member.name} is a link or a "
                                    "device); delete the file and get it from a source you trust")
            Path(directory).mkdir(parents=True, exist_ok=True)
            mark.touch()
            archive.extractall(directory, filter="data")
            mark.unlink()
    except tarfile.FilterError as error:
        raise UserError(
            f"{path}: refused to unpack ({error}); delete the file and get it from a source you "
            "trust"
        ) from error
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is no whole tar archive ({error}); delete it and get it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot unpack {path} into {directory} ({error}); make room or choose another folder, "
            "and run again"
        ) from error
