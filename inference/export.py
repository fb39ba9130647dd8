"""Export a checkpoint: write the file, prove it against its PyTorch network, keep it or not.

Real images go through the new file in its runtime and through the network as it was trained. Their
boxes are compared one by one, and their AP where ground truth exists. A file that exceeds
`proof.TOLERANCE` is not kept. A kept one has FILE.json beside it: sha256, description and proof.
"""

import importlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data.config import INPUT_MEAN
from inference.export_info import ExportInfo
from inference.formats import FORMATS, Format, write
from inference.images import Images, TrainedOn, find_images
from inference.proof import TOLERANCE, Tolerance, TooDifferent, excess, prove
from inference.runtime import cpu_has_bf16, files_of, identity
from models.info import DetectorInfo
from utils.checkpoint import load_checkpoint, load_weights, read_hashed
from utils.errors import UserError, import_package
from utils.files import check_writable, temporary_folder, write_errors_named, write_json

IMAGES = 200
CALIBRATION_IMAGES = 300


@dataclass(frozen=True)
class ExportOptions:
    """The options of ``python -m tools.export``."""

    checkpoint: Path
    format: str  # a key of ``formats.FORMATS``
    precision: str = "fp32"
    output: Path | None = None  # None: beside the checkpoint, named after it and the precision
    preprocess: bool = False
    with_nms: bool = False
    dynamic: bool = False  # these three: see ``ExportInfo``
    classes: tuple[str, ...] | None = None  # names for a checkpoint that stores none
    score_threshold: float | None = None
    max_detections: int | None = None  # detection settings of the file; None: the published ones
    images: str | None = None
    sets: str | None = None  # folder or data set to prove the file with, and its image sets
    limit: int = IMAGES  # most images of the proof; 0: all
    tolerance: float | None = None  # largest loss of AP in points; None: that of the precision
    calibrate: str | None = None
    calibrate_sets: str | None = None
    """Folder or data set to calibrate INT8 with, and its image sets."""

    def target(self) -> Path:
        """Return the path of the exported file."""
        precision = "" if self.precision == "fp32" else f"_{self.precision}"
        name = self.checkpoint.stem + precision + FORMATS[self.format].suffix
        return self.output or self.checkpoint.with_name(name)

    def allowed(self) -> Tolerance:
        """Return how much the file may differ from the network."""
        usual = TOLERANCE[self.precision]
        return usual if self.tolerance is None else replace(usual, ap=self.tolerance)


def export(options: ExportOptions) -> list[str]:
    """Write, prove and keep a file, and return what came of it in lines of text.

    Raises:
        UserError: bad input, a missing package, or no images to prove the file with.
        TooDifferent: the file exceeds the tolerance, and is not kept.
    """
    form, output = FORMATS[options.format], options.target()
    _check(options, form, output)
    saved, digest = read_hashed(options.checkpoint, load_checkpoint)
    detector = DetectorInfo.of(saved, options.checkpoint, options.classes)
    detector.check_names(options.classes, options.checkpoint)
    net = detector.build().eval()
    load_weights(net, saved["model"], options.checkpoint)
    images, calibration = _images(options, saved, detector)
    info = _describe(options, form, detector, digest, calibration)
    manifest = output.with_name(output.name + ".json")
    for kept in (output, manifest):
        check_writable(kept)
    with temporary_folder(output.parent) as folder:
        file = folder / output.name
        with write_errors_named(output):
            write(options.format, net, info, file, calibration)
        proof = prove(net, info, file, images)
        if problem := excess(proof.comparison, options.allowed(), proof.ap):
            raise TooDifferent(f"{output} is not kept: {problem}", proof)
        for replaced in (manifest, output):  # never an .xml beside a .bin that is not its own
            replaced.unlink(missing_ok=True)
        for new, kept in reversed([*zip(files_of(file), files_of(output), strict=True)]):
            os.replace(new, kept)
    told = {"proof": {**proof.plain(), "tolerance": asdict(options.allowed())}}
    about = {"bytes": output.stat().st_size, **info.plain(), "inputs": info.inputs}
    write_json(manifest, {**identity(output), **about, **told})
    beside = " and ".join(each.name for each in [*files_of(output)[1:], manifest])
    kept = f"{output} ({form.title}, {options.precision}), with {beside} beside it"
    return [*proof.lines(), kept]


def _check(options: ExportOptions, form: Format, output: Path) -> None:
    precision = options.precision
    if precision not in form.precisions:
        raise UserError(f"--precision {precision} does not go with --format {options.format}; give "
                        f"one of {', '.join(form.precisions)}")
    bf16 = (options.format, precision) == ("openvino", "bf16")
    if bf16 and options.preprocess and options.dynamic:
        raise UserError("resizing in bf16 is too coarse; leave --preprocess or --dynamic out")
    for option in ("calibrate", "calibrate_sets"):
        if getattr(options, option) is not None and precision != "int8":
            raise UserError(f"--{option} goes with --precision int8")
    for package in form.packages_for(precision):
        import_package(package, f"--format {options.format}")
    if bf16 and not cpu_has_bf16():
        raise UserError("this CPU has no bfloat16 instructions: OpenVINO would compute in fp32 and "
                        "prove nothing; export on one that has them, or give --precision fp32")
    if output.suffix != form.suffix:
        raise UserError(f"--output {output}: an {form.title} file's name ends in {form.suffix}")


def _images(options: ExportOptions, saved: Mapping,
            detector: DetectorInfo) -> tuple[Images, Images | None]:
    checkpoint = options.checkpoint
    trained_on = TrainedOn.of(saved, checkpoint)
    images = find_images(options.images, options.sets, options.limit, trained_on, detector)
    if images is None:
        what = "does not know any"
        if trained_on.root is not None:
            what = f"was tested on {trained_on.root}, which does not exist"
        raise UserError(f"no images to prove the file with: {checkpoint} {what}; give --images "
                        "FOLDER (docs/exporting.md)")
    if options.precision != "int8":
        return images, None
    calibration = find_images(options.calibrate, options.calibrate_sets, CALIBRATION_IMAGES,
                              trained_on, detector, True)
    if calibration is None:
        raise UserError("--precision int8 needs real images to calibrate: give --calibrate FOLDER")
    return images, calibration


def _describe(options: ExportOptions, form: Format, detector: DetectorInfo, digest: str,
              calibration: Images | None) -> ExportInfo:
    detection = detector.detection().with_limits(options.score_threshold, options.max_detections)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in form.packages_for(options.precision):
        versions[package] = importlib.import_module(package).__version__
    return ExportInfo(
        detector, variance=detector.prior_config().variance, mean=INPUT_MEAN,
        preprocess=options.preprocess, nms=options.with_nms, dynamic=options.dynamic,
        precision=options.precision, detection=detection,
        checkpoint={"file": options.checkpoint.name, "sha256": digest},
        versions=versions,
        calibration=calibration and {"pictures": len(calibration), "of": calibration.about},
    )
