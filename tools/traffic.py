"""Parameters, MACs and memory traffic of a detector's forward pass on one image.

    python -m tools.traffic [-v VERSION ...] [-s SIZE ...] [--num_classes N] [--layers] [--json OUT]

Nothing is computed: shapes are propagated on PyTorch's meta device. docs/traffic.md says what is
counted, and has the figures of every network.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import BACKBONES, build_net
from models.base import on_meta
from utils.arguments import Parser, count
from utils.errors import UserError, command
from utils.files import check_writable, write_json

BYTES = {"fp32": 4, "bf16": 2}  # bytes of an element
ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Layer:
    """A convolution, a concatenation, or another module with parameters of its own."""

    name: str  # dotted path of the module that ran it; "" for the network itself
    kind: str
    inputs: tuple[tuple[int, ...], ...]  # shapes, with the batch dimension of 1
    output: tuple[int, ...]  # shape of the first output tensor; () for a module that returns none
    parameters: int = 0
    macs: int = 0  # multiply-accumulates of a convolution, without its bias
    cio: int = 0
    """Convolutional input/output (arXiv 1909.00948): elements of input plus those of output."""
    concat: int = 0  # elements that a concatenation or a copy reads and writes


@dataclass(frozen=True)
class Profile:
    """The layers of a network in the order in which they ran, and their totals."""

    layers: tuple[Layer, ...]
    parameters: int
    sums: int
    """Elements that additions of two tensors read and write. They are not part of the traffic."""

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def cio(self) -> int:
        return sum(layer.cio for layer in self.layers)

    @property
    def concat(self) -> int:
        return sum(layer.concat for layer in self.layers)

    @property
    def traffic(self) -> int:
        """CIO plus concatenations, in elements."""
        return self.cio + self.concat


def profile(net: nn.Module, size: int) -> Profile:
    """Count what a forward pass of ``net`` on one image [1, 3, size, size] computes and moves.

    A copy without data runs on the meta device in evaluation mode. Convolutions (also transposed),
    ``torch.cat`` of two or more tensors, ``copy_`` and additions are counted, whichever module or
    function calls them. Other matrix products are not counted.
    """
    shadow = on_meta(net).eval()
    recorder = _Recorder(shadow)
    for name, module in shadow.named_modules():
        module.register_forward_pre_hook(partial(recorder.enter, name))
        module.register_forward_hook(recorder.leave)
    with torch.no_grad(), recorder:
        shadow(torch.empty(1, 3, size, size, device="meta"))
    return Profile(tuple(recorder.layers), _numel(net.parameters()), recorder.sums)


class _Recorder(TorchDispatchMode):
    """See every operator below autograd, and by hooks the modules that call them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.sums = 0
        self.path = [""]
        self.unseen = {id(p): p.numel() for p in net.parameters()}

    def enter(self, name: str, module: nn.Module, inputs: tuple) -> None:
        self.path.append(name)

    def leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        name = self.path.pop()
        own = self._parameters(module.parameters(recurse=False))
        if own:
            kind, first = type(module).__name__, (*_shapes(output), ())[0]
            self.layers.append(Layer(name, kind, _shapes(inputs), first, own))

    def __torch_dispatch__(self, func: OpOverload, types: Sequence[type], args: tuple = (),
                           kwargs: dict | None = None) -> object:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self._add_convolution(output, *args)
        elif func is torch.ops.aten.cat.default and len(args[0]) > 1:
            self._add("concat", args[0], output, concat=_numel((*args[0], output)))
        elif func is torch.ops.aten.copy_.default:
            self._add("copy", [args[1]], output, concat=_numel((args[1], output)))
        elif func in ADDITIONS and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self.sums += _numel((*args[:2], output))
        return output

    def _add_convolution(self, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None,
                         stride: list[int], padding: list[int], dilation: list[int],
                         transposed: bool, output_padding: list[int], groups: int) -> None:
        words = ["transposed conv" if transposed else "conv", "x".join(map(str, weight.shape[2:]))]
        words += [f"/{max(stride)}"] * (max(stride) > 1)
        words += [f"dilation {max(dilation)}"] * (max(dilation) > 1)
        words += [f"groups {groups}"] * (groups > 1)
        # Every element of the output (of the input if transposed) meets one filter.
        macs = (x if transposed else output).numel() * weight[0].numel()
        parameters = self._parameters((weight, bias))
        cio = _numel((x, output))
        self._add(" ".join(words), [x], output, parameters=parameters, macs=macs, cio=cio)

    def _parameters(self, tensors: Iterable[Tensor | None]) -> int:
        """Return the number of elements of parameters that are met for the first time."""
        return sum(self.unseen.pop(id(t), 0) for t in tensors)

    def _add(self, kind: str, inputs: Sequence[Tensor], output: Tensor, **counts: int) -> None:
        shape = tuple(output.shape)
        self.layers.append(Layer(self.path[-1], kind, _shapes(inputs), shape, **counts))


