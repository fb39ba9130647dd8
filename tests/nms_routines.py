"""Every routine of utils.nms applied to tensors on the CPU, the CUDA kernel too."""

import functools
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from utils.nms import backend, backend_reason, backends

TESTS = Path(__file__).parent
compiled = pytest.mark.skipif(backend() != "cython", reason=f"backend is torch: {backend_reason()}")
needs_compiler = pytest.mark.skipif(not shutil.which("c++") or sys.platform == "win32",
                                    reason="no C++ compiler with ucontext.h")
needs_torchvision = pytest.mark.skipif(backends.torchvision()[0] is None,
                                       reason=backends.torchvision()[1])
EXACT = ["torch", pytest.param("cython", marks=compiled),
         pytest.param("cuda", marks=needs_compiler)]
"""Routines that keep the same boxes to the last tie."""
exact = pytest.mark.parametrize("routine", EXACT)
EVERY = [*EXACT, pytest.param("torchvision", marks=needs_torchvision)]
every = pytest.mark.parametrize("routine", EVERY)


@functools.cache
def kernel_on_the_cpu():
    """Compile utils/nms/_cuda_nms.cu for the CPU, where its threads run one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "library.so")
        command = ["c++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
        command += ["-include", TESTS / "cuda_on_cpu.h", '-DARCHITECTURES="a CPU"', "-x", "c++"]
        source = Path(backends.__file__).with_name("_cuda_nms.cu")
        subprocess.run([*command, source, "-o", library], check=True)
        return backends.load_library(library)


@contextmanager
def using(routine: str) -> Iterator[None]:
    """Make one routine serve tensors on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if routine == "cuda":
            patch.setattr(backends, "library", lambda index: (kernel_on_the_cpu(), "a test"))
            patch.setattr(torch.cuda, "device", nullcontext)
            stream = types.SimpleNamespace(cuda_stream=None)
            patch.setattr(torch.cuda, "current_stream", lambda: stream)
        patch.setattr(backends, "_backend", lambda device: (routine, "a test"))
        yield
