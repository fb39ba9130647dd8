"""Each routine of utils.nms made to serve tensors on the CPU, the CUDA kernel too."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
import types
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

import utils.nms as nms_module
from utils.nms import backend, backend_reason

TESTS = Path(__file__).parent
compiled = pytest.mark.skipif(backend() != "cython", reason=f"backend is torch: {backend_reason()}")
needs_compiler = pytest.mark.skipif(
    not shutil.which("c++") or sys.platform == "win32", reason="no C++ compiler with ucontext.h"
)
needs_torchvision = pytest.mark.skipif(
    nms_module._torchvision()[0] is None, reason=nms_module._torchvision()[1]
)
EXACT = [
    "torch",
    pytest.param("cython", marks=compiled),
    pytest.param("cuda", marks=needs_compiler),
]
"""Routines that keep the same boxes to the last tie."""
exact = pytest.mark.parametrize("routine", EXACT)
EVERY = [*EXACT, pytest.param("torchvision", marks=needs_torchvision)]
every = pytest.mark.parametrize("routine", EVERY)


@functools.cache
def kernel_on_the_cpu():
    """The library of utils/nms/_cuda_nms.cu, its threads run one after the other on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "library.so")
        command = ["c++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
        command += ["-include", TESTS / "cuda_on_cpu.h", '-DARCHITECTURES="a CPU"', "-x", "c++"]
        subprocess.run(
            [*command, nms_module.__path__[0] + "/_cuda_nms.cu", "-o", library], check=True
        )
        return nms_module._load_library(library)


@contextmanager
def using(routine):
    """Make one routine serve tensors on the CPU."""
    with ExitStack() as stack:

        def patch(target, name, value):
            stack.enter_context(mock.patch.object(target, name, value))

        if routine == "cython":
            assert backend() == "cython"
        elif routine == "torch":
            patch(nms_module, "_extension", lambda: (None, "a test"))
        elif routine == "cuda":
            library = kernel_on_the_cpu()
            patch(nms_module, "_library", lambda index: (library, "a test"))
            patch(nms_module, "_routine", lambda *_: nms_module._cuda)
            patch(torch.cuda, "device", nullcontext)
            patch(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=None))
        elif routine == "torchvision":
            patch(
                nms_module,
                "_routine",
                lambda device, method, count: (
                    nms_module._by_torchvision if count else nms_module._torch_hard
                ),
            )
        yield
