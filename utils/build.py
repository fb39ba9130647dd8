"""The packages that the project needs, and its extensions, compiled in place.

    python utils/build.py                   compile what is missing or older than its sources
    python utils/build.py --check           print the NMS routine of CPU and GPU, and the reason
    python utils/build.py --missing [EXTRA] print the packages to install, one requirement per line

`./make.sh` and `pip install -e .` compile in the same way (`pip -v` shows the outcome):

- `utils/nms/_cpu_nms.pyx` by Cython and a C++ compiler, with OpenMP if the compiler has it;
- `utils/nms/_cuda_nms.cu` by nvcc alone, into a shared library without PyTorch's headers. It is
  compiled for the GPUs present or for the compute capabilities in TORCH_CUDA_ARCH_LIST. It is left
  out if PyTorch was built without CUDA (which pip's isolated builds cannot see).

Each extension prints one line. A failure is no error: PyTorch and torchvision then do the work.
Importing this module needs the standard library only.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parents[1]
CPU_SOURCE = Path("utils/nms/_cpu_nms.pyx")
CUDA_SOURCE = Path("utils/nms/_cuda_nms.cu")
CORE = ("torch>=2.6", "torchvision", "numpy>=1.26", "opencv-python-headless>=4.8", "pillow>=10.1",
        "pycocotools>=2.0.8", "pyyaml>=5.1", "cython>=3", "setuptools>=64")
EVAL = ("hotcoco>=1.2", "faster-coco-eval")
ONNX = ("onnx", "onnxscript")
OPENVINO = ("openvino", "nncf")
EXTRAS = {
    "test": ("pytest", "pytest-xdist", "hypothesis", "ruff", "safetensors", "matplotlib", *EVAL,
             *ONNX, "onnxruntime", *OPENVINO),
    "eval": EVAL,
    "onnx": (*ONNX, "onnxruntime"),
    "openvino": (*OPENVINO, *ONNX),
    "weights": ("safetensors", "gdown", "huggingface_hub"),
    "report": ("matplotlib",),
    "tensorboard": ("tensorboard",),
}
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python",
          "opencv-contrib-python-headless")


def requirements() -> list[str]:
    """Return the packages needed at run time.

    Four packages of OpenCV overwrite each other's files, so the installed one is required. Without
    one it is the headless package: opencv-python needs libGL.so.1, which servers and containers
    lack, and only the window of a live demo needs opencv-python.
    """
    flavour = next((name for name in OPENCV if _version(name)), "opencv-python-headless")
    return [line.replace("opencv-python-headless", flavour) for line in CORE]


def missing(extra: str | None = None) -> list[str]:
    """Return what pip has to install: the unmet requirements, with those of an extra.

    Every torchvision fits one torch. A torch that is new enough is listed with its version: pip
    then keeps it and finds its torchvision. A torch that is too old is replaced with torchvision.
    """
    wanted = [*requirements(), *EXTRAS.get(extra, ())]
    unmet = [line for line in wanted if not _is_met(line)]
    if unmet:
        unmet.append(f"torch=={_version('torch')}" if _is_met(CORE[0]) else "torchvision")
    return list(dict.fromkeys(unmet))


def extensions() -> list[Extension]:
    """Return the setuptools Extensions of setup.py, which compiles them by `command()`."""
    from setuptools import Extension

    return [Extension(_name(CPU_SOURCE), [CPU_SOURCE.as_posix()], language="c++"),
            Extension(_name(CUDA_SOURCE), [CUDA_SOURCE.as_posix()])]


def command() -> type:
    """Return the `build_ext` of setup.py, which always compiles in place and never fails."""
    from setuptools.command.build_ext import build_ext

    class BuildInPlace(build_ext):
        def run(self) -> None:
            for line in build():
                print(line)

        def get_outputs(self) -> list[str]:
            return []  # nothing for a wheel

        def get_output_mapping(self) -> dict[str, str]:
            return {}

    return BuildInPlace


def build() -> list[str]:
    """Compile every extension that is not up to date; return one line per extension.

    The current folder must be the project's root.
    """
    return [_attempt(CPU_SOURCE, _build_cpu, "PyTorch serves instead, with equal results, until "
                     "Cython and a C++ compiler can compile it"),
            _attempt(CUDA_SOURCE, _build_cuda, "torchvision serves a GPU instead")]


def _attempt(source: Path, make: Callable[[], str], instead: str) -> str:
    try:
        outcome = make()
    except Exception as error:  # of any type: an installation goes on without the extension
        if _library(source).is_file():
            instead = "the library compiled earlier stays"
        outcome = f"not compiled: {str(error) or type(error).__name__}; {instead}"
    line = " ".join(f"{_name(source)}: {outcome}".split())
    # Compilers use quotation marks that not every console can show.
    return line.encode("ascii", "backslashreplace").decode()


def _build_cpu() -> str:
    if _is_current(CPU_SOURCE) and _loads_in_python(_library(CPU_SOURCE)):
        return "up to date"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise RuntimeError("Python.h is missing (on Debian: apt install python3-dev)")
    # -O3 for vector instructions; no fused multiply-add, which rounds unlike PyTorch.
    windows = sys.platform == "win32"
    flags = [] if windows else ["-O3", "-ffp-contract=off"]
    openmp = {"win32": ["/openmp"], "darwin": []}.get(sys.platform, ["-fopenmp"])
    try:
        _run_setuptools(flags + openmp, [] if windows else openmp)
    except RuntimeError as error:
        if not openmp:
            raise
        _run_setuptools(flags, [])
        return f"compiled without OpenMP, for one thread: {error}"
    return "compiled"


def _run_setuptools(compiling: list[str], linking: list[str]) -> None:
    """Compile the CPU's extension in another process, whose output can be hidden.

    Raises RuntimeError: the line of the output that names the error.
    """
    program = f"from utils import build; build.run_setuptools({compiling}, {linking})"
    _run([sys.executable, "-c", program])


def run_setuptools(compiling: list[str], linking: list[str]) -> None:
    """Compile the CPU's extension with these flags of the compiler and of the linker."""
    from Cython.Build import cythonize
    from setuptools import Distribution

    (extension,) = cythonize(extensions()[:1], build_dir="build", force=True, quiet=True)
    extension.extra_compile_args, extension.extra_link_args = compiling, linking
    command = Distribution({"ext_modules": [extension]}).get_command_obj("build_ext")
    command.inplace = command.force = True
    command.build_lib = "build/in-place"  # `pip install .` puts build/lib into its wheel
    command.ensure_finalized()
    command.run()


