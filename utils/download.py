"""Verified downloads and safe unpacking."""

import os
import platform
import re
import shutil
import socket
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request

from utils.errors import UserError, import_package
from utils.files import file_digest

SECONDS_OF_SILENCE = 30  # a server that sends nothing for so long is given up
_DRIVE = re.compile(r"https://drive\.google\.com/file/d/([\w-]+)")
_HUB = re.compile(r"hf://([^/]+/[^/]+)/([^@]+)(?:@(.+))?")


class Place(NamedTuple):
    """Where a file is.

    url: http(s), ``https://drive.google.com/file/d/ID/view`` (needs the package gdown), or
        ``hf://ORG/REPO/FILE[@REVISION]`` (needs huggingface_hub).
    checksum: "md5:", "sha256:" or "git:" (a blob id), and the hex digest or its beginning; None if
        none is known.
    """

    url: str
    checksum: str | None


def fetch(places: Sequence[Place], path: str | Path,
          check: Callable[[Path], str] | None = None) -> Path:
    """Download a file from the first place that has it to ``path``, and return the path.

    The file takes its place after it was verified; until then an earlier file stays. A file that is
    there already is kept if it is that of any place.

    Args:
        check: returns what else is wrong with a file, "" if nothing is.

    Raises:
        UserError: no place gives the file, or it cannot be written. The message names every
            place.
        ValueError: a place has no checksum, and there is no check.
    """
    if check is None and not all(place.checksum for place in places):
        raise ValueError(f"nothing would verify {places[0].url}; give a checksum or a check")
    path = Path(path)
    by_hand = f"download it by hand and put it at {path}"
    try:
        if path.is_file():
            faults = [_fault(path, place.checksum, check) for place in places]
            if not all(faults):
                return path
            print(f"{path} is not the file wanted ({faults[0]}): replacing it", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); choose another folder") from error
    answers = []
    for place in places:
        try:
            return _fetch_from(place, path, check)
        except Exception as error:  # gdown, huggingface_hub and their HTTP library raise various
            reason = " ".join(str(error).split()) or type(error).__name__
            answers.append(f"{place.url}: {reason}")
    raise UserError(f"cannot download {path.name} from {'; '.join(answers)}; try again later, or "
                    f"{by_hand}")


def _fetch_from(place: Place, path: Path, check: Callable[[Path], str] | None) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        with redirect_stderr(sys.__stderr__):  # progress bars need control characters
            if drive := _DRIVE.match(place.url):
                _download_from_drive(drive[1], part)
            elif hub := _HUB.fullmatch(place.url):
                _download_from_hub(*hub.groups(), part)
            else:
                _download(place.url, part)
        if reason := _fault(part, place.checksum, check):
            raise UserError(f"gave {part.stat().st_size} bytes that are not {path.name} ({reason})")
        os.replace(part, path)
        return path
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
        Request(url)  # ValueError: no URL; torch.hub would leave a temporary file behind
        download_url_to_file(url, str(part), progress=bool(sys.stderr) and sys.stderr.isatty())
    finally:
        socket.setdefaulttimeout(before)


def _download_from_drive(file_id: str, part: Path) -> None:
    """Download by gdown, which knows Google Drive's confirmation pages."""
    gdown = import_package("gdown", "Google Drive's page to confirm a download")
    # Without the cookies of the user's browser.
    done = gdown.download(id=file_id, output=str(part), resume=True, use_cookies=False)
    if done is None:  # releases before 5.0 print the reason
        raise UserError("Google Drive refuses it at present")


def _download_from_hub(repository: str, file: str, revision: str | None, part: Path) -> None:
    hub = import_package("huggingface_hub", "a file of a Hugging Face repository")
    shutil.copyfile(hub.hf_hub_download(repository, file, revision=revision), part)


def unpacking_mark(path: str | Path, directory: str | Path) -> Path:
    """Return the file that exists in ``directory`` until ``path`` is unpacked whole."""
    return Path(directory) / f".{Path(path).name}.unpacking"


def extract_tar(path: str | Path, directory: str | Path) -> None:
    """Unpack an uncompressed tar archive into ``directory``, over files of the same names.

    Python's filter "data" must accept every member, so nothing is written elsewhere; otherwise
    nothing is unpacked. ``unpacking_mark`` stays if the work is cut short.
    Raises UserError: no whole tar archive, a refused member, no room, or a Python without the
    filter.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"{path} cannot be unpacked safely by Python {platform.python_version()}; "
                        "use 3.10.12, 3.11.4 or newer")
    mark = unpacking_mark(path, directory)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                tarfile.data_filter(member, str(directory))
                # The filter lets links pass, and has had holes for them; no data set needs any.
                if not (member.isreg() or member.isdir()):
                    raise tarfile.SpecialFileError(member)
            Path(directory).mkdir(parents=True, exist_ok=True)
            mark.touch()
            archive.extractall(directory, filter="data")
            mark.unlink()
    except tarfile.FilterError as error:
        raise UserError(f"{path}: refused to unpack ({error}); delete the file and get it from a "
                        "source you trust") from error
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is no whole tar archive ({error}); delete it and get it again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot unpack {path} into {directory} ({error}); make room or choose "
                        "another folder, and run again") from error
