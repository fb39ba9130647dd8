"""Importing does no work, and folders depend on each other in one direction only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("utils", "data", "layers", "models")
ALLOWED = {
    "utils": {"utils"},
    "data": {"data", "utils"},
    "layers": {"layers", "utils"},
    "models": {"models", "layers", "data.config", "data.image", "data.transforms", "utils"},
}
# Commands (`python -m utils.NAME`) and what is made of whole networks: their functions may import
# what stands above their folder, no other module does, and importing them imports nothing of it.
OPEN = (
    "utils/weights.py", "utils/profile.py", "utils/deploy.py", "utils/export.py", "data/check.py",
)  # fmt: skip
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for folder in (*FOLDERS, "demo", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*.py")
)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; of `OPEN`, outside functions."""
    names = set()
    tree = ast.parse(path.read_text("utf-8"))
    if path.relative_to(ROOT).as_posix() in OPEN:
        for node in ast.walk(tree):
            if hasattr(node, "body") and isinstance(node.body, list):
                node.body = [x for x in node.body if not isinstance(x, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_what_lies_below_it(folder):
    ours = (*FOLDERS, "demo", "benchmarks", "tests", "train_test")
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            if name.split(".")[0] in ours and name not in FOLDERS:
                assert any(name == a or name.startswith(f"{a}.") for a in ALLOWED[folder]), (
                    f"{path} imports {name}"
                )


def test_layers_take_nothing_of_utils_but_nms():
    for path in (ROOT / "layers").rglob("*.py"):
        for name in imported(path):
            assert not name.startswith("utils") or name.startswith("utils.nms"), path


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
for name in {[*MODULES, "train_test"]!r}:
    importlib.import_module(name)
after = (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
         torch.get_rng_state().tolist(), torch.is_grad_enabled(), cv2.getNumThreads(),
         str(numpy.random.get_state()[1]), os.getcwd(), torch.backends.cudnn.benchmark)
assert before == after
import logging
assert not logging.getLogger().handlers
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True,
        text=True,
    )  # fmt: skip
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
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}
