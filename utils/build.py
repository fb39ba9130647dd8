"""What the project needs before its first run: packages, and extensions compiled in place.

    python utils/build.py                  compile what is missing or older than its sources
    python utils/build.py --check          tell in one line which NMS routine is in use and why
    python utils/build.py --missing [test] print the packages to install, one requirement a line

Importing it needs nothing but the standard library. Without a compiler or Cython the project
runs all the same (`utils.nms` has a PyTorch routine of equal results), so that is no error here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    "torch>=2.6",
    "torchvision",
    "numpy>=1.26",
    "opencv-python-headless>=4.8",
    "pycocotools>=2.0.8",
    "cython>=3",
    "setuptools>=64",
)
EXTRAS = {"test": ("pytest", "hypothesis", "ruff"), "tensorboard": ("tensorboard",)}
OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)


def requirements() -> list[str]:
    """The packages needed at run time.

    OpenCV comes in four packages that overwrite each other's files, so one that is installed is
    the one required. Without any it is the headless one: opencv-python needs libGL.so.1, which
    servers and containers lack, and only the window of a live demo needs opencv-python.
    """
    flavour = next((name for name in OPENCV if _version(name)), "opencv-python-headless")
    return [line.replace("opencv-python-headless", flavour) for line in CORE]


def missing(extra: str | None = None) -> list[str]:
    """What pip has to install: the requirements, and those of an extra, that are not met.

    Every torchvision fits one torch. So a torch that is new enough is named with its version, for
    pip to keep it and find its torchvision; one that is too old takes its torchvision along.
    """
    wanted = [*requirements(), *EXTRAS.get(extra, ())]
    unmet = [line for line in wanted if not _is_met(line)]
    if unmet:
        unmet.append(f"torch=={_version('torch')}" if _is_met(CORE[0]) else "torchvision")
    return list(dict.fromkeys(unmet))


def extensions() -> list:
    """The setuptools Extensions; a compiler that fails must not stop an installation by pip."""
    from setuptools import Extension

    # -O3 for vector instructions; no fused multiply-add, whose rounding would differ from PyTorch.
    flags = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=off"]
    return [
        Extension(
            "utils.nms._cpu_nms",
            ["utils/nms/_cpu_nms.pyx"],
            extra_compile_args=flags,
            optional=True,
        ),
    ]


def build() -> list[str]:
    """Compiles every extension that is not up to date; one line each of what came of it.

    The current folder must be the project's root.
    """
    try:
        return [_compile(extension) for extension in extensions()]
    except ModuleNotFoundError as error:
        return [f"no extension compiled: {error}; PyTorch serves instead, with equal results"]


def _compile(extension) -> str:
    if _up_to_date(extension):
        return f"{extension.name}: up to date"
    from Cython.Build import cythonize
    from Cython.Compiler.Errors import CompileError
    from setuptools import Distribution
    from setuptools.errors import BaseError, CCompilerError

    try:
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise BaseError("Python.h is missing (on Debian: apt install python3-dev)")
        extension.optional = False
        modules = cythonize([extension], build_dir="build", force=True, quiet=True)
        command = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
        command.inplace = command.force = True
        command.ensure_finalized()
        command.run()
    except (BaseError, CCompilerError, CompileError, OSError) as error:
        return (
            f"{extension.name}: not compiled, which takes a C compiler: {error}; "
            "PyTorch serves instead, with equal results"
        )
    return f"{extension.name}: compiled"


def _up_to_date(extension) -> bool:
    """Whether it is there for this Python, not older than its sources, and can be loaded."""
    built = ROOT / f"{extension.name.replace('.', '/')}{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [Path(__file__), *(ROOT / source for source in extension.sources)]
    if not built.is_file() or built.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        return False
    try:
        importlib.util.module_from_spec(
            importlib.util.spec_from_file_location(extension.name, built)
        )
    except ImportError:
        return False
    return True


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
    """The release of a version: [2, 6, 0] of 2.6.0rc1+cpu, [] of nothing."""
    return [int(n) for n in re.match(r"[\d.]*", version)[0].split(".") if n]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the extensions in place.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="which NMS routine is in use, and why")
    choice.add_argument(
        "--missing",
        nargs="?",
        const="core",
        choices=["core", *EXTRAS],
        metavar="EXTRA",
        help="the packages to install, one a line",
    )
    args = parser.parse_args()
    os.chdir(ROOT)  # setuptools takes paths from the current folder
    if args.missing:
        lines = missing(args.missing)
    elif args.check:
        from utils import nms

        lines = [f"NMS: {nms.backend()} ({nms.backend_reason()})"]
    else:
        lines = build()
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    # Python puts the folder of a script first on the path, where our modules would hide others.
    sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "utils")]
    sys.exit(main())
