"""Train and evaluate SSD detectors: the wiring of all parts, behind one command line.

    python train_test.py -d VOC -v SSD_HarDNet68 -s 512                    # train
    python train_test.py --test weights/SSD_HarDNet68_512/.../Final_SSD_HarDNet68_VOC.pth

Exit status: 0 done, 1 unexpected failure, 2 bad usage or bad input, 130 interrupted (state saved).
"""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import build_dataset
from data.coco_eval import BACKENDS, load_backend
from data.config import (
    INPUT_MEAN,
    LR_MILESTONES,
    NMS_THRESHOLD,
    PER_CLASS,
    RECIPES,
    TRAINING_THRESHOLD,
    WARMUP_START_LR,
)
from data.curves import CURVES_FILE
from data.detections import load_detections, save_detections
from data.loading import EpochSampler, TestSet, TrainingSet, test_loader, training_loader
from data.transfer import COCO_CLASSES, match_classes, parse_class_map, transfer_classes
from data.transforms import SSDAugmentation, TestTransform
from data.voc0712 import VOC_CLASSES, parse_classes
from layers import Detect, MultiBoxLoss, PriorBox
from layers.detect import SUPPRESSION
from models import BACKBONES, SIZES, build_net, identify, prior_config
from utils import nms
from utils.checkpoint import load_base, load_checkpoint, load_weights, sha256_of
from utils.engine import AMP_TYPES, detect_all
from utils.errors import UserError
from utils.files import write_json
from utils.logger import LOGGER, Progress, close_logging, setup_logging
from utils.options import (
    DEFAULTS,
    DETECTION_OPTIONS,
    OF_ONE_CALL,
    TRAINING_RECIPES,
    check_gpus,
    choose_device,
    image_sets,
    parser,
    set_names,
)
from utils.schedule import SCHEDULES, lr_at
from utils.trainer import Interrupted, Trainer

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
    # Whose prior boxes: the offsets of weights from elsewhere were learnt against others.
    options.setdefault("priors", options["dataset"])
    for key, value in TRAINING_RECIPES[options["recipe"]].items():
        options.setdefault(key, value)
    options.setdefault("crowds", True)
    if "crowds" in given and options["dataset"] != "COCO":
        raise UserError("--crowds is for -d COCO; leave it out")
    try:
        prior_config(options["version"], options["priors"], options["size"])
    except ValueError as error:
        raise UserError(f"{error} (--size)") from error
    recipe = RECIPES[options["dataset"]]
    options.setdefault("max_epoch", recipe.epochs)
    options.setdefault("weight_decay", recipe.weight_decay)
    folder = {"VOC": "VOCdevkit", "COCO": "COCO"}[options["dataset"]]
    options.setdefault("root", str(Path.home() / "data" / folder))
    bare = (Path(options["root"]) / "Annotations").is_dir()
    for key, bare_set in (("train_sets", "trainval"), ("test_sets", "test")):
        default = [(None, bare_set)] if bare else getattr(recipe, key)
        sets = options.get(key, default)
        options[key] = image_sets(sets) if isinstance(sets, str) else [list(s) for s in sets]
    return options


