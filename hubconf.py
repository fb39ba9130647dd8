"""The detectors for ``torch.hub``: a function for each network and size of the README's table.

    net = torch.hub.load(REPOSITORY, "ssd512_hardnet68", pretrained=True)
    predictor = torch.hub.load(REPOSITORY, "predictor", "best.pth")

``REPOSITORY`` is the project's name on GitHub, or with ``source="local"`` the folder of a clone.
The project's folders have general names (``models``, ``utils``, ``data``, ``layers``): it cannot be
loaded into a program that has imported others of these names.

Networks take images [B, 3, S, S] (BGR, 0..255 minus the mean) and give (loc, conf), as
``models.build_net`` says; a predictor takes pictures and gives boxes.
"""

from __future__ import annotations

# torch.hub takes every public function of this file for an entry.
from collections.abc import Callable as _Callable
from pathlib import Path as _Path

import torch

import models as _models
from inference.predictor import Predictor as _Predictor
from models import pretrained as _weights
from utils import checkpoint as _checkpoint
from utils.errors import UserError as _UserError

dependencies = ["torch", "numpy", "cv2"]


def predictor(file: str, **options) -> _Predictor:
    """Detect in images with a checkpoint or an exported file; see ``inference.predictor``."""
    return _Predictor(file, **options)


def _builder(name: str, version: str, size: int) -> _Callable[..., torch.nn.Module]:
    def build(pretrained: bool | str = False, num_classes: int | None = None) -> torch.nn.Module:
        weights = _published(name, version, size) if pretrained is True else pretrained
        if not weights:
            return _models.build_net(version, size, 81 if num_classes is None else num_classes)
        model = _checkpoint.load_checkpoint(weights)["model"]
        try:
            found = _models.identify(model)
        except ValueError as error:
            raise _UserError(f"{weights}: {error}") from error
        if found[:2] != (version, size):
            raise _UserError(f"{weights} is {found[0]} at {found[1]}, not {version} at {size}")
        if num_classes not in (None, found[2]):
            raise _UserError(f"{weights} has {found[2]} classes with background, not {num_classes}")
        net = _models.build_net(*found)
        _checkpoint.load_weights(net, model, weights)
        return net.eval()

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{version} at {size}.

    Args:
        pretrained: False: new weights. True: the published ones, downloaded. Else the path of a
            checkpoint, of this program or a published one; the network is in evaluation mode then.
        num_classes: with background; None: those of the weights, 81 (COCO) of new ones.

    Raises:
        UserError: nothing was published for it, or the file is another detector's.
    """
    return build


def _published(name: str, version: str, size: int) -> _Path:
    for row in _weights.PUBLISHED:
        if row.size == size and version in row.versions:
            return _weights.download(row.name, _Path(torch.hub.get_dir()) / "checkpoints")
    there = ", ".join(row.name for row in _weights.PUBLISHED if row.size)
    raise _UserError(
        f"no weights of {name} were published, only {there}; give the path of a checkpoint"
    )


for _version, _row in _models.BACKBONES.items():
    for _size in _row.sizes:
        _kind, _base = _version.lower().split("_", 1)
        _name = f"{_kind}{_size}_{_base}"
        globals()[_name] = _builder(_name, _version, _size)
