"""Parameters, MACs and memory traffic of a detector's forward pass on one image.

    python -m tools.traffic [-v VERSION ...] [-s SIZE ...] [--classes N] [--layers] [--json OUT]

Nothing is computed: shapes are propagated on PyTorch's meta device. What is counted, and the
figures of every network, are in docs/traffic.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.errors import UserError, command
from utils.files import check_writable, write_json

BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of an element."""


@dataclass(frozen=True)
class Layer:
    """A convolution, a concatenation, or another module with parameters of its own."""

    name: str
    """Dotted path of the module that ran it; empty for the network itself."""
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    """Shapes, with the batch's 1 in front."""
    output: tuple[int, ...]
    """Shape; of a module that returns several tensors that of the first, of one without ()."""
    parameters: int = 0
    macs: int = 0
    """Multiply-accumulates of a convolution; its bias is not counted."""
    cio: int = 0
    """Elements of a convolution's input and of its output."""
    concat: int = 0
    """Elements that a concatenation, or a copy in its stead, reads and writes."""


@dataclass(frozen=True)
class Profile:
    """A network's layers in the order in which they ran, and what they add up to."""

    layers: tuple[Layer, ...]
    parameters: int
    sums: int
    """Elements read and written by additions of two tensors, which are no part of the traffic."""

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def cio(self) -> int:
        """Convolutional input/output (arXiv 1909.00948), in elements."""
        return sum(layer.cio for layer in self.layers)

    @property
    def concat(self) -> int:
        """Elements read and written by concatenations."""
        return sum(layer.concat for layer in self.layers)

    @property
    def traffic(self) -> int:
        """CIO and concatenations, in elements."""
        return self.cio + self.concat


def profile(net: nn.Module, size: int) -> Profile:
    """What a forward pass of ``net`` on one image [1, 3, size, size] computes and moves.

    The network may lie on any device; a copy without data runs, in evaluation mode. Counted are
    convolutions (transposed ones, too), ``torch.cat`` of two or more tensors, ``copy_`` and
    additions, whichever module or function calls them; other matrix products are not.
    """
    tensors = [*net.parameters(), *net.buffers()]
    shadow = copy.deepcopy(net, memo={id(t): t.to("meta") for t in tensors}).eval()
    recorder = _Recorder(shadow)
    for name, module in shadow.named_modules():
        module.register_forward_pre_hook(recorder.entering(name))
        module.register_forward_hook(recorder.leave)
    with torch.no_grad(), recorder:
        shadow(torch.empty(1, 3, size, size, device="meta"))
    return Profile(tuple(recorder.layers), _numel(net.parameters()), recorder.sums)


