"""Importing does no work, and folders depend on each other in one direction only."""

import ast
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = (
    ("utils",),
    ("data", "layers"),
    ("models",),
    ("inference",),
    ("engine",),
    ("tools",),
    ("train_test", "hubconf"),
    ("demo",),
    ("benchmarks", "docs"),
)
"""A room imports from itself and from the rooms of lower floors."""
ROOMS = [room for floor in FLOORS for room in floor]


def files_of(room: str) -> list[Path]:
    file = ROOT / f"{room}.py"
    return [file] if file.is_file() else sorted((ROOT / room).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return parts.removesuffix(".__init__")


MODULES = {module_of(path): path for room in ROOMS for path in files_of(room)}


def own_imports(path: Path) -> set[tuple[str, bool]]:
    """Return (module, whether inside a function) of every own module that a file imports."""
    found = set()

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.update((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                found.add((member if member in MODULES else node.module, inside))
        for child in ast.iter_child_nodes(node):
            inner = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, inner)

    visit(ast.parse(path.read_text("utf-8")), False)
    return {(name, inside) for name, inside in found if name.split(".")[0] in ROOMS}


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_room_imports_only_what_lies_below_it(floor):
    below = {room for lower in FLOORS[:floor] for room in lower}
    for room in FLOORS[floor]:
        for path in files_of(room):
            for name, inside in own_imports(path):
                assert name.split(".")[0] in below | {room}, f"{path} imports {name}"
                assert not inside, f"{path} imports {name} inside a function"


def test_no_modules_import_each_other_in_a_circle():
    imports = {module: {name for name, _ in own_imports(path)} for module, path in MODULES.items()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_torchvision_is_never_imported_at_module_level():
    for path in ROOT.rglob("*.py"):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert "torchvision" not in {str(name).split(".")[0] for name in named}, path


def test_importing_every_module_is_silent_and_changes_nothing(tmp_path):
    program = f"""
import os, sys
import cv2, numpy, torch
before = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
          torch.get_rng_state().tolist(), torch.is_grad_enabled(), cv2.getNumThreads(),
          str(numpy.random.get_state()[1]), os.getcwd(), torch.backends.cudnn.benchmark)
import importlib
sys.argv = ["program", "--unknown"]
for name in {[*MODULES]!r}:
    importlib.import_module(name)
after = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
         torch.get_rng_state().tolist(), torch.is_grad_enabled(), cv2.getNumThreads(),
         str(numpy.random.get_state()[1]), os.getcwd(), torch.backends.cudnn.benchmark)
assert before == after
import logging
assert not logging.getLogger().handlers
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_reading_a_preset_needs_neither_opencv_nor_pycocotools():
    program = (
        "import sys; import data.config, data;"
        "assert not {'cv2', 'pycocotools', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), cwd=ROOT)
    assert done.returncode == 0


def test_public_names():
    program = """
from models import build_net
from data.config import VOC_300, VOC_512, COCO_300, COCO_512
from layers import PriorBox, MultiBoxLoss, Detect
from utils.nms import nms, soft_nms
from data import VOCDetection, COCODetection, detection_collate
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
