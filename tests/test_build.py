"""The build of the extensions, the lists of packages, and make.sh, mostly in a copied tree."""

import importlib.util
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
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")),
                                    reason="no C++ compiler on this machine")
needs_nvcc = pytest.mark.skipif(build._nvcc() is None, reason="no nvcc on this machine")


def run(*command, cwd, **environment):
    active = ("VIRTUAL_ENV", "CONDA_PREFIX", "SSD_VENV")
    inherited = {k: v for k, v in os.environ.items() if k not in active}
    inherited["TORCH_CUDA_ARCH_LIST"] = "none"  # unless a test asks for it, no CUDA
    return subprocess.run(list(map(str, command)), cwd=cwd, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True,
                          env=inherited | {k: str(v) for k, v in environment.items()}, timeout=120)


@pytest.fixture
def tree(tmp_path):
    """Copy what the build reads to a folder whose name has a space; nothing is compiled.

    A function of one line takes the place of the CPU's extension.
    """
    root = tmp_path / "a clone"
    (root / "utils/nms").mkdir(parents=True)
    for name in ("setup.py", "make.sh", "pyproject.toml", "README.md", "utils/__init__.py"):
        shutil.copy(ROOT / name, root / name)
    for path in (ROOT / "utils/build.py", *(ROOT / "utils/nms").iterdir()):
        if path.suffix in (".py", ".cu"):
            shutil.copy(path, root / path.relative_to(ROOT))
    (root / "utils/nms/_cpu_nms.pyx").write_text("def f():\n    return 1\n")
    return root


