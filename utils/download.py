"""Resumable, verified downloads and safe unpacking, on the standard library alone."""

from __future__ import annotations

import hashlib
import http.client
import inspect
import os
import re
import socket
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from utils.errors import UserError

CHUNK = 1 << 16
# name -> hash object for a file of `size` bytes
HASHES = {
    "md5": lambda size: hashlib.md5(usedforsecurity=False),
    "sha256": lambda size: hashlib.sha256(),
    # the id that git gives a file: its size is hashed before its bytes
    "git": lambda size: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False),
}
_DRIVE = re.compile(r"https://drive\.google\.com/file/d/([\w-]+)")


class _TransferError(Exception):
    """One request failed in a way that another try may mend."""


def file_digest(path: str | Path, name: str) -> str:
    """Hex digest of a file by the hash called `name` (a key of HASHES)."""
    path = Path(path)
    state = HASHES[name](path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def fetch(
    url: str,
    path: str | Path,
    checksum: str | None,
    *,
    check: Callable[[Path], str] | None = None,
    timeout: float = 30.0,
    tries: int = 5,
    backoff: float = 1.0,
) -> Path:
    """Download `url` to `path` and return the path; a good file already there is not fetched again.

    The bytes go to `<path>.part`, which a later call resumes; it takes the place of `path` only
    after it was found right, so an older file survives every failure. Files of Google Drive
    (https://drive.google.com/file/d/ID/view) are had by the package gdown.

    Args:
        checksum: "name:hex", name a key of HASHES, hex the digest or its beginning, e.g.
            "md5:c52e279531787c972589f7e41ab4ae64"; None where none is known.
        check: says what else is wrong with a file, "" if nothing is.
        timeout: seconds without a byte after which a request is given up.
        tries: failed requests in a row, none of them with a new byte, before giving up.
        backoff: seconds before the first new try; doubled before every further one.

    Raises:
        UserError: the file cannot be had, written or verified.
        ValueError: `checksum` names an unknown hash, or there is neither a checksum nor a check.
    """
    path = Path(path)
    name, _, expected = (checksum or "").partition(":")
    if checksum is None and check is None:
        raise ValueError(f"nothing would verify {url}; give a checksum or a check")
    if checksum is not None and (name not in HASHES or not expected):
        raise ValueError(f"checksum {checksum!r} names none of {sorted(HASHES)}")
    part = path.with_name(path.name + ".part")
    by_hand = f"download it by hand and put it at {path}"

    def fault(file: Path) -> str:
        if checksum is not None:
            found = file_digest(file, name)
            if not found.startswith(expected):
                return f"it has the {name} {found}, not {expected}"
        return check(file) if check else ""

    def download() -> bool:
        if drive := _DRIVE.match(url):
            return _download_from_drive(drive[1], url, part, timeout, by_hand)
        return _download(url, part, timeout, tries, backoff, by_hand)

    try:
        if path.is_file():
            if not (reason := fault(path)):
                return path
            _say(f"{path} is not the file wanted ({reason}): fetching it again")
        path.parent.mkdir(parents=True, exist_ok=True)
        resumed = download()
        reason = fault(part)
        if reason and resumed:
            _say(f"{part} was continued but is not the file wanted ({reason}): starting over")
            part.unlink()
            download()
            reason = fault(part)
        if reason:
            size = part.stat().st_size
            part.unlink()
            raise UserError(
                f"{url} gave {size} bytes that are not {path.name} ({reason}): "
                f"try again later or another mirror, or {by_hand}"
            )
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"cannot store {url} as {path}: {error.strerror or error}; "
            "make room or choose another folder and run again (what has arrived is kept)"
        ) from error
    return path


def _download_from_drive(file_id: str, url: str, part: Path, timeout: float, by_hand: str) -> bool:
    """Complete `part` by gdown, which knows Google Drive's confirmation pages; as `_download`."""
    try:
        import gdown
    except ImportError as error:
        raise UserError(
            f"Google Drive has a page to confirm before a download, which the package gdown can "
            f"do: pip install gdown and run again, or open {url} and {by_hand}"
        ) from error
    # gdown keeps what has arrived under names of its own, and goes on from it if it is one file.
    kept = [
        file
        for file in sorted(part.parent.iterdir())
        if file != part and file.name.startswith(part.name) and file.suffix == ".part"
    ]
    if len(kept) > 1 and not part.exists():
        raise UserError(
            f"cannot go on downloading {url}: {len(kept)} parts of it are there "
            f"({', '.join(map(str, kept))}); delete them, or all but one, and run again"
        )
    resumed = part.exists() or bool(kept)
    # Releases before 6.3 do not have it.
    has_timeout = "timeout" in inspect.signature(gdown.download).parameters
    options = {"timeout": timeout} if has_timeout else {}
    try:
        # The user's browser cookies are none of our business.
        done = gdown.download(
            id=file_id, output=str(part), resume=True, use_cookies=False, **options
        )
    except OSError as error:
        # requests' errors are OSErrors, too, but have no errno
        if error.errno:
            raise
        raise UserError(f"cannot download {url}: {_first_line(error)}; {by_hand}") from error
    except Exception as error:  # whatever a package that follows a web page's changes raises
        raise UserError(f"cannot download {url}: {_first_line(error)}; {by_hand}") from error
    if done is None:  # how older releases say that Drive refused
        raise UserError(f"cannot download {url}: Google Drive refuses it at present; {by_hand}")
    return resumed


