"""Open what --test evaluates: a checkpoint or an exported file, and the data it is tested on."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data import DetectionData, list_sets
from data.classes import parse_classes
from data.detections import load_detections
from data.image_sets import one_folder, sets_name
from data.split import SPLIT_SETS
from engine.distributed import World
from engine.evaluate import detection_of, keep_and_score, origin_of, score
from engine.options import OPTIONS, Call, Options
from engine.resolve import absolute, asked_dataset, dataset_of_test, resolve, use_device
from engine.run import log_dataset, open_dataset
from inference.predictor import Predictor
from inference.runtime import EXPORTED_SUFFIXES, identity
from inference.views import Views
from layers.detect import DetectConfig
from models.info import DetectorInfo, published_detection
from models.transfer import check_known, parse_class_map, transfer_classes
from utils import nms
from utils.checkpoint import load_checkpoint, read_hashed
from utils.errors import UserError
from utils.files import check_writable, locked
from utils.logger import LOGGER

MACHINE = {name for name, spec in OPTIONS.items() if spec.metadata["machine"]}
"""Options that suit the machine that trained."""


@dataclass(frozen=True)
class Testing:
    """Everything that a test needs, read and found to fit together."""

    options: Options
    device: torch.device
    dataset: DetectionData
    detection: DetectConfig
    weights: dict[str, torch.Tensor] | None
    """State dict for the classes of the data set; None for an exported file."""
    predictor: Predictor | None
    """Detects in place of ``weights``: an exported file, or a checkpoint with --tiles or --flip."""
    checkpoint: dict
    """The file's name and sha256, kept in results.json."""
    folder: Path
    class_map: str | None = None

    __test__ = False  # for pytest

    @property
    def origin(self) -> dict:
        """Everything that decides the detections; kept with them."""
        views = self.predictor.views if self.predictor else Views()
        return origin_of(self.options, self.detection, self.checkpoint, self.device,
                         self.class_map) | {"views": asdict(views)}  # fmt: skip

    @contextmanager
    def opened(self, world: World) -> Iterator[None]:
        """Create the folder, and hold it against other processes.

        Raises:
            UserError: the folder cannot be written, or another process tests into it.
        """
        with ExitStack() as held:

            def hold() -> None:
                check_writable(self.folder / "results.json")
                held.enter_context(locked(self.folder / ".lock", "--date"))

            world.decide(hold)
            yield

    def log_data(self) -> None:
        """Log the number of images, what the reader changed, and what will detect."""
        log_dataset(self.dataset, self.options, "test_sets")
        if self.predictor and self.predictor.exported:
            runtime = self.checkpoint["runtime"]
            LOGGER.info("%s by %s", self.checkpoint["file"], runtime)
        else:
            options, routine = self.options, nms.backend(self.device.type)
            LOGGER.info("%s at %d, %d classes, on %s (%s); NMS: %s", options.version, options.size,
                        len(options.classes), self.device, options.amp, routine)  # fmt: skip

    def keep(self, detections: list[dict]) -> None:
        """Write the detections of all images, and score them."""
        keep_and_score(self.dataset, detections, self.origin, self.folder, self.options.network)

    def score_again(self, call: Call) -> None:
        """Score the detections that an earlier test has kept.

        Raises:
            UserError: that test was another one.
        """
        asked = ["checkpoint", "dataset", "class_map", "root", "sets", "classes"]
        if call.given_detection:
            asked += ["thresholds", "suppression"]
        asked += ["views"] * bool(call.given_views)
        same = {key: self.origin[key] for key in asked}
        path = self.folder / "detections.npz"
        kept, origin = load_detections(path, self.dataset.ids, len(self.dataset.classes), same)
        try:
            detection_of(origin)
        except Exception as error:  # of any values
            raise UserError(f"{path} does not say by which limits it was made ({error!r:.200}); "
                            "run the test again, without --retest") from error
        origin = {key: value for key, value in origin.items() if key in self.origin}
        score(self.dataset, kept, origin, self.folder, self.options.network)


def open_test(call: Call, given: Mapping[str, object], world: World) -> Testing:
    """Read the file of --test and the data that it is tested on; write nothing.

    Raises:
        UserError: the file is no detector, or options, file and data do not fit together.
    """
    path = Path(call.test)
    if path.suffix in EXPORTED_SUFFIXES:
        return _open_exported(call, given, path, world)
    return _open_checkpoint(call, given, path, world)


