"""Everything that waits for a GPU, part by part; `benchmarks/gpu.sh` calls it and says how.

Every call has its own limit of time, and its failure stops nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEVICE = os.environ.get("DEVICE", "cuda")
QUICK = os.environ.get("QUICK") == "1"
BCCD = os.environ.get("BCCD")
EPOCHS = os.environ.get("EPOCHS", "60")
SEEDS = os.environ.get("SEEDS", "0 1 2").split()
TOTAL = float(os.environ.get("LIMIT", 570))
OUT = Path(os.environ.get("OUT", "runs/gpu"))
START = time.monotonic()
NETS = ("SSD_HarDNet68", "SSD_vgg", "SSD_HarDNet85", "SSD_resnet101")
ONE_CORE = {"OMP_NUM_THREADS": "1"}
GPU_TESTS = [f"tests/test_{name}.py" for name in ("gpu", "speed", "gathered_conv", "loading")]
LOCK = threading.Lock()


def log(text: str) -> None:
    with LOCK, (OUT / "log.txt").open("a", errors="replace") as file:
        file.write(text + "\n")


class Part:
    """A part's calls, their results by name, and what failed."""

    def __init__(self, name: str, limit: float, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.start = time.monotonic()
        kept = 0 if name in PHASES[-1] else RESERVE
        self.end = min(self.start + limit, START + TOTAL - kept)
        self.result: dict = {}
        self.failed: list[str] = []
        self.timed_out = False

    def call(self, name: str, limit: float, *line: object, env: dict | None = None, module=True):
        """Run a Python program; True if it ended well. Its --json is read whatever became of it."""
        path = self.folder / f"{self.name}_{name}.json"
        argv = [sys.executable, *(["-m"] if module else []), *map(str, line)]
        if module and str(line[0]).startswith("benchmarks."):
            argv += ["--json", str(path)]
        limit, start = min(limit, self.end - time.monotonic()), time.monotonic()
        text, status, output = "", None, self.folder / f"{self.name}_{name}.txt"
        if limit > 1:
            with output.open("wb") as file:
                process = subprocess.Popen(
                    argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env={**os.environ, **(env or {})}, start_new_session=True,
                )  # fmt: skip
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    self.timed_out = True
                    stop(process)
            text = output.read_text(errors="replace")
        else:
            self.timed_out = True
        seconds = round(time.monotonic() - start, 1)
        said = "out of time" if status is None else f"exit status {status}"
        log(f"\n===== {self.name} {name}: {' '.join(argv)}\n{text}\n===== {said}, {seconds} s")
        found = self.result[name] = {"seconds": seconds, "status": status}
        if path.is_file():
            try:
                found["json"] = json.loads(path.read_text())
            except ValueError:
                found["json"] = None
        else:
            found["output"] = text[-3000:]
        if status != 0:
            last = "\n".join("  " + row[:200] for row in text.strip().splitlines()[-15:])
            self.failed.append(f"{self.name} {name}: {said} after {seconds} s\n{last}")
        return status == 0

    def together(self, calls) -> None:
        """Argument tuples of ``call``, all at the same time."""
        with ThreadPoolExecutor(64) as pool:
            for done in [pool.submit(self.call, *args, **more) for args, more in calls]:
                done.result()


def stop(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


# ---------------------------------------------------------------- parts

ON = ("--device", DEVICE)
SMALL = ("--size", 300) if QUICK else ()


def build(part: Part) -> None:
    part.call("build", 60, "utils/build.py", module=False)
    part.call("check", 30, "utils/build.py", "--check", module=False)
    part.call("machine", 30, "torch.utils.collect_env")


def warm(part: Part) -> None:
    """Fill the caches of TorchInductor and Triton, by many processes at once."""
    calls, env = [], {**ONE_CORE, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    once = ("benchmarks.forward", *ON, "--rounds", 1, *SMALL)
    for batch in (1,) if QUICK else (1, 32):
        for net in NETS[:1] if QUICK else NETS:
            line = (*once, "--version", net, "--batch", batch, "--routes", "compiled")
            calls.append(((f"compiled_{net}_{batch}", 100, *line), {"env": env}))
    if DEVICE != "cpu":
        for k in range(12):
            line = (*once, "--routes", "gather", "--warm", f"{k}/12")
            calls.append(((f"gather_{k}", 100, *line), {"env": env}))
    part.together(calls)
    for found in part.result.values():
        found.pop("json", None)  # times of many programs at once


def nms(part: Part) -> None:
    boxes = (1000,) if QUICK else (1000, 10_000, 100_000)
    few = ("--rounds", 1 if QUICK else 10)
    part.call("nms", 35, "benchmarks.nms", *ON, "--boxes", *boxes, *few)
    for batch in (1,) if QUICK else (1, 32):
        line = ("benchmarks.detect", *ON, "--batch", batch, "--rounds", 1 if QUICK else 5)
        part.call(f"detect_{batch}", 30, *line)


def speed(part: Part) -> None:
    forward = ("benchmarks.forward", *ON, *SMALL, "--rounds", 1 if QUICK else 15)
    every = ("--version", *(NETS[:1] if QUICK else NETS))
    graph = () if DEVICE == "cpu" else ("graph",)
    routes = ("--routes", "plain", "deployed", *graph, *(() if QUICK else ("compiled",)))
    roof = () if QUICK else ("--roofline",)
    batches = (1,) if QUICK else (1, 32)
    part.call("bf16", 100, *forward, *every, "--batch", *batches, *routes, *roof)
    more = (2,) if QUICK else (8, 128)
    routes = ("--routes", "deployed", *graph)
    part.call("batches", 40, *forward, *every, "--batch", *more, *routes, *roof)
    both = ("--version", *NETS[:1]) if QUICK else ("--version", *NETS[:2])
    amps = ("--amp", "off") if DEVICE == "cpu" else ("--amp", "tf32", "off")
    part.call("float32", 40, *forward, *both, *amps, "--routes", "plain", *graph, *roof)
    line = ("benchmarks.speed", *ON, *SMALL, *both, "--rounds", 1 if QUICK else 12)
    part.call("files", 50, *line, "--amp", "off", "bf16", "--routes", "plain", "deployed", *graph)


def gather(part: Part) -> None:
    line = ("benchmarks.forward", *ON, "--few_tiles", "--rounds", 30, "--batch", 1, 32, 128)
    routes = ("deployed", "graph", "gather", "gather_graph", "compiled")
    part.call("bf16", 120, *line, "--routes", *routes)


def step(part: Part) -> None:
    root = ("--root", BCCD) if BCCD else ()
    sizes = ((300, 2, 4),) if QUICK else ((300, 16, 20), (512, 32, 12))
    for size, batch, steps in sizes:
        line = ("benchmarks.step", *ON, "--size", size, "--batch", batch, "--steps", steps, *root)
        part.call(f"step_{size}", 40, *line)
    net = ("--versions", NETS[0])
    tiny = ("--amp", "bf16", "--rounds", 1, "--size", 300) if QUICK else ("--batch", 8)
    part.call("memory", 30, "benchmarks.memory", *ON, *net, *tiny)
    tiny = ("--rounds", 1, "--size", 300, "--batch", 2) if QUICK else ()
    part.call("loss", 25, "benchmarks.loss", *ON, *tiny)
    if BCCD:
        workers = (2,) if QUICK else (8, 16)
        few = ("--pictures", 32) if QUICK else ()
        line = ("benchmarks.loader", *root, "--workers", *workers, "--rounds", 1 if QUICK else 2)
        part.call("loader", 40, *line, *few)
    line = ("benchmarks.step", *ON, "--size", 300, "--batch", 2 if QUICK else 16, "--compile")
    part.call("compiled_300", 50, *line, "--steps", 4 if QUICK else 20, *root)


def tests(part: Part) -> None:
    line = ("pytest", "-m", "gpu", "-v", "--no-header", "-rfE", "--tb", "short")
    line = (*line, "-p", "no:cacheprovider", *GPU_TESTS)
    # The longest, which compiles every route, must not take the others along.
    part.together([
        (("every_route", 180, *line, "-n", 0, "-k", "every_route"), {}),
        (("tests", 180, *line, "-n", 6, "-k", "not every_route"), {}),
    ])  # fmt: skip


def training(folder: Path, name: str, *more: object) -> tuple:
    return (
        "train_test.py", "-d", "VOC", "-v", NETS[0], "-s", 300, "--root", BCCD,
        "--save_folder", folder, "--date", name, "--device", DEVICE, "--num_workers", 2,
        "--train_sets", "trainval", "--test_sets", "test", *more,
    )  # fmt: skip


def run_of(folder: Path, name: str) -> Path:
    """The weights of a run: the last ones, should it not have come to its end."""
    run = folder / f"{NETS[0]}_300" / name
    final = run / f"Final_{NETS[0]}_VOC.pth"
    return final if final.is_file() else run / "last.pth"


def bccd(part: Part) -> None:
    folder = part.folder / "bccd"
    few = ("-b", 16, "--max_epoch", EPOCHS, *(("--max_iters", 2) if QUICK else ()))
    summary = part.result["summary"] = {}

    def one(recipe: str, seed: str) -> None:
        name = f"{recipe}_{seed}"
        line = training(folder, name, "--recipe", recipe, "--seed", seed, "--amp", "bf16", *few)
        quiet = ("--test_frequency", 0, "--save_frequency", 0, "--save_minutes", 1)
        left = part.end - time.monotonic() - 40
        part.call(name, left, *line, *quiet, "--log_iters", 100, module=False, env=ONE_CORE)
        file = run_of(folder, name)
        line = ("train_test.py", "--test", file, "--score_threshold", "0.01", "--device", DEVICE)
        more = {"module": False, "env": ONE_CORE}
        part.call(f"{name}_test", 60, *line, "--num_workers", 2, **more)
        for path in file.parent.glob("ss_predict/*/*/results.json"):
            found = json.loads(path.read_text())
            summary[name] = {
                "weights": file.name, "seconds": part.result[name]["seconds"],
                **{key: found[key] for key in ("voc07_11point", "area")},
            }  # fmt: skip

    with ThreadPoolExecutor(16) as pool:
        recipes = ("published",) if QUICK else ("published", "modern")
        for done in [pool.submit(one, r, s) for r in recipes for s in SEEDS]:
            done.result()
    for recipe in recipes:
        for metric in ("voc07_11point", "area"):
            runs = [x[metric]["mean"] for k, x in summary.items() if k.startswith(recipe)]
            if runs:
                summary.setdefault("mean", {})[f"{recipe} {metric}"] = {
                    "mean": statistics.mean(runs), "least": min(runs), "most": max(runs),
                    "deviation": statistics.stdev(runs) if len(runs) > 1 else None,
                }  # fmt: skip
    (OUT / "bccd.json").write_text(json.dumps(summary, indent=1))


COMPARE = """
import json, sys
from utils.checkpoint import load_checkpoint
a, b, c = (load_checkpoint(file)["model"] for file in sys.argv[1:])
def most(x, y):
    return max(float((x[k].double() - y[k].double()).abs().max()) for k in x)
print(json.dumps({"largest_weight": max(float(v.double().abs().max()) for v in a.values()),
                  "straight_again": most(a, b), "resumed": most(a, c)}))
"""


def nccl(part: Part) -> None:
    folder, more = part.folder / "nccl", {"module": False, "env": ONE_CORE}
    batch = 4 if QUICK else 16
    quiet = ("-b", batch, "--test_frequency", 0, "--overfit", batch * 2, "--max_epoch", 2)
    straight = training(folder, "straight", *quiet)
    again = training(folder, "again", *quiet)
    stopped = training(folder, "resumed", *quiet, "--max_iters", 2)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", 1)
    line = (*launcher, *training(folder, "torchrun", *quiet), "--sync_bn")
    part.together([
        (("torchrun", 110, *line), {"env": ONE_CORE}),
        (("straight", 90, *straight), more), (("again", 90, *again), more),
        (("stopped", 90, *stopped), more),
    ])  # fmt: skip
    part.call("resumed", 60, *training(folder, "resumed", "--resume", "auto"), **more)
    files = [run_of(folder, name) for name in ("straight", "again", "resumed")]
    if part.call("differences", 60, "-c", COMPARE, *files, module=False):
        part.result["differences"] = json.loads(
            part.result["differences"]["output"].strip().splitlines()[-1]
        )


LIMITS = {
    "build": 70, "warm": 90, "nms": 60, "speed": 150, "gather": 120, "step": 80,
    "tests": 180, "bccd": 240, "nccl": 150,
}  # fmt: skip
"""Seconds of each part."""
PHASES = (("build", "warm"), ("nms",), ("speed",), ("gather",), ("step",),
          ("tests", "bccd", "nccl"))  # fmt: skip
"""Parts of a phase run at the same time: they measure no times, or only their own."""
NEED_BCCD = ("bccd", "nccl")
NEED_GPU = ("gather", "tests")
RESERVE = 170
"""Seconds of LIMIT that are kept for the last phase."""


# ---------------------------------------------------------------- what is told


def figures(name: str, result: dict) -> list[str]:
    """The few that matter, in lines; never an error."""
    try:
        return list(_figures(name, result))
    except Exception as error:  # a part that failed half-way
        return [f"no figures: {type(error).__name__}: {error}"]


def _figures(name: str, result: dict):
    for call, found in result.items():
        data = found.get("json") if isinstance(found, dict) else None
        if name == "build":
            if call == "check":
                yield from found["output"].strip().splitlines()[-3:]
            if call == "machine":
                keys = ("GPU 0", "Nvidia driver", "PyTorch version", "CUDA runtime", "cuDNN")
                yield from (x for x in found["output"].splitlines() if x.startswith(keys))
        elif not data:
            continue
        elif call == "nms":
            for x in data["rows"]:
                s = x["seconds"]
                yield (f"nms {x['boxes']} boxes {x['classes']} classes {s['ours'] * 1e3:.3f} ms"
                       f" torchvision/ours {s['torchvision'] / s['ours']:.2f}")  # fmt: skip
        elif call.startswith("detect"):
            for kind, x in data["rows"].items():
                times = " ".join(f"{k} {v * 1e3:.2f}" for k, v in x["seconds"].items())
                yield f"{call} {kind} ms: {times}"
        elif "forward" in data.get("rows", [{}])[0].get("median", ()):
            for x in data["rows"]:
                times = " ".join(f"{k} {v * 1e3:.2f}" for k, v in x["median"].items())
                yield f"{x['network']} {x['route']} {x['precision']} ms: {times}"
        elif name in ("speed", "gather"):
            if data.get("ceilings") and call == "bf16":
                rates = {k: round(v / 1e12) for k, v in data["ceilings"]["operations"].items()}
                yield f"copy {data['ceilings']['bandwidth'] / 1e9:.0f} GB/s, 10^12/s {rates}"
            for (net, batch, precision), rows in grouped(data["rows"]).items():
                times = " ".join(
                    f"{x['route']} " + (f"{x['seconds'] * 1e3:.2f}" if "seconds" in x else "ERROR")
                    + "".join(f"/{v:.0%}" for v in x.get("shares", {}).values()) for x in rows
                )  # fmt: skip
                yield f"{net} batch {batch} {precision} ms: {times}"
                yield from (f"  {x['route']}: {x['error'][:150]}" for x in rows if "error" in x)
            if call == "bf16":
                yield from ratios(data["rows"])
        elif call.startswith(("step", "compiled")):
            yield f"{call}: {data['ratio']:.2f} times as fast as plain, {data['seconds']}"
        elif call == "memory":
            for x in data["rows"]:
                kept, peak = ({k: f"{v / 2**20:.0f}" for k, v in x[y].items()}
                              for y in ("kept", "peak"))  # fmt: skip
                yield f"memory {x['amp']} MiB kept {kept} peak {peak} s {x['seconds']}"
        elif call in ("loss", "loader"):
            for x in data["rows"]:
                yield f"{call} {x.get('amp', x.get('what'))}: " + (
                    f"{x['ratio']:.3f} {x.get('samples_per_second', x.get('seconds'))}"
                )
    if name == "tests":
        yield from (f"{call}: {x['output'].strip().splitlines()[-1]}" for call, x in result.items())
    if name == "nccl":
        found = result["differences"]
        yield f"largest differences of weights: {found}" if "resumed" in found else "no differences"
        yield f"torchrun: exit status {result['torchrun']['status']}"
    if name == "bccd":
        for run, x in result["summary"].items():
            if run != "mean":
                yield (f"{run}: 11-point {x['voc07_11point']['mean']:.4f} area "
                       f"{x['area']['mean']:.4f}, {x['seconds']} s, {x['weights']}")  # fmt: skip
        for what, x in result["summary"].get("mean", {}).items():
            yield f"{what}: mean {x['mean']:.4f}, {x['least']:.4f} to {x['most']:.4f}"


def grouped(rows) -> dict:
    found: dict = {}
    for x in rows:
        found.setdefault((x["network"], x["batch"], x["precision"]), []).append(x)
    return found


def ratios(rows):
    """The claims by route, and the gathered convolutions beside the best of the others."""
    times = {(x["network"], x["route"], x["batch"]): x["seconds"] for x in rows if "seconds" in x}
    for one, other in (NETS[:2], NETS[2:]):
        found = " ".join(
            f"{route}@{batch} {seconds / times[other, route, batch]:.3f}"
            for (net, route, batch), seconds in times.items()
            if net == one and (other, route, batch) in times
        )
        if found:
            yield f"time of {one} / {other}: {found}"
    for batch in sorted({key[2] for key in times}):
        ours, others = (
            {r: s for (_, r, b), s in times.items() if b == batch and r.startswith("gather") == g}
            for g in (True, False)
        )
        if ours and others:
            yield (f"batch {batch}: {min(ours, key=ours.get)} takes "
                   f"{min(ours.values()) / min(others.values()):.3f} of "
                   f"{min(others, key=others.get)}")  # fmt: skip


def perform(name: str, folder: Path) -> dict:
    """A part, from its start to its line of JSON."""
    part = Part(name, LIMITS[name], folder)
    status, problem = "ok", None
    if name in NEED_BCCD and not BCCD:
        status, problem = "skipped", "needs BCCD=FOLDER"
    elif name in NEED_GPU and DEVICE == "cpu":
        status, problem = "skipped", "needs a GPU"
    else:
        try:
            globals()[name](part)
        except Exception as error:
            part.failed.append(f"{name}: {type(error).__name__}: {error}")
            log(part.failed[-1])
        if part.failed:
            status = "timeout" if part.timed_out else "failed"
    row = {
        "part": name, "status": status, "seconds": round(time.monotonic() - part.start, 1),
        "result": part.result, "failed": part.failed, "problem": problem,
        "figures": figures(name, part.result) if status != "skipped" else [],
    }  # fmt: skip
    with LOCK, (OUT / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name}: {status}, {row['seconds']} s", flush=True)
    return row


def main(wanted: list[str]) -> int:
    if unknown := [name for name in wanted if name not in LIMITS]:
        print(f"no such part: {' '.join(unknown)}; there are {' '.join(LIMITS)}", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for phase in PHASES:
            names = [name for name in phase if not wanted or name in wanted]
            with ThreadPoolExecutor(max(len(names), 1)) as pool:
                rows += pool.map(lambda name: perform(name, Path(folder)), names)
    for row in rows:
        for text in row["failed"][:3]:
            print(text[-1100:])
    for row in rows:
        print(f"{row['part']:8}{row['status']:8}{row['seconds']:6.0f} s  {row['problem'] or ''}")
        for line in row["figures"]:
            print(f"    {line[:230]}")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
