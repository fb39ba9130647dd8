"""Published weights: where they are, what they fit, what a file holds, and its conversion.

    python -m tools.weights list
    python -m tools.weights download NAME [--to DIR]
    python -m tools.weights inspect FILE [--json]
    python -m tools.weights convert IN OUT          # .pth <-> .safetensors

Exit status: 0 done, 1 unexpected failure, 2 bad usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.checkpoint import (
    BaseMatch,
    load_checkpoint,
    match_base,
    save_checkpoint,
    save_safetensors,
)
from utils.download import fetch, file_digest
from utils.errors import UserError, command
from utils.files import atomic_write

# ---------------------------------------------------------------- what there is


@dataclass(frozen=True)
class PublishedFile:
    """A file that others published; nothing of it is ours, and it may be gone."""

    name: str
    file: str
    """Its name on the disk."""
    url: str
    checksum: str | None
    """ "git:" blob id or "sha256:" beginning of the digest; None where none was published, and the
    tensors themselves are checked instead."""
    versions: tuple[str, ...]
    """Detectors it fits: itself one, or ``--basenet`` of them."""
    licence: str
    """Of the code that it was published with."""
    size: int | None = None
    """Of a detector: the side of its input."""
    num_classes: int | None = None
    """Of a detector: with background."""

    @property
    def fits(self) -> str:
        names = ", ".join(self.versions)
        if self.size is None:
            return f"--basenet of {names}"
        return f"{names} at {self.size}, {self.num_classes} classes with background"


_AUTHORS = "https://raw.githubusercontent.com/PingoLH/PytorchSSD-HarDNet/master/weights/"
_CLASSIFIERS = "https://ping-chao.com/hardnet/"
_TORCHVISION = "https://download.pytorch.org/models/"
_HARDNET68 = ("SSD_HarDNet68", "RFB_HarDNet68")
_HARDNET85 = ("SSD_HarDNet85", "RFB_HarDNet85")

# fmt: off
PUBLISHED = (
    PublishedFile(
        "hardnet68-base", "hardnet68_base_bridge.pth", _AUTHORS + "hardnet68_base_bridge.pth",
        "git:e1c5068f95b680e0dbd2dba7fbcf9bfa76eb9d80", _HARDNET68, "MIT",
    ),
    PublishedFile(
        "hardnet85-base", "hardnet85_base.pth", _AUTHORS + "hardnet85_base.pth",
        "git:5fcc95ce628fba75994a83c40da1e92c118bd27a", _HARDNET85, "MIT",
    ),
    PublishedFile(
        "ssd512-hardnet68-coco", "SSD-HarDNet68.pth",
        "https://drive.google.com/file/d/1IHXvQMsQbuwYbuxW7HjFQHhGSX6SKz70/view",
        None, ("SSD_HarDNet68",), "MIT", 512, 81,
    ),
    PublishedFile(
        "ssd512-hardnet85-coco", "SSD-HarDNet85.pth",
        "https://drive.google.com/file/d/1gagahaMFOKG6hOGpU0-CgL3m1yc13ktr/view",
        None, ("SSD_HarDNet85",), "MIT", 512, 81,
    ),
    PublishedFile(
        "hardnet68", "hardnet68-5d684880.pth", _CLASSIFIERS + "hardnet68-5d684880.pth",
        "sha256:5d684880", _HARDNET68, "MIT",
    ),
    PublishedFile(
        "hardnet85", "hardnet85-a28faa00.pth", _CLASSIFIERS + "hardnet85-a28faa00.pth",
        "sha256:a28faa00", _HARDNET85, "MIT",
    ),
    PublishedFile(
        "hardnet68ds", "hardnet68ds-632474d2.pth", _CLASSIFIERS + "hardnet68ds-632474d2.pth",
        "sha256:632474d2", ("SSD_HarDNet68ds",), "MIT",
    ),
    PublishedFile(
        "hardnet39ds", "hardnet39ds-0e6c6fa9.pth", _CLASSIFIERS + "hardnet39ds-0e6c6fa9.pth",
        "sha256:0e6c6fa9", ("SSD_HarDNet39ds",), "MIT",
    ),
    PublishedFile(
        "vgg16-reducedfc", "vgg16_reducedfc.pth",
        "https://s3.amazonaws.com/amdegroot-models/vgg16_reducedfc.pth",
        None, ("SSD_vgg",), "MIT",
    ),
    PublishedFile(
        "resnet101", "resnet101-63fe2227.pth", _TORCHVISION + "resnet101-63fe2227.pth",
        "sha256:63fe2227", ("SSD_resnet101",), "BSD-3-Clause",
    ),
    PublishedFile(
        "mobilenet-v2", "mobilenet_v2-b0353104.pth", _TORCHVISION + "mobilenet_v2-b0353104.pth",
        "sha256:b0353104", ("SSD_mobile",), "BSD-3-Clause",
    ),
)
# fmt: on


def published(name: str) -> PublishedFile:
    """The row of a name or of a file name; UserError, naming all, where there is none."""
    for row in PUBLISHED:
        if name in (row.name, row.file):
            return row
    names = ", ".join(row.name for row in PUBLISHED)
    raise UserError(f"{name} is no published file; choose from {names}")


def origin(digests: Mapping[str, str]) -> PublishedFile | None:
    """The published file that has one of these digests, by the name of their hash."""
    for row in PUBLISHED:
        name, _, expected = (row.checksum or "").partition(":")
        if expected and digests.get(name, "").startswith(expected):
            return row
    return None


def download(name: str, folder: str | Path = "weights", **options) -> Path:
    """Download a published file into ``folder`` by ``fetch(**options)``, verified.

    Raises:
        UserError: an unknown name, or the file cannot be had, written or verified.
    """
    row = published(name)

    def fault(path: Path) -> str:
        try:
            found = examine(path)
        except UserError as error:
            return str(error)
        detector = (row.versions[0], row.size, row.num_classes)
        right = set(row.versions) <= set(found["basenet"]) if row.size is None else (
            (found["version"], found["size"], found["num_classes"]) == detector
        )  # fmt: skip
        return "" if right else f"its tensors are not those of {row.fits}"

    check = fault if row.checksum is None else None
    return fetch(row.url, Path(folder) / row.file, row.checksum, check=check, **options)


# ---------------------------------------------------------------- what a file holds


def examine(path: str | Path) -> dict:
    """What a checkpoint, a base file or a classifier holds, as plain data.

    Of a detector "version", "size" and "num_classes" are set, else None. "basenet" are the
    versions whose base it can start; "closest" names what "missing", "unused" and "wrong" (of
    another shape) refer to: the closest detector, else the base. "not_compared" has a sentence for
    every version that cannot be built here.

    Raises:
        UserError: as ``load_checkpoint``.
    """
    from models import closest

    saved = load_checkpoint(path)
    state = saved["model"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    digests = {name: file_digest(path, name) for name in ("sha256", "git")}
    row = origin(digests)
    result = {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "sha256": digests["sha256"],
        "git_blob": digests["git"],
        "origin": row.name if row else None,
        "holds": ["model", *_beside(saved)],
        "tensors": len(state),
        "parameters": sum(t.numel() for k, t in state.items() if not k.endswith(buffers)),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in state.values())),
        "version": None,
        "size": None,
        "num_classes": None,
        "classes": saved.get("classes"),
    }
    bases = {name: match for name, match in _bases(state).items() if match.fits}
    result["basenet"] = list(bases)
    whole = {n: m for n, m in bases.items() if m.source != "the base of a detector"}
    if whole:
        name, found = next(iter(whole.items()))
        result["closest"] = f"{found.source} for {name}"
        result["not_compared"] = []
    else:
        found = closest(state)
        row = found.version, found.size, found.num_classes
        result["closest"] = "{} at {}, {} classes with background".format(*row)
        result["not_compared"] = found.not_compared
        if not found:
            result["version"], result["size"], result["num_classes"] = row
    return result | {what: getattr(found, what) for what in ("missing", "unused", "wrong")}


def _beside(saved: Mapping) -> list[str]:
    """Names of what a file holds beside its tensors."""
    return sorted({*saved, *saved.get("beside", ())} - {"model", "beside"})


def _bases(state: Mapping[str, Tensor]) -> dict[str, BaseMatch]:
    """How a state dict fits the base of every version that can be built here."""
    from models import BACKBONES

    matches = {}
    for version, row in BACKBONES.items():
        try:
            with torch.device("meta"):
                base = row.base().state_dict()
        except UserError:  # made of a package that is not installed
            continue
        matches[version] = match_base(base, state, row.from_classifier)
    return matches


def describe(found: dict) -> str:
    """The result of ``examine`` as text; lists are cut at 20."""
    dtypes = ", ".join(f"{count} {name}" for name, count in found["dtypes"].items())
    lines = {
        "file": f"{found['file']} ({found['bytes']:,} bytes)",
        "sha256": found["sha256"],
        "git blob": found["git_blob"],
        "origin": "unknown",
        "holds": ", ".join(found["holds"]),
        "tensors": f"{found['tensors']} ({dtypes}), {found['parameters']:,} parameters",
        "detector": "none",
        "basenet of": ", ".join(found["basenet"]) or "none",
    }
    if found["origin"]:
        row = published(found["origin"])
        lines["origin"] = f"{row.name}, {row.url}, licence {row.licence}"
    if found["version"]:
        lines["detector"] = found["closest"]
        lines["classes"] = ", ".join(found["classes"] or ["(names are not in the file)"])
    elif found["missing"] or found["unused"] or found["wrong"]:
        lines["compared to"] = found["closest"]
        for what in ("missing", "unused", "wrong"):
            if keys := found[what]:
                more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
                title = {"wrong": "other shape"}.get(what, what)
                lines[title] = f"{len(keys)}: {', '.join(keys[:20])}{more}"
        if found["not_compared"]:
            lines["but"] = "; ".join(found["not_compared"])
    return "\n".join(f"{title:<12} {text}" for title, text in lines.items())


# ---------------------------------------------------------------- conversion


def convert(source: str | Path, target: str | Path) -> list[str]:
    """Write a checkpoint or bare state dict as ``.safetensors``, or one of those as ``.pth``.

    Tensors keep their values, types, names (but for DataParallel's ``module.``) and order; the
    configuration and the classes of a checkpoint go with them, and version and size of a detector
    into the metadata of ``.safetensors``.

    Returns:
        The entries of the checkpoint that are left out: what only ``--resume`` needs.

    Raises:
        UserError: ``source`` cannot be read, ``target`` exists, cannot be written or cannot hold
            it, or their names do not end in ``.safetensors`` and something else.
    """
    source, target = Path(source), Path(target)
    if (source.suffix == ".safetensors") == (target.suffix == ".safetensors"):
        raise UserError(
            f"{source} and {target}: one of the two must end in .safetensors, the other in .pth"
        )
    if target.exists():
        raise UserError(f"{target} exists; delete it or give another name")
    saved = load_checkpoint(source)
    kept = {key: saved[key] for key in ("config", "classes") if key in saved}
    if target.suffix == ".safetensors":
        save_safetensors(target, saved["model"], {**_identity(saved), **kept})
    elif kept:
        try:
            save_checkpoint(target, {"model": saved["model"], **kept})
        except RecursionError as error:
            raise UserError(
                f"{target} cannot be written: the configuration in {source} is too deeply nested"
            ) from error
    else:
        with atomic_write(target) as file:
            torch.save(saved["model"], file)
    return [name for name in _beside(saved) if name not in {*kept, "format"}]


def _identity(saved: Mapping) -> dict:
    """Version and size of a detector, from the configuration or the tensors; else nothing."""
    from models import identify

    config = saved.get("config")
    if isinstance(config, Mapping):
        return {key: config[key] for key in ("version", "size") if key in config}
    try:
        version, size, _ = identify(saved["model"])
    except ValueError:
        return {}
    return {"version": version, "size": size}


# ---------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m tools.weights", description="Published weights, and files of weights."
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the published files: what they fit, and where they are")
    c = commands.add_parser("download", help="download a published file, and verify it")
    c.add_argument("name", metavar="NAME", help="a name of the list")
    c.add_argument("--to", metavar="DIR", default="weights", help="folder (default: weights)")
    c = commands.add_parser("inspect", help="say what a file holds, without running its code")
    c.add_argument("file", metavar="FILE")
    c.add_argument("--json", action="store_true", help="everything, as JSON")
    c = commands.add_parser("convert", help=".pth to .safetensors, or back")
    c.add_argument("source", metavar="IN")
    c.add_argument("target", metavar="OUT")
    return p.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parse(argv)
    if args.command == "list":
        for row in PUBLISHED:
            print(f"{row.name:<22} {row.file}\n  {row.fits}; licence {row.licence}")
            print(f"  {row.url}\n  {row.checksum or 'no hash known: its tensors are checked'}")
    elif args.command == "download":
        print(download(args.name, args.to))
    elif args.command == "inspect":
        found = examine(args.file)
        print(json.dumps(found, indent=1) if args.json else describe(found))
    else:
        left_out = convert(args.source, args.target)
        note = f" (left out: {', '.join(left_out)})" if left_out else ""
        print(f"{args.target}{note}")
    return 0