def describe(saved: dict, path: Path, given: dict) -> dict:
    """What a checkpoint says of itself: its configuration, else what its tensors tell.

    Raises:
        UserError: neither says enough, or the configuration is none that this program writes.
    """
    if "config" in saved:
        return check_config(saved, path)
    try:
        version, size, num_classes = identify(saved["model"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    stored = {"version": version, "size": size}
    if num_classes == 81:  # a published file: 81 classes are COCO's, 21 VOC's
        stored["dataset"] = "COCO"
    elif num_classes == 21:
        stored |= {"dataset": "VOC", "classes": list(VOC_CLASSES)}
    elif "classes" not in given:
        raise UserError(
            f"{path} has {num_classes - 1} classes and no names for them; give --classes"
        )
    elif len(parse_classes(given["classes"])) != num_classes - 1:
        named = len(parse_classes(given["classes"]))
        raise UserError(f"{path} has {num_classes - 1} classes, but --classes names {named}")
    return stored


def check_config(saved: dict, path: Path) -> dict:
    """The configuration of one of our checkpoints, with its classes.

    Raises:
        UserError: a field is missing, or not of the kind that this program writes.
    """
    config, classes = saved.get("config"), saved.get("classes")
    expected = {**DEFAULTS, "root": "", "max_epoch": 1, "weight_decay": 0.0}
    expected |= {"train_sets": [], "test_sets": []}
    if not isinstance(config, dict):
        raise UserError(f"{path}: its configuration is no dict; is it a file of this program?")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        raise UserError(f"{path}: its classes are {classes!r}, expected a list of names")
    choices = {"version": BACKBONES, "size": SIZES, "dataset": RECIPES, "amp": AMP_TYPES}
    choices["priors"] = RECIPES
    expected |= TRAINING_RECIPES["published"]
    choices |= {"recipe": TRAINING_RECIPES, "schedule": SCHEDULES}
    later = {"priors": "", "crowds": True, "recipe": "", **TRAINING_RECIPES["published"]}
    later.pop("warm_epoch")
    expected = {key: example for key, example in expected.items() if key not in later}
    # not in the first files, whose recipe was the published one
    expected |= {key: example for key, example in later.items() if key in config}
    for key, example in expected.items():
        value = config.get(key)
        right = isinstance(value, type(example)) or (
            isinstance(example, float) and isinstance(value, int)
        )
        if not right or (key in choices and value not in choices[key]):
            raise UserError(f"{path}: its configuration has {key} {value!r}, which is not valid")
    return {**config, "classes": classes}


def trained_for(saved: dict, path: Path, given: dict) -> tuple[list[str] | None, str | None]:
    """The classes that a checkpoint's weights know, and whose prior boxes; None: it cannot be told.

    A published file has no names: --classes names its classes if they are as many, else 80 are
    COCO's and 20 VOC's.

    Raises:
        UserError: its tensors are no detector's.
    """
    if "config" in saved:
        config = check_config(saved, path)
        return config["classes"], config.get("priors", config["dataset"])
    try:
        _, _, num_classes = identify(saved["model"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    known = {81: (list(COCO_CLASSES), "COCO"), 21: (list(VOC_CLASSES), "VOC")}
    names, boxes = known.get(num_classes, (None, None))
    if "classes" in given and "class_map" not in given:
        named = list(parse_classes(given["classes"]))
        names = named if len(named) == num_classes - 1 else names
    return names, boxes


def transfer(
    state: dict, names: list[str], classes: list[str], given: dict
) -> tuple[dict, list[str]]:
    """Weights of a detector of ``names`` for ``classes``, and those of them that are new to it."""
    generator = torch.Generator().manual_seed(given.get("seed", DEFAULTS["seed"]))
    return transfer_classes(state, names, classes, class_map(given), generator)


def class_map(given: dict) -> dict[str, str] | None:
    return parse_class_map(given["class_map"]) if "class_map" in given else None


def check_known(path: Path, names: list[str], classes: list[str], given: dict) -> None:
    """UserError unless a detector of ``names`` knows all ``classes``, by name or --class_map."""
    rows = match_classes(names, classes, class_map(given))
    unknown = [name for name, row in zip(classes, rows, strict=True) if row is None]
    if unknown:
        raise UserError(
            f"{path} has not learnt {', '.join(unknown)}; its classes are {', '.join(names)}; say "
            "which of them each is (--class_map own=other,...), or train from it with --resume_net"
        )


# ---------------------------------------------------------------- data


def open_dataset(options: dict, key: str, classes: list[str] | None):
    """The data set of options[key], of just ``classes`` if these are given."""
    sets = [tuple(s) for s in options[key]]
    crowds = options["crowds"] or key == "test_sets"
    dataset = build_dataset(options["dataset"], options["root"], sets, classes, crowds)
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
    LOGGER.info("%s %s: %d pictures", options["root"], set_names(options[key]), len(dataset))
    for line in dataset.report():
        LOGGER.info("  %s", line)


def fingerprint(dataset) -> dict:
    """What tells whether a data set is still the same: the number and the names of its pictures."""
    names = "\n".join(map(str, dataset.ids))
    return {"pictures": len(dataset), "ids": hashlib.sha256(names.encode()).hexdigest()}


# ---------------------------------------------------------------- evaluation


def detection_options(given: dict, options: dict, threshold: float) -> dict:
    """Arguments of ``Detect``: the published ones, but for what is ``given``."""
    return {
        "conf_thresh": given.get("score_threshold", threshold),
        "nms_thresh": NMS_THRESHOLD,
        "per_class": PER_CLASS,
        "top_k": given.get("max_detections", RECIPES[options["dataset"]].top_k),
        "nms": given.get("nms", "hard"),
        "class_agnostic": given.get("class_agnostic", False),
        "background_shortcut": given.get("background_shortcut", False),
    }


def scoring_options(given: dict, options: dict) -> dict:
    """Arguments of a data set's ``evaluate``; UserError for a backend that cannot serve."""
    if options["dataset"] != "COCO":
        if "eval_backend" in given:
            raise UserError("--eval-backend computes COCO's numbers; leave it out with -d VOC")
        return {}
    scoring = {"name": f"{options['version']}_{options['size']}"}  # of a test split's files
    if "eval_backend" in given:
        load_backend(given["eval_backend"])  # what is not installed is told now
        scoring["backend"] = given["eval_backend"]
    return scoring


def detect(
    net: nn.Module, dataset, priors: torch.Tensor, options: dict, chosen: dict, on_batch
) -> list[dict[str, np.ndarray]]:
    """Detections of all pictures of ``dataset``, by ``Detect(**chosen)``."""
    samples = TestSet(dataset, TestTransform(options["size"]))
    pin_memory = priors.device.type == "cuda"
    loader = test_loader(samples, options["batch_size"], options["num_workers"], pin_memory)
    progress = Progress("test", len(loader), options["log_iters"])

    def advance(images: int) -> None:
        progress.update(images)
        on_batch(images)

    try:
        return detect_all(
            net, Detect(**chosen), priors, loader, INPUT_MEAN, options["amp"], advance
        )
    except FloatingPointError as error:
        raise UserError(
            f"the network's output is not finite ({error}); its weights have diverged, or their "
            "file is damaged"
        ) from error
    finally:
        progress.close()


def made_by(options: dict, chosen: dict, checkpoint: dict, device: torch.device) -> dict:
    """All that decides what the detections of a call are; kept with them."""
    return {
        "checkpoint": checkpoint,
        "dataset": options["dataset"],
        "priors": options["priors"],
        "class_map": options.get("class_map"),
        "root": options["root"],
        "sets": set_names(options["test_sets"]),
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


def test(given: dict) -> None:
    """Evaluate the checkpoint given["test"], or score its kept detections again."""
    for option in ("resume", "resume_net", "resume_epoch", "basenet"):
        if option in given:
            raise UserError(f"--{option} is for training, --test evaluates; give one of them")
    path = Path(given["test"])
    saved = load_checkpoint(path)
    stored = describe(saved, path, given)
    # Precision and processes were chosen for the training machine, not for this one.
    stored = {k: v for k, v in stored.items() if k not in ("amp", "ngpu", "num_workers")}
    names, boxes = trained_for(saved, path, given)
    if given.get("dataset", stored.get("dataset")) != stored.get("dataset"):
        stored = {key: stored[key] for key in ("version", "size")}  # what its data were is no help
    if "class_map" in given or "classes" in given:
        stored.pop("classes", None)
    if "classes" in given and names:  # before the data are looked for
        check_known(path, names, list(parse_classes(given["classes"])), given)
    if boxes:
        stored["priors"] = boxes
    options = resolve(given, stored)
    device = choose_device(given, options["amp"])
    scoring = scoring_options(given, options)
    dataset = open_dataset(options, "test_sets", options.get("classes"))
    log_dataset(dataset, options, "test_sets")
    options["classes"] = list(dataset.classes)
    checkpoint = {"file": path.name, "sha256": sha256_of(path)}
    directory = test_folder(given, options, path)
    cache = directory / "detections.npz"
    chosen = detection_options(given, options, RECIPES[options["dataset"]].test_threshold)
    origin = made_by(options, chosen, checkpoint, device)
    if given.get("retest"):
        asked = ["checkpoint", "dataset", "class_map", "root", "sets", "classes"]
        if DETECTION_OPTIONS & given.keys():
            asked += ["thresholds", "suppression"]
        same = {key: origin[key] for key in asked}
        detections, origin = load_detections(cache, dataset.ids, same)
    else:
        net = build_net(options["version"], options["size"], len(dataset.classes) + 1)
        if names and ("class_map" in given or names != options["classes"]):
            check_known(path, names, options["classes"], given)
            saved["model"], _ = transfer(saved["model"], names, options["classes"], given)
        load_weights(net, saved["model"], path)
        net.to(device, memory_format=torch.channels_last)
        preset = prior_config(options["version"], options["priors"], options["size"])
        priors = PriorBox(preset).to(device)()
        LOGGER.info(
            "%s at %d, %d classes, on %s (%s); NMS: %s",
            options["version"],
            options["size"],
            len(dataset.classes),
            device,
            options["amp"],
            nms.backend(device.type),
        )
        detections = detect(net, dataset, priors, options, chosen, lambda images: None)
        for name in SCORES:  # of the detections that are replaced
            (directory / name).unlink(missing_ok=True)
        save_detections(cache, dataset.ids, detections, origin)
    score(dataset, detections, origin, directory, scoring)


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
    return run / "ss_predict" / path.stem / set_names(options["test_sets"])


# ---------------------------------------------------------------- training


def train(given: dict) -> None:
    """Train, from scratch or from where a checkpoint left off."""
    check_training_options(given)
    saved, path = find_checkpoint(given)
    stored, start = check_config(saved, path) if saved else {}, saved
    if "resume_net" in given:
        start = load_checkpoint(given["resume_net"])
        if boxes := trained_for(start, Path(given["resume_net"]), given)[1]:
            stored["priors"] = boxes
    options = resolve(given, stored)
    if saved:
        for key in ("batch_size", "seed", "train_sets", "recipe", "norm_decay", "ema"):
            before = stored.get(key, options[key])
            if options[key] != before:
                raise UserError(
                    f"--{key} {options[key]} contradicts the run that is resumed, which has "
                    f"{before}; leave the option out"
                )
    device = choose_device(given, options["amp"])
    check_gpus(options["ngpu"], device)
    scoring_options(given, options)  # for its refusals, while nothing is written
    train_set = open_dataset(options, "train_sets", options.get("classes"))
    options["classes"] = list(train_set.classes)
    data = fingerprint(train_set)
    if saved and saved.get("data") != data:
        raise UserError(
            f"{path} was trained on other pictures ({saved.get('data', {}).get('pictures')}) than "
            f"{options['root']} holds now ({data['pictures']}), so its run cannot go on; start a "
            "new one from its weights with --resume_net"
        )
    test_set = open_test_set(options) if options["test_frequency"] else None
    # Only now that nothing speaks against it: a mistake leaves no folder behind.
    directory = run_folder(given, options, saved, path)
    setup_logging(directory / "train.log")
    log_dataset(train_set, options, "train_sets")
    if test_set is not None:
        log_dataset(test_set, options, "test_sets")
    identity = {"classes": options["classes"], "config": options, "data": data}
    trainer = build_trainer(given, options, identity, start, directory, device, train_set, test_set)
    if saved:
        trainer.restore(saved, path)
    write_json(directory / "config.json", options)
    LOGGER.info(
        "%s at %d, %d classes, %d pictures, %d steps an epoch, %d epochs, on %s (%s); run %s",
        options["version"],
        options["size"],
        len(options["classes"]),
        len(train_set),
        trainer.steps_per_epoch,
        options["max_epoch"],
        device,
        options["amp"],
        directory,
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
        raise UserError(
            f"--basenet {given['basenet']} does not exist; the published file for {version} is "
            f"{BACKBONES[version].weights}, and weights/README.md says where it can be had"
        )
    if given.get("visdom"):
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                "--visdom writes for TensorBoard, which is not installed; pip install tensorboard"
            ) from error


def find_checkpoint(given: dict) -> tuple[dict | None, Path | None]:
    """The checkpoint that --resume means, and its path; (None, None) for a new run."""
    if "resume" not in given:
        return None, None
    path = Path(given["resume"])
    if given["resume"] == "auto":
        folder = Path(given.get("save_folder", DEFAULTS["save_folder"]))
        version, size = (given.get(key, DEFAULTS[key]) for key in ("version", "size"))
        runs = (folder / f"{version}_{size}").glob(given.get("date", "*"))
        found = [run / "last.pth" for run in runs if _resumable(run, given)]
        if not found:
            return None, None
        path = max(found, key=lambda p: p.stat().st_mtime)
    saved = load_checkpoint(path)
    if "optimizer" not in saved:
        raise UserError(f"{path} holds weights only; start a run from them with --resume_net")
    return saved, path


def _resumable(run: Path, given: dict) -> bool:
    """Whether a run is of the data set and root that are asked for, and has a checkpoint."""
    try:
        config = json.loads((run / "config.json").read_text())
        dataset, root = config["dataset"], config["root"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = str(Path(given["root"]).expanduser().absolute()) if "root" in given else root
    same = (dataset, root) == (given.get("dataset", DEFAULTS["dataset"]), wanted)
    return same and (run / "last.pth").is_file()


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
                step = load_checkpoint(last).get("step", 0)
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


def build_trainer(
    given: dict,
    options: dict,
    identity: dict,
    start: dict | None,
    directory: Path,
    device: torch.device,
    train_set,
    test_set,
) -> Trainer:
    """Network, loss, data and optimiser of a run; its weights are the starting ones.

    ``identity`` is what every checkpoint of the run carries beside the state, ``start`` the
    checkpoint of --resume or --resume_net.
    """
    torch.manual_seed(options["seed"])
    net = build_net(options["version"], options["size"], len(options["classes"]) + 1)
    if "resume" not in given or not start:
        options["start"] = starting_weights(net, given, options, start)
    net.to(device, memory_format=torch.channels_last)
    preset = prior_config(options["version"], options["priors"], options["size"])
    priors = PriorBox(preset).to(device)()
    loader = training_loader(
        TrainingSet(train_set, SSDAugmentation(options["size"], INPUT_MEAN), options["seed"]),
        EpochSampler(len(train_set), options["batch_size"], options["seed"]),
        options["num_workers"],
        device.type == "cuda",
    )

    def learning_rate(step: int) -> float:
        return lr_at(
            step,
            steps_per_epoch=len(loader.batch_sampler),
            epochs=options["max_epoch"],
            base_lr=options["lr"],
            schedule=options["schedule"],
            gamma=options["gamma"],
            milestones=LR_MILESTONES,
            warm_epochs=options["warm_epoch"],
            start_lr=WARMUP_START_LR,
        )

    chosen = detection_options({}, options, TRAINING_THRESHOLD)
    scoring = scoring_options(given, options)

    def evaluate(net: nn.Module, name: str, on_batch) -> dict:
        folder = directory / "ss_predict" / name / set_names(options["test_sets"])
        origin = made_by(options, chosen, {"file": f"{directory.name}, {name}"}, device)
        detections = detect(net, test_set, priors, options, chosen, on_batch)
        save_detections(folder / "detections.npz", test_set.ids, detections, origin)
        return score(test_set, detections, origin, folder, scoring)

    trainer = Trainer(
        net,
        MultiBoxLoss(net.num_classes, options["jaccard_threshold"], variance=preset.variance),
        priors,
        loader,
        learning_rate,
        evaluate if test_set is not None else None,
        options,
        identity,
        INPUT_MEAN,
        directory,
        lambda index: str(train_set.image_path(index)),
    )
    trainer.step = given.get("resume_epoch", 0) * trainer.steps_per_epoch
    return trainer


def starting_weights(net: nn.Module, given: dict, options: dict, start: dict | None) -> str:
    """Load what --resume_net (``start``) or --basenet names; says where the weights are from."""
    if "resume_net" in given:
        path, classes = Path(given["resume_net"]), options["classes"]
        state, origin = start["model"], f"all weights from {path} (sha256 {sha256_of(path)})"
        names, boxes = trained_for(start, path, given)
        if "class_map" in given and names is None:
            raise UserError(f"{path} has no names of its classes for --class_map to go by")
        if names and ("class_map" in given or names != classes):
            state, new = transfer(state, names, classes, given)
            origin += f", {len(classes) - len(new)} of {len(classes)} classes by name"
            origin += f"; new: {', '.join(new)}" if new else ""
        if boxes not in (None, options["dataset"]):
            origin += f"; prior boxes of {boxes}, as they were trained with"
        load_weights(net, state, path)
    elif "basenet" in given:
        path = Path(given["basenet"])
        match = load_base(net.base, path, BACKBONES[options["version"]].from_classifier)
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
    arguments = parser(
        versions=BACKBONES,
        sizes=SIZES,
        datasets=RECIPES,
        suppressions=SUPPRESSION,
        backends=BACKENDS,
    )
    given = vars(arguments.parse_args(argv))
    setup_logging()
    # All batches have one shape, so cuDNN's search for the fastest algorithm pays.
    torch.backends.cudnn.benchmark = True
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        test(given) if "test" in given else train(given)
        return 0
    except UserError as error:
        # An error of a loading process arrives with that process's traceback before it.
        sentence = str(error).strip().rpartition("UserError: ")[2]
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        close_logging()


if __name__ == "__main__":
    sys.exit(main())
