"""The build of the extensions, the lists of packages, and make.sh, mostly in copies of the tree."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from utils import build

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = f"_cpu_nms{sysconfig.get_config_var('EXT_SUFFIX')}"
needs_compiler = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CC", "cc")) or sys.platform == "win32"),
    reason="no C compiler on this machine",
)


def run(*command, cwd, **environment):
    active = ("VIRTUAL_ENV", "CONDA_PREFIX", "SSD_VENV")
    inherited = {k: v for k, v in os.environ.items() if k not in active}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {k: str(v) for k, v in environment.items()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads, in a folder whose name has a space, nothing compiled."""
    root = tmp_path / "a clone"
    (root / "utils/nms").mkdir(parents=True)
    for name in ("utils/__init__.py", "utils/build.py", "setup.py", "make.sh"):
        shutil.copy(ROOT / name, root / name)
    for name in ("__init__.py", "_cpu_nms.pyx"):
        shutil.copy(ROOT / "utils/nms" / name, root / "utils/nms" / name)
    return root


def hide_cython(tree):
    (tree / "Cython").mkdir()
    (tree / "Cython/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'Cython'\", name='Cython')"
    )


@needs_compiler
def test_compiles_in_place_once_and_again_when_a_source_changed(tree):
    def script(**environment):
        result = run(sys.executable, tree / "utils/build.py", cwd=tree.parent, **environment)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout

    assert script() == "utils.nms._cpu_nms: compiled\n"
    library = tree / "utils/nms" / LIBRARY
    compiled_at = library.stat().st_mtime_ns
    assert script() == "utils.nms._cpu_nms: up to date\n"
    assert library.stat().st_mtime_ns == compiled_at
    assert not list((tree / "utils").rglob("*.c"))

    hide_cython(tree)
    assert "up to date" in script()
    source = tree / "utils/nms/_cpu_nms.pyx"
    later = library.stat().st_mtime + 10
    os.utime(source, (later, later))
    assert "No module named 'Cython'" in script()  # it tried
    os.utime(source, (0, 0))
    assert "up to date" in script()
    library.write_bytes(b"not a library")
    assert "No module named 'Cython'" in script()


def test_without_a_compiler_it_says_so_and_the_fallback_serves(tree):
    result = run(sys.executable, "-m", "utils.build", cwd=tree, CC="/nonexistent")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(
        r"utils\.nms\._cpu_nms: not compiled, which takes a C compiler: .*/nonexistent.*; "
        r"PyTorch serves instead, with equal results\n",
        result.stdout,
    )
    check = run(sys.executable, tree / "utils/build.py", "--check", cwd=tree.parent)
    assert check.returncode == 0
    assert check.stdout == (
        "NMS: torch (utils.nms._cpu_nms is not compiled for this Python; ./make.sh compiles it)\n"
    )


def test_without_cython_it_says_so(tree):
    hide_cython(tree)
    result = run(sys.executable, "utils/build.py", cwd=tree)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (
        "no extension compiled: No module named 'Cython'; "
        "PyTorch serves instead, with equal results\n"
    )


def test_setup_takes_extensions_and_requirements_from_the_build(monkeypatch):
    passed = {}
    monkeypatch.setattr("setuptools.setup", passed.update)
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(ROOT / "setup.py"))
    assert [e.name for e in passed["ext_modules"]] == ["utils.nms._cpu_nms"]
    assert [e.name for e in build.extensions()] == ["utils.nms._cpu_nms"]
    assert all((ROOT / source).is_file() for e in build.extensions() for source in e.sources)
    assert passed["install_requires"] == build.requirements()
    assert set(passed["extras_require"]) == {"test", "tensorboard"}


def installed(monkeypatch, **versions):
    versions = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(build, "_version", versions.get)


def test_the_opencv_that_is_there_is_the_one_required(monkeypatch):
    installed(monkeypatch)
    assert "opencv-python-headless>=4.8" in build.requirements()
    for flavour in build.OPENCV:
        monkeypatch.setattr(build, "_version", {flavour: "4.9"}.get)
        assert [r for r in build.requirements() if r.startswith("opencv")] == [f"{flavour}>=4.8"]


def test_only_what_is_missing_or_too_old_is_installed(monkeypatch):
    everything = {
        "torch": "2.10.0+cpu", "torchvision": "0.25.0+cpu", "numpy": "2.0.0rc1",
        "opencv_contrib_python": "5.0.0.93", "pycocotools": "2.0.8", "cython": "3.0a1",
        "setuptools": "80.1",
    }  # fmt: skip
    installed(monkeypatch, **everything)
    assert build.missing() == []
    assert build.missing("test") == ["pytest", "hypothesis", "ruff", "torch==2.10.0+cpu"]
    installed(monkeypatch, **everything | {"numpy": "1.25.9"})
    assert build.missing() == ["numpy>=1.26", "torch==2.10.0+cpu"]
    installed(monkeypatch, **everything | {"torch": "2.5.1"})
    assert build.missing() == ["torch>=2.6", "torchvision"]
    installed(monkeypatch)
    assert build.missing() == list(build.CORE)


@pytest.fixture
def bash():
    if sys.platform == "win32" or not shutil.which("bash"):
        pytest.skip("make.sh needs bash")
    return "bash"


def fake_python(folder, name, body):
    folder.mkdir(parents=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_make_refuses_an_unknown_word(bash, tmp_path):
    result = run(bash, ROOT / "make.sh", "tset", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ./make.sh")


def test_make_refuses_an_old_python(bash, tree, tmp_path):
    old = tmp_path / "old"
    fake_python(old / "bin", "python", 'case "$2" in *print*) echo 3.8 ;; *) exit 1 ;; esac')
    result = run(bash, tree / "make.sh", cwd=tmp_path, VIRTUAL_ENV=old)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{old}/bin/python is Python 3.8, and 3.10 or newer is needed" in result.stderr


def test_make_explains_a_python_that_cannot_create_environments(bash, tree, tmp_path):
    fake_python(
        tmp_path / "bin",
        "python3",
        'test "$1" = -c && echo 3.12 && exit; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 1',
    )
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = run(bash, tree / "make.sh", cwd=tmp_path, PATH=path, SSD_VENV="")
    assert (result.returncode, result.stdout) == (1, "")
    assert "apt install python3-venv" in result.stderr
    assert not (tree / ".venv").exists()


def test_make_in_a_complete_environment_only_builds(bash, tree, tmp_path):
    if build.missing():
        pytest.skip(f"not installed here: {build.missing()}")
    environment = tmp_path / "environment"
    fake_python(environment / "bin", "python", f'exec "{sys.executable}" "$@"')
    result = run(bash, tree / "make.sh", cwd=tmp_path, SSD_VENV=environment, CC="/nonexistent")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"utils\.nms\._cpu_nms: not compiled.*\n", result.stdout)
