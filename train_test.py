"""Train and evaluate SSD detectors: the wiring of all parts, behind one command line.

    python train_test.py -d VOC -v SSD_HarDNet68 -s 512                    # train
    python train_test.py --test weights/SSD_HarDNet68_512/.../Final_SSD_HarDNet68_VOC.pth

Exit status: 0 done, 1 unexpected failure, 2 bad usage or bad input, 130 interrupted (state saved).
"""

from __future__ import annotations

import glob
import json
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from data import DATASETS, build_dataset, default_root, default_sets, list_sets
from data.cache import open_cache
from data.classes import parse_classes
from data.coco_eval import BACKENDS
from data.config import (
    INPUT_MEAN,
    LR_MILESTONES,
    NMS_THRESHOLD,
    PER_CLASS,
    TRAINING_THRESHOLD,
    WARMUP_START_LR,
)
from data.curves import CURVES_FILE
from data.detections import load_detections, save_detections
from data.image_sets import parse_image_sets, sets_name
from data.loading import (
    EpochSampler,
    TestSet,
    TrainingSet,
    check_shared_memory,
    test_loader,
    training_loader,
)
from data.transforms import ResizeOnly, SSDAugmentation, TestTransform
from engine.distributed import (
    SINGLE_PROCESS,
    RankZeroFailed,
    World,
    check_shares,
    check_sync_bn,
    end,
    is_lost_connection,
    join,
    launch,
    launched,
    leave,
)
from engine.options import (
    DEFAULTS,
    DETECTION_OPTIONS,
    FIXED_IN_A_RUN,
    OF_ONE_CALL,
    OF_THE_MACHINE,
    TRAINING_RECIPES,
    check_config,
    check_gpus,
    device_name,
    parser,
)
from engine.schedule import lr_at
from engine.steps import detect_all
from engine.trainer import Interrupted, Trainer
from inference.draw import contact_sheet, draw_batch, draw_comparison
from inference.predictor import Predictor
from inference.runtime import EXPORTED_SUFFIXES, identity
from layers import Detect, MultiBoxLoss, PriorBox
from layers.detect import SUPPRESSION
from models import BACKBONES, SIZES, build_net, prior_config
from models.base_weights import load_base
from models.info import DetectorInfo
from models.pretrained import published_bases
from models.transfer import check_known, parse_class_map, transfer_classes
from utils import nms
from utils.arguments import cores
from utils.checkpoint import load_checkpoint, load_weights, sha256_of
from utils.device import choose_device
from utils.errors import UserError, first_line, reason
from utils.files import locked, write_json
from utils.logger import LOGGER, Progress, close_logging, setup_logging

# ---------------------------------------------------------------- options


def resolve(given: dict, stored: dict | None = None) -> dict:
    """All options of a call: what is ``given``, else what a checkpoint ``stored``, else defaults.

    Raises:
        UserError: given and stored contradict each other in what the checkpoint was made for, or
            the network does not exist at the size.
    """
    stored = {k: v for k, v in (stored or {}).items() if k not in OF_ONE_CALL}
    given = dict(given)
    if isinstance(given.get("classes"), str):
        given["classes"] = list(parse_classes(given["classes"]))
    if "root" in given:
        given["root"] = str(Path(given["root"]).expanduser().absolute())
        if given["root"] != stored.get("root"):
            # Image sets of another root mean nothing here.
            stored = {k: v for k, v in stored.items() if k not in ("train_sets", "test_sets")}
    for key in ("version", "size", "dataset", "classes"):
        if key in given and key in stored and given[key] != stored[key]:
            raise UserError(
                f"--{key} {given[key]} contradicts the checkpoint, which is made for "
                f"{stored[key]}; leave the option out"
            )
    options = {**DEFAULTS, **stored, **given}
    if "num_workers" not in stored.keys() | given.keys():
        options["num_workers"] = min(options["num_workers"], cores())
    # Whose prior boxes: the offsets of weights from elsewhere were learnt against others.
    options.setdefault("priors", DATASETS[options["dataset"]].priors)
    for key, value in TRAINING_RECIPES[options["recipe"]].items():
        options.setdefault(key, value)
    options.setdefault("crowds", True)
    for key in ("crowds", "eval_backend"):
        if key in given and key not in DATASETS[options["dataset"]].options:
            takers = ", ".join(name for name, row in DATASETS.items() if key in row.options)
            raise UserError(
                f"--{key.replace('_', '-')} goes with -d {takers}; leave it out with -d"
                f" {options['dataset']}"
            )
    try:
        prior_config(options["version"], options["priors"], options["size"])
    except ValueError as error:
        raise UserError(f"{error} (--size)") from error
    name = options["dataset"]
    options.setdefault("max_epoch", DATASETS[name].epochs)
    options.setdefault("weight_decay", DATASETS[name].weight_decay)
    options.setdefault("root", str(default_root(name)))
    defaults = default_sets(name, options["root"])
    for key, sets in zip(("train_sets", "test_sets"), defaults, strict=True):
        sets = options.get(key, sets)
        if isinstance(sets, str):
            sets = parse_image_sets(sets, list_sets(name, options["root"]))
        options[key] = [list(each) for each in sets]
    return options


