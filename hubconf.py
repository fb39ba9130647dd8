"""The detectors for ``torch.hub``: a function for each network and size of the README's table.

    net = torch.hub.load(REPOSITORY, "ssd512_hardnet68", pretrained=True)
    predictor = torch.hub.load(REPOSITORY, "predictor", "best.pth")

``REPOSITORY`` is the project's name on GitHub, or with ``source="local"`` the folder of a clone.
The project's folders have general names (``models``, ``utils``, ``data``, ``layers``): do not load
it into a program that has imported others of these names.

Networks map images [B, 3, S, S] (BGR, 0..255 minus the mean) to (loc, conf), as described in
``models.build_net``. A predictor maps images to detections.
"""

# torch.hub takes every public function of this file for an entry.
from collections.abc import Callable as _Callable
from collections.abc import Sequence as _Sequence
from pathlib import Path as _Path

import torch

from inference.predictor import Predictor as _Predictor
from models import BACKBONES as _BACKBONES
from models import build_net as _build_net
from models import pretrained as _pretrained
from models.info import load_detector as _load_detector
from utils.errors import UserError as _UserError

dependencies = ["torch", "numpy", "cv2"]


def predictor(file: str, **options) -> _Predictor:
    """Detect in images with a checkpoint or an exported file; see ``inference.predictor``."""
    return _Predictor(file, **options)


def _builder(name: str, version: str, size: int) -> _Callable[..., torch.nn.Module]:
    def build(pretrained: bool | str = False, num_classes: int | None = None,
              classes: _Sequence[str] | None = None) -> torch.nn.Module:
        weights = _published(name, version, size) if pretrained is True else pretrained
        if not weights:
            net = _build_net(version, size, 1 + len(classes) if classes else num_classes or 81)
        else:
            net, info = _load_detector(weights, classes)
            if (info.version, info.size) != (version, size):
                raise _UserError(f"{weights} is {info.version} at {info.size}, not {version} at "
                                 f"{size}")
        if num_classes not in (None, net.num_classes):
            raise _UserError(f"{weights or name} has {net.num_classes} classes with background, "
                             f"not {num_classes}")
        return net

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Build {version} at {size}.

    Args:
        pretrained: False for new weights, True for the published ones, which are downloaded, or
            the path of a checkpoint of this program or a published one. A network with pretrained
            weights is in evaluation mode.
        num_classes: classes with background; None means those of the weights, or 81 (COCO).
        classes: their names, for a file that stores none.

    Raises:
        UserError: no weights were published for it, or the file is another detector's.
    """
    return build


def _published(name: str, version: str, size: int) -> _Path:
    for row in _pretrained.PUBLISHED:
        if row.size == size and version in row.versions:
            return _pretrained.download(row.name, _Path(torch.hub.get_dir()) / "checkpoints")
    there = ", ".join(row.name for row in _pretrained.PUBLISHED if row.size)
    raise _UserError(f"no weights of {name} were published, only {there}; give the path of a "
                     "checkpoint")


for _version, _row in _BACKBONES.items():
    for _size in _row.sizes:
        _kind, _base = _version.lower().split("_", 1)
        _name = f"{_kind}{_size}_{_base}"
        globals()[_name] = _builder(_name, _version, _size)