def compile_in(tree, **environment):
    """Return what the build says of the CPU's extension and of the GPU's."""
    result = run(sys.executable, tree / "utils/build.py", cwd=tree.parent, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    lines = r"utils\.nms\._cpu_nms: (.+)\nutils\.nms\._cuda_nms: (.+)\n"
    return re.fullmatch(lines, result.stdout).groups()


def script(folder, name, body):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n", "utf-8")
    (folder / name).chmod(0o755)
    return folder / name


def hide_cython(tree):
    (tree / "Cython").mkdir()
    (tree / "Cython/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'Cython'\", name='Cython')"
    )


def fake_torch(tree, cuda="13.0", gpus=()):
    """Add a PyTorch for a CUDA version (None: the CPU) that sees GPUs of these capabilities."""
    (tree / "torch.py").write_text("from types import SimpleNamespace\n"
                                   "__version__ = '2.9.0'\n"
                                   f"version = SimpleNamespace(cuda={cuda!r})\n"
                                   f"cuda = SimpleNamespace(device_count=lambda: {len(gpus)},"
                                   f" get_device_capability={tuple(gpus)}.__getitem__)\n")


@needs_compiler
def test_compiles_in_place_once_and_again_when_a_source_changed(tree):
    hide_cython(tree)
    missing = "not compiled: ModuleNotFoundError: No module named 'Cython'; "
    assert compile_in(tree)[0].startswith(f"{missing}PyTorch serves instead, with equal results")
    shutil.rmtree(tree / "Cython")
    assert compile_in(tree)[0] == "compiled"
    library = tree / f"utils/nms/_cpu_nms{SUFFIX}"
    compiled_at = library.stat().st_mtime_ns
    assert not list((tree / "utils").rglob("*.c*p"))

    hide_cython(tree)
    assert compile_in(tree)[0] == "up to date"
    assert library.stat().st_mtime_ns == compiled_at
    source = tree / "utils/nms/_cpu_nms.pyx"
    later = library.stat().st_mtime + 10
    os.utime(source, (later, later))
    assert compile_in(tree)[0] == f"{missing}the library compiled earlier stays"
    os.utime(source, (0, 0))
    library.write_bytes(b"not a library")
    assert compile_in(tree)[0] == f"{missing}the library compiled earlier stays"


@needs_compiler
def test_what_cython_and_the_compiler_find_wrong_is_told_in_one_line(tree):
    source = tree / "utils/nms/_cpu_nms.pyx"
    source.write_text("def f():\n    return nothing_of_this_name\n")
    told = compile_in(tree)[0]
    assert told.startswith("not compiled: utils/nms/_cpu_nms.pyx:2:11: undeclared name")
    assert "; PyTorch serves instead, with equal results" in told
    source.write_text('cdef extern from "no_such_header.h":\n    int g()\n')
    assert re.match(r"not compiled: .*no_such_header\.h", compile_in(tree)[0])


@needs_compiler
def test_a_compiler_without_openmp_serves_and_it_is_said(tree, tmp_path):
    refusal = "c++: error: unsupported option \u2018-fopenmp\u2019"  # quoted as gcc does
    compiler = script(tmp_path, "c++",
                      f'case "$*" in *-fopenmp*) echo "{refusal}" >&2; exit 1 ;; esac\n'
                      f'exec {shutil.which(os.environ.get("CXX", "c++"))} "$@"')
    told = compile_in(tree, CC=compiler, CXX=compiler, PYTHONIOENCODING="ascii")[0]
    assert told.startswith("compiled without OpenMP, for one thread: c++: error: unsupported")
    assert compile_in(tree)[0] == "up to date"


def test_without_a_compiler_it_says_so_and_the_fallbacks_serve(tree):
    told = compile_in(tree, CC="/nonexistent", CXX="/nonexistent")[0]
    assert re.fullmatch(r"not compiled: .*/nonexistent.*; .*C\+\+ compiler.*", told)
    check = run(sys.executable, tree / "utils/build.py", "--check", cwd=tree.parent)
    assert check.returncode == 0
    gpu = r"NMS on the GPU: (none|torch|torchvision) \(.+\)\n"
    assert re.fullmatch(r"NMS on the CPU: torch \(.+\)\n" + gpu, check.stdout)


@needs_nvcc
def test_cuda_is_compiled_for_the_architectures_asked_for_and_again_for_others(tree):
    hide_cython(tree)
    fake_torch(tree)
    library = tree / f"utils/nms/_cuda_nms{SUFFIX}"
    assert compile_in(tree, TORCH_CUDA_ARCH_LIST="9.0")[1] == "compiled for 9.0"
    compiled_at = library.stat().st_mtime_ns
    assert compile_in(tree, TORCH_CUDA_ARCH_LIST="9.0")[1] == "up to date, for 9.0"
    assert compile_in(tree, TORCH_CUDA_ARCH_LIST="")[1] == "up to date, for 9.0"
    assert library.stat().st_mtime_ns == compiled_at

    both = "compiled for 8.0;9.0+PTX"
    assert compile_in(tree, TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")[1] == both
    assert compile_in(tree, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")[1] == f"up to date, {both[9:]}"
    assert embedded(library, "elf") in (None, {"sm_80", "sm_90"})
    assert embedded(library, "ptx") in (None, {"sm_90"})
    code = cuobjdump("--dump-ptx", library)
    assert code is None or ("div.rn.f32" in code and "fma.rn.f32" not in code)  # as on the CPU
    library.write_bytes(b"not a library")
    assert compile_in(tree, TORCH_CUDA_ARCH_LIST="9.0")[1] == "compiled for 9.0"

    with open(tree / "utils/nms/_cuda_nms.cu", "a") as source:
        source.write("int broken() { return nothing_of_this_name; }\n")
    library.unlink()
    told = compile_in(tree, TORCH_CUDA_ARCH_LIST="9.0")[1]
    assert re.match(r"not compiled: .*_cuda_nms\.cu.* error.*nothing_of_this_name", told)


def embedded(library, kind):
    """Return the targets of a library's machine code ("elf") or "ptx", None without a tool."""
    listed = cuobjdump(f"--list-{kind}", library)
    return None if listed is None else set(re.findall(r"sm_\d+", listed))


def cuobjdump(option, library):
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton else ""
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))
    return None if tool is None else run(tool, option, library, cwd=ROOT).stdout


def test_the_gpus_that_are_present_say_what_to_compile_for(tree, tmp_path):
    hide_cython(tree)
    refusal = "host_config.h:143:2: error: #error -- unsupported GNU version!"
    script(tmp_path / "cuda/bin", "nvcc", f'echo "$@" >asked; echo "{refusal}" >&2; exit 1')
    home = {"CUDA_HOME": tmp_path / "cuda", "TORCH_CUDA_ARCH_LIST": ""}

    def asked():
        told = compile_in(tree, **home, PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        assert told[1] == f"not compiled: {refusal}; torchvision serves a GPU instead"
        return re.findall("-gencode=([^ ]+)", (tree / "asked").read_text())

    fake_torch(tree, gpus=[(12, 0), (9, 0), (9, 0)])
    expected = ["arch=compute_90,code=sm_90", "arch=compute_120,code=sm_120"]
    assert asked() == expected
    (tree / "torch.py").write_text("raise ModuleNotFoundError")
    script(tmp_path / "bin", "nvidia-smi", r"printf '12.0\n9.0\n9.0\n'")
    assert asked() == expected


def test_what_keeps_cuda_from_being_compiled_is_told_in_one_line(tree):
    hide_cython(tree)

    def told(**environment):
        cause, instead = compile_in(tree, **environment)[1].rsplit("; ", 1)
        assert instead == "torchvision serves a GPU instead"
        return cause.removeprefix("not compiled: ")

    wrong = told(TORCH_CUDA_ARCH_LIST="8.0;Hopper")
    assert "'8.0;Hopper'" in wrong and "'Hopper'" in wrong and "8.0;9.0+PTX" in wrong
    fake_torch(tree)
    assert told(TORCH_CUDA_ARCH_LIST="").startswith("no GPU here; set TORCH_CUDA_ARCH_LIST")
    fake_torch(tree, cuda=None)
    assert told(TORCH_CUDA_ARCH_LIST="9.0") == "PyTorch 2.9.0 was built without CUDA"
    fake_torch(tree)
    code = tree / "utils/build.py"
    code.write_text(code.read_text().replace("/usr/local/cuda", "/nonexistent"))
    nowhere = told(TORCH_CUDA_ARCH_LIST="9.0", CUDA_HOME="", CUDA_PATH="", PATH="")
    assert nowhere.startswith("no nvcc") and nowhere.endswith("or in /nonexistent")


PIP = "-m pip install -v --no-index --no-deps --no-build-isolation --ignore-installed --prefix"
can_pip = build._version("pip") and (build._is_met("setuptools>=70.1") or build._version("wheel"))


@needs_compiler
@pytest.mark.parametrize("command", [f"{PIP} ../prefix -e .", "setup.py build_ext"])
def test_installing_compiles_in_place_and_tells_what_came_of_it(command, tree):
    if command.startswith(PIP) and not can_pip:
        pytest.skip("takes pip and setuptools>=70.1")
    result = run(sys.executable, *command.split(), cwd=tree)
    assert result.returncode == 0, result.stderr
    told = result.stdout + result.stderr
    assert "utils.nms._cpu_nms: compiled\n" in told
    assert "utils.nms._cuda_nms: not compiled: TORCH_CUDA_ARCH_LIST is 'none'" in told
    assert (tree / f"utils/nms/_cpu_nms{SUFFIX}").is_file()
    assert not list((tree.parent / "prefix").rglob("_cpu_nms*"))


def test_setup_takes_extensions_and_requirements_from_the_build(monkeypatch):
    passed = {}
    monkeypatch.setattr("setuptools.setup", passed.update)
    monkeypatch.setattr(sys, "path", sys.path[:])
    runpy.run_path(str(ROOT / "setup.py"))
    names = [extension.name for extension in passed["ext_modules"]]
    assert names == ["utils.nms._cpu_nms", "utils.nms._cuda_nms"]
    assert all((ROOT / source).is_file() for e in passed["ext_modules"] for source in e.sources)
    assert passed["install_requires"] == build.requirements()
    extras = {name: set(packages) for name, packages in passed["extras_require"].items()}
    assert set(extras) == {"test", "eval", "onnx", "openvino", "weights", "report", "tensorboard"}
    assert extras["eval"] | extras["onnx"] | extras["openvino"] < extras["test"]


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
    everything = {"torch": "2.10.0+cpu", "torchvision": "0.25.0+cpu", "numpy": "2.0.0rc1",
                  "opencv_contrib_python": "5.0.0.93", "pycocotools": "2.0.8", "cython": "3.0a1",
                  "setuptools": "80.1", "pillow": "10.1.0", "pyyaml": "6.0"}
    installed(monkeypatch, **everything)
    assert build.missing() == []
    assert build.missing("eval") == ["hotcoco>=1.2", "faster-coco-eval", "torch==2.10.0+cpu"]
    assert build.missing("test") == [*build.EXTRAS["test"], "torch==2.10.0+cpu"]
    installed(monkeypatch, **everything | {"numpy": "1.25.9"})
    assert build.missing() == ["numpy>=1.26", "torch==2.10.0+cpu"]
    installed(monkeypatch, **everything | {"torch": "2.5.1"})
    assert build.missing() == ["torch>=2.6", "torchvision"]
    installed(monkeypatch)
    assert build.missing() == list(build.CORE)


def test_make_refuses_an_unknown_word(tmp_path):
    result = run("bash", ROOT / "make.sh", "tset", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: ./make.sh")


def test_make_refuses_an_old_python(tree, tmp_path):
    old = tmp_path / "old"
    script(old / "bin", "python", 'case "$2" in *print*) echo 3.8 ;; *) exit 1 ;; esac')
    result = run("bash", tree / "make.sh", cwd=tmp_path, VIRTUAL_ENV=old)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{old}/bin/python is Python 3.8, and 3.10 or newer is needed" in result.stderr


def test_make_explains_a_python_that_cannot_create_environments(tree, tmp_path):
    broken = 'test "$1" = -c && echo 3.12 && exit; mkdir -p "$3/bin"; cp "$0" "$3/bin/python"'
    script(tmp_path / "bin", "python3", f"{broken}; exit 1")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = run("bash", tree / "make.sh", cwd=tmp_path, PATH=path, SSD_VENV="")
    assert (result.returncode, result.stdout) == (1, "")
    assert "apt install python3-venv" in result.stderr
    assert not (tree / ".venv").exists()


def test_make_in_a_complete_environment_only_builds(tree, tmp_path):
    if build.missing():
        pytest.skip(f"not installed here: {build.missing()}")
    environment = tmp_path / "environment"
    script(environment / "bin", "python", f'exec "{sys.executable}" "$@"')
    result = run("bash", tree / "make.sh", cwd=tmp_path, SSD_VENV=environment, CXX="/nonexistent")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"(utils\.nms\._(cpu|cuda)_nms: not compiled.*\n){2}", result.stdout)
