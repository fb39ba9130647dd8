"""Values of the options of a call, and what contradicts what."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from data import (
    DATASETS,
    check_layout,
    default_root,
    default_sets,
    find_layout,
    layouts,
    list_sets,
    split_options,
)
from data.classes import parse_classes
from data.image_sets import DEFAULT_SET, parse_image_sets, set_word, sets_name
from data.split import SPLIT_SETS
from engine.declare import check_value, flag_of
from engine.distributed import World
from engine.options import OPTIONS, RECIPES, Call, Options
from engine.priors import FIT, read_priors
from models import prior_config
from models.pretrained import published_bases
from utils.arguments import cores
from utils.device import choose_device
from utils.errors import UserError
from utils.logger import LOGGER


def resolve(given: Mapping[str, object], stored: Mapping[str, object] | None = None) -> Options:
    """Return all options of a call.

    An option takes the value that is ``given``, else the ``stored`` one of a checkpoint, else the
    recipe's, the data set's or the option's default.

    Args:
        given: values of some options; classes and image sets may be texts of the command line.
        stored: values of some options, such as a configuration, or what the tensors of a published
            file tell.

    Raises:
        UserError: a given value contradicts what the checkpoint is made for, breaks the option's
            rule, or is not for the data set; the network does not exist at the size.
    """
    given, stored = dict(given), dict(stored or {})
    if isinstance(given.get("classes"), str):
        given["classes"] = list(parse_classes(given["classes"]))
    for key in ("version", "size", "dataset", "classes"):
        if key in given and stored.get(key) and given[key] != stored[key]:
            raise UserError(f"--{key} {given[key]} contradicts the checkpoint, which is made for "
                            f"{stored[key]}; leave the option out")
    values = {**stored, **given}
    values["dataset"] = dataset = asked_dataset(values, stored.get("dataset"))
    row, rooted = DATASETS[dataset], "root" in values
    for key in ("crowds", "val_share", "split_by"):
        if key in given:
            _check_taken(key, dataset)
    values = {
        "priors": row.priors, "root": str(default_root(dataset)), "max_epoch": row.epochs,
        "weight_decay": row.weight_decay, "num_workers": min(Options.num_workers, cores()),
        **RECIPES[check_value(OPTIONS["recipe"], values.get("recipe", Options.recipe))], **values,
    }
    values["root"] = root = absolute(values["root"])
    if os.path.isfile(root):
        if zipfile.is_zipfile(root):
            raise UserError(f"--root {root} is a zip file; unpack it and give the folder")
        raise UserError(f"--root {root} is a file; give its folder, {Path(root).parent}")
    values["priors"] = read_priors(values["priors"], values.get("size", Options.size))
    if "priors" in given and stored.get("priors", values["priors"]) != values["priors"]:
        raise UserError(f"--priors {given['priors']} contradicts the checkpoint, which is trained "
                        f"with {stored['priors']}; leave the option out, or take its base network "
                        "alone (--basenet)")
    found = layouts(Path(root)) if stored.get("dataset") and "dataset" not in given else []
    if found and dataset not in dict(found):
        raise UserError(f"{root} holds {found[0][1]}, but the checkpoint is of a run on -d "
                        f"{dataset}, so it cannot be read; give the --root of that run's data, or "
                        "start a new run from its weights with --resume_net")
    if "dataset" in given or not rooted:  # else what the root holds has been looked at
        check_layout(dataset, root)
    options = Options(**{**values, **_image_sets(values, dataset, root)})
    _check_size(options)
    return options


def _image_sets(values: Mapping[str, object], dataset: str, root: str) -> dict[str, object]:
    """Return the image sets that ``values`` name, else those of the data by default."""
    sets = {key: values.get(key) for key in ("train_sets", "test_sets")}
    absent = [key for key, each in sets.items() if each in (None, (), [])]
    texts = any(isinstance(each, str) for each in sets.values())
    existing = list_sets(dataset, root) if absent or texts else []
    if absent:
        defaults = default_sets(dataset, root)
        declared = [s for s in existing if s.name not in SPLIT_SETS]
        unclear = {set_word(s.name) for s in declared} - {"train", "trainval", DEFAULT_SET}
        divided = defaults[0][0].name in SPLIT_SETS
        if len(absent) == len(sets) and len(declared) > 1 and unclear and divided:
            LOGGER.warning("%s has the image sets %s; their names do not say which to train and "
                           "which to test on, so all images are divided: choose with --train_sets "
                           "and --test_sets", root, ", ".join(map(str, declared)))
        sets |= {key: each for key, each in zip(sets, defaults, strict=True) if key in absent}
    return {key: parse_image_sets(each, existing) if isinstance(each, str) else each
            for key, each in sets.items()}


def asked_dataset(given: Mapping[str, object], stored: object = None) -> str:
    """Return the data set of a call: that of -d, else ``stored``, else what --root holds.

    Raises:
        UserError: no such data set, or the root holds no layout or several.
    """
    dataset = given.get("dataset") or stored
    if dataset is None and "root" in given and os.path.isdir(root := absolute(given["root"])):
        dataset, _ = find_layout(root)
    return check_value(OPTIONS["dataset"], dataset or Options.dataset)


def dataset_of_test(given: Mapping[str, object], trained: str) -> str:
    """Return the data set of a test of a detector that was ``trained`` on one."""
    root = given.get("root")
    if "dataset" in given or root is None or not os.path.isdir(absolute(root)):
        return given.get("dataset", trained)
    return find_layout(absolute(root), trained)[0]


def check_parts(options: Options) -> None:
    """Refuse to train or to test on one part of a division, and on other image sets beside it.

    Raises:
        UserError: the training set may then hold test images.
    """
    train, test = (any(each.name in SPLIT_SETS for each in sets)
                   for sets in (options.train_sets, options.test_sets))
    existing = [*map(str, list_sets(options.dataset, options.root)), *SPLIT_SETS]
    asked = map(str, (*options.train_sets, *options.test_sets)) if train != test else ()
    if unknown := [name for name in asked if name not in existing]:
        raise UserError(f'no image set "{unknown[0]}" in {options.root}; existing image sets: '
                        f"{', '.join(existing)} (--train_sets, --test_sets)")
    if train != test and options.test_frequency:
        raise UserError(f"--train_sets {sets_name(options.train_sets)} may hold images of "
                        f"--test_sets {sets_name(options.test_sets)}: {' and '.join(SPLIT_SETS)} "
                        f"divide all images of {options.root}; give both options or neither")


def _check_size(options: Options) -> None:
    try:
        fits = options.priors == FIT
        prior_config(options.version, Options.priors if fits else options.priors, options.size)
    except ValueError as error:
        raise UserError(f"{error} (--size, --priors)") from error


def absolute(root: object) -> str:
    """Return a --root as options and config.json keep it."""
    return str(Path(root).expanduser().absolute())


def check_training(call: Call, given: Mapping[str, object]) -> None:
    """Refuse a training call that contradicts itself, before anything is read or written.

    Raises:
        UserError: see the messages.
    """
    if call.class_map and not call.resume_net:
        raise UserError("--class_map goes with --resume_net FILE or --test FILE")
    sources = ["resume"] if call.resume not in (None, "auto") else []
    sources += ["resume_net"] if call.resume_net else []
    base = call.basenet not in ("auto", "none")
    sources += ["basenet"] if base else []
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} and --{sources[1]} both say where weights come from; give "
                        "one")
    if call.resume_epoch is not None and not call.resume_net:
        raise UserError("--resume_epoch goes with --resume_net FILE; to continue a run of this "
                        "program give --resume instead")
    if call.resume_net and not Path(call.resume_net).is_file():
        raise UserError(f"--resume_net {call.resume_net} does not exist; give a checkpoint")
    if base and not Path(call.basenet).is_file():
        version = given.get("version", Options.version)
        files = " or ".join(row.file for row in published_bases(version))
        raise UserError(f"--basenet {call.basenet} does not exist; the published file for "
                        f"{version} is {files or 'none'}, and weights/README.md says where to get "
                        "files")
    suits = RECIPES[given.get("recipe", Options.recipe)].get("optimizer", Options.optimizer)
    if call.resume in (None, "auto") and given.get("optimizer", suits) != suits:
        if not {"lr", "weight_decay"} <= given.keys():
            raise UserError(f"--optimizer {given['optimizer']} does not suit the learning rate and "
                            "the weight decay of the recipe; give --lr and --weight_decay, too")
    if given.get("send_images_to_visdom") and not (given.get("visdom") or given.get("log")):
        raise UserError("--send_images_to_visdom goes with --log NAMES or --visdom")


def check_resumed(given: Mapping[str, object], stored: Options) -> None:
    """Refuse a given option that a resumed run cannot change.

    Raises:
        UserError: the option differs from the run's.
    """
    for key, value in given.items():
        before = getattr(stored, key)
        if key in ("train_sets", "test_sets") and isinstance(value, str):
            value = tuple(parse_image_sets(value, before))
        if key == "priors" and value != FIT:
            value = read_priors(value, stored.size)
        if OPTIONS[key].metadata["fixed"] and value not in (before, FIT):
            raise UserError(f"{flag_of(OPTIONS[key])} {given[key]} contradicts the run that is "
                            f"resumed, which has {before}; leave the option out")


def dataset_options(options: Options, call: Call, testing: bool) -> dict[str, object]:
    """Return the options of the data set's reader beyond root, image sets and classes.

    Raises:
        UserError: --eval-backend is given for a data set that does not take it.
    """
    if call.eval_backend:
        _check_taken("eval_backend", options.dataset)
    chosen: dict[str, object] = {"crowds": options.crowds or (testing and not options.overfit)}
    if call.eval_backend:
        chosen["eval_backend"] = call.eval_backend
    taken = DATASETS[options.dataset].options
    chosen = {key: value for key, value in chosen.items() if key in taken}
    return chosen | split_options(options.dataset, vars(options))


def _check_taken(name: str, dataset: str) -> None:
    if name not in DATASETS[dataset].options:
        takers = ", ".join(key for key, row in DATASETS.items() if name in row.options)
        flag = flag_of(OPTIONS[name])
        raise UserError(f"{flag} goes with -d {takers}; leave it out with -d {dataset}")


def use_device(call: Call, options: Options, world: World) -> torch.device:
    """Return the device of this process, and make it PyTorch's current one.

    Raises:
        UserError: the device is not there, or it does not run --amp.
    """
    rank = world.local_rank if world.size > 1 else None
    device = choose_device(call.device_name(), options.amp, rank)
    if device.type == "cuda":
        # Streams, events and pinned memory are those of the current device.
        torch.cuda.set_device(device.index or 0)
    return device