def _download(
    url: str, part: Path, timeout: float, tries: int, backoff: float, by_hand: str
) -> bool:
    """Complete `part`, with new tries; return whether its beginning is from an earlier request."""
    failures, furthest = 0, _size(part)
    while True:
        try:
            return _request(url, part, timeout)
        except (urllib.error.HTTPError, ValueError) as error:
            gone = isinstance(error, urllib.error.HTTPError)
            reason = f"the host no longer gives it out ({error})" if gone else str(error)
            raise UserError(f"cannot download {url}: {reason}; {by_hand}") from error
        except _TransferError as error:
            arrived = _size(part)
            failures = 1 if arrived > furthest else failures + 1
            furthest = max(furthest, arrived)
            if failures >= tries:
                raise UserError(
                    f"cannot download {url}: {error}; run again to go on from byte {arrived}, "
                    f"or {by_hand}"
                ) from error
            wait = backoff * 2 ** (failures - 1)
            _say(f"{url}: {error}; next try in {wait:g} s")
            time.sleep(wait)


def _request(url: str, part: Path, timeout: float) -> bool:
    """One request for what `part` lacks; return whether it was appended to (False: started over).

    Local errors stay OSErrors; those of the network become _TransferError or, where another try
    is useless, HTTPError.
    """
    offset = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and offset:
                if error.headers.get("Content-Range") == f"bytes */{offset}":
                    return True
                part.unlink()
                return _request(url, part, timeout)
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _TransferError(str(error)) from error
            raise
    except (OSError, http.client.HTTPException) as error:
        raise _TransferError(_reason(error)) from error

    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError("the host sends a web page in place of the file")
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
        if response.status == 206:
            content_range = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
            if not match or int(match[1]) != offset or not offset:
                part.unlink(missing_ok=True)
                raise _TransferError(f"asked for byte {offset}, was sent {content_range!r}")
            total = None if match[2] == "*" else int(match[2])
        else:
            offset = 0
        with part.open("ab" if offset else "wb") as file:
            done = offset
            progress = _Progress(part.name.removesuffix(".part"), total)
            try:
                while total is None or done < total:
                    try:
                        chunk = response.read(CHUNK)
                    except (OSError, http.client.HTTPException) as error:
                        raise _TransferError(f"lost at byte {done}: {_reason(error)}") from error
                    if not chunk:
                        break
                    file.write(chunk)
                    done += len(chunk)
                    progress.show(done)
            finally:
                progress.show(done, last=True)
    if total is not None and done != total:
        raise _TransferError(f"the transfer stopped at byte {done} of {total}")
    return offset > 0


class _Progress:
    """Bytes so far on stderr: one line rewritten on a terminal, a plain line now and then else."""

    def __init__(self, name: str, total: int | None):
        self.name, self.total = name, total
        self.terminal = sys.stderr.isatty()
        self.shown = time.monotonic()

    def show(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.shown < (0.2 if self.terminal else 10):
            return
        self.shown = now
        text = f"{self.name}: {done / 1e6:.1f} MB"
        if self.total:
            text += f" of {self.total / 1e6:.1f} MB ({100 * done // self.total} %)"
        if self.terminal:
            print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            _say(text)


def unpacking_mark(path: str | Path, directory: str | Path) -> Path:
    """The file that exists while, and if cut short after, `path` is unpacked into `directory`."""
    return Path(directory) / f".{Path(path).name}.unpacking"


def extract_tar(path: str | Path, directory: str | Path) -> None:
    """Unpack an uncompressed tar archive into `directory`, over files of the same names.

    Only folders and regular files with relative names below `directory` are accepted, so nothing
    can be written elsewhere; one other member and nothing at all is unpacked. `unpacking_mark`
    stays behind if the work was cut short.

    Raises:
        UserError: no readable tar archive, a refused member, or no room.
    """
    path, directory = Path(path), Path(directory)
    # absent before 3.10.12; the check of every member below does not rest on it
    data_filter = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    mark = unpacking_mark(path, directory)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive.getmembers():
                if problem := _unsafe(member):
                    raise UserError(
                        f"{path}: refused to unpack, its member {member.name!r} {problem}; "
                        "delete the file and get it from a source you trust"
                    )
            directory.mkdir(parents=True, exist_ok=True)
            mark.touch()
            archive.extractall(directory, **data_filter)
            mark.unlink()
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is no whole tar archive ({error}): delete it and get it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot unpack {path} into {directory}: {error.strerror or error}; "
            "make room or choose another folder and run again"
        ) from error


def _unsafe(member: tarfile.TarInfo) -> str:
    """Why a member must not be unpacked; empty if it may."""
    if PurePosixPath(member.name).is_absolute() or PureWindowsPath(member.name).anchor:
        return "has an absolute name"
    if ".." in PureWindowsPath(member.name).parts:
        return "leaves the folder"
    if not (member.isreg() or member.isdir()):
        return "is neither a file nor a folder"
    return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", "") or error
    if isinstance(reason, socket.gaierror):
        return f"its host is not found ({reason.strerror}); it is gone, or there is no network"
    return str(reason) or type(error).__name__


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