class _Recorder(TorchDispatchMode):
    """Sees every operator below autograd, and by its hooks the modules that call them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.sums = 0
        self.path = [""]
        self.unseen = {id(p): p.numel() for p in net.parameters()}

    def entering(self, name: str):
        def enter(module: nn.Module, inputs) -> None:
            self.path.append(name)

        return enter

    def leave(self, module: nn.Module, inputs, output) -> None:
        name = self.path.pop()
        own = self._parameters(module.parameters(recurse=False))
        if own:
            kind, shapes = type(module).__name__, tuple(tuple(x.shape) for x in _tensors(inputs))
            first = next((tuple(x.shape) for x in _tensors(output)), ())
            self.layers.append(Layer(name, kind, shapes, first, own))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, stride, _, dilation, transposed, _, groups = args
            # Every element of the output (of the input, where transposed) meets one filter.
            met = x if transposed else output
            self._add(
                _convolution(weight, stride, dilation, groups, transposed),
                [x],
                output,
                parameters=self._parameters((weight, bias)),
                macs=met.numel() * weight[0].numel(),
                cio=_numel((x, output)),
            )
        elif func is torch.ops.aten.cat.default and len(args[0]) > 1:
            self._add("concat", args[0], output, concat=_numel((*args[0], output)))
        elif func is torch.ops.aten.copy_.default:
            self._add("copy", [args[1]], output, concat=_numel((args[1], output)))
        elif func in _ADDITIONS and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self.sums += _numel((*args[:2], output))
        return output

    def _parameters(self, tensors: Iterable[Tensor | None]) -> int:
        """How many elements of parameters are met here for the first time."""
        return sum(self.unseen.pop(id(t), 0) for t in tensors)

    def _add(self, kind: str, inputs: Sequence[Tensor], output: Tensor, **counts: int) -> None:
        shapes = tuple(tuple(x.shape) for x in inputs)
        self.layers.append(Layer(self.path[-1], kind, shapes, tuple(output.shape), **counts))


def _tensors(value) -> Iterator[Tensor]:
    """The tensors of a module's inputs or outputs, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def _convolution(weight: Tensor, stride, dilation, groups: int, transposed: bool) -> str:
    """For instance "conv 3x3 /2", "conv 3x3 dilation 4", "conv 3x3 groups 64"."""
    words = ["transposed conv" if transposed else "conv", "x".join(map(str, weight.shape[2:]))]
    words += [f"/{max(stride)}"] * (max(stride) > 1)
    words += [f"dilation {max(dilation)}"] * (max(dilation) > 1)
    words += [f"groups {groups}"] * (groups > 1)
    return " ".join(words)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns; numbers right, with thousands' commas."""
    cells = [[x if isinstance(x, str) else f"{x:,}" for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [set(column) <= set("0123456789,") for column in map("".join, zip(*cells, strict=True))]

    def line(row: Sequence[str]) -> str:
        aligned = zip(row, widths, right, strict=True)
        return f"| {' | '.join(x.rjust(w) if r else x.ljust(w) for x, w, r in aligned)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(header), f"|{rule}|", *map(line, cells)])


def layer_table(result: Profile) -> str:
    """A line a layer: shapes without the batch; a concatenation's input as 14+24x128x128."""
    header = ("layer", "kind", "input", "output", "parameters", "MACs", "CIO", "concatenation")
    return table(
        header,
        [
            (x.name, x.kind, _input(x), "x".join(map(str, x.output[1:])))
            + (x.parameters, x.macs, x.cio, x.concat)
            for x in result.layers
        ],
    )


def _input(layer: Layer) -> str:
    if layer.kind != "concat":
        return "x".join(str(n) for n in layer.inputs[0][1:]) if layer.inputs else ""
    sides = list(zip(zip(*layer.inputs, strict=True), layer.output, strict=True))[1:]
    # Only on the axis of a concatenation do the inputs' sizes add up to the output's.
    return "x".join("+".join(map(str, n)) if sum(n) == out else str(n[0]) for n, out in sides)


def summary_table(results: Iterable[tuple[str, int, Profile]]) -> str:
    """A line a network and size; the last columns are the total traffic in 10^6 bytes."""
    header = ("network", "size", "parameters", "MACs", "CIO", "concatenation", "total")
    return table(
        (*header, *(f"MB {name}" for name in BYTES)),
        [
            (version, size, p.parameters, p.macs, p.cio, p.concat, p.traffic)
            + tuple(round(p.traffic * n / 1e6) for n in BYTES.values())
            for version, size, p in results
        ],
    )


def report(version: str, size: int, num_classes: int, result: Profile) -> dict:
    """A profile as JSON has it: totals, bytes, and every layer."""
    totals = {name: getattr(result, name) for name in _TOTALS}
    return {
        "version": version,
        "size": size,
        "num_classes": num_classes,
        **totals,
        "traffic_bytes": {name: result.traffic * n for name, n in BYTES.items()},
        "parameter_bytes": {name: result.parameters * n for name, n in BYTES.items()},
        "layers": [asdict(layer) for layer in result.layers],
    }


_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_TOTALS = ("parameters", "macs", "cio", "concat", "sums", "traffic")


@command
def main(argv: Sequence[str] | None = None) -> int:
    # Modules of utils stand below models and do not know them; this command does.
    from models import BACKBONES, build_net

    p = argparse.ArgumentParser(prog="python -m tools.traffic", description=__doc__.splitlines()[0])
    p.add_argument(
        "-v", "--version", nargs="+", choices=BACKBONES, metavar="VERSION",
        help=f"networks (all that have the size): {', '.join(BACKBONES)}",
    )  # fmt: skip
    p.add_argument("-s", "--size", type=int, nargs="+", help="sides of the input (all there are)")
    p.add_argument(
        "--classes", type=int, default=81, help="number, with the background (%(default)s: COCO)"
    )
    p.add_argument("--layers", action="store_true", help="a table of the layers, too")
    p.add_argument("--json", metavar="OUT", help="write totals and layers to this file")
    args = p.parse_args(argv)
    results = []
    existing = {size for row in BACKBONES.values() for size in row.sizes}
    if args.json:
        check_writable(args.json)
    for version in args.version or BACKBONES:
        sizes = BACKBONES[version].sizes
        for size in args.size or sizes:
            if args.version is None and size in existing and size not in sizes:
                continue
            try:
                with torch.device("meta"):
                    net = build_net(version, size, args.classes)
            except ValueError as error:
                raise UserError(str(error)) from error
            results.append((version, size, profile(net, size)))
    if args.json:
        write_json(args.json, [report(v, s, args.classes, r) for v, s, r in results])
    if args.layers:
        for version, size, result in results:
            print(f"{version} at {size}\n\n{layer_table(result)}\n")
    print(summary_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
