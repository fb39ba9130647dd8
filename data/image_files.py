"""Finding files by name; each folder is listed once."""

import errno
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

# Errors of a path that names nothing, such as one longer than the file system takes.
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL}

MOST_FOLDERS = 100_000
"""Folders below one that are looked through. ImageNet-21k has 21,841; a whole disk has more."""


class _Listing(NamedTuple):
    """One folder: path of each file by name, of each subfolder by name, and of files by stem."""

    files: dict[str, str]
    folders: dict[str, str]
    stems: dict[str, list[str]]


class FileIndex:
    """Finds files; each folder is listed once.

    One listing is faster than several stat calls a file, most of all on network disks. Names match
    across Unicode forms (NFC, NFD), an equal one first, and with back slashes for slashes.

    suffixes: lower case, in order of preference; files may have them in any case.
    """

    def __init__(self, suffixes: Sequence[str]) -> None:
        self.suffixes = tuple(suffixes)
        self._listings: dict[str, _Listing] = {}

    def by_stem(self, path: str | Path) -> list[Path]:
        """Return the files of a path without suffix that have one of the suffixes."""
        return [Path(file) for file in self._find(path, "stems") or ()]

    def by_name(self, path: str | Path) -> Path | None:
        """Return the file of a path, whatever its suffix; None if it does not exist."""
        file = self._find(path, "files")
        return Path(file) if file else None

    def subfolders(self, path: str | Path) -> list[Path]:
        """Return the folders in a folder, sorted."""
        folders = self._listing(os.fspath(path)).folders
        return [Path(each) for each in sorted(set(folders.values()))]

    def has_folder(self, path: str | Path) -> bool:
        """Return whether a path is a folder."""
        return self._find(path, "folders") is not None

    def inside(self, folder: str | Path) -> list[Path]:
        """Return all files under ``folder`` that have one of the suffixes, sorted.

        Links to folders are followed. Files and folders whose name begins with a dot are left out.
        Raises UserError after `MOST_FOLDERS` folders.
        """
        stems = (files for listing in self._walk(folder) for files in listing.stems.values())
        found = {file for files in stems for file in files if os.path.basename(file)[0] != "."}
        return [Path(file) for file in sorted(found, key=lambda file: file.split(os.sep))]

    def holds_files(self, folder: str | Path) -> bool:
        """Return whether `inside` is not empty, sooner."""
        return any(stem[0] != "." for listing in self._walk(folder) for stem in listing.stems)

    def _walk(self, folder: str | Path) -> Iterator[_Listing]:
        left, seen = [os.fspath(folder)], set()
        while left:
            if (real := os.path.realpath(path := left.pop())) not in seen:
                seen.add(real)
                if len(seen) > MOST_FOLDERS:
                    raise UserError(f"{folder} holds more than the {MOST_FOLDERS:,} folders that "
                                    f"were searched, the last {path}; give the folder of the data "
                                    "set itself as --root")
                yield (listing := self._listing(path))
                names = sorted(name for name in listing.folders if name[0] != ".")
                left += [listing.folders[name] for name in names]

    def _find(self, path: str | Path, table: str) -> str | list[str] | None:
        path = os.fspath(path)
        folder, name = os.path.split(path)
        names = getattr(self._listing(folder), table)
        found = names.get(name) or names.get(_nfc(name))
        return self._find(path.replace("\\", "/"), table) if not found and "\\" in path else found

    def _listing(self, folder: str) -> _Listing:
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        return self._listings[folder]

    def _list(self, folder: str) -> _Listing:
        files, folders, stems, by_suffix = {}, {}, {}, {}
        try:
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    # os.path.isdir is False for a link that leads nowhere or to itself.
                    link = entry.is_symlink() and os.path.isdir(entry.path)
                    folder_like = link or entry.is_dir(follow_symlinks=False)
                    (folders if folder_like else files)[entry.name] = entry.path
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            if isinstance(error, OSError) and error.errno not in _NO_FOLDER:
                raise UserError(f"{folder}: cannot read the folder ({error.strerror})") from error
            parent, name = os.path.split(folder)
            other = not name.isascii() and self._listing(parent).folders.get(_nfc(name))
            return self._listing(other) if other else _Listing({}, {}, {})
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if (suffix := suffix.lower()) in self.suffixes:
                by_suffix.setdefault(stem, []).append((self.suffixes.index(suffix), name))
        for stem, named in by_suffix.items():
            stems[stem] = [files[name] for _, name in sorted(named)]
        for names in (files, folders, stems):
            for name in [each for each in names if not each.isascii()]:
                names.setdefault(_nfc(name), names[name])
        return _Listing(files, folders, stems)


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)