def _run(command: Sequence[str | Path]) -> None:
    """Run a compiler; raise RuntimeError with the line of its output that names the error."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        output = done.stdout + done.stderr
        raise RuntimeError(_telling_line(output) or f"{command[0]} failed")


def _build_cuda() -> str:
    wanted = _architectures()
    present = _compiled_for(_library(CUDA_SOURCE)) if _is_current(CUDA_SOURCE) else ""
    if present and wanted in (present, ""):
        return f"up to date, for {present}"
    if not wanted:
        raise RuntimeError("no GPU here; set TORCH_CUDA_ARCH_LIST, e.g. to 9.0, to compile for "
                           "another machine")
    nvcc = _nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc, the compiler of the CUDA toolkit, in CUDA_HOME, on the PATH "
                           "or in /usr/local/cuda")
    # No fused multiply-add: IoUs are rounded as on the CPU.
    flags = ["-O3", "-fmad=false", "-shared", f'-DARCHITECTURES="{wanted}"']
    if sys.platform != "win32":
        flags += ["-Xcompiler", "-fPIC"]
    for architecture in wanted.split(";"):
        number, _, ptx = architecture.replace(".", "").partition("+")
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    _run([nvcc, *flags, "-o", _library(CUDA_SOURCE), CUDA_SOURCE])
    return f"compiled for {wanted}"


def _nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda")]
    folders.insert(len(homes), os.environ.get("PATH", os.defpath))
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def _architectures() -> str:
    """Return the architectures to compile for, e.g. "8.0;9.0+PTX"; "" if none is known."""
    value = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    listed = value.replace(";", " ").split()
    for architecture in listed:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", architecture):
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST is {value!r}, and {architecture!r} is no "
                               "compute capability; write numbers, e.g. 8.0;9.0+PTX")
    try:
        import torch
    except ModuleNotFoundError:  # in an isolated build of pip
        return ";".join(dict.fromkeys(listed or _capabilities_by_driver()))
    if torch.version.cuda is None:
        raise RuntimeError(f"PyTorch {torch.__version__} was built without CUDA")
    gpus = range(0 if listed else torch.cuda.device_count())
    found = sorted(torch.cuda.get_device_capability(gpu) for gpu in gpus)
    return ";".join(dict.fromkeys(listed or ["{}.{}".format(*numbers) for numbers in found]))


def _capabilities_by_driver() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except FileNotFoundError:
        return []
    return sorted(re.findall(r"^\d+\.\d$", answer, re.MULTILINE), key=float)


def _name(source: Path) -> str:
    return ".".join(source.with_suffix("").parts)


def _library(source: Path) -> Path:
    return source.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))


def _is_current(source: Path) -> bool:
    """Return whether the library for this Python is newer than its source and this file."""
    library, sources = _library(source), (source, Path(__file__))
    return library.is_file() and all(
        library.stat().st_mtime >= file.stat().st_mtime for file in sources
    )


def _loads_in_python(library: Path) -> bool:
    name = library.name.partition(".")[0]
    try:
        importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, library))
    except ImportError:
        return False
    return True


def _compiled_for(library: Path) -> str:
    """Return the architectures of a compiled CUDA library, "" if it cannot be loaded.

    Another process loads it: a process cannot replace a library that it has loaded.
    """
    program = ("import ctypes, sys; ask = ctypes.CDLL(sys.argv[1]).nms_architectures; "
               "ask.restype = ctypes.c_char_p; print(ask().decode())")
    question = [sys.executable, "-c", program, library.resolve()]
    return subprocess.run(question, capture_output=True, text=True).stdout.strip()


def _telling_line(output: str) -> str:
    """Return the first error in the output of a compiler, a linker or Python, else ""."""
    error = r"\b(error|fatal)\b[ \w]*:|: cannot find |undefined (reference|symbol)"
    of_cython = r"^(?!warning: ).*\.pyx:\d+:\d+: "
    of_python = r"^[\w.]+Error: "
    telling = "|".join([error, of_cython, of_python])
    found = (line for line in output.splitlines() if re.search(telling, line))
    return next(found, "").strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_met(requirement: str) -> bool:
    name, _, least = requirement.partition(">=")
    installed = _version(name)
    return installed is not None and _numbers(installed) >= _numbers(least)


def _numbers(version: str) -> list[int]:
    """Return the release of a version: [2, 6, 0] for 2.6.0rc1+cpu, [] for ""."""
    return [int(n) for n in re.match(r"[\d.]*", version)[0].split(".") if n]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the extensions in place.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="print the NMS routines in use")
    choice.add_argument("--missing", nargs="?", const="core", choices=["core", *EXTRAS],
                        metavar="EXTRA", help="print the packages to install, one per line")
    args = parser.parse_args()
    os.chdir(ROOT)  # setuptools resolves paths against the current folder
    if args.missing:
        lines = missing(args.missing)
    elif args.check:
        nms = importlib.import_module("utils.nms")  # here: building works without PyTorch
        lines = [f"NMS on the {name}: {nms.backend(device)} ({nms.backend_reason(device)})"
                 for name, device in (("CPU", "cpu"), ("GPU", "cuda"))]
    else:
        lines = build()
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    # Python puts the folder of a script first on the path, where it would hide other modules.
    sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "utils")]
    sys.exit(main())
