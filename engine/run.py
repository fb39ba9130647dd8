"""Open a training run: options, data, starting weights and folder, checked before it writes."""

import dataclasses
import glob
import itertools
import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import DATASETS, DetectionData, build_dataset
from data.cache import open_cache
from data.classes import parse_classes
from data.config import TRAINING_THRESHOLD
from data.image import limit_pixels
from data.loading import check_shared_memory
from data.split import SPLIT_SETS, list_files
from engine.distributed import World, check_shares, check_sync_bn
from engine.folder import RunFolder
from engine.options import Call, Options
from engine.priors import FIT, fit_to
from engine.resolve import (
    absolute,
    asked_dataset,
    check_parts,
    check_resumed,
    check_training,
    dataset_options,
    resolve,
    use_device,
)
from engine.state import State
from layers.detect import DetectConfig
from models import prior_config
from models.info import DetectorInfo, published_detection
from utils.checkpoint import load_checkpoint, read_hashed, sha256_of
from utils.errors import UserError
from utils.files import read_text, write_errors_named
from utils.logger import LOGGER
from utils.trackers import check_trackers


@dataclass(frozen=True)
class Run:
    """Everything that a training run is made of but its network, found to fit together."""

    options: Options
    device: torch.device
    train_set: DetectionData
    pull: Callable[[int], np.ndarray] | None
    """Reads an image of the training set through the cache; None without a cache."""
    test_set: DetectionData | None
    data: dict
    """Fingerprint of the training set."""
    saved: dict | None
    """The checkpoint that is resumed."""
    path: Path | None
    """Its file."""
    start: dict | None
    """The checkpoint of --resume_net."""
    start_info: DetectorInfo | None
    start_digest: str | None
    """SHA-256 of that checkpoint's file."""
    folder: RunFolder | None = None
    """None until every rank knows it."""

    @property
    def detection(self) -> DetectConfig:
        """Detection settings of the evaluations during training."""
        published = published_detection(self.options.dataset)
        return dataclasses.replace(published, conf_thresh=TRAINING_THRESHOLD)

    def check_folder(self) -> None:
        """Raise UserError if another process has trained in the folder since it was read.

        Call it while the folder is locked: a process that trains there saves until it ends.
        """
        folder = self.folder.path
        if self.path is None or self.path.parent != folder:
            _refuse_run(folder)
        elif (newest := _last_step(folder)) > (step := self.saved["step"]):
            raise UserError(f"{folder / 'last.pth'} is at step {newest} now, but {self.path} was "
                            f"read at {step}: the run has gone on meanwhile; repeat the command")

    def log_data(self, asked: str | None) -> None:
        """Log the number of images, and what the readers changed; ``asked``: value of --resume."""
        if asked == "auto" and self.path is None:
            LOGGER.info("no run to go on with: a new one starts")
        told = log_dataset(self.train_set, self.options, "train_sets")
        if self.test_set is not None:
            log_dataset(self.test_set, self.options, "test_sets", told)
        if self.test_set is not None and not self.options.overfit:
            _warn_shared(self.train_set, self.test_set)


# ---------------------------------------------------------------- data


def open_dataset(options: Options, call: Call, key: str) -> DetectionData:
    """Return the data set of the image sets ``key``, "train_sets" or "test_sets".

    Raises:
        UserError: the data cannot be read, their classes are not those of the options, a test set
            cannot be scored, or a training set has no box.
    """
    testing = key == "test_sets"
    limit_pixels(options.max_pixels)
    sets, classes = getattr(options, key), options.classes
    more = dataset_options(options, call, testing)
    dataset = build_dataset(options.dataset, options.root, sets, classes, **more)
    if options.overfit:
        dataset.keep_first(options.overfit)
    if classes is not None and tuple(dataset.classes) != classes:
        raise UserError(f"{options.root} has the classes {', '.join(dataset.classes)}, but those "
                        f"in use are {', '.join(classes)}, and their order counts; give the --root "
                        "of matching data")
    if testing:
        dataset.check_scorable()
    elif not len(dataset.rows):
        raise UserError(f"{options.root}: the {len(dataset)} training images have no box to learn "
                        "from; annotate some, or give other image sets (--train_sets)")  # fmt: skip
    return dataset


