"""Where pictures come from: files, folders, patterns, videos, cameras, a list."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import cv2

from utils.errors import UserError
from utils.logger import LOGGER

PICTURES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split()
)
VIDEOS = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .mts .3gp .ogv .gif".split()
)


@dataclass(frozen=True)
class Source:
    """A picture, a video or a camera."""

    path: str | int
    """A file, the address of a stream, or a camera's number."""
    name: str
    """Of its results and in messages: relative, with /, no other source's, no password."""
    kind: str
    """picture, video or camera (which also is a stream: it ends when somebody ends it)."""


def find_sources(words: Sequence[str], out: Path) -> tuple[list[Source], int]:
    """What the command line's SOURCE mean, in order, each once, and how often one came again.

    - A folder: the pictures and videos in it and in its folders, by the ends of their names,
      sorted; not what a dot hides, links to folders, and ``out``, where results go.
    - A pattern (``*``, ``?``, ``[``; ``**`` is any depth) that is no file: the same of what fits.
    - ``-``: the files that standard input lists, one a line, or between NULs (find -print0).
      One that is missing or no picture is found out when its turn comes.
    - ``camera``, a number, or an address with ``://``.
    - Any other file, by the end of its name, else by what OpenCV makes of it.

    Names are relative to the folder that is common to all, so equal ones in two folders differ.

    Raises:
        UserError: nothing found, no such file, a kind of file that is neither.
    """
    found: list[tuple[str, str]] = []  # path, kind
    roots, cameras = [], []
    for word in words:
        before = len(found) + len(cameras)
        is_there = os.path.exists(word)
        if not is_there and (word == "camera" or word.isdecimal() or "://" in word):
            cameras.append(word)
        elif word == "-":
            listed = [(path, _kind(path) or "picture") for path in _listed()]
            roots += [os.path.dirname(path) for path, _ in listed]
            found += listed
        elif os.path.isdir(word):
            roots.append(word)
            found += [(path, kind) for path in _inside(word, out) if (kind := _kind(path))]
        elif not is_there and glob.has_magic(word):
            paths = sorted(p for p in glob.glob(word, recursive=True) if os.path.isfile(p))
            fitting = [(path, kind) for path in paths if (kind := _kind(path))]
            roots += [os.path.dirname(path) for path, _ in fitting]
            found += fitting
        else:
            roots.append(os.path.dirname(word))
            found.append((word, (is_there and _kind(word)) or _kind_by_content(word)))
        if len(found) + len(cameras) == before:
            raise UserError(
                f"{word} holds no picture and no video; their names end in "
                f"{', '.join(sorted(PICTURES))}, {', '.join(sorted(VIDEOS))}"
            )
    once = {os.path.abspath(path): kind for path, kind in found}
    base = _common({os.path.abspath(root) for root in roots})
    sources = [Source(path, _readable(Path(path).relative_to(base)), k) for path, k in once.items()]
    taken = {source.name.casefold() for source in sources}
    for path in dict.fromkeys(map(_camera, cameras)):
        name = _stream_name(path) if isinstance(path, str) else f"camera_{path}"
        tries = chain([name], (f"{name}_{k}" for k in count(2)))
        name = next(each for each in tries if each.casefold() not in taken)
        taken.add(name.casefold())
        sources.append(Source(path, name, "camera"))
    return sources, len(found) - len(once)


def label_names(sources: Sequence[Source]) -> dict[str, str]:
    """A picture's name -> that of its annotation without a suffix, which readers expect to be the
    picture's own. Where it would be another's, too (of ``a.jpg`` beside ``a.png``, or of
    ``a.jpg.png`` beside ``a.jpg``), the suffix is kept, as is a video's."""
    stems = [os.path.splitext(source.name)[0] for source in sources]
    keys = [stem.casefold() for stem in stems]  # some file systems do not tell the case
    times = Counter(keys + [source.name.casefold() for source in sources])
    return {
        source.name: stem if source.kind == "picture" and times[key] == 1 else source.name
        for source, stem, key in zip(sources, stems, keys, strict=True)
    }


def image_ids(sources: Sequence[Source]) -> dict[str, int]:
    """Names -> numbers for COCO JSON. Where all pictures are named by different numbers, as COCO's
    own are, these, else 1, 2, ... in their order. None with videos among them: there every frame
    takes the next."""
    if any(source.kind != "picture" for source in sources):
        return {}
    stems = [os.path.splitext(os.path.basename(source.name))[0] for source in sources]
    numbers = [int(stem) for stem in stems if _is_number(stem)]
    if len(set(numbers)) < len(sources):
        numbers = range(1, len(sources) + 1)
    return {source.name: k for source, k in zip(sources, numbers, strict=True)}


def _is_number(stem: str) -> bool:
    return stem.isascii() and stem.isdecimal() and len(stem) <= 15


def _kind(path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()
    return "picture" if suffix in PICTURES else "video" if suffix in VIDEOS else None


def _kind_by_content(path: str) -> str:
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give pictures, folders, videos, camera or -")
    try:
        if cv2.haveImageReader(path):
            return "picture"
        with open(path, "rb") as file:
            is_text = b"\0" not in file.read(4096)  # which FFmpeg would film
        capture = cv2.VideoCapture() if is_text else cv2.VideoCapture(path)
        opened = capture.isOpened()
        capture.release()
    except cv2.error:
        opened = False
    if not opened:
        raise UserError(f"{path} is neither a picture nor a video that OpenCV can read")
    return "video"


def real_path(path: str | Path) -> str:
    """The same of all paths that lead to a file or a folder, there or not, through links, too."""
    return os.path.normcase(os.path.realpath(path))


_RESULTS = {"detections.json", "detections.csv", "images.json"}


def _inside(folder: str, out: Path) -> Iterator[str]:
    results = real_path(out)
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and real_path(os.path.join(place, name)) != results
        )  # fmt: skip
        if "drawn" in folders and _RESULTS & set(names):
            LOGGER.warning("%s is left out: an earlier call has drawn it", Path(place, "drawn"))
            folders.remove("drawn")
        yield from (os.path.join(place, n) for n in sorted(names) if not n.startswith("."))


def _listed() -> list[str]:
    data = sys.stdin.buffer.read()
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def _common(folders: set[str]) -> str:
    try:
        return os.path.commonpath(folders) if folders else os.sep
    except ValueError as error:  # Windows
        raise UserError("the pictures lie on different drives; detect on one at a time") from error


def _camera(word: str) -> str | int:
    return 0 if word == "camera" else int(word) if word.isdecimal() else word


def _stream_name(address: str) -> str:
    """Without user, password and query, which are secret: names go into files and messages."""
    scheme, rest = re.match(r"(.*?)://(?:[^/?#]*@)?([^?#]*)", address, re.DOTALL).groups()
    return re.sub(r"\W+", "_", f"{scheme}_{rest}")


def _readable(path: Path) -> str:
    """With /, and with escapes for bytes that are no text in a name."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()
