"""The forward pass alone, by each route and at large batches, where whole stages would take long.

    python -m benchmarks.forward [--version SSD_HarDNet68 ...] [--batch 1 32] [--amp bf16]
        [--routes plain deployed compiled graph] [--device cuda] [--roofline] [--json OUT]

Routes, precisions and networks with new weights are those of `benchmarks.speed`. A route that fails
is a row with its error, and the others go on; the file is written after every row. "difference" is
that of two pictures' outputs to the plain network's in float32, relative to their norm.

--few_tiles lets the gathered convolutions choose among three tiles, after short trials. --warm K/N
only compiles: the K-th of N shares of the gathered convolutions, for one of those tiles.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from benchmarks.roofline import ceilings, shares, tensor_float
from benchmarks.speed import (
    MADE_UP,
    PRECISIONS,
    WAYS,
    compilations,
    made_up,
    new_weights,
    open_network,
    routes_of,
)
from benchmarks.timing import machine, medians, write
from data.image import read_image
from models import BACKBONES
from tools.traffic import profile

FEW_TILES = ((64, 16), (128, 32), (128, 64))
"""Of every number of outputs one at least is tried."""


def choose_tiles(tiles) -> None:
    """Let the gathered convolutions try these only, and briefly."""
    import triton
    from triton.testing import do_bench

    from inference import gathered_conv

    gathered_conv.TILES = tiles
    triton.autotune = partial(
        triton.autotune,
        do_bench=lambda call, quantiles: do_bench(call, warmup=5, rep=20, quantiles=quantiles),
    )


def compile_a_share(number: int, of: int) -> None:
    """Run a share of the gathered convolutions only, with one tile; others give zeros."""
    from inference import gathered_conv

    real, seen, tiles = gathered_conv.gathered_conv2d, {}, len(FEW_TILES)
    choose_tiles((FEW_TILES[number % tiles],))

    def some(parts, weight, out=None):
        key = (weight.widths, len(weight.bias), weight.kernel, weight.activation, parts[0].shape)
        turn = seen.setdefault(key, len(seen))
        if parts[0].device.type != "meta" and turn % max(of // tiles, 1) == number // tiles:
            return real(parts, weight, out)
        batch, _, height, width = parts[0].shape
        return (
            parts[0]
            .new_zeros(batch, len(weight.bias), height, width)
            .to(memory_format=torch.channels_last)
        )

    gathered_conv.gathered_conv2d = some


def measure(network, name, amp, batch, images, expected, rounds, ceiling) -> dict:
    """A row of a route; what fails is its error."""
    device = network.predictor.device
    row = {"network": network.name, "route": name, "precision": PRECISIONS[amp], "batch": batch}
    start = time.perf_counter()
    try:
        with compilations(device) if name == "compiled" else nullcontext():
            (route,) = routes_of(network, [name], [amp], [], torch.get_num_threads())
            pictures = [images[i % len(images)] for i in range(batch)]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with tensor_float(amp == "tf32"):
                inputs = route.predictor.preprocess(pictures)
                found = route.predictor.forward(inputs)
                row["difference"] = {
                    key: float((found[key][:2].float() - x[:batch]).norm() / x[:batch].norm())
                    for key, x in expected.items()
                }
                found = None
                row["first"] = time.perf_counter() - start
                call = {"forward": lambda: route.predictor.forward(inputs)}
                row["seconds"] = medians(call, rounds, device, warm_up=3)["forward"]
            row["pictures_per_second"] = batch / row["seconds"]
            if device.type == "cuda":
                row["bytes"] = torch.cuda.max_memory_allocated()
        if ceiling:
            counted = profile(route.profiled, network.predictor.info.size)
            row["shares"] = shares(counted, batch, row["precision"], row["seconds"], ceiling)
    except Exception as error:  # the other routes are measured all the same
        row["error"] = f"{type(error).__name__}: {str(error).strip()[:400]}"
    return row


def plain_outputs(network, images) -> dict:
    """Of two pictures, in float32; no search for fast algorithms."""
    (plain,) = routes_of(network, ["plain"], ["off"], [], torch.get_num_threads())
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with tensor_float(False):
            return plain.predictor.forward(plain.predictor.preprocess(images[:2]))
    finally:
        torch.backends.cudnn.benchmark = before


def show(row: dict) -> None:
    line = f"{row['network']:14} {row['route']:12} {row['precision']:4} batch {row['batch']:3}"
    if "seconds" in row:
        line += f" {row['seconds'] * 1e3:9.3f} ms {row['pictures_per_second']:9.1f} pictures/s"
        line += f"  first {row['first']:.1f} s  differs by {max(row['difference'].values()):.1e}"
    for what, share in row.get("shares", {}).items():
        line += f"  {share:.0%} of the {what}"
    print(line + (f"  {row['error']}" if "error" in row else ""), flush=True)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--version", nargs="+", choices=BACKBONES, default=["SSD_HarDNet68"])
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--batch", type=int, nargs="+", default=[1])
    p.add_argument("--amp", nargs="+", choices=PRECISIONS, default=["bf16"])
    p.add_argument("--routes", nargs="+", choices=["plain", *WAYS], default=["plain", "deployed"])
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--roofline", action="store_true", help="shares of what the device can do")
    p.add_argument("--few_tiles", action="store_true")
    p.add_argument("--warm", metavar="K/N")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if args.warm:
        compile_a_share(*map(int, args.warm.split("/")))
    elif args.few_tiles:
        choose_tiles(FEW_TILES)
    ceiling, rows = None, []
    print(machine(device))
    if args.roofline:
        try:
            ceiling = ceilings(device)
            print(ceiling, flush=True)
        except Exception as error:
            print(f"no ceilings: {type(error).__name__}: {error}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        files = made_up(Path(folder), *MADE_UP)
        images = [read_image(file) for file in files]
        for version in args.version:
            path = new_weights(version, args.size, Path(folder), files)
            network = open_network(path, str(device))
            expected = plain_outputs(network, images)
            for batch in args.batch:
                for amp in args.amp:
                    for name in args.routes:
                        if (name, device.type) == ("plain", "cpu") and amp != "off":
                            continue  # as in benchmarks.speed
                        row = measure(
                            network, name, amp, batch, images, expected, args.rounds, ceiling
                        )
                        show(row)
                        rows.append(row)
                        write(args.json, device, size=args.size, ceilings=ceiling, rows=rows)
                        gc.collect()
                        if device.type == "cuda":
                            torch.cuda.empty_cache()
            del network
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