def log_dataset(dataset: DetectionData, options: Options, key: str,
                told: Collection[str] = ()) -> list[str]:
    """Log what was found, and a line for each kind of record that had to be changed.

    Lines that are ``told`` are left out. Returns all lines.
    """
    LOGGER.info("%s", dataset.describe())
    lists, lines = list_files(options.root), dataset.report()
    if any(str(s) in SPLIT_SETS for s in getattr(options, key)):
        files = " and ".join(str(lists[name]) for name in SPLIT_SETS if name in lists)
        lines.insert(0, f"part of all images, chosen by {files}" if files else
                     f"part of all images, {options.val_share:g} of them to test on, chosen by "
                     "their names (--val_share, --split_by; python -m tools.split writes lists)")
    for line in lines:
        if line not in told:
            LOGGER.info("  %s", line)
    return lines


def _warn_shared(train_set: DetectionData, test_set: DetectionData) -> None:
    """Log that test images are training images, whose score says little."""
    train, test = ({each.image_path(i): None for i in range(len(each))}
                   for each in (train_set, test_set))
    if shared := [path for path in test if path in train]:
        LOGGER.warning("%d of %d test images are training images, e.g. %s, so the score is too "
                       "good; give other --test_sets", len(shared), len(test), shared[0])


# ---------------------------------------------------------------- opening


def open_run(call: Call, given: Mapping[str, object], world: World) -> Run:
    """Read what a run starts from and trains on, then make its folder.

    Rank 0 does each part first, so that a mistake is reported once; the other ranks take its
    checkpoint and its folder. A mistake leaves no folder behind.

    Raises:
        UserError: options, checkpoint and data do not fit together.
    """
    read: dict[Path, dict] = {}
    path = Path(found) if (found := world.decide(partial(_choose, call, given, read))) else None
    run = world.in_turn(lambda: _read_run(call, given, path, read.get(path), world))
    folder = Path(world.decide(lambda: str(run_folder(call, run.options, run.saved, path))))
    return dataclasses.replace(run, folder=RunFolder(folder, run.options, world.main))


def _choose(call: Call, given: Mapping[str, object], read: dict[Path, dict]) -> str:
    check_training(call, given)
    read |= find_checkpoint(call, given)
    return str(next(iter(read), ""))


def _read_run(call: Call, given: Mapping[str, object], path: Path | None, saved: dict | None,
              world: World) -> Run:
    """Return the run without its folder; ``saved``: the checkpoint ``path``, if it was read."""
    start, info, digest, stored = None, None, None, {}
    if path is not None:
        saved = saved or load_checkpoint(path)
        if "optimizer" not in saved:
            raise UserError(f"{path} holds weights only; start a run from them with --resume_net")
        before = Options.of(saved, path)
        check_resumed(given, before)
        State.of(saved, path)
        DetectorInfo.of(saved, path)
        stored = before.plain()
        if not path.with_name("config.json").is_file():
            # A file from elsewhere does not say where to write.
            stored = {k: v for k, v in stored.items() if k not in ("save_folder", "cache")}
    fits = given.get("priors") == FIT
    if fits and path is not None:
        given = {key: value for key, value in given.items() if key != "priors"}
    if call.resume_net and path is None:
        start, digest = read_hashed(call.resume_net, load_checkpoint)
        info = _starting_info(start, call, given)
        stored |= {"version": info.version, "size": info.size, "priors": info.priors}
    options = dataclasses.replace(resolve(given, stored), ngpu=world.size)
    if options.overfit:
        options = dataclasses.replace(options, test_sets=options.train_sets)
    check_parts(options)
    check_trackers(options.trackers)
    if options.recompute and options.compile:
        raise UserError("--recompute changes nothing under --compile; give one of them")
    device = use_device(call, options, world)
    check_shares(options.batch_size, world.size, options.accumulate)
    if options.sync_bn:
        check_sync_bn(device, world.size)
    train_set = open_dataset(options, call, "train_sets")
    options = dataclasses.replace(options, classes=tuple(train_set.classes))
    if fits:
        options = _fit_priors(options, train_set, path)
    data = train_set.fingerprint()
    _check_data(options, data, saved, path)
    parts = world.size * options.accumulate
    if len(train_set) < parts:
        raise UserError(f"{len(train_set)} images cannot be cut into {parts} parts, {world.size} "
                        f"processes with {options.accumulate} accumulation steps each; use fewer")
    test_set = _open_test_set(options, call) if options.test_frequency else None
    # The first process of a machine makes sure that the caches of all of its processes fit.
    processes = world.local_size if world.local_rank == 0 else 1
    pull = open_cache(options.cache, train_set, processes)
    _check_memory(options, len(train_set), test_set is not None, world)
    return Run(options, device, train_set, pull, test_set, data, saved, path, start, info,
               digest)


