"""Exported detectors in their runtimes, ONNX Runtime and OpenVINO, on the CPU.

    model = open_model("detector.onnx")
    outputs = model({"images": images})

Only files of ``python -m tools.export`` are accepted. They carry a description (``ExportInfo``).
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data.transforms import to_square
from inference.export_info import INFO_KEY, ExportInfo
from utils.checkpoint import sha256_of
from utils.errors import UserError, first_line, import_package
from utils.logger import LOGGER

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ExportedModel:
    """An exported detector, ready to run."""

    path: Path
    info: ExportInfo
    runtime: tuple[str, str]
    """Name and version of the package that runs it, e.g. ("onnxruntime", "1.31.1")."""
    names: Sequence[str]  # of the outputs, in order
    run: Callable[[Arrays], Iterable[np.ndarray]]  # of the runtime: inputs by name -> outputs

    def __call__(self, inputs: Arrays) -> Arrays:
        """Run the graph on a batch.

        inputs: of ``graph_inputs``. "images" float32 [B, 3, S, S], BGR minus the mean; with
            ``info.preprocess`` instead "pictures" uint8 [B, H, W, 3], BGR. With ``info.nms`` also
            "sizes" float32 [B, 2], (width, height) in pixels. Unless ``info.dynamic``, B is 1 and
            H and W are S.

        Returns "loc" float32 [B, P, 4] and "conf" float32 [B, P, C] logits. With ``info.nms``
        instead "boxes" float32 [n, 4], (x1, y1, x2, y2) in pixels, "scores" float32 [n], "labels"
        int64 [n] in 1..C-1 and "image" int64 [n], the index in the batch, ascending; n may be 0.

        Raises UserError if the runtime cannot run the graph on these inputs, or if its outputs are
        not those of its detector.
        """
        try:
            outputs = dict(zip(self.names, self.run(inputs), strict=True))
        except Exception as error:  # each runtime raises kinds of its own
            given = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in inputs.items())
            raise UserError(f"{self.path} cannot run on {given} ({first_line(error)}); give what "
                            "it takes, or export the detector again") from error
        self._check(outputs, len(next(iter(inputs.values()))))
        return outputs

    def _check(self, outputs: Arrays, batch: int) -> None:
        classes = len(self.info.detector.classes)
        if self.info.nms:
            n = np.size(outputs["scores"])
            wanted = {"boxes": ("float", (n, 4)), "scores": ("float", (n,)),
                      "labels": ("int", (n,)), "image": ("int", (n,))}
        else:
            priors = self.info.detector.prior_config().num_priors
            wanted = {"loc": ("float", (batch, priors, 4)),
                      "conf": ("float", (batch, priors, classes + 1))}
        for name, (kind, shape) in wanted.items():
            found = np.asarray(outputs[name])
            if found.shape != shape or not found.dtype.name.startswith(kind):
                raise UserError(f"{self.path} gives {name} {found.dtype} {list(found.shape)}, its "
                                f"detector should give {kind} {list(shape)}; export the detector "
                                "again")
        for name, low, high in (("labels", 1, classes), ("image", 0, batch - 1)):
            if self.info.nms and not ((outputs[name] >= low) & (outputs[name] <= high)).all():
                raise UserError(f"{self.path} gives {name} that are not in {low}..{high}; export "
                                "the detector again")


def open_model(path: str | Path, threads: int | None = None) -> ExportedModel:
    """Open an .onnx file in ONNX Runtime, or an .xml file, with its .bin, in OpenVINO.

    threads: CPU threads of the runtime; None: the runtime chooses. Raises UserError if the file is
    missing, damaged or not of ``python -m tools.export``, or the runtime is not installed.
    """
    path = Path(path)
    if path.suffix not in EXPORTED_SUFFIXES:
        names = ", ".join(EXPORTED_SUFFIXES)
        raise UserError(f"{path} is no exported file; their names end in {names}")
    for file in files_of(path):
        if not file.is_file():
            fix = "check the path" if file == path else f"it belongs beside {path.name}"
            raise UserError(f"{file} does not exist or is not a file; {fix}")
    return _RUNTIMES[path.suffix](path, threads)


def graph_inputs(images: Sequence[np.ndarray], info: ExportInfo) -> Arrays:
    """Return the inputs of a graph for BGR uint8 [H, W, 3] images, as ``ExportedModel`` takes them.

    Images of different sizes make a batch unless ``info`` has both ``preprocess`` and ``dynamic``:
    that graph resizes, so it takes them as they are.
    """
    as_they_are = info.preprocess and info.dynamic
    size = info.detector.size
    batch = np.stack(images if as_they_are else [to_square(image, size) for image in images])
    if info.preprocess:
        inputs = {"pictures": batch}
    else:
        pixels = batch.transpose(0, 3, 1, 2).astype(np.float32, order="C")
        inputs = {"images": pixels - np.array(info.mean, np.float32)[:, None, None]}
    if info.nms:
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        inputs["sizes"] = np.array(sizes, np.float32)
    return inputs


def files_of(path: Path) -> list[Path]:
    """Return the files of an exported detector: OpenVINO keeps the weights beside the graph."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def identity(path: str | Path) -> dict[str, object]:
    """Return name and sha256 of an exported file, and of OpenVINO's weights beside it."""
    graph, *weights = (
        {"file": file.name, "sha256": sha256_of(file)} for file in files_of(Path(path))
    )
    return {**graph, "weights": weights[0]} if weights else graph


