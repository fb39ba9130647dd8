"""Exported detectors in their runtimes, ONNX Runtime and OpenVINO, on the CPU.

    model = open_model("detector.onnx")
    outputs = model({"images": images})

The files are those of ``python -m tools.export``; no other is taken. Each has its description
inside (``INFO_KEY``).
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.download import file_digest
from utils.errors import UserError
from utils.logger import LOGGER

INFO_KEY = "ssd_hardnet"
"""Of the description: in ONNX's metadata, OpenVINO's runtime information."""
FORMAT = 1

_KEYS = {
    "format": int, "version": str, "size": int, "classes": list, "dataset": str, "priors": str,
    "variance": list, "mean": list, "preprocess": bool, "nms": bool, "dynamic": bool,
    "precision": str, "detection": dict, "checkpoint": dict, "versions": dict,
}  # fmt: skip


class ExportedModel:
    """An exported detector, ready to run.

    Attributes:
        path: its file.
        info: its description, which has

            - "version", "size", "classes" (names, label k is that of k - 1), "dataset" and
              "priors" ("VOC" or "COCO"), "variance", "mean" (BGR) of the detector,
            - "preprocess", "nms", "dynamic" (bool) and "precision" (fp32, bf16, fp16, int8) of the
              file,
            - "detection": conf_thresh, nms_thresh, per_class, top_k; a graph with its own
              suppression has them inside, others leave them to the caller,
            - "checkpoint": file and sha256 of what it was made of, "versions": of the packages.

        runtime: name and version of what runs it, e.g. ("onnxruntime", "1.31.1").
    """

    def __init__(
        self,
        path: Path,
        info: dict,
        runtime: tuple[str, str],
        run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    ):
        self.path = path
        self.info = info
        self.runtime = runtime
        self._run = run

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on a batch, of one image unless it is dynamic.

        Args:
            inputs: "images" float32 [B, 3, S, S], BGR minus the mean, or, of a graph with its own
                preprocessing, "pictures" uint8 [B, H, W, 3], BGR, of S x S unless it is dynamic; of
                one with its own suppression also "sizes" float32 [B, 2], (width, height) in pixels.

        Returns:
            "loc" float32 [B, P, 4] and "conf" float32 [B, P, C], or, of a graph with its own
            suppression, "boxes" float32 [n, 4] in pixels, "scores" float32 [n], "labels" int64 [n]
            and "image" int64 [n], ascending: which image of the batch; n may be 0.
        """
        return self._run(inputs)


def identity(path: str | Path) -> dict:
    """Name and sha256 of an exported file, and of OpenVINO's weights beside it."""
    path = Path(path)
    found = {"file": path.name, "sha256": file_digest(path, "sha256")}
    if path.suffix == ".xml":
        weights = path.with_suffix(".bin")
        found["weights"] = {"file": weights.name, "sha256": file_digest(weights, "sha256")}
    return found


def open_model(path: str | Path, threads: int | None = None) -> ExportedModel:
    """Open an .onnx by ONNX Runtime, an .xml (with its .bin) by OpenVINO.

    Args:
        threads: of the CPU, None: as many as the runtime chooses.

    Raises:
        UserError: no such file, another kind of file, a damaged one, one that
            ``python -m tools.export`` has not written or a newer one has, or the runtime is not
            installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no exported file; their names end in {', '.join(SUFFIXES)}")
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    for file in files:
        if not file.is_file():
            fix = "check the path" if file == path else f"it belongs beside {path.name}"
            raise UserError(f"{file} does not exist or is not a file; {fix}")
    return _RUNTIMES[path.suffix](path, threads)


def import_package(name: str, extra: str):
    """A package that not everybody needs, of one of this project's extras; UserError, naming what
    installs it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}); pip install {name}, or pip install -e .[{extra}]"
        ) from error


def cpu_has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU; without instructions for it, in fp32."""
    openvino = import_package("openvino", "openvino")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _onnx(path: Path, threads: int | None) -> ExportedModel:
    ort = import_package("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or 0
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # kinds of its own for what it does not expect
        raise _unreadable(path, error) from error
    info = _info(path, session.get_modelmeta().custom_metadata_map.get(INFO_KEY))
    names = [output.name for output in session.get_outputs()]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, inputs), strict=True))

    return ExportedModel(path, info, ("onnxruntime", ort.__version__), run)


def _openvino(path: Path, threads: int | None) -> ExportedModel:
    openvino = import_package("openvino", "openvino")
    core = openvino.Core()
    try:
        model = core.read_model(path)
        text = model.get_rt_info(INFO_KEY).astype(str) if model.has_rt_info(INFO_KEY) else None
        info = _info(path, text)
        # Left to itself it computes in bfloat16 on some CPUs.
        precision = "bf16" if info["precision"] == "bf16" else "f32"
        config = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        config |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        compiled = core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    if precision == "bf16" and not cpu_has_bf16():
        LOGGER.warning("this CPU has no bfloat16 instructions: %s runs in fp32", path)
    names = [output.any_name for output in compiled.outputs]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Copies, as the next call writes into the same memory.
        return {name: np.array(v) for name, v in zip(names, compiled(inputs).values(), strict=True)}

    return ExportedModel(path, info, ("openvino", openvino.__version__), run)


_RUNTIMES = {".onnx": _onnx, ".xml": _openvino}
SUFFIXES = tuple(_RUNTIMES)
"""Ends of the names of exported files."""


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    return UserError(f"{path} cannot be opened ({reason.strip()}); export the detector again")


def _are_numbers(values: list, count: int, most: float = math.inf) -> bool:
    return len(values) == count and all(
        isinstance(value, int | float) and 0 <= value <= most for value in values
    )


def _is_detection(found: dict) -> bool:
    limits = [found.get("per_class"), found.get("top_k")]
    return (
        set(found) == {"conf_thresh", "nms_thresh", "per_class", "top_k"}
        and _are_numbers([found["conf_thresh"], found["nms_thresh"]], 2, most=1)
        and all(type(limit) is int and limit > 0 for limit in limits)
    )


_VALUES = {
    "classes": lambda names: names and all(isinstance(name, str) for name in names),
    "variance": lambda values: _are_numbers(values, 2),
    "mean": lambda values: _are_numbers(values, 3),
    "detection": _is_detection,
}
"""What is asked of a value beyond its kind."""


def _info(path: Path, text: str | None) -> dict:
    """The description of a file, checked."""
    if not text:
        raise UserError(
            f"{path} has no description of its detector; export it with python -m tools.export"
        )
    try:
        info = json.loads(text)
        if info["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer version of this program; update it")
        wrong = [key for key, kind in _KEYS.items() if not isinstance(info[key], kind)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its description is damaged; export the detector again") from error
    wrong = wrong or [key for key, fits in _VALUES.items() if not fits(info[key])]
    if wrong:
        raise UserError(
            f"{path}: its description has {wrong[0]} {info[wrong[0]]!r}; export the detector again"
        )
    return info