def _fit_priors(options: Options, train_set: DetectionData, path: Path | None) -> Options:
    config = prior_config(options.version, DATASETS[options.dataset].priors, options.size)
    found = fit_to(train_set, config)
    if path is not None and found != options.priors:
        raise UserError(f"--priors fit contradicts the run that is resumed: {path} has "
                        f"{options.priors}, and {found} fits the data; leave the option out")
    LOGGER.info("prior boxes that fit the training set: %s", found)
    return dataclasses.replace(options, priors=found)


def _check_data(options: Options, data: dict, saved: dict | None, path: Path | None) -> None:
    if not saved or saved["data"] == data:
        return
    before = saved["data"]
    if "annotations" not in before:
        raise UserError(f"{path} is of an older version of this program, which did not record the "
                        "annotations, so its run cannot continue; start a new one from its weights "
                        "with --resume_net")
    what = ", ".join(key for key in data if data[key] != before.get(key))
    raise UserError(f"{path} was trained on other data than {options.root} holds now (different: "
                    f"{what}; {before.get('images')} and {data['images']} images), so its run "
                    "cannot continue; start a new one from its weights with --resume_net")


def _check_memory(options: Options, images: int, tested: bool, world: World) -> None:
    # Testing does not cut a process's share of a batch into accumulation steps.
    parts = world.size if tested else world.size * options.accumulate
    share = -(-min(options.batch_size, images) // parts)
    check_shared_memory(options.num_workers, share, options.size, world.local_size)


def _open_test_set(options: Options, call: Call) -> DetectionData:
    try:
        return open_dataset(options, call, "test_sets")
    except UserError as error:
        raise UserError(f"{error} (--test_frequency 0 trains without a test set)") from error


# ---------------------------------------------------------------- resuming


def find_checkpoint(call: Call, given: Mapping[str, object]) -> dict[Path, dict]:
    """Read the checkpoint that --resume means, and return it by its path; {} for a new run.

    "auto" takes the newest run of the network, size, data set, root and --overfit that are asked
    for, or of --date, that began from the file of --resume_net or --basenet. If its last.pth is
    damaged, previous.pth is taken, and the log says so.

    Raises:
        UserError: no checkpoint of the newest run, or no configuration of a newer, can be read.
    """
    if call.resume != "auto":
        return {path: load_checkpoint(path) for path in map(Path, filter(None, [call.resume]))}
    folder = Path(given.get("save_folder", Options.save_folder))
    version, size = (given.get(key, getattr(Options, key)) for key in ("version", "size"))
    if call.resume_net:
        info = _starting_info(load_checkpoint(call.resume_net), call, given)
        version, size = info.version, info.size
    pattern = glob.escape(call.date) if call.date else "*"
    runs = [[run / name for name in ("last.pth", "previous.pth") if (run / name).is_file()]
            for run in (folder / f"{version}_{size}").glob(pattern)]
    newest = sorted(filter(None, runs), key=lambda paths: paths[0].stat().st_mtime, reverse=True)
    files = [file for file in (call.resume_net, call.basenet) if file not in (None, "auto", "none")]
    began = [*map(sha256_of, files)] if newest else []
    path, *others = next((paths for paths in newest if _is_wanted(paths[0], call, given, began)),
                         [None])
    if path is None:
        return {}
    try:
        return {path: load_checkpoint(path)}
    except UserError as error:
        if not others:
            raise
        saved = load_checkpoint(others[0])
        damaged = path.rename(path.with_name(path.name + ".damaged"))
        LOGGER.warning("%s; it is %s now, and %s is taken", error, damaged.name, others[0])
        return {others[0]: saved}


def _is_wanted(checkpoint: Path, call: Call, given: Mapping[str, object],
               began: Collection[str]) -> bool:
    """Whether a run is the one to continue, see `find_checkpoint`; UserError if it does not say.

    began: sha256 of the files that it must have begun from.
    """
    file = checkpoint.with_name("config.json")
    try:
        config = json.loads(read_text(file))
        found = config["dataset"], config["root"], config.get("overfit", Options.overfit)
        if [*map(type, found)] != [str, str, int]:
            raise TypeError(f"dataset, root, overfit: {found}")
    except Exception as error:  # of whatever the file holds
        raise UserError(f"{file} is not the configuration of a run ({error!r:.200}), so --resume "
                        f"auto cannot tell whether {checkpoint} is to be continued; give --resume "
                        f"{checkpoint}, or move it") from error
    root = absolute(given["root"]) if "root" in given else found[1]
    overfit = given.get("overfit", Options.overfit)
    if not all(digest in str(config.get("start")) for digest in began):
        return False
    return bool(call.date) or found == (asked_dataset(given), root, overfit)


def run_folder(call: Call, options: Options, saved: dict | None, path: Path | None) -> Path:
    """Return the folder of the run, which exists: that of the resumed checkpoint, else a new one.

    With --date, or from a checkpoint outside a run's folder, a resumed run continues in a new one.

    Raises:
        UserError: the checkpoint is older than the run's last one, or --date names another run.
    """
    folder = Path(options.save_folder) / options.network
    if saved and (path.parent / "config.json").is_file():
        here = path.parent
        if not call.date or here.absolute() == (folder / call.date).absolute():
            _refuse_older(path, saved["step"])
            return here
    if call.date:
        directory = folder / call.date
        _refuse_run(directory)
        with write_errors_named(directory):
            directory.mkdir(parents=True, exist_ok=True)
        return directory
    now = time.strftime("%Y%m%d-%H%M%S")
    with write_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            directory = folder / (now if number == 1 else f"{now}-{number}")
            with suppress(FileExistsError):
                directory.mkdir()
                return directory


def _refuse_run(folder: Path) -> None:
    if any(folder.glob("*.pth")):
        raise UserError(f"{folder} holds a run already; give another --date, or --resume auto to "
                        "continue it")


def _refuse_older(path: Path, step: int) -> None:
    if (newest := _last_step(path.parent)) > step:
        raise UserError(f"{path} is at step {step}, but {path.with_name('last.pth')} at {newest} "
                        "already; give that, or a new --date to continue beside it")


def _last_step(folder: Path) -> int:
    """Return the step of the folder's last.pth, 0 if none can be read."""
    newest = 0
    with suppress(UserError):  # of a damaged file, which nobody asked for
        newest = load_checkpoint(folder / "last.pth", mmap=True).get("step", 0)
    return newest if isinstance(newest, int) else 0


def _starting_info(start: Mapping, call: Call, given: Mapping[str, object]) -> DetectorInfo:
    # With a class map --classes names the classes of the data, not of the file.
    names = None if call.class_map else given.get("classes")
    names = parse_classes(names) if isinstance(names, str) else names
    dataset = asked_dataset(given)
    return DetectorInfo.of(start, Path(call.resume_net), names, dataset)
