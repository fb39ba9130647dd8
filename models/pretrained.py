"""Published weights: where they are, which networks they fit, and what a file of weights holds."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from models import BACKBONES
from models.base_weights import BaseMatch, match_base
from models.identify import Difference, bases_here, closest, identify
from utils.checkpoint import load_checkpoint, save_checkpoint, save_safetensors
from utils.download import Place, fetch
from utils.errors import UserError
from utils.files import atomic_write, file_digest

# ---------------------------------------------------------------- the published files


@dataclass(frozen=True)
class PublishedFile:
    """A file that others published. It may no longer be available."""

    name: str  # its name on the command line
    file: str
    places: tuple[Place, ...]
    """Where it is, in the order in which they are tried. Where a place has no checksum, the tensors
    themselves are checked."""
    versions: tuple[str, ...]
    """The detectors whose base network it starts (``--basenet``), or the one that it holds."""
    licence: str = "MIT"  # the licence of the code that it was published with
    size: int | None = None  # the input size of the detector that it holds, None for a base network
    num_classes: int | None = None  # the classes with background of that detector

    @property
    def fits(self) -> str:
        names = ", ".join(self.versions)
        if self.size is None:
            return f"--basenet of {names}"
        return f"{names} at {self.size}, {self.num_classes} classes with background"


WEIGHTS = Path("weights")  # the folder of published files
_GITHUB = "https://raw.githubusercontent.com/PingoLH/"
_AUTHORS = _GITHUB + "PytorchSSD-HarDNet/master/weights/"
_CLASSIFIERS = _GITHUB + "Pytorch-HarDNet/master/"
_PING_CHAO = "https://ping-chao.com/hardnet/"  # reported as gone
_DRIVE = "https://drive.google.com/file/d/"
_TORCHVISION = "https://download.pytorch.org/models/"
_HARDNET68 = ("SSD_HarDNet68", "SSD_HarDNet68bn", "RFB_HarDNet68")
_HARDNET85 = ("SSD_HarDNet85", "RFB_HarDNet85")

PUBLISHED = (
    PublishedFile("hardnet68-base", "hardnet68_base_bridge.pth", (
        Place(_AUTHORS + "hardnet68_base_bridge.pth",
              "git:e1c5068f95b680e0dbd2dba7fbcf9bfa76eb9d80"),), _HARDNET68),
    PublishedFile("hardnet85-base", "hardnet85_base.pth", (
        Place(_AUTHORS + "hardnet85_base.pth", "git:5fcc95ce628fba75994a83c40da1e92c118bd27a"),),
        _HARDNET85),
    PublishedFile("ssd512-hardnet68-coco", "SSD-HarDNet68.pth", (
        Place(_DRIVE + "1IHXvQMsQbuwYbuxW7HjFQHhGSX6SKz70/view", None),), ("SSD_HarDNet68",),
        size=512, num_classes=81),
    PublishedFile("ssd512-hardnet85-coco", "SSD-HarDNet85.pth", (
        Place(_DRIVE + "1gagahaMFOKG6hOGpU0-CgL3m1yc13ktr/view", None),), ("SSD_HarDNet85",),
        size=512, num_classes=81),
    PublishedFile("hardnet68", "hardnet68.pth", (
        Place(_CLASSIFIERS + "hardnet68.pth", "git:1cf247ba4935866c16d0f02c886797f860fb1366"),
        Place(_PING_CHAO + "hardnet68-5d684880.pth", "sha256:5d684880")), _HARDNET68),
    PublishedFile("hardnet85", "hardnet85.pth", (
        Place(_DRIVE + "1I-qbZtpVlWbRyz1c3lT7rg2IqxCl28at/view", None),
        Place(_PING_CHAO + "hardnet85-a28faa00.pth", "sha256:a28faa00")), _HARDNET85),
    PublishedFile("hardnet68ds", "hardnet68ds.pth", (
        Place(_CLASSIFIERS + "hardnet68ds.pth", "git:f036deac5ad828a7838dc8101cd66112bcb55ec0"),
        Place(_PING_CHAO + "hardnet68ds-632474d2.pth", "sha256:632474d2")), ("SSD_HarDNet68ds",)),
    PublishedFile("hardnet39ds", "hardnet39ds.pth", (
        Place(_CLASSIFIERS + "hardnet39ds.pth", "git:5b99f2587b2f28687aef03f8cf1c00dbb7c73294"),
        Place(_PING_CHAO + "hardnet39ds-0e6c6fa9.pth", "sha256:0e6c6fa9")),
        ("SSD_HarDNet39ds", "SSD_HarDNet39dsbn")),
    PublishedFile("vgg16-reducedfc", "vgg16_reducedfc.pth", (
        Place("https://s3.amazonaws.com/amdegroot-models/vgg16_reducedfc.pth", None),),
        ("SSD_vgg",)),
    PublishedFile("resnet101", "resnet101-63fe2227.pth", (
        Place(_TORCHVISION + "resnet101-63fe2227.pth", "sha256:63fe2227"),), ("SSD_resnet101",),
        "BSD-3-Clause"),
    PublishedFile("mobilenet-v2", "mobilenet_v2-b0353104.pth", (
        Place(_TORCHVISION + "mobilenet_v2-b0353104.pth", "sha256:b0353104"),), ("SSD_mobile",),
        "BSD-3-Clause"),
)


def published(name: str) -> PublishedFile:
    """Return the row of a name or file name; UserError, naming all, for any other."""
    for row in PUBLISHED:
        if name in (row.name, row.file):
            return row
    names = ", ".join(row.name for row in PUBLISHED)
    raise UserError(f"{name} is no published file; choose from {names}")


def published_bases(version: str) -> list[PublishedFile]:
    """Return the files for ``--basenet`` of a detector, the authors' choice first."""
    return [row for row in PUBLISHED if row.size is None and version in row.versions]