def _open_checkpoint(call: Call, given: Mapping[str, object], path: Path, world: World) -> Testing:
    saved, digest = read_hashed(path, load_checkpoint)
    class_map = parse_class_map(call.class_map) if call.class_map else None
    names = parse_classes(given["classes"]) if "classes" in given else None
    # With a class map --classes names the classes of the data, not of the file.
    assumed = Options.dataset if "config" in saved else asked_dataset(given)
    info = DetectorInfo.of(saved, path, None if class_map else names, assumed)
    if names:  # before the data are looked for
        check_known(path, info.classes, names, class_map)
    given = {**given, "dataset": dataset_of_test(given, info.dataset)}
    options = resolve(given, _stored(saved, info, path, given, class_map is not None))
    device = use_device(call, options, world)
    dataset = open_dataset(options, call, "test_sets")
    options = replace(options, classes=tuple(dataset.classes))
    weights = saved["model"]
    if class_map or info.classes != options.classes:
        check_known(path, info.classes, options.classes, class_map)
        weights, _ = transfer_classes(weights, info.classes, options.classes, class_map,
                                      options.seed)
    detection = replace(published_detection(options.dataset), **call.given_detection)
    folder, predictor = test_folder(call, given, options, path), None
    if call.given_views:
        if weights is not saved["model"] or world.size > 1:
            raise UserError("--tiles and --flip take the checkpoint's own classes, in one process; "
                            "leave them out, or --class_map and --ngpu")
        names = None if "config" in saved else names
        make = partial(Predictor, device=str(device), amp=options.amp, classes=names,
                       **call.given_views)
        predictor, digest = read_hashed(path, make)
        predictor.config = detection
    checkpoint = {"file": path.name, "sha256": digest}
    return Testing(options, device, dataset, detection, weights, predictor, checkpoint, folder,
                   call.class_map)  # fmt: skip


def _open_exported(call: Call, given: Mapping[str, object], path: Path, world: World) -> Testing:
    wrong = [name for name in ("class_map", "amp") if name in given or getattr(call, name, None)]
    if wrong:
        raise UserError(f"--{wrong[0]} cannot change {path}, which is exported; leave it out")
    if call.device_name() not in ("auto", "cpu") or world.size > 1:
        raise UserError(f"{path} is exported and runs on the CPU, in one process; use --device cpu")
    names = {"conf_thresh": "score_threshold", "top_k": "max_detections",
             "per_class": "max_per_class"}  # fmt: skip
    asked = {names.get(key, key): value for key, value in call.given_detection.items()}
    predictor = Predictor(path, **asked, **call.given_views)
    info, exported = predictor.info, predictor.exported
    checkpoint = {**identity(path), "precision": exported.info.precision,
                  "made_of": exported.info.checkpoint, "runtime": " ".join(exported.runtime)}
    stored = {"version": info.version, "size": info.size}
    stored["dataset"] = info.dataset if "dataset" in given else dataset_of_test(given, info.dataset)
    options = resolve(given, {**stored, "priors": info.priors, "classes": list(info.classes)})
    dataset = open_dataset(options, call, "test_sets")
    folder = test_folder(call, given, options, path)
    return Testing(options, predictor.device, dataset, predictor.detect.config, None, predictor,
                   checkpoint, folder)  # fmt: skip


def _stored(saved: Mapping, info: DetectorInfo, path: Path, given: Mapping[str, object],
            mapped: bool) -> dict[str, object]:
    """Return the options that a test takes from its checkpoint."""
    stored: dict[str, object] = {"version": info.version, "size": info.size}
    if given["dataset"] == info.dataset:
        stored |= {"dataset": info.dataset}
        if "config" in saved:
            stored = Options.of(saved, path).plain()
        elif not info.assumed:  # else the data tell which of the detector's classes they have
            stored["classes"] = list(info.classes)
    # A detector that was trained on the images of --overfit was tested on them.
    leave = {"train_sets", "save_folder", "overfit", *MACHINE}
    if stored.get("overfit"):
        leave.add("test_sets")
    root = given.get("root")
    if root is not None and absolute(root) != stored.get("root"):
        # The image sets and the division of the run hold where they fit: the data have moved.
        there = {*list_sets(given["dataset"], absolute(root))}
        tested = {tuple(each) for each in stored.get("test_sets", ())}
        divided = not there and tested <= {(None, name) for name in SPLIT_SETS}
        if not divided:
            leave |= {"val_share", "split_by"}
            if not tested <= there:
                leave.add("test_sets")
    if mapped or "classes" in given:
        leave.add("classes")
    return {k: v for k, v in stored.items() if k not in leave} | {"priors": info.priors}


def test_folder(call: Call, given: Mapping[str, object], options: Options, path: Path) -> Path:
    """Return the folder of a test's files: in the checkpoint's run, if it lies in a run."""
    folder = Path(options.save_folder) / options.network
    run = path.absolute().parent
    in_a_run = (run / "config.json").is_file()
    if call.date:
        run = folder / call.date
    elif not in_a_run or ("save_folder" in given and run.parent != folder.absolute()):
        run = folder / one_folder(run.name if in_a_run else path.stem)
    # An exported file keeps its suffix: it lies beside the checkpoint that it is made of.
    name = path.name if path.suffix in EXPORTED_SUFFIXES else path.stem
    return run / "ss_predict" / one_folder(name) / sets_name(options.test_sets)


test_folder.__test__ = False
