"""Where training starts: new weights, those of a base network, or those of a whole detector."""

import dataclasses
from functools import partial
from pathlib import Path

from torch import nn

from data import DATASETS
from engine.options import Call, Options
from engine.run import Run
from models.base_weights import load_base
from models.pretrained import WEIGHTS, published_bases
from models.transfer import parse_class_map, transfer_classes
from utils.checkpoint import load_weights, read_hashed
from utils.logger import LOGGER


def starting_weights(net: nn.Module, run: Run, call: Call) -> Run:
    """Load what --resume_net or --basenet names; return the run that records it.

    Raises:
        UserError: the file does not fit the network.
    """
    if call.resume_net:
        origin = _from_detector(net, run, call)
    elif path := _base_file(call, run.options):
        load = partial(load_base, net.base, version=run.options.version)
        match, digest = read_hashed(path, load)
        origin = f"{len(match.tensors)} of {match.total} tensors of the base network from {path}, "
        origin += f"{match.source} (sha256 {digest})"
    else:
        origin = "new weights: the base network is trained from scratch"
    if not call.resume_net and (run.options.freeze == "heads" or run.options.freeze and not path):
        LOGGER.warning("--freeze %s keeps new, random weights; give trained ones with "
                       "--resume_net FILE, or with --basenet FILE for the base network",
                       run.options.freeze)
    LOGGER.info("%s", origin)
    return dataclasses.replace(run, options=dataclasses.replace(run.options, start=origin))


def _base_file(call: Call, options: Options) -> Path | None:
    """Return the file of --basenet; None for new weights."""
    if call.basenet == "none":
        return None
    if call.basenet != "auto":
        return Path(call.basenet)
    rows = published_bases(options.version)
    files = [WEIGHTS / row.file for row in rows]
    found = next(filter(Path.is_file, files), None)
    if found is None and rows:
        recipe = "" if options.recipe == "modern" else "; --recipe modern suits new weights better"
        LOGGER.warning(
            "%s is missing: training starts from new weights, and needs many more epochs for less "
            "AP. Get the file by `python -m tools.weights download %s`%s (--basenet)",
            files[0], rows[0].name, recipe,
        )  # fmt: skip
    return found


def _from_detector(net: nn.Module, run: Run, call: Call) -> str:
    options, info, path = run.options, run.start_info, Path(call.resume_net)
    state, origin = run.start["model"], f"all weights from {path} (sha256 {run.start_digest})"
    class_map = parse_class_map(call.class_map) if call.class_map else None
    if class_map is not None or info.classes != options.classes:
        state, new = transfer_classes(state, info.classes, options.classes, class_map, options.seed)
        kept = len(options.classes) - len(new)
        origin += f", {kept} of {len(options.classes)} classes by name"
        origin += f"; new: {', '.join(new)}" if new else ""
        if new and options.freeze == "heads":
            LOGGER.warning("--freeze heads keeps new, random weights of %s; leave it out, or name "
                           "the classes that they correspond to with --class_map", ", ".join(new))
    if info.priors != DATASETS[options.dataset].priors:
        origin += f"; prior boxes of {info.priors}, as they were trained with"
    load_weights(net, state, path)
    return origin