def transfer(
    state: dict, names: list[str], classes: list[str], given: dict
) -> tuple[dict, list[str]]:
    """Weights of a detector of ``names`` for ``classes``, and those of them that are new to it."""
    seed = given.get("seed", DEFAULTS["seed"])
    return transfer_classes(state, names, classes, class_map(given), seed)


def given_classes(given: dict) -> list[str] | None:
    return list(parse_classes(given["classes"])) if "classes" in given else None


def own_names(given: dict) -> list[str] | None:
    """What --classes says of a file without names; with --class_map it names the data's classes."""
    return None if "class_map" in given else given_classes(given)


def class_map(given: dict) -> dict[str, str] | None:
    return parse_class_map(given["class_map"]) if "class_map" in given else None


def detector_info(saved: dict, path: Path, given: dict) -> DetectorInfo:
    return DetectorInfo.for_data(saved, path, own_names(given), given.get("dataset", "VOC"))


def detector_of(info: DetectorInfo) -> dict:
    """What stands for the configuration of a file without one."""
    stored = {"version": info.version, "size": info.size, "dataset": info.dataset}
    # COCO's data tell their classes, which may be some of the detector's.
    return stored if info.dataset == "COCO" else {**stored, "classes": list(info.classes)}


def use_device(given: dict, amp: str, world: World) -> torch.device:
    """The device of this process, made the current one."""
    rank = world.local_rank if world.size > 1 else None
    device = choose_device(device_name(given), amp, rank)
    if device.type == "cuda":  # streams, events and pinned memory are those of the current device
        torch.cuda.set_device(device.index or 0)
    return device


# ---------------------------------------------------------------- data


def open_dataset(options: dict, key: str, classes: list[str] | None):
    """The data set of options[key], of just ``classes`` if these are given."""
    sets = [tuple(s) for s in options[key]]
    crowds = options["crowds"] or (key == "test_sets" and not options["overfit"])
    more = {"crowds": crowds, "eval_backend": options.get("eval_backend", BACKENDS[0])}
    more = {key: more[key] for key in more if key in DATASETS[options["dataset"]].options}
    dataset = build_dataset(options["dataset"], options["root"], sets, classes, **more)
    if options["overfit"]:
        dataset.keep_first(options["overfit"])
    if classes is not None and list(dataset.classes) != list(classes):
        raise UserError(
            f"{options['root']} has the classes {', '.join(dataset.classes)}, but those in use "
            f"are {', '.join(classes)}, and their order counts; give the --root of matching data"
        )
    if key == "test_sets":
        dataset.check_scorable()
    return dataset


def log_dataset(dataset, options: dict, key: str) -> None:
    """How many pictures there are, and a line for each kind of record that had to be changed."""
    LOGGER.info("%s %s: %d pictures", options["root"], sets_name(options[key]), len(dataset))
    for line in dataset.report():
        LOGGER.info("  %s", line)


# ---------------------------------------------------------------- evaluation


def detection_options(given: dict, options: dict, threshold: float) -> dict:
    """Arguments of ``Detect``: the published ones, but for what is ``given``."""
    published = DATASETS[options["dataset"]].detection
    return {
        "nms_thresh": NMS_THRESHOLD,
        "per_class": PER_CLASS,
        "conf_thresh": given.get("score_threshold", threshold),
        "top_k": given.get("max_detections", published["top_k"]),
        "nms": given.get("nms", "hard"),
        "class_agnostic": given.get("class_agnostic", False),
        "background_shortcut": given.get("background_shortcut", False),
    }


def scoring_options(options: dict) -> dict:
    """Arguments of a data set's ``evaluate``."""
    return {"name": f"{options['version']}_{options['size']}"}  # of a test split's files


