"""The compiled routines and torchvision's, their loading, and the choice between them.

Every routine has the contract of those in `utils.nms.reference`.
"""

import ctypes
import functools
import importlib
import logging
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from utils.nms import reference
from utils.nms.reference import Groups, Rule

Routine = Callable[[Tensor, Tensor, Groups, Rule], tuple[Tensor, Tensor]]

INTERFACE = 2
"""The version of the arguments that both compiled files must report."""

TORCHVISION_MOST = 20_000
"""The most boxes for torchvision, whose memory grows with the square: 50 MB for so many."""

_WORTH_THREADS = 2000
"""The fewest boxes of a call that are worth waking threads for."""

# OpenMP's threads do not survive a fork, and a child waits for them. This is the process that
# started them, unless a child is the first to import this module.
_FIRST_PROCESS = os.getpid()


# ---------------------------------------------------------------- the choice


def backend(device: str | torch.device = "cpu") -> str:
    """Return the name of the routine for data on a device.

    On the CPU "cython" or "torch". On a GPU ("cuda", "cuda:1", ...) "cuda", "torchvision" or
    "torch", or "none" where PyTorch sees no GPU. "torchvision" leaves Soft-NMS, more than 20,000
    boxes and coordinates above about 10^7 to PyTorch.
    """
    return _backend(torch.device(device))[0]


def backend_reason(device: str | torch.device = "cpu") -> str:
    """Return why `backend(device)` serves: the compiled file, or what prevents its use."""
    return _backend(torch.device(device))[1]


def routine(device: torch.device, method: str, count: int) -> Routine:
    """Return the function that suppresses `count` boxes on a device."""
    if count and device.type in ("cpu", "cuda"):
        name = _backend(device)[0]
        if name in ("cython", "cuda"):
            return cython if name == "cython" else cuda
        if name == "torchvision" and method == "hard" and count <= TORCHVISION_MOST:
            return by_torchvision
    return reference.hard if method == "hard" else reference.soft


