"""Detectors for other runtimes, each file proven against the PyTorch network it is made of.

    python -m tools.export CHECKPOINT --format onnx|openvino [--preprocess] [--with-nms]
        [--dynamic] [--precision fp32|bf16|fp16|int8] [--pictures FOLDER] [--output FILE]

Real pictures go through the new file in its runtime and through the network as it was trained. The
boxes of the two are compared one by one, and their AP where there is ground truth. A file that
differs more than `TOLERANCE` allows is not kept. A kept one has a FILE.json beside it: its sha256,
what it takes and gives, the versions of the packages, and the numbers of the comparison.

Exit status: 0 done, 1 the file differs too much, or unexpected failure, 2 bad usage or bad input,
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from inference.runtime import FORMAT, INFO_KEY, cpu_has_bf16, identity, import_package
from utils.errors import UserError, command
from utils.files import check_writable, write_json


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    title: str
    suffix: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    """That write and run it."""
    extra: str
    """Of this project, which has them."""


_ONNX = ("onnx", "onnxscript")
FORMATS = {
    "onnx": Format("ONNX", ".onnx", ("fp32", "fp16"), (*_ONNX, "onnxruntime"), "onnx"),
    "openvino": Format(
        "OpenVINO", ".xml", ("fp32", "bf16", "fp16", "int8"), (*_ONNX, "openvino"), "openvino"
    ),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": None}


@dataclass(frozen=True)
class Tolerance:
    """How much an exported file may differ from the network."""

    matched: float
    """Least share of boxes that have a partner."""
    score: float | None = None
    """Largest difference of the scores of partners; None: any."""
    pixels: float | None = None
    """Largest difference of a coordinate of partners."""
    ap: float = 0.3
    """Largest loss of AP, in points (100 x AP). Of 72 pictures of BCCD rounding moves a tenth."""


TOLERANCE = {
    "fp32": Tolerance(0.999, score=1e-3, pixels=0.5, ap=0.1),
    "bf16": Tolerance(0.97),
    "fp16": Tolerance(0.99),
    "int8": Tolerance(0.9, ap=0.5),
}
"""By precision."""
MARGIN = 0.05
"""Boxes are compared from this score over the detection threshold: close to it, a rounding decides
whether a box is there."""
PARTNER_IOU = 0.5
PICTURES = 200
CALIBRATION_PICTURES = 300
BATCH = 4
"""Pictures at a time through a graph that takes any number."""


class TooDifferent(Exception):
    """The exported file is not what the network is: one sentence."""


@dataclass(frozen=True)
class Pictures:
    """Real pictures, BGR uint8 [H, W, 3], and what is known of them."""

    about: str
    read: Callable[[int], np.ndarray]
    count: int
    evaluate: Callable[[list[dict], Path], dict] | None = None
    """A data set's, of all its pictures; None where there is no ground truth."""

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        for start in range(0, self.count, size):
            yield [self.read(i) for i in range(start, min(start + size, self.count))]


# ---------------------------------------------------------------- what goes in