def _shapes(value: object) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors in nested lists, tuples and mappings."""
    return tuple(tuple(x.shape) for x in tree_leaves(value) if isinstance(x, Tensor))


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with aligned columns; numbers are right-aligned, with commas."""
    cells = [[x if isinstance(x, str) else f"{x:,}" for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [set(column) <= set("0123456789,") for column in map("".join, zip(*cells, strict=True))]

    def line(row: Sequence[str]) -> str:
        aligned = zip(row, widths, right, strict=True)
        return f"| {' | '.join(x.rjust(w) if r else x.ljust(w) for x, w, r in aligned)} |"

    rule = "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True))
    return "\n".join([line(header), f"|{rule}|", *map(line, cells)])


def layer_table(result: Profile) -> str:
    """Return a table of layers. Shapes are without batch; a concatenation reads 14+24x128x128."""
    header = ("layer", "kind", "input", "output", "parameters", "MACs", "CIO", "concatenation")
    return table(header, [(x.name, x.kind, _input(x), "x".join(map(str, x.output[1:])))
                          + (x.parameters, x.macs, x.cio, x.concat) for x in result.layers])


def _input(layer: Layer) -> str:
    if layer.kind != "concat":
        return "x".join(str(n) for n in layer.inputs[0][1:]) if layer.inputs else ""
    sides = list(zip(zip(*layer.inputs, strict=True), layer.output, strict=True))[1:]
    # Only on the axis of a concatenation, the sizes of the inputs add up to that of the output.
    return "x".join("+".join(map(str, n)) if sum(n) == out else str(n[0]) for n, out in sides)


def summary_table(results: Iterable[tuple[str, int, Profile]]) -> str:
    """Return a table of networks; the last columns are the total traffic in 10^6 bytes."""
    header = ("network", "size", "parameters", "MACs", "CIO", "concatenation", "total")
    return table((*header, *(f"MB {name}" for name in BYTES)), [
        (version, size, p.parameters, p.macs, p.cio, p.concat, p.traffic)
        + tuple(round(p.traffic * n / 1e6) for n in BYTES.values())
        for version, size, p in results
    ])


def report(version: str, size: int, num_classes: int, result: Profile) -> dict:
    """Return a profile as JSON values: totals, bytes, and every layer."""
    totals = ("parameters", "macs", "cio", "concat", "sums", "traffic")
    return {"version": version, "size": size, "num_classes": num_classes,
            **{name: getattr(result, name) for name in totals},
            "traffic_bytes": {name: result.traffic * n for name, n in BYTES.items()},
            "parameter_bytes": {name: result.parameters * n for name, n in BYTES.items()},
            "layers": [asdict(layer) for layer in result.layers]}


def profiles(versions: Sequence[str] | None, sizes: Sequence[int] | None,
             num_classes: int) -> list[tuple[str, int, Profile]]:
    """Return (version, size, profile) of networks.

    ``versions`` None: all that have one of the sizes. ``sizes`` None: all of a network.
    Raises UserError: a network does not exist at a size, or the number of classes is too small.
    """
    existing = {size for row in BACKBONES.values() for size in row.sizes}
    results = []
    for version in versions or BACKBONES:
        own = BACKBONES[version].sizes
        for size in sizes or own:
            if versions is None and size in existing and size not in own:
                continue
            try:
                with torch.device("meta"):
                    net = build_net(version, size, num_classes)
            except ValueError as error:
                raise UserError(str(error)) from error
            results.append((version, size, profile(net, size)))
    return results


@command
def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m tools.traffic", description=__doc__.splitlines()[0])
    p.add_argument("-v", "--version", nargs="+", choices=BACKBONES, metavar="VERSION",
                   help=f"networks (default: all that have the size): {', '.join(BACKBONES)}")
    p.add_argument("-s", "--size", type=int, nargs="+", help="sides of the input (default: all)")
    p.add_argument("--num_classes", type=count, default=81, metavar="N",
                   help="number of classes, with the background (default: 81, COCO)")
    p.add_argument("--layers", action="store_true", help="also print a table of the layers")
    p.add_argument("--json", metavar="OUT", help="write totals and layers to this file")
    args = p.parse_args(argv)
    if args.json:
        check_writable(args.json)
    results = profiles(args.version, args.size, args.num_classes)
    if args.json:
        write_json(args.json, [report(v, s, args.num_classes, r) for v, s, r in results])
    if args.layers:
        for version, size, result in results:
            print(f"{version} at {size}\n\n{layer_table(result)}\n")
    print(summary_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
