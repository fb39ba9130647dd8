"""Text in any script, as masks to draw with. OpenCV's fonts before its version 5 are ASCII only."""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError

FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts",
    "C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts",
)  # fmt: skip
"""Where systems keep their fonts."""
SUFFIXES = (".ttf", ".otf", ".ttc")

# A text is drawn in this share of a line's height, for room above and below.
_SIZE = 0.8


class Lettering:
    """Fonts that together have the characters of some texts.

    OpenCV's own (from version 5: Latin, Greek, Cyrillic, Chinese, Japanese, Korean), then those
    that the system has, by Pillow, which also shapes and orders scripts such as Arabic (its wheels
    can, with libfribidi on Linux).

    Args of the constructor:
        texts: what will be drawn; figures and ASCII need no mention.
        file: a font (.ttf, .otf, .ttc) to take before all others.

    Attributes:
        missing: the characters that no font has, each once; they are drawn as "?".

    Raises:
        UserError: ``file`` is no font.
    """

    def __init__(self, texts: Iterable[str], file: str | Path | None = None) -> None:
        wanted = {c for text in texts for c in _plain(text) if not (c.isascii() or _joins(c))}
        self._fonts: list[_Font] = [] if file is None else [_given(file)]
        self._fonts.append(_Builtin() if hasattr(cv2, "FontFace") else _Ascii())
        left = {c for c in wanted if not self._covered(c)}
        for font in _installed() if left else ():
            if had := {c for c in left if font.has(c)}:
                self._fonts.append(font)
                left -= had
            if not left:
                break
        self.missing = "".join(sorted(left))

    def mask(self, text: str, height: int) -> np.ndarray:
        """How much of each pixel a line of text covers: uint8 [height, its width >= 1]."""
        height, text = max(height, 1), "".join(map(self._drawable, _plain(text)))
        # The font that has most of the text comes first, for words in one hand.
        fonts = sorted(self._fonts, key=lambda font: -sum(map(font.has, text)))
        last = fonts[0]

        def font_of(character: str) -> _Font:
            nonlocal last
            if not _joins(character):
                last = next(font for font in fonts if font.has(character))
            return last

        parts = [font.mask("".join(run), height) for font, run in groupby(text, font_of)]
        return np.hstack(parts) if parts else np.zeros((height, 1), np.uint8)

    def _covered(self, character: str) -> bool:
        return any(font.has(character) for font in self._fonts)

    def _drawable(self, character: str) -> str:
        return character if _joins(character) or self._covered(character) else "?"


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _joins(character: str) -> bool:
    """Whether it is drawn with what stands before it: spaces, marks, joiners."""
    return character.isspace() or unicodedata.category(character)[0] in "CM"


class _Font:
    """What has some characters, and draws a line of them."""

    def has(self, character: str) -> bool:
        raise NotImplementedError

    def mask(self, text: str, height: int) -> np.ndarray:
        raise NotImplementedError


class _Ascii(_Font):
    """Stroke letters of any OpenCV; accents are dropped, other characters become "?"."""

    def has(self, character: str) -> bool:
        return character.isascii()

    def mask(self, text: str, height: int) -> np.ndarray:
        decomposed = unicodedata.normalize("NFKD", text)
        kept = "".join(c for c in decomposed if not unicodedata.combining(c))
        plain = kept.encode("ascii", "replace").decode()
        scale = 0.7 * _SIZE * height / 22  # a capital of scale 1 is 22 pixels high
        thickness = max(1, round(1.2 * scale))
        (width, _), _ = cv2.getTextSize(plain, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        area = np.zeros((height, max(width, 1)), np.uint8)
        start = (0, round(_SIZE * height))
        cv2.putText(area, plain, start, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness,
                    cv2.LINE_AA)  # fmt: skip
        return area


class _Builtin(_Font):
    """The fonts inside OpenCV 5. It writes from left to right only."""

    def __init__(self) -> None:
        self._face = cv2.FontFace("uni")
        self.has = functools.cache(self.has)
        self._unknown = self.mask("?", 32)

    def has(self, character: str) -> bool:
        if character.isascii():
            return True
        if unicodedata.bidirectional(character) in ("R", "AL"):
            return False
        drawn = self.mask(character, 32)
        return bool(drawn.any()) and not np.array_equal(drawn, self._unknown)

    def mask(self, text: str, height: int) -> np.ndarray:
        size = max(round(_SIZE * height), 1)
        x, _, width, _ = cv2.getTextSize((0, 0), text, (0, 0), self._face, size)
        area = np.zeros((height, max(x + width, 1)), np.uint8)
        cv2.putText(area, text, (0, size), 255, self._face, size)
        return area


class _File(_Font):
    """A font file, by Pillow; OSError where it is none."""

    def __init__(self, path: str | Path) -> None:
        from PIL import ImageFont

        self._open = functools.cache(functools.partial(ImageFont.truetype, os.fspath(path)))
        # Character by character nothing is to be shaped.
        self._single = ImageFont.truetype(os.fspath(path), 24, layout_engine=ImageFont.Layout.BASIC)
        self.has = functools.cache(self.has)
        self._unknown = self._drawn("\uffff")  # no character: the box for those it has not

    def has(self, character: str) -> bool:
        drawn = self._drawn(character)
        return any(drawn[1]) and drawn != self._unknown

    def _drawn(self, character: str) -> tuple[tuple[int, int], bytes]:
        mask = self._single.getmask(character)
        return mask.size, bytes(mask)

    def mask(self, text: str, height: int) -> np.ndarray:
        from PIL import Image, ImageDraw

        # The size is that of the em square; what rises over it and falls below differs by font.
        ascent, descent = self._open(100).getmetrics()
        font = self._open(max(round(100 * height / (ascent + descent)), 1))
        left, _, right, _ = font.getbbox(text, anchor="ls")
        area = Image.new("L", (max(right - min(left, 0), 1), height))
        line = round(height * ascent / (ascent + descent))
        ImageDraw.Draw(area).text((-min(left, 0), line), text, 255, font, anchor="ls")
        return np.asarray(area)


def _given(file: str | Path) -> _Font:
    try:
        return _File(Path(file).expanduser())
    except (OSError, ImportError) as error:
        raise UserError(
            f"{file} cannot be used as a font ({error}); give a .ttf, .otf or .ttc"
        ) from error


def _installed() -> Iterator[_Font]:
    """The system's fonts, upright ones without serifs first."""
    paths = [
        Path(folder, name)
        for place in FOLDERS
        for folder, _, names in os.walk(os.path.expanduser(place))
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]

    def rank(path: Path) -> tuple:
        name = path.stem.lower()
        styled = any(word in name for word in ("bold", "italic", "oblique", "light", "thin", "mono",
                                               "black", "condensed"))  # fmt: skip
        return styled, "sans" not in name, len(name), name

    for path in sorted(paths, key=rank):
        try:
            yield _File(path)
        except ImportError:
            return
        except OSError:  # damaged, or of one size only, as colour fonts are
            continue