def _backend(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        module, reason = extension()
        return ("torch" if module is None else "cython"), reason
    if not torch.cuda.is_available():
        return "none", f"PyTorch {torch.__version__} sees no GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    compiled, reason = library(index)
    if compiled is not None:
        return "cuda", reason
    vision, error = torchvision()
    if vision is not None:
        return "torchvision", reason
    return "torch", f"{reason}; {error}"


# ---------------------------------------------------------------- loading


@functools.cache
def extension() -> tuple[ModuleType | None, str]:
    """Return the Cython module and its file, or None and the reason.

    A module that cannot be used is reported once.
    """
    name = "utils.nms._cpu_nms"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return None, f"{name} is not compiled for this Python; ./make.sh compiles it"
    except ImportError as error:
        return None, _unusable(name, str(error), "PyTorch")
    if getattr(module, "INTERFACE", None) != INTERFACE:
        return None, _unusable(name, "it was compiled from other sources", "PyTorch")
    return module, module.__file__


@functools.cache
def library(index: int) -> tuple[ctypes.CDLL | None, str]:
    """Return the CUDA library for the GPU of that index and its file, or None and the reason.

    A library that cannot be used is reported once for each GPU.
    """
    path = Path(__file__).with_name("_cuda_nms" + sysconfig.get_config_var("EXT_SUFFIX"))
    name = "utils.nms._cuda_nms"
    if not path.is_file():
        return None, f"{name} is not compiled; python utils/build.py compiles it"
    try:
        compiled = load_library(path)
        if compiled.nms_interface() != INTERFACE:
            raise AttributeError("it was compiled from other sources")
        with torch.cuda.device(index):
            error = compiled.nms_check()
    except (OSError, AttributeError) as broken:  # not our library, or an old one
        return None, _unusable(name, str(broken), "torchvision")
    if error:
        return None, _unusable(name, compiled.nms_error(error).decode(), "torchvision")
    return compiled, f"{path}, compiled for {compiled.nms_architectures().decode()}"


def load_library(path: Path) -> ctypes.CDLL:
    """Load the CUDA library and declare its functions; OSError or AttributeError if it is none."""
    compiled = ctypes.CDLL(str(path))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    compiled.nms_select.argtypes = (*[pointer] * 5, integer, number, integer, ctypes.c_int,
                                    ctypes.c_double, number, number, *[pointer] * 3)
    compiled.nms_error.argtypes = (ctypes.c_int,)
    compiled.nms_error.restype = compiled.nms_architectures.restype = ctypes.c_char_p
    return compiled


@functools.cache
def torchvision() -> tuple[ModuleType | None, str]:
    """Return torchvision.ops, or None and the reason."""
    try:
        return importlib.import_module("torchvision.ops"), ""
    except (ImportError, RuntimeError, AttributeError) as error:  # built for another PyTorch
        return None, f"torchvision cannot be imported ({error})"


def _unusable(name: str, reason: str, instead: str) -> str:
    reason = f"{name} cannot be used here ({reason}); python utils/build.py compiles it anew"
    logging.getLogger("ssd").warning("NMS by %s: %s", instead, reason)
    return reason


# ---------------------------------------------------------------- routines


def cython(boxes: Tensor, scores: Tensor, groups: Groups, rule: Rule) -> tuple[Tensor, Tensor]:
    """Select by the Cython module, on the CPU."""
    kept, selected = torch.full_like(groups.order, -1), torch.empty_like(scores)
    extension()[0].select(*(x.numpy() for x in (boxes, scores, groups.order, groups.starts)),
                          int(groups.count), *rule.values(), kept.numpy(), selected.numpy(),
                          np.empty(len(kept), np.uint64), np.empty(5 * len(kept), np.float32),
                          _threads(len(kept), int(groups.count)))
    return _taken(kept, selected)


def _threads(boxes: int, groups: int) -> int:
    if boxes < _WORTH_THREADS:
        return 1
    return 1 if os.getpid() != _FIRST_PROCESS else min(torch.get_num_threads(), groups)


def cuda(boxes: Tensor, scores: Tensor, groups: Groups, rule: Rule) -> tuple[Tensor, Tensor]:
    """Select by the CUDA library, on the GPU of the boxes."""
    compiled, _ = library(boxes.device.index)
    kept, selected = torch.full_like(groups.order, -1), torch.empty_like(scores)
    # Copies: they are aligned to 16 bytes, and the kernel overwrites the scores (and the order).
    boxes, scores = boxes.clone(), scores.clone()
    with torch.cuda.device(boxes.device):
        error = compiled.nms_select(
            *(x.data_ptr() for x in (boxes, scores, groups.order, groups.starts, groups.count)),
            len(scores), *rule.values(), kept.data_ptr(), selected.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    if error:
        raise RuntimeError(f"NMS on {boxes.device}: {compiled.nms_error(error).decode()}")
    return _taken(kept, selected)


def _taken(kept: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entries that a compiled routine has written. Waits for a GPU."""
    taken = (kept >= 0).nonzero()[:, 0]
    return kept[taken], selected[taken]


def by_torchvision(boxes: Tensor, scores: Tensor, groups: Groups,
                   rule: Rule) -> tuple[Tensor, Tensor]:
    """Suppress hard by torchvision, the groups moved apart, in float64."""
    corners = boxes.double()
    low, high = corners.aminmax()
    apart = high - low + 2
    # Also false for infinite coordinates. Below the limit float64 resolves a millionth pixel.
    if not apart * groups.count < 2**28:
        return reference.hard(boxes, scores, groups, rule)
    corners[:, 2:] += rule.extra
    corners += (groups.of_box * apart)[:, None]
    ranked = scores.argsort(descending=True, stable=True)
    falling = -torch.arange(len(ranked), dtype=torch.float64, device=ranked.device)
    kept = ranked[torchvision()[0].nms(corners[ranked], falling, rule.thresh)]
    kept = kept[groups.of_box[kept].argsort(stable=True)]
    kept = kept[reference.rank_in_group(groups.of_box[kept]) < rule.limit]
    return kept, scores[kept]