def cpu_has_bf16() -> bool:
    """Return whether OpenVINO computes in bfloat16 on this CPU; otherwise it falls back to fp32."""
    openvino = import_package("openvino", "bfloat16")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _onnx(path: Path, threads: int | None) -> ExportedModel:
    ort = import_package("onnxruntime", path)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # exceptions tell the errors
    options.intra_op_num_threads = threads or 0
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"],
                                       enable_fallback=0)  # which would try again, with a banner
        text = session.get_modelmeta().custom_metadata_map.get(INFO_KEY)
    except Exception as error:  # kinds of its own
        raise _unreadable(path, error) from error
    info = ExportInfo.parse(text, path)
    taken, names = (
        [each.name for each in ports] for ports in (session.get_inputs(), session.get_outputs())
    )
    _check_names(path, info, taken, names)
    run = partial(session.run, names)
    return ExportedModel(path, info, ("onnxruntime", ort.__version__), names, run)


def _openvino(path: Path, threads: int | None) -> ExportedModel:
    openvino = import_package("openvino", path)
    core = openvino.Core()
    try:
        if ElementTree.parse(path).getroot().tag != "net":  # OpenVINO would try other formats
            raise ValueError("it is no graph of OpenVINO")
        model = core.read_model(path)
        text = model.get_rt_info(INFO_KEY).astype(str) if model.has_rt_info(INFO_KEY) else None
    except Exception as error:  # kinds of its own
        raise _unreadable(path, error) from error
    info = ExportInfo.parse(text, path)
    # Left to itself OpenVINO computes in bfloat16 on some CPUs.
    precision = "bf16" if info.precision == "bf16" else "f32"
    config = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = core.compile_model(model, "CPU", config)
        taken, names = (
            [each.any_name for each in ports] for ports in (compiled.inputs, compiled.outputs)
        )
    except Exception as error:
        raise _unreadable(path, error) from error
    _check_names(path, info, taken, names)
    if precision == "bf16" and not cpu_has_bf16():
        LOGGER.warning("this CPU has no bfloat16 instructions: %s runs in fp32", path)
    runtime = ("openvino", openvino.__version__)
    # Copies: the next call writes into the same memory.
    return ExportedModel(path, info, runtime, names,
                         lambda inputs: map(np.array, compiled(inputs).values()))


_RUNTIMES = {".onnx": _onnx, ".xml": _openvino}
EXPORTED_SUFFIXES = tuple(_RUNTIMES)  # suffixes of exported files


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be opened ({first_line(error)}); export the detector again")


def _check_names(path: Path, info: ExportInfo, inputs: list[str], outputs: list[str]) -> None:
    for what, found, wanted in (("takes", inputs, info.inputs), ("gives", outputs, info.outputs)):
        if set(found) != set(wanted):
            raise UserError(f"{path} {what} {', '.join(found)}, where its description says "
                            f"{', '.join(wanted)}; export the detector again")