def download(name: str, folder: str | Path = WEIGHTS) -> Path:
    """Download a published file, or ``hf://ORG/REPO/FILE[@REVISION]``; return its path in a folder.

    Its checksum or its tensors are verified. A file of Hugging Face may be any file of weights.
    Raises UserError: an unknown name, or a file that cannot be downloaded, written or verified.
    """
    row = None if name.startswith("hf://") else published(name)

    def fault(path: Path) -> str:
        try:
            found = examine(path)
        except UserError as error:
            return str(error)
        if row is None:
            return ""
        if row.size is None:
            right = set(row.versions) <= set(found.basenet)
        else:
            detector = (row.versions[0], row.size, row.num_classes)
            right = (found.version, found.size, found.num_classes) == detector
        return "" if right else f"its tensors are not those of {row.fits}"

    if row is None:
        return fetch([Place(name, None)], Path(folder) / Path(name.partition("@")[0]).name, fault)
    check = None if all(place.checksum for place in row.places) else fault
    return fetch(row.places, Path(folder) / row.file, check)


# ---------------------------------------------------------------- what a file holds


@dataclass(frozen=True)
class Contents:
    """What a checkpoint, a base file or a classifier holds."""

    file: str
    bytes: int
    sha256: str
    git_blob: str  # the id that git gives the file
    origin: str | None  # the name of the published file that it is
    holds: list[str]  # names of the checkpoint's entries
    tensors: int
    parameters: int
    dtypes: dict[str, int]  # number of tensors by dtype
    version: str | None  # of the detector that it is; None for anything else, as are the next two
    size: int | None
    num_classes: int | None
    classes: list[str] | None  # names, if they are in the file
    basenet: list[str]  # the versions whose base network it can start
    closest: str
    """The detector, else the base network, that the next three lists compare the file to."""
    not_compared: list[str]  # a sentence for every version that cannot be built here
    missing: list[str]
    unused: list[str]
    wrong: list[str]


def examine(path: str | Path) -> Contents:
    """Say what a file of weights holds, without running code from it.

    Raises UserError: as ``load_checkpoint``.
    """
    saved = load_checkpoint(path)
    state = saved["model"]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    digests = {name: file_digest(path, name) for name in ("sha256", "git")}
    matches = {version: match_base(base.state_dict(), state, BACKBONES[version])
               for version, base in bases_here()[0].items()}
    bases = {version: match for version, match in matches.items() if match.fits}
    whole = [name for name, match in bases.items() if match.source != "the base of a detector"]
    detector = None if whole else closest(state)
    found: BaseMatch | Difference = detector or bases[whole[0]]
    other = (f"{found.source} for {whole[0]}" if whole else
             f"{found.version} at {found.size}, {found.num_classes} classes with background")
    exact = detector if detector and detector.exact else None
    return Contents(
        file=str(path), bytes=Path(path).stat().st_size, sha256=digests["sha256"],
        git_blob=digests["git"], origin=_origin(digests), holds=["model", *_beside(saved)],
        tensors=len(state),
        parameters=sum(t.numel() for k, t in state.items() if not k.endswith(buffers)),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in state.values())),
        version=exact and exact.version, size=exact and exact.size,
        num_classes=exact and exact.num_classes, classes=saved.get("classes"), basenet=list(bases),
        closest=other, not_compared=detector.not_compared if detector else [],
        missing=found.missing, unused=found.unused, wrong=found.wrong,
    )


def _origin(digests: Mapping[str, str]) -> str | None:
    for row in PUBLISHED:
        for place in row.places:
            name, _, expected = (place.checksum or "").partition(":")
            if expected and digests[name].startswith(expected):
                return row.name
    return None


def _beside(saved: Mapping) -> list[str]:
    return sorted({*saved, *saved.get("beside", ())} - {"model", "beside"})


# ---------------------------------------------------------------- conversion


def convert(source: str | Path, target: str | Path) -> list[str]:
    """Write a checkpoint or bare state dict as ``.safetensors``, or one of those as ``.pth``.

    Tensors keep their values, dtypes, order and names (without DataParallel's ``module.``). A
    checkpoint's configuration and classes are kept. The version and size of a detector go into the
    metadata of ``.safetensors``. Return the names of the checkpoint's other entries, which are
    left out: only ``--resume`` needs them.

    Raises UserError: ``source`` cannot be read, ``target`` exists, cannot be written or cannot hold
    it, or not exactly one of the two names ends in ``.safetensors``.
    """
    source, target = Path(source), Path(target)
    if (source.suffix == ".safetensors") == (target.suffix == ".safetensors"):
        raise UserError(f"{source} and {target}: one of the two must end in .safetensors, the "
                        "other in .pth")
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
            raise UserError(f"{target} cannot be written: the configuration in {source} is too "
                            "deeply nested") from error
    else:
        with atomic_write(target) as file:
            torch.save(saved["model"], file)
    return [name for name in _beside(saved) if name not in {*kept, "format"}]


def _identity(saved: Mapping) -> dict:
    """Return the version and size of a detector, by its configuration or tensors; else nothing."""
    config = saved.get("config")
    if isinstance(config, Mapping):
        return {key: config[key] for key in ("version", "size") if key in config}
    try:
        version, size, _ = identify(saved["model"])
    except ValueError:
        return {}
    return {"version": version, "size": size}
