"""Write a network as an ONNX or OpenVINO file."""

import errno
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inference.deploy import deploy
from inference.export_info import INFO_KEY, ExportInfo
from inference.graph import Preprocess, detect_onnx
from inference.images import Images
from inference.runtime import graph_inputs
from layers import PriorBox
from utils.errors import UserError, first_line

OnnxModel = Any  # onnx.ModelProto; the packages are optional
OpenVINOModel = Any  # openvino.Model


@dataclass(frozen=True)
class Format:
    """A kind of exported file, named like the extra of this project that installs its packages."""

    title: str
    suffix: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]  # that write and run it

    def packages_for(self, precision: str) -> tuple[str, ...]:
        """Return the packages that write and run a file of this precision."""
        return (*self.packages, "nncf") if precision == "int8" else self.packages


_ONNX, _OPENVINO = (("onnx", "onnxscript", runtime) for runtime in ("onnxruntime", "openvino"))
FORMATS = {"onnx": Format("ONNX", ".onnx", ("fp32", "fp16"), _ONNX),
           "openvino": Format("OpenVINO", ".xml", ("fp32", "bf16", "fp16", "int8"), _OPENVINO)}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": None}
"""Precision -> dtype of the network in the graph; INT8 is quantised later."""


def write(form: str, net: nn.Module, info: ExportInfo, path: Path,
          calibration: Images | None) -> None:
    """Write a network in evaluation mode as a file of the format ``form``, a key of `FORMATS`.

    INT8 takes its ranges from ``calibration``. UserError: the exporter cannot write this network.
    OSError: the disk is full, or the file cannot be written otherwise.
    """
    try:
        if form == "onnx":
            _write_onnx(net, info, path)
        else:
            _write_openvino(net, info, path, calibration)
    except (UserError, OSError):
        raise
    except Exception as error:  # exporters raise dozens of kinds for what a version cannot do
        raise UserError(f"{info.detector.version} cannot be exported to {FORMATS[form].title} by "
                        f"PyTorch {torch.__version__} ({first_line(error)}); a newer PyTorch may "
                        "be able to") from error


class Graph(nn.Module):
    """A deployed network of one dtype between float32 inputs and outputs."""

    def __init__(self, net: nn.Module, before: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.before, self.net, self.dtype = before, net.to(dtype), dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        loc, conf = self.net(self.before(images).to(self.dtype))
        return loc.float(), conf.float()


def build_graph(net: nn.Module, info: ExportInfo) -> Graph:
    """Return the deployed network, behind its preprocessing if ``info`` has it inside."""
    before = nn.Identity()
    if info.preprocess:
        before = Preprocess(info.detector.size, info.mean, resize=info.dynamic)
    return Graph(deploy(net), before, PRECISIONS[info.precision] or torch.float32).eval()


def _network_as_onnx(net: nn.Module, info: ExportInfo) -> OnnxModel:
    """Return the graph up to "loc" and "conf"."""
    side, batch = info.detector.size, 2 if info.dynamic else 1
    images, free = torch.zeros(batch, 3, side, side), ["batch"]
    if info.preprocess:
        height, width = (side + 20, side + 40) if info.dynamic else (side, side)
        images = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
        free = ["batch", "height", "width"]
    dimensions = {i: torch.export.Dim(name, min=1) for i, name in enumerate(free)}
    with torch.no_grad(), _quiet():
        return torch.onnx.export(build_graph(net, info), (images,), dynamo=True, verbose=False,
                                 input_names=["pictures" if info.preprocess else "images"],
                                 output_names=["loc", "conf"],
                                 dynamic_shapes=(dimensions,) if info.dynamic else None).model_proto


def _detection_as_onnx(info: ExportInfo, network: OnnxModel) -> OnnxModel:
    """Return the part of the graph behind ``network``, of its ONNX version."""
    (opset,) = (entry.version for entry in network.opset_import if entry.domain == "")
    priors, classes = PriorBox(info.detector.prior_config())(), len(info.detector.classes) + 1
    return detect_onnx(priors, classes, info.variance, info.detection, opset=opset,
                       ir_version=network.ir_version)


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_onnx(net: nn.Module, info: ExportInfo, path: Path) -> None:
    import onnx

    model = _network_as_onnx(net, info)
    if info.nms:
        behind = _detection_as_onnx(info, model)
        model = onnx.compose.add_prefix(model, "network.", rename_inputs=False,
                                        rename_outputs=False)
        model = onnx.compose.merge_models(model, behind, [("loc", "loc"), ("conf", "conf")])
    onnx.helper.set_model_props(model, {INFO_KEY: json.dumps(info.plain())})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _write_openvino(net: nn.Module, info: ExportInfo, path: Path,
                    calibration: Images | None) -> None:
    import openvino

    source = _network_as_onnx(net, replace(info, precision="fp32"))
    model = _as_openvino(source, path)
    if calibration is not None:
        model = _quantised(model, info, calibration)
    if info.nms:  # joined after quantisation, which thus leaves decoding and scores as they are
        model = _joined(model, _as_openvino(_detection_as_onnx(info, source), path))
    model.set_rt_info(json.dumps(info.plain()), INFO_KEY)
    try:
        openvino.save_model(model, path, compress_to_fp16=info.precision == "fp16")
    except RuntimeError as error:
        if "iostream" not in str(error):
            raise
        # A C++ stream does not tell the system's error.
        raise OSError(errno.ENOSPC, first_line(error)) from error


def _as_openvino(model: OnnxModel, path: Path) -> OpenVINOModel:
    import onnx
    import openvino

    file = path.with_suffix(".onnx")
    onnx.save(model, file)
    with _quiet():
        return openvino.convert_model(file)


def _joined(network: OpenVINOModel, behind: OpenVINOModel) -> OpenVINOModel:
    """Connect the outputs of ``network`` to the inputs of ``behind`` of the same name."""
    import openvino

    parameters = {each.output(0).any_name: each for each in behind.get_parameters()}
    for name in ("loc", "conf"):
        source = network.output(name).get_node().input_value(0)
        for target in parameters.pop(name).output(0).get_target_inputs():
            target.replace_source_output(source)
    inputs = [*network.get_parameters(), *parameters.values()]
    return openvino.Model(behind.get_results(), inputs, "detector")


def _quantised(model: OpenVINOModel, info: ExportInfo, calibration: Images) -> OpenVINOModel:
    import nncf

    info = replace(info, nms=False)
    count = len(calibration)
    images = nncf.Dataset(range(count), lambda i: graph_inputs([calibration.read(i)], info))
    exact = nncf.IgnoredScope(types=["Subtract", "Interpolate"], validate=False)
    with _quiet():
        return nncf.quantize(model, images, preset=nncf.QuantizationPreset.MIXED, subset_size=count,
                             ignored_scope=exact)