def read_checkpoint(path: Path, args: argparse.Namespace) -> tuple[nn.Module, dict, dict]:
    """The network of a checkpoint, the description of its export, and its configuration."""
    from data import DATASETS
    from data.config import INPUT_MEAN, NMS_THRESHOLD, PER_CLASS
    from data.voc0712 import parse_classes
    from engine.options import check_config
    from models.info import DetectorInfo
    from utils.checkpoint import load_checkpoint, load_weights, sha256_of

    saved = load_checkpoint(path)
    named = list(parse_classes(args.classes)) if args.classes else None
    known = DetectorInfo.of(saved, path, named)
    stored = check_config(saved, path) if "config" in saved else {}
    stored |= {**asdict(known), "classes": list(known.classes)}
    priors = known.prior_config()
    net = known.build().eval()
    load_weights(net, saved["model"], path)
    asked = {"conf_thresh": args.score_threshold, "top_k": args.max_detections}
    asked = {key: value for key, value in asked.items() if value is not None}
    info = {
        "format": FORMAT,
        "version": stored["version"],
        "size": stored["size"],
        "classes": stored["classes"],
        "dataset": stored["dataset"],
        "priors": stored["priors"],
        "variance": list(priors.variance),
        "mean": list(INPUT_MEAN),
        "preprocess": args.preprocess,
        "nms": args.with_nms,
        "dynamic": args.dynamic,
        "precision": args.precision,
        "detection": {
            "nms_thresh": NMS_THRESHOLD,
            "per_class": PER_CLASS,
            **DATASETS[stored["dataset"]].detection,
            **asked,
        },
        "checkpoint": {"file": path.name, "sha256": sha256_of(path)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    return net, info, stored


def find_pictures(
    root: str | None, sets: str | None, limit: int, key: str, stored: dict, info: dict
) -> Pictures | None:
    """At most ``limit`` (0: all) pictures of a data set's image sets, or of a plain folder.

    Args:
        root: the data set or folder; None: that which the checkpoint was trained with.
        sets: None: those of the checkpoint's ``key`` ("train_sets" or "test_sets"), if the root is
            its own, else the usual ones.

    Returns:
        None where no root is given and the checkpoint's is not there.

    Raises:
        UserError: no pictures in ``root``, or ``sets`` of a plain folder.
    """
    from data import build_dataset, default_sets, list_sets
    from data.image import read_image
    from data.image_sets import parse_image_sets, sets_name
    from data.voc0712 import SUFFIXES

    own = stored.get("root")
    folder = Path(root or own or "").expanduser().absolute()
    if root is None and not (own and folder.is_dir()):
        return None
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; give a folder of pictures or a data set")
    existing = list_sets(info["dataset"], folder)
    if not existing:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        files = _spread(files, limit)
        if not files:
            raise UserError(
                f"{folder} holds neither pictures nor a data set in {info['dataset']} layout; give "
                "another folder"
            )
        if sets:
            option = {"train_sets": "--calibrate_sets", "test_sets": "--sets"}[key]
            raise UserError(
                f"{folder} is a plain folder of pictures, without image sets; leave {option} "
                f"{sets} out or give a data set in {info['dataset']} layout"
            )
        return Pictures(str(folder), lambda i: read_image(files[i]), len(files))
    if sets:
        chosen = parse_image_sets(sets, existing)
    elif own and folder == Path(own).absolute() and key in stored:
        chosen = stored[key]
    else:
        chosen = default_sets(info["dataset"], folder)[key == "test_sets"]
    pairs = [tuple(pair) for pair in chosen]
    dataset = build_dataset(info["dataset"], str(folder), pairs, info["classes"])
    about = f"{folder} {sets_name(chosen)}"
    objects = sum(len(dataset.target(i)) > 0 for i in range(len(dataset)))
    if key == "train_sets" or not objects:  # nothing to score
        index = _spread(range(len(dataset)), limit)
        return Pictures(about, lambda i: dataset.pull_image(index[i]), len(index))
    if limit and limit < len(dataset):
        dataset.keep_first(min(limit, objects))
    dataset.check_scorable()
    return Pictures(about, dataset.pull_image, len(dataset), dataset.evaluate)


def _spread(items: Sequence, limit: int) -> list:
    """At most ``limit`` items (0: all), evenly from first to last."""
    most = min(limit or len(items), len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]


# ---------------------------------------------------------------- the graph


class Graph(nn.Module):
    """A network with what stands before it; only the network is of ``dtype``."""

    def __init__(
        self, net: nn.Module, before: nn.Module, dtype: torch.dtype
    ):
        super().__init__()
        self.before, self.net, self.dtype = before, net.to(dtype), dtype

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        loc, conf = self.net(self.before(images).to(self.dtype))
        return loc.float(), conf.float()


def build_graph(net: nn.Module, info: dict) -> Graph:
    """The deployed network, and its preprocessing if the description has it inside."""
    from inference.deploy import deploy
    from inference.graph import Preprocess

    before = nn.Identity()
    if info["preprocess"]:
        before = Preprocess(info["size"], info["mean"], resize=info["dynamic"])
    return Graph(deploy(net), before, PRECISIONS[info["precision"]] or torch.float32).eval()


def detection(info: dict) -> dict:
    """Arguments of ``Detect``, and of ``inference.graph.detect_onnx``."""
    return {**info["detection"], "variance": tuple(info["variance"])}


def priors_of(info: dict) -> Tensor:
    from layers import PriorBox
    from models import prior_config

    return PriorBox(prior_config(info["version"], info["priors"], info["size"]))()


def example(info: dict) -> tuple[Tensor, dict]:
    """An input to trace a graph with, and the names of those of its dimensions that may change."""
    side, batch = info["size"], 2 if info["dynamic"] else 1
    images, free = torch.zeros(batch, 3, side, side), {0: torch.export.Dim("batch", min=1)}
    if info["preprocess"]:
        height, width = (side + 20, side + 40) if info["dynamic"] else (side, side)
        images = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
        free |= {1: torch.export.Dim("height", min=1), 2: torch.export.Dim("width", min=1)}
    return images, free if info["dynamic"] else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of exporters, which are of no use to who calls them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------- formats


def onnx_network(net: nn.Module, info: dict):
    """The graph up to "loc" and "conf" as an ``onnx.ModelProto``."""
    for package in _ONNX:
        info["versions"][package] = import_package(package, "onnx").__version__
    images, free = example(info)
    with torch.no_grad(), quiet():
        return torch.onnx.export(
            build_graph(net, info),
            (images,),
            dynamo=True,
            input_names=["pictures" if info["preprocess"] else "images"],
            output_names=["loc", "conf"],
            dynamic_shapes=(free,) if info["dynamic"] else None,
            verbose=False,
        ).model_proto


def onnx_detection(info: dict, network):
    """What stands behind ``network`` in a graph with suppression, of its ONNX version."""
    from inference.graph import detect_onnx

    (opset,) = (entry.version for entry in network.opset_import if entry.domain == "")
    return detect_onnx(
        priors_of(info),
        len(info["classes"]) + 1,
        **detection(info),
        opset=opset,
        ir_version=network.ir_version,
    )


def write_onnx(net: nn.Module, info: dict, path: Path, calibration: Pictures | None) -> None:
    import onnx

    model = onnx_network(net, info)
    if info["nms"]:
        inner = onnx.compose.add_prefix(
            model, "network.", rename_inputs=False, rename_outputs=False
        )
        both = [("loc", "loc"), ("conf", "conf")]
        model = onnx.compose.merge_models(inner, onnx_detection(info, model), io_map=both)
    onnx.helper.set_model_props(model, {INFO_KEY: json.dumps(info)})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_openvino(net: nn.Module, info: dict, path: Path, calibration: Pictures | None) -> None:
    import openvino

    info["versions"]["openvino"] = openvino.__version__
    # In one piece until it is quantised, so that box decoding and scores stay as they are.
    source = onnx_network(net, {**info, "precision": "fp32"})
    model = _converted(source, path)
    if info["precision"] == "int8":
        model = _quantised(model, info, calibration)
    if info["nms"]:
        model = _joined(model, _converted(onnx_detection(info, source), path))
    model.set_rt_info(json.dumps(info), INFO_KEY)
    openvino.save_model(model, path, compress_to_fp16=info["precision"] == "fp16")


def _converted(model, path: Path):
    import onnx
    import openvino

    file = path.with_suffix(".onnx")
    onnx.save(model, file)
    with quiet():
        return openvino.convert_model(file)


def _joined(network, behind):
    """Two OpenVINO models as one: what the first gives is what the second takes by that name."""
    import openvino

    kept = []
    for parameter in behind.get_parameters():
        name = parameter.output(0).any_name
        if name not in ("loc", "conf"):
            kept.append(parameter)
            continue
        source = network.output(name).get_node().input_value(0)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(source)
    return openvino.Model(behind.get_results(), [*network.get_parameters(), *kept], "detector")


def _quantised(model, info: dict, calibration: Pictures):
    """An OpenVINO model in INT8, its ranges those of real pictures."""
    import nncf

    info["versions"]["nncf"] = nncf.__version__
    info["calibration"] = {"pictures": calibration.count, "of": calibration.about}
    inputs = nncf.Dataset(
        range(calibration.count), lambda i: network_inputs([calibration.read(i)], info)
    )
    with quiet():
        return nncf.quantize(
            model,
            inputs,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=calibration.count,
            ignored_scope=nncf.IgnoredScope(types=["Subtract", "Interpolate"], validate=False),
        )


def network_inputs(pictures: list[np.ndarray], info: dict) -> dict[str, np.ndarray]:
    """What a graph takes of pictures: "pictures" or "images"."""
    from data.transforms import TestTransform

    if not (info["preprocess"] and info["dynamic"]):
        pictures = [TestTransform(info["size"])(picture) for picture in pictures]
    batch = np.stack(pictures)
    if info["preprocess"]:
        return {"pictures": batch}
    images = batch.transpose(0, 3, 1, 2).astype(np.float32)
    return {"images": images - np.array(info["mean"], np.float32)[:, None, None]}


WRITERS = {"onnx": write_onnx, "openvino": write_openvino}


# ---------------------------------------------------------------- the proof


def prove(net: nn.Module, info: dict, path: Path, pictures: Pictures) -> dict:
    """Compare the file's detections with those of the network as it was trained.

    Returns:
        Counts and largest differences, as JSON has them.

    Raises:
        UserError: there is no box to compare, or the network gives NaN or infinity.
        TooDifferent: the file gives NaN or infinity.
    """
    expected, found = [], []
    for one, other in detections(net, info, path, pictures):
        expected += one
        found += other
    floor = info["detection"]["conf_thresh"] + MARGIN
    proof = {
        "pictures": pictures.count,
        "of": pictures.about,
        "score_floor": floor,
        **compare(expected, found, floor),
        "ap": None,
    }
    if not proof["boxes"]:
        raise UserError(
            f"the network finds nothing of score {floor:g} or more on the {pictures.count} pictures"
            f" of {pictures.about}, so nothing can be proven; give others (--pictures), or a "
            "trained network"
        )
    if pictures.evaluate is not None:
        results = []
        for each in (expected, found):
            with tempfile.TemporaryDirectory() as folder:
                results.append(pictures.evaluate(each, Path(folder)))
        if results[0]["value"] is not None:
            proof["ap"] = {
                "metric": results[0]["metric"],
                "network": results[0]["value"],
                "file": results[1]["value"],
            }
    return proof


@torch.inference_mode()
def detections(
    net: nn.Module, info: dict, path: Path, pictures: Pictures
) -> Iterator[tuple[list[dict], list[dict]]]:
    """Of every batch what the network and what the file finds: one dict of arrays an image."""
    from data.transforms import TestTransform
    from inference.predictor import Predictor
    from layers import Detect
    from utils.device import to_input

    predictor, resize = Predictor(path), TestTransform(info["size"])
    detect, priors = Detect(**detection(info)), priors_of(info)
    keys = ("boxes", "scores", "labels")
    for batch in pictures.batches(BATCH if info["dynamic"] else 1):
        stacked = np.stack([resize(picture) for picture in batch])
        images = to_input(
            torch.from_numpy(stacked).permute(0, 3, 1, 2), info["mean"], torch.device("cpu")
        )
        loc, conf = net(images)
        sizes = [(picture.shape[1], picture.shape[0]) for picture in batch]
        try:
            expected = detect(loc, conf, priors, sizes)
        except FloatingPointError as error:
            raise UserError(
                f"the network of {info['checkpoint']['file']} fails ({error}): its training "
                "diverged or its weights are damaged; export another checkpoint"
            ) from error
        try:
            found = predictor(batch)
        except FloatingPointError as error:
            raise TooDifferent(f"{path.name} is not kept: {error}") from error
        yield tuple(
            [{key: each[key].numpy() for key in keys} for each in both]
            for both in (expected, found)
        )


def compare(expected: Sequence[dict], found: Sequence[dict], floor: float) -> dict:
    """Match two lists of detections (one dict an image: boxes, scores, labels) box by box.

    Partners are boxes of one image and class, each of at most one other, of the highest IoU first,
    and of at least `PARTNER_IOU`. Every box of a score of ``floor`` or more, of either list, is
    counted; its partner may have a lower one.

    Returns:
        "boxes": how many were counted, "unmatched_network" and "unmatched_file": how many have no
        partner, "matched": share of those that have one; of the partners "score_difference",
        "pixel_difference" (of a coordinate) and "least_iou"; these are None without any.
    """
    counted, unmatched = 0, [0, 0]
    score, pixels, ious = [], [], []
    for pair in zip(expected, found, strict=True):
        one, other = pair
        *partners, iou = _partners(one, other)
        over = [each["scores"] >= floor for each in pair]
        counted += sum(int(each.sum()) for each in over)
        for side in range(2):
            unmatched[side] += int(np.delete(over[side], partners[side]).sum())
        meant = over[0][partners[0]] | over[1][partners[1]]
        a, b = (indices[meant] for indices in partners)
        score += np.abs(one["scores"][a] - other["scores"][b]).tolist()
        pixels += np.abs(one["boxes"][a] - other["boxes"][b]).max(1, initial=0).tolist()
        ious += iou[meant].tolist()
    return {
        "boxes": counted,
        "unmatched_network": unmatched[0],
        "unmatched_file": unmatched[1],
        "matched": 1 - sum(unmatched) / counted if counted else None,
        "score_difference": max(score, default=None),
        "pixel_difference": max(pixels, default=None),
        "least_iou": min(ious, default=None),
    }


def _partners(one: dict, other: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices into the two, and IoU, of the boxes that are partners."""
    from layers.boxes import iou

    table = iou(*(torch.from_numpy(each["boxes"]).double() for each in (one, other))).numpy()
    table[one["labels"][:, None] != other["labels"][None]] = 0
    pairs = []
    free = np.ones(len(one["scores"]), bool), np.ones(len(other["scores"]), bool)
    rows, columns = np.nonzero(table >= PARTNER_IOU)
    for k in np.argsort(-table[rows, columns], kind="stable"):
        i, j = rows[k], columns[k]
        if free[0][i] and free[1][j]:
            free[0][i] = free[1][j] = False
            pairs.append((i, j))
    a, b = np.array(pairs, np.int64).reshape(-1, 2).T
    return a, b, table[a, b]


def excess(proof: dict, tolerance: Tolerance) -> str:
    """What of the comparison is over the tolerance; empty where nothing is."""
    if proof["matched"] < tolerance.matched:
        return (
            f"{100 * proof['matched']:.2f} % of the boxes have a partner, "
            f"{100 * tolerance.matched:g} % are needed (a detector that has hardly learnt has many "
            "boxes of nearly equal scores, which rounding exchanges: train it longer, or give a "
            "higher --score_threshold, which leaves the unsure ones out of the file's detections)"
        )
    for key, limit, what in (
        ("score_difference", tolerance.score, "a score"),
        ("pixel_difference", tolerance.pixels, "a coordinate, in pixels,"),
    ):
        if limit is not None and (proof[key] or 0) > limit:
            return f"{what} differs by {proof[key]:.4g}, {limit:g} is allowed"
    if proof["ap"]:
        lost = 100 * (proof["ap"]["network"] - proof["ap"]["file"])
        if lost > tolerance.ap:
            return f"it loses {lost:.2f} points of AP, {tolerance.ap:g} are allowed"
    return ""


def describe_proof(proof: dict) -> list[str]:
    """The comparison in lines."""
    lines = [
        f"compared with PyTorch on {proof['pictures']} pictures ({proof['of']}):",
        f"  {proof['boxes']} boxes of score {proof['score_floor']:g} or more, "
        f"{proof['unmatched_network']} of the network's and {proof['unmatched_file']} of the "
        f"file's without a partner ({100 * proof['matched']:.2f} % matched)",
    ]
    if proof["least_iou"] is not None:
        lines.append(
            f"  largest difference of a score {proof['score_difference']:.2g}, of a coordinate "
            f"{proof['pixel_difference']:.2g} pixels; least IoU {proof['least_iou']:.5f}"
        )
    ap = proof["ap"]
    if ap is None:
        lines.append("  no ground truth: the AP is not compared")
    else:
        lines.append(
            f"  {ap['metric']}: {ap['network']:.4f} in PyTorch, {ap['file']:.4f} in the file "
            f"({100 * (ap['file'] - ap['network']):+.2f} points)"
        )
    return lines


# ---------------------------------------------------------------- command line


def export(args: argparse.Namespace) -> list[str]:
    """Write, prove and keep a file; what came of it in lines.

    Raises:
        UserError: bad input, a package that is missing, or nothing to prove the file with.
        TooDifferent: the file is over the tolerance, and not kept.
    """
    form = FORMATS[args.format]
    checkpoint = Path(args.checkpoint)
    if args.precision not in form.precisions:
        raise UserError(
            f"--precision {args.precision} does not go with --format {args.format}, which has "
            f"{', '.join(form.precisions)}"
        )
    if args.precision == "bf16" and args.format == "openvino" and args.preprocess and args.dynamic:
        raise UserError(
            "OpenVINO would resize pictures in bfloat16, too, which is too coarse; leave "
            "--preprocess or --dynamic out"
        )
    for option in ("calibrate", "calibrate_sets"):
        if getattr(args, option) is not None and args.precision != "int8":
            raise UserError(f"--{option} goes with --precision int8")
    for package in (*form.packages, *(["nncf"] if args.precision == "int8" else [])):
        import_package(package, form.extra)
    if (args.format, args.precision) == ("openvino", "bf16") and not cpu_has_bf16():
        raise UserError(
            "this CPU has no bfloat16 instructions, OpenVINO would compute in fp32 and prove "
            "nothing; export on one that has them, or give --precision fp32"
        )
    name = checkpoint.stem + ("" if args.precision == "fp32" else f"_{args.precision}")
    output = Path(args.output or checkpoint.with_name(name + form.suffix))
    if output.suffix != form.suffix:
        raise UserError(f"{output}: the name of a file of {form.title} ends in {form.suffix}")
    net, info, stored = read_checkpoint(checkpoint, args)
    pictures = find_pictures(args.pictures, args.sets, args.limit, "test_sets", stored, info)
    if pictures is None:
        raise UserError(
            f"there are no pictures to prove the file with: {checkpoint} "
            + (f"was tested on {stored['root']}, which is not there" if "root" in stored else
               "does not know any")
            + "; give --pictures FOLDER (docs/exporting.md)"
        )  # fmt: skip
    calibration = None
    if args.precision == "int8":
        calibration = find_pictures(
            args.calibrate, args.calibrate_sets, CALIBRATION_PICTURES, "train_sets", stored, info
        )
        if calibration is None:
            raise UserError("--precision int8 takes real pictures to calibrate: --calibrate FOLDER")
    check_writable(output)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        file = Path(folder, output.name)
        write(args.format, net, info, file, calibration)
        proof = prove(net, info, file, pictures)
        lines = describe_proof(proof)
        tolerance = TOLERANCE[args.precision]
        if args.tolerance is not None:
            tolerance = replace(tolerance, ap=args.tolerance)
        if problem := excess(proof, tolerance):
            print("\n".join(lines))
            raise TooDifferent(f"{output} is not kept: {problem}")
        manifest = output.with_name(output.name + ".json")
        for replaced in (manifest, output):  # no .xml beside a .bin that is not its own
            replaced.unlink(missing_ok=True)
        weights = output.with_suffix(".bin")
        parts = [weights, output] if file.with_suffix(".bin").exists() else [output]
        for part in parts:
            os.replace(file.with_suffix(part.suffix), part)
    write_json(
        manifest,
        {
            **identity(output),
            "bytes": output.stat().st_size,
            **info,
            "inputs": inputs_of(info),
            "proof": {**proof, "tolerance": asdict(tolerance)},
        },
    )
    beside = " and ".join(part.name for part in [*parts[:-1], manifest])
    return [*lines, f"{output} ({form.title}, {args.precision}), with {beside} beside it"]


def inputs_of(info: dict) -> dict[str, str]:
    """What the graph takes, in words."""
    side = info["size"]
    batch = "B" if info["dynamic"] else 1
    if info["preprocess"]:
        shape = "H, W" if info["dynamic"] else f"{side}, {side}"
        inputs = {"pictures": f"uint8 [{batch}, {shape}, 3], BGR"}
    else:
        inputs = {"images": f"float32 [{batch}, 3, {side}, {side}], BGR minus the mean"}
    return {**inputs, "sizes": f"float32 [{batch}, 2], width and height"} if info["nms"] else inputs


def write(form: str, net: nn.Module, info: dict, path: Path, calibration: Pictures | None) -> None:
    """Write the file; UserError where an exporter cannot."""
    try:
        WRITERS[form](net, info, path, calibration)
    except (UserError, OSError):
        raise
    except Exception as error:  # exporters raise dozens of kinds, for what a version cannot do
        raise UserError(
            f"{info['version']} cannot be exported to {FORMATS[form].title} by PyTorch "
            f"{torch.__version__} ({_first_line(error)}); a newer PyTorch may be able to"
        ) from error


def parse(argv: list[str] | None) -> argparse.Namespace:
    from utils.arguments import count, fraction, number, positive

    p = argparse.ArgumentParser(
        prog="python -m tools.export", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    # fmt: off
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="of a training, or a published file")
    p.add_argument("--format", required=True, choices=FORMATS, help="kind of file")
    p.add_argument("--precision", default="fp32", choices=PRECISIONS, help="(default: fp32)")
    p.add_argument("--output", metavar="FILE", help="(default: beside the checkpoint)")
    p.add_argument("--preprocess", action="store_true",
                   help="take pictures, uint8 BGR; with --dynamic of any size")
    p.add_argument("--with-nms", "--with_nms", action="store_true",
                   help="give detections in pixels instead of the network's outputs")
    p.add_argument("--dynamic", action="store_true", help="take any number of images")
    p.add_argument("--classes", metavar="NAMES", help="a,b,c or a file, for one without names")
    p.add_argument("--score_threshold", type=fraction, metavar="X",
                   help="lowest score of a detection (default: 0.03 VOC, 0.02 COCO)")
    p.add_argument("--max_detections", type=positive, metavar="N",
                   help="most detections of a picture (default: 300 VOC, 200 COCO)")
    g = p.add_argument_group("proof")
    g.add_argument("--pictures", metavar="FOLDER",
                   help="pictures or a data set (default: what the checkpoint was tested on)")
    g.add_argument("--sets", metavar="SETS", help="of the data set, e.g. 2007_test")
    g.add_argument("--limit", type=count, default=PICTURES, metavar="N",
                   help=f"most pictures, 0: all (default: {PICTURES})")
    losses = ", ".join(f"{t.ap:g} {name}" for name, t in TOLERANCE.items())
    g.add_argument("--tolerance", type=number, metavar="X",
                   help=f"largest loss of AP, in points (default: {losses})")
    g = p.add_argument_group("INT8")
    g.add_argument("--calibrate", metavar="FOLDER",
                   help="pictures or a data set (default: what the checkpoint was trained on)")
    g.add_argument("--calibrate_sets", metavar="SETS", help="of the data set, e.g. 2007_trainval")
    # fmt: on
    return p.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parse(argv)
    try:
        print("\n".join(export(args)))
        return 0
    except TooDifferent as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