def detect(
    net: nn.Module,
    dataset,
    priors: torch.Tensor,
    options: dict,
    chosen: dict,
    on_batch: Callable[[int], None],
    world: World,
) -> list[dict[str, np.ndarray]] | None:
    """Detections of all pictures of ``dataset``, by ``Detect(**chosen)``.

    Each process detects on its share of them; None on all processes but the first.
    """
    share = list(world.share_of(len(dataset)))
    samples = Subset(TestSet(dataset, TestTransform(options["size"])), share)
    pin_memory = priors.device.type == "cuda"
    size = -(-options["batch_size"] // world.size)
    loader = test_loader(samples, size, options["num_workers"], pin_memory)
    progress = Progress("test", len(loader), options["log_iters"])

    def advance(images: int) -> None:
        progress.update(images)
        on_batch(images)

    try:
        found = detect_all(
            net, Detect(**chosen), priors, loader, INPUT_MEAN, options["amp"], advance
        )
    except FloatingPointError as error:
        raise UserError(
            f"the network's output is not finite ({error}); its weights have diverged, or their "
            "file is damaged"
        ) from error
    finally:
        progress.close()
    return world.collect(found, len(dataset))


def made_by(options: dict, chosen: dict, checkpoint: dict, device: torch.device) -> dict:
    """All that decides what the detections of a call are; kept with them."""
    return {
        "checkpoint": checkpoint,
        "dataset": options["dataset"],
        "priors": options["priors"],
        "class_map": options.get("class_map"),
        "root": options["root"],
        "sets": sets_name(options["test_sets"]),
        "overfit": options["overfit"],
        "classes": options["classes"],
        "thresholds": {
            "score": chosen["conf_thresh"],
            "nms": chosen["nms_thresh"],
            "per_class": chosen["per_class"],
            "per_image": chosen["top_k"],
        },
        "suppression": {
            key: chosen[key] for key in ("nms", "class_agnostic", "background_shortcut")
        },
        "amp": options["amp"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "nms": nms.backend(device.type),
        },
    }


SCORES = ("results.json", CURVES_FILE)
"""What a scoring leaves in its folder, beside the official files."""


def score(dataset, detections: list[dict], origin: dict, directory: Path, scoring: dict) -> dict:
    """Write the official files, score them, and leave results.json; returns its content."""
    results = {
        **dataset.evaluate(detections, directory, **scoring),
        **origin,
        "images": len(dataset),
        "detection_count": sum(len(d["scores"]) for d in detections),
    }
    path = directory / "results.json"
    write_json(path, results)
    for line in results["notes"]:
        LOGGER.info("  %s", line)
    for name, value in results["per_class"].items():
        LOGGER.info("  %-20s %.4f", name, value)
    value = results["value"]
    LOGGER.info(
        "%s: %s (%d pictures, %d detections of score > %g; %s)",
        results["metric"],
        "no ground truth to score against" if value is None else f"{value:.4f}",
        results["images"],
        results["detection_count"],
        origin["thresholds"]["score"],
        path,
    )
    return results


@dataclass(frozen=True)
class Testing:
    """All that a test needs, read and found to fit together."""

    options: dict
    device: torch.device
    dataset: object
    model: dict[str, torch.Tensor] | Predictor
    """The state dict, of the data set's classes; or an exported file, ready to run."""
    checkpoint: dict
    """Its file's name and sha256."""
    directory: Path
    scoring: dict

    __test__ = False  # for pytest


def open_test(given: dict, world: World) -> Testing:
    """Read the checkpoint given["test"] and the data that it is tested on; writes nothing."""
    for option in ("resume", "resume_net", "resume_epoch", "basenet", "overfit"):
        if given.get(option):
            raise UserError(f"--{option} is for training, --test evaluates; give one of them")
    path = Path(given["test"])
    if path.suffix in EXPORTED_SUFFIXES:
        return open_exported(given, path, world)
    saved = load_checkpoint(path)
    info = detector_info(saved, path, given)
    stored = check_config(saved, path) if "config" in saved else detector_of(info)
    if stored.get("overfit"):  # it was tested on what it was trained on
        stored = {k: v for k, v in stored.items() if k not in ("overfit", "test_sets")}
    stored = {k: v for k, v in stored.items() if k not in OF_THE_MACHINE}
    names = list(info.classes)
    if given.get("dataset", stored["dataset"]) != stored["dataset"]:
        stored = {key: stored[key] for key in ("version", "size")}  # what its data were is no help
    if "class_map" in given or "classes" in given:
        stored.pop("classes", None)
    if "classes" in given:  # before the data are looked for
        check_known(path, names, given_classes(given), class_map(given))
    stored["priors"] = info.priors
    options = resolve(given, stored)
    device = use_device(given, options["amp"], world)
    scoring = scoring_options(options)
    dataset = open_dataset(options, "test_sets", options.get("classes"))
    options["classes"] = list(dataset.classes)
    model = saved["model"]
    if "class_map" in given or names != options["classes"]:
        check_known(path, names, options["classes"], class_map(given))
        model, _ = transfer(model, names, options["classes"], given)
    checkpoint = {"file": path.name, "sha256": sha256_of(path)}
    directory = test_folder(given, options, path)
    return Testing(options, device, dataset, model, checkpoint, directory, scoring)


def open_exported(given: dict, path: Path, world: World) -> Testing:
    """``open_test`` of what ``python -m tools.export`` has written."""
    for option in ("class_map", "amp"):
        if option in given:
            raise UserError(f"--{option} cannot change {path}, which is exported; leave it out")
    if given.get("cuda") or given.get("device", "cpu") not in ("auto", "cpu") or world.size > 1:
        raise UserError(f"{path} is exported and runs on the CPU, in one process; use --device cpu")
    predictor = Predictor(path, **{key: given[key] for key in DETECTION_OPTIONS & given.keys()})
    keys = ("version", "size", "dataset", "priors")
    stored = {key: getattr(predictor.info, key) for key in keys}
    options = resolve(given, {**stored, "classes": list(predictor.info.classes)})
    scoring = scoring_options(options)
    dataset = open_dataset(options, "test_sets", options["classes"])
    exported = predictor.exported
    checkpoint = {
        **identity(path),
        "precision": exported.info.precision,
        "made_of": exported.info.checkpoint,
        "runtime": " ".join(exported.runtime),
    }
    directory = test_folder(given, options, path)
    return Testing(options, predictor.device, dataset, predictor, checkpoint, directory, scoring)


def detect_exported(predictor: Predictor, dataset, options: dict) -> list[dict[str, np.ndarray]]:
    """``detect`` by an exported file."""
    found, step = [], options["batch_size"]
    progress = Progress("test", -(-len(dataset) // step), options["log_iters"])
    try:
        for start in range(0, len(dataset), step):
            batch = range(start, min(start + step, len(dataset)))
            found += predictor([dataset.pull_image(i) for i in batch])
            progress.update(len(batch))
    except FloatingPointError as error:
        raise UserError(f"the output of the exported file is not finite ({error})") from error
    finally:
        progress.close()
    return [{key: d[key].numpy() for key in ("boxes", "scores", "labels")} for d in found]


def test(given: dict, world: World = SINGLE_PROCESS) -> None:
    """Evaluate the checkpoint given["test"], or score its kept detections again."""
    job = world.in_turn(lambda: open_test(given, world))
    options, dataset, directory = job.options, job.dataset, job.directory
    log_dataset(dataset, options, "test_sets")
    cache = directory / "detections.npz"
    exported = isinstance(job.model, Predictor)
    threshold = DATASETS[options["dataset"]].detection["conf_thresh"]
    chosen = detection_options(given, options, threshold)
    if exported:  # it knows its own
        chosen = asdict(job.model.detect.config)
    origin = made_by(options, chosen, job.checkpoint, job.device)
    if given.get("retest"):
        asked = ["checkpoint", "dataset", "class_map", "root", "sets", "classes"]
        if DETECTION_OPTIONS & given.keys():
            asked += ["thresholds", "suppression"]
        same = {key: origin[key] for key in asked}
        if not world.main:
            return
        detections, origin = load_detections(cache, dataset.ids, same)
    elif exported:
        LOGGER.info("%s by %s", given["test"], job.checkpoint["runtime"])
        detections = detect_exported(job.model, dataset, options)
    else:
        net = build_net(options["version"], options["size"], len(dataset.classes) + 1)
        load_weights(net, job.model, given["test"])
        net.to(job.device, memory_format=torch.channels_last)
        preset = prior_config(options["version"], options["priors"], options["size"])
        priors = PriorBox(preset).to(job.device)()
        LOGGER.info(
            "%s at %d, %d classes, on %s (%s); NMS: %s",
            options["version"],
            options["size"],
            len(dataset.classes),
            job.device,
            options["amp"],
            nms.backend(job.device.type),
        )
        detections = detect(net, dataset, priors, options, chosen, lambda images: None, world)
        if detections is None:
            return
    if not given.get("retest"):
        for name in SCORES:  # of the detections that are replaced
            (directory / name).unlink(missing_ok=True)
        save_detections(cache, dataset.ids, detections, origin)
    score(dataset, detections, origin, directory, job.scoring)


def test_folder(given: dict, options: dict, path: Path) -> Path:
    """Where a test's files go: into the run that the checkpoint lies in, if it lies in one."""
    folder = Path(given.get("save_folder", DEFAULTS["save_folder"]))
    folder /= f"{options['version']}_{options['size']}"
    run = path.absolute().parent
    in_a_run = (run / "config.json").is_file()
    if "date" in given:
        run = folder / given["date"]
    elif not in_a_run or ("save_folder" in given and run.parent != folder.absolute()):
        run = folder / path.stem
    # An exported file lies beside the checkpoint that it is made of.
    name = path.name if path.suffix in EXPORTED_SUFFIXES else path.stem
    return run / "ss_predict" / name / sets_name(options["test_sets"])


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Run:
    """All that a training run is made of but its network, read and found to fit together."""

    options: dict
    device: torch.device
    train_set: object
    pull: Callable[[int], np.ndarray] | None
    """The cache of its pictures."""
    test_set: object | None
    saved: dict | None
    """The checkpoint that is resumed, and where it lies."""
    path: Path | None
    start: dict | None
    """The checkpoint of --resume_net."""
    directory: Path
    data: dict
    """The fingerprint of the training pictures."""


def open_run(given: dict, world: World, directory: Path | None = None) -> Run:
    """Read what a run starts from and trains on.

    ``directory``: its folder, where another process has made it. Else it is made here, as the last
    thing: a mistake leaves no folder behind.
    """
    check_training_options(given)
    saved, path = find_checkpoint(given)
    stored, start = check_config(saved, path) if saved else {}, None
    if "resume_net" in given:
        start = load_checkpoint(given["resume_net"])
        stored["priors"] = detector_info(start, Path(given["resume_net"]), given).priors
    options = {**resolve(given, stored), "ngpu": world.size}
    if saved:
        before = resolve({}, stored)
        for key in FIXED_IN_A_RUN:
            if options[key] != before[key]:
                raise UserError(
                    f"--{key} {options[key]} contradicts the run that is resumed, which has "
                    f"{before[key]}; leave the option out"
                )
    if options["overfit"]:
        options["test_sets"] = options["train_sets"]
    if options["recompute"] and options["compile"]:
        raise UserError("--recompute changes nothing under --compile; give one of them")
    device = use_device(given, options["amp"], world)
    check_shares(options["batch_size"], world.size, options["accumulate"])
    if options["sync_bn"]:
        check_sync_bn(device, world.size)
    train_set = open_dataset(options, "train_sets", options.get("classes"))
    options["classes"] = list(train_set.classes)
    parts = world.size * options["accumulate"]
    if len(train_set) < parts:
        raise UserError(
            f"{len(train_set)} pictures cannot be cut into {parts} parts, {world.size} processes "
            f"with {options['accumulate']} accumulation steps each; use fewer"
        )
    data = train_set.fingerprint()
    before = saved.get("data") or {} if saved else data
    if changed := [key for key in data if before.get(key) != data[key]]:
        raise UserError(
            f"{path} was trained on other data ({before.get('images')} images) than"
            f" {options['root']} holds now ({data['images']}): {', '.join(changed)} differ, so its"
            " run cannot go on; start a new one from its weights with --resume_net"
        )
    test_set = open_test_set(options) if options["test_frequency"] else None
    pull = open_cache(options["cache"], train_set)
    # Testing does not cut a process's share of a batch into accumulation steps.
    batch = min(options["batch_size"], len(train_set))
    share = -(-batch // (world.size if test_set is not None else parts))
    check_shared_memory(options["num_workers"], share, options["size"], world.local_size)
    directory = directory or run_folder(given, options, saved, path)
    return Run(options, device, train_set, pull, test_set, saved, path, start, directory, data)


def train(given: dict, world: World = SINGLE_PROCESS) -> None:
    """Train, from scratch or from where a checkpoint left off."""
    run = None

    def first() -> list[str | None]:
        nonlocal run
        run = open_run(given, world)
        return [str(run.directory), str(run.path) if run.path else None]

    directory, path = world.decide(first)
    if run is None:
        # The same checkpoint, whatever this process would take for the newest.
        given = {
            **{k: v for k, v in given.items() if k != "resume"},
            **({"resume": path} if path else {}),
        }
        run = open_run(given, world, Path(directory))
    with locked(run.directory / ".lock") if world.main else nullcontext():
        train_run(given, run, world)


def train_run(given: dict, run: Run, world: World) -> None:
    """The training itself, in its folder."""
    options = run.options
    if world.main:
        setup_logging(run.directory / "train.log")
    log_dataset(run.train_set, options, "train_sets")
    if run.test_set is not None:
        log_dataset(run.test_set, options, "test_sets")
    if given.get("resume") == "auto" and not run.saved:
        LOGGER.info("no run to go on with: a new one starts")
    trainer = build_trainer(given, run, world)
    if run.saved:
        trainer.restore(run.saved, run.path)
    if world.main:
        write_json(run.directory / "config.json", options)
    LOGGER.info(
        "%s at %d, %d classes, %d pictures, %d steps an epoch, %d epochs, on %s (%s); run %s",
        options["version"],
        options["size"],
        len(options["classes"]),
        len(run.train_set),
        trainer.steps_per_epoch,
        options["max_epoch"],
        run.device,
        options["amp"],
        run.directory,
    )
    sampler = trainer.loader.batch_sampler
    LOGGER.info(
        "a step: %d pictures in all (%d processes x %d accumulation steps x %d), learning rate %g "
        "(%s recipe)",
        sampler.batch_size,
        world.size,
        options["accumulate"],
        sampler.batch_size // (world.size * options["accumulate"]),
        options["lr"],
        options["recipe"],
    )
    trainer.run(given.get("max_iters"))


def check_training_options(given: dict) -> None:
    """Refuse, before anything is written, what cannot be meant."""
    if "class_map" in given and "resume_net" not in given:
        raise UserError("--class_map goes with --resume_net FILE or --test FILE")
    for option in ("retest", *sorted(DETECTION_OPTIONS)):
        if given.get(option, False) is not False:  # a switch may be off, a number 0 is none
            raise UserError(f"--{option} goes with --test FILE")
    for one, other in (("resume", "resume_net"), ("resume", "basenet"), ("basenet", "resume_net")):
        if one in given and other in given:
            raise UserError(f"--{one} and --{other} both say where weights come from; give one")
    if "resume_epoch" in given and "resume_net" not in given:
        raise UserError(
            "--resume_epoch goes with --resume_net FILE; to go on with a run of this program give "
            "--resume instead"
        )
    if "resume_net" in given and not Path(given["resume_net"]).is_file():
        raise UserError(f"--resume_net {given['resume_net']} does not exist")
    if "basenet" in given and not Path(given["basenet"]).is_file():
        version = given.get("version", DEFAULTS["version"])
        files = " or ".join(row.file for row in published_bases(version))
        raise UserError(
            f"--basenet {given['basenet']} does not exist; the published file for {version} is "
            f"{files}, and weights/README.md says where it can be had"
        )
    recipe = TRAINING_RECIPES[given.get("recipe", DEFAULTS["recipe"])]
    if "resume" not in given and given.get("optimizer", recipe["optimizer"]) != recipe["optimizer"]:
        if not {"lr", "weight_decay"} <= given.keys():
            raise UserError(
                f"--optimizer {given['optimizer']} is not that of the recipe, whose learning rate "
                "and weight decay do not suit it; give --lr and --weight_decay, too"
            )
    if given.get("send_images_to_visdom") and not given.get("visdom"):
        raise UserError("--send_images_to_visdom goes with --visdom")
    if given.get("visdom"):
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                "--visdom writes for TensorBoard, which is not installed; pip install tensorboard"
            ) from error


def find_checkpoint(given: dict) -> tuple[dict | None, Path | None]:
    """The checkpoint that --resume means, and its path; (None, None) for a new run.

    "auto" takes the one before, should the newest of a run be damaged; the log says so.
    """
    if "resume" not in given:
        return None, None
    if given["resume"] != "auto":
        saved, path = load_checkpoint(given["resume"]), Path(given["resume"])
    else:
        folder = Path(given.get("save_folder", DEFAULTS["save_folder"]))
        version, size = (given.get(key, DEFAULTS[key]) for key in ("version", "size"))
        runs = (folder / f"{version}_{size}").glob(
            glob.escape(given["date"]) if "date" in given else "*"
        )
        kept = [[run / name for name in ("last.pth", "previous.pth") if (run / name).is_file()]
                for run in runs if _resumable(run, given)]  # fmt: skip
        kept = [paths for paths in kept if paths]
        if not kept:
            return None, None
        path, *others = max(kept, key=lambda paths: paths[0].stat().st_mtime)
        try:
            saved = load_checkpoint(path)
        except UserError as error:
            if not others:
                raise
            saved = load_checkpoint(others[0])
            damaged = path.rename(path.with_name(path.name + ".damaged"))
            LOGGER.warning("%s; it is %s now, and %s is taken", error, damaged.name, others[0])
            path = others[0]
    if "optimizer" not in saved:
        raise UserError(f"{path} holds weights only; start a run from them with --resume_net")
    return saved, path


def _resumable(run: Path, given: dict) -> bool:
    """Whether a run is of the data set, root and --overfit that are asked for.

    A --date names its run: what contradicts it is told, and the run not passed over.
    """
    if "date" in given:
        return True
    try:
        config = json.loads((run / "config.json").read_text())
        dataset, root, overfit = config["dataset"], config["root"], config.get("overfit", 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = str(Path(given["root"]).expanduser().absolute()) if "root" in given else root
    asked = (given.get("dataset", DEFAULTS["dataset"]), wanted, given.get("overfit", 0))
    return (dataset, root, overfit) == asked


def run_folder(given: dict, options: dict, saved: dict | None, path: Path | None) -> Path:
    """The folder of the run: that of the checkpoint it goes on from, else a new one.

    With --date, or from a checkpoint outside a run's folder, a resumed run goes on in a new one.
    """
    folder = Path(options["save_folder"]) / f"{options['version']}_{options['size']}"
    if saved and (path.parent / "config.json").is_file():
        here = path.parent
        if "date" not in given or here.absolute() == (folder / given["date"]).absolute():
            last = here / "last.pth"
            if path.name != last.name and last.is_file():
                step = load_checkpoint(last, mmap=True).get("step", 0)
                if step > saved["step"]:
                    raise UserError(
                        f"{path} is at step {saved['step']}, but {last} at {step} already; give "
                        "that, or a new --date to go on beside it"
                    )
            return here
    if "date" in given:
        directory = folder / given["date"]
        if any(directory.glob("*.pth")):
            raise UserError(
                f"{directory} holds a run already; give another --date, or --resume auto to go on "
                "with it"
            )
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    now = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        try:
            (folder / f"{now}{suffix}").mkdir(parents=True)
            return folder / f"{now}{suffix}"
        except FileExistsError:
            if not folder.is_dir():
                raise
    raise UserError(f"{folder} holds a thousand runs of this second; give --date")


def open_test_set(options: dict):
    try:
        return open_dataset(options, "test_sets", options["classes"])
    except UserError as error:
        raise UserError(f"{error} (--test_frequency 0 trains without a test set)") from error


def build_trainer(given: dict, run: Run, world: World) -> Trainer:
    """Network, loss, data and optimiser of a run; its weights are the starting ones."""
    options, device, train_set, test_set = run.options, run.device, run.train_set, run.test_set
    torch.manual_seed(options["seed"])
    net = build_net(options["version"], options["size"], len(options["classes"]) + 1)
    if not run.saved:
        options["start"] = starting_weights(net, given, options, run.start)
    net.recompute = options["recompute"]
    if options["sync_bn"] and world.size > 1:
        # Several processes have more than one value per channel: the rule of models/rfb.py for a
        # single value is not needed.
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    forward = world.replicate(torch.compile(net) if options["compile"] else net, device)
    preset = prior_config(options["version"], options["priors"], options["size"])
    priors = PriorBox(preset).to(device)()
    size = options["size"]
    augment = ResizeOnly(size) if options["overfit"] else SSDAugmentation(size, INPUT_MEAN)
    samples = TrainingSet(train_set, augment, options["seed"], run.pull)
    sampler = EpochSampler(
        len(train_set),
        options["batch_size"],
        options["seed"],
        world.rank,
        world.size,
        options["accumulate"],
    )
    loader = training_loader(samples, sampler, options["num_workers"], device.type == "cuda")

    def learning_rate(step: int) -> float:
        return lr_at(
            step,
            steps_per_epoch=sampler.steps,
            epochs=options["max_epoch"],
            base_lr=options["lr"],
            schedule=options["schedule"],
            gamma=options["gamma"],
            milestones=LR_MILESTONES,
            warm_epochs=options["warm_epoch"],
            start_lr=WARMUP_START_LR,
        )

    chosen = detection_options({}, options, TRAINING_THRESHOLD)
    scoring = scoring_options(options)

    def evaluate(net: nn.Module, name: str, on_batch: Callable[[int], None]) -> dict | None:
        folder = run.directory / "ss_predict" / name / sets_name(options["test_sets"])
        origin = made_by(options, chosen, {"file": f"{run.directory.name}, {name}"}, device)
        detections = detect(net, test_set, priors, options, chosen, on_batch, world)
        if detections is None:
            return None
        save_detections(folder / "detections.npz", test_set.ids, detections, origin)
        results = score(test_set, detections, origin, folder, scoring)
        return {**results, "draw": lambda: draw_examples(test_set, detections)}

    trainer = Trainer(
        net=net,
        forward=forward,
        criterion=MultiBoxLoss(
            net.num_classes, options["jaccard_threshold"], variance=preset.variance
        ),
        priors=priors,
        loader=loader,
        learning_rate=learning_rate,
        evaluate=evaluate if test_set is not None else None,
        options=options,
        identity={"classes": options["classes"], "config": options, "data": run.data},
        mean=INPUT_MEAN,
        directory=run.directory,
        image_name=lambda index: str(train_set.image_path(index)),
        draw_batch=lambda images, targets: draw_batch(images, targets, options["classes"]),
        world=world,
    )
    trainer.step = given.get("resume_epoch", 0) * trainer.steps_per_epoch
    return trainer


def draw_examples(dataset, detections: list[dict], most: int = 8) -> np.ndarray:
    """Some pictures, spread over the data set, with truth and detections: BGR uint8 [H, W, 3]."""
    chosen = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)
    return contact_sheet(
        [
            draw_comparison(
                dataset.pull_image(i), dataset.target(i), detections[i], dataset.classes
            )
            for i in chosen
        ],
        4,
    )


def starting_weights(net: nn.Module, given: dict, options: dict, start: dict | None) -> str:
    """Load what --resume_net (``start``) or --basenet names; says where the weights are from."""
    if "resume_net" in given:
        path, classes = Path(given["resume_net"]), options["classes"]
        state, origin = start["model"], f"all weights from {path} (sha256 {sha256_of(path)})"
        info = detector_info(start, path, given)
        names, boxes = list(info.classes), info.priors
        if "class_map" in given or names != classes:
            state, new = transfer(state, names, classes, given)
            origin += f", {len(classes) - len(new)} of {len(classes)} classes by name"
            origin += f"; new: {', '.join(new)}" if new else ""
        if boxes != options["dataset"]:
            origin += f"; prior boxes of {boxes}, as they were trained with"
        load_weights(net, state, path)
    elif "basenet" in given:
        path = Path(given["basenet"])
        match = load_base(net.base, path, options["version"])
        origin = f"{len(match.tensors)} of {match.total} tensors of the base network from {path}, "
        origin += f"{match.source} (sha256 {sha256_of(path)})"
    else:
        origin = "no --basenet: the base network is trained from scratch"
    LOGGER.info("%s", origin)
    return origin


# ---------------------------------------------------------------- main


def interrupt(number: int, _) -> None:
    raise Interrupted


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser(
        versions=BACKBONES,
        sizes=SIZES,
        datasets=DATASETS,
        suppressions=SUPPRESSION,
        backends=BACKENDS,
    )
    given = vars(arguments.parse_args(argv))
    setup_logging()
    # Nearly all batches have one shape, so cuDNN's search for the fastest algorithm pays.
    torch.backends.cudnn.benchmark = True
    before = signal.signal(signal.SIGTERM, interrupt)
    world = SINGLE_PROCESS
    try:
        if "ngpu" in given:
            amp = given.get("amp", DEFAULTS["amp"])
            check_gpus(given["ngpu"], choose_device(device_name(given), amp))
            if given["ngpu"] > 1 and not launched():
                return launch(given["ngpu"], [__file__, *argv])
        world = join()
        if not world.main:
            setup_logging(quiet=True)
        test(given, world) if "test" in given else train(given, world)
        leave()
        return 0
    except UserError as error:
        print(f"{_speaker(world)}error: {error}", file=sys.stderr)
        return 2
    except RankZeroFailed:
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"{_speaker(world)}error: the GPU's memory is full ({first_line(error)}); give a "
            "smaller --batch_size, or with the same one --accumulate, --recompute or --amp bf16",
            file=sys.stderr,
        )
        return 1
    except (RuntimeError, ConnectionError) as error:
        if world.size == 1 or not is_lost_connection(error):
            raise
        advice = "" if "test" in given else "; start it again with --resume auto"
        print(
            f"{_speaker(world)}error: another process of the job has ended "
            f"({first_line(error)}){advice}",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"{_speaker(world)}error: {reason(error)}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        if world.main:
            print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        close_logging()


def _speaker(world: World) -> str:
    """Which of several processes a message is from."""
    return "" if world.main else f"[process {world.rank}] "


if __name__ == "__main__":
    end(main())
