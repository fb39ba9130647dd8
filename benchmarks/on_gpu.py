"""Everything that needs a GPU, part by part; `benchmarks/gpu.sh` calls it and says how.

Every call has its own limit of time, and its failure stops nothing else. The limits of a part's
stages add up to at most the part's, those of all parts to at most `Settings.limit`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

NET = "SSD_HarDNet68"
TWO, OTHERS = f"{NET} SSD_vgg", "SSD_HarDNet85 SSD_resnet101"
ONE_CORE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
"""Environment of calls that run at the same time."""
TINY = {"--version": "SSD_HarDNet39ds", "-v": "SSD_HarDNet39ds", "--size": "300", "--batch": "2",
        "--rounds": "1", "--boxes": "300", "--routes": "plain deployed", "--amp": "off",
        "--images": "32", "--workers": "2", "--max_epoch": "2", "--batch_size": "4",
        "--overfit": "8", "--limits": ""}  # values of options with QUICK=1
LOCK = threading.Lock()

Stage = dict[str, tuple[float, str]]
"""Name of a call -> (limit in seconds, arguments of Python). Calls of a stage run together."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; `benchmarks/gpu.sh` describes it."""

    device: str = "cuda"
    quick: bool = False
    bccd: str = ""
    epochs: str = "60"
    seeds: str = "0 1"
    options: str = ""
    limit: float = 720
    out: Path = Path("runs/gpu")

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Settings:
        """Read DEVICE, QUICK, BCCD, EPOCHS, SEEDS, OPTIONS, LIMIT and OUT."""
        kinds = {"quick": lambda text: text == "1", "limit": float, "out": Path}
        names = [name for name in cls.__dataclass_fields__ if env.get(name.upper())]
        return cls(**{name: kinds.get(name, str)(env[name.upper()]) for name in names})

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"


def command_of(line: str, s: Settings, out: Path) -> list[str]:
    """Return the program and arguments of a call; ``out`` is for the JSON of a benchmark."""
    words = shlex.split(line)
    if s.quick:
        words = tiny(words)
    if words[0].startswith("benchmarks."):
        words += ["--json", str(out)]
    file = words[0].endswith(".py") or words[0] == "-c"
    return [sys.executable, *([] if file else ["-m"]), *words]


def tiny(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    replaced = False
    for word in words:
        if word.startswith("-") and not word.lstrip("-").isdecimal():
            replaced = word in TINY
            if word not in TINY or TINY[word]:
                found += [word, *TINY.get(word, "").split()]
        elif not replaced:
            found.append(word)
    return found


# ---------------------------------------------------------------- the parts

COMPARE = """
import sys
from utils.checkpoint import load_checkpoint
a, b, c = (load_checkpoint(file)["model"] for file in sys.argv[1:])
def most(x, y):
    return max(float((x[k].double() - y[k].double()).abs().max()) for k in x)
print("largest weight", max(float(x.double().abs().max()) for x in a.values()),
      "differences: the same run again", most(a, b), "stopped and resumed", most(a, c))
"""
PYTEST = "pytest -m gpu -q -rfE --tb short -p no:cacheprovider"


def build(s: Settings, folder: Path) -> list[Stage]:
    """Compile the routines; fill torch.compile's cache meanwhile."""
    once = f"benchmarks.speed --device {s.device} --size 512 --forward --amp bf16 --rounds 1"
    first: Stage = {"compile": (60, "utils/build.py")}
    if s.gpu:
        for net in f"{TWO} {OTHERS}".split():
            for batch in (1, 32):
                line = f"{once} --version {net} --batch {batch} --routes compiled"
                first[f"warm_{net}_{batch}"] = 80, line
    return [first, {"check": (15, "utils/build.py --check")}]


def nms(s: Settings, folder: Path) -> list[Stage]:
    """Suppression beside torchvision's, and from network outputs to detections."""
    line = f"benchmarks.nms suppress --device {s.device} --rounds 10"
    detect = f"benchmarks.nms detect --device {s.device} --version {NET} --amp off bf16 --rounds 5"
    return [{"suppress": (25, f"{line} --boxes 1000 10000 100000")},
            {"detect": (20, f"{detect} --batch 1")},
            {"suppress_32": (20, f"{line} --boxes 10000 --classes 80 --batch 32")}]


def speed(s: Settings, folder: Path) -> list[Stage]:
    """Forward passes of four networks by each route, and the stages from files to boxes."""
    line = f"benchmarks.speed --device {s.device} --size 512 --rounds 15"
    bf16 = f"{line} --forward --amp bf16 --batch 1 32"
    return [{"bf16": (55, f"{bf16} --limits --version {TWO} --routes plain graph compiled")},
            {"others": (40, f"{bf16} --version {OTHERS} --routes graph compiled")},
            {"files": (35, f"{line} --version {TWO} --amp tf32 --batch 1 --routes plain graph")}]


def gather(s: Settings, folder: Path) -> list[Stage]:
    """The gathered convolutions beside the other routes, once Triton's cache is filled."""
    on = f"--device {s.device}"
    line = f"benchmarks.speed {on} --forward --few_tiles --version {NET} --amp bf16 --rounds 30"
    return [{f"warm_{k}": (45, f"benchmarks.gather {on} --share {k}/12") for k in range(12)},
            {"bf16": (45, f"{line} --batch 1 32 --routes graph compiled gather_graph")}]


def step(s: Settings, folder: Path) -> list[Stage]:
    root = f"--root {shlex.quote(s.bccd)}" if s.bccd else ""
    line = f"benchmarks.train step --device {s.device} {root}"
    loss = f"benchmarks.train loss --device {s.device}"
    loader = f"benchmarks.loader {root} --size 512 --images 384 --workers 16 --rounds 2"
    return [{"step_300": (25, f"{line} --size 300 --batch 16 --rounds 20 --version {TWO}")},
            {"step_512": (20, f"{line} --size 512 --batch 32 --rounds 12 --version {NET}")},
            {"loss": (15, f"{loss} --size 512 --batch 32 --rounds 15")},
            *([{"loader": (15, loader)}] if s.bccd else [])]


def tests(s: Settings, folder: Path) -> list[Stage]:
    """The tests marked gpu. The longest, which compiles every route, is on its own."""
    others = "tests/test_gpu.py tests/test_gathered_conv.py tests/test_loading.py"
    return [{"every_route": (240, f"{PYTEST} tests/test_speed.py"),
             "others": (240, f"{PYTEST} -n 6 {others}")}]


def training(s: Settings, folder: Path, name: str) -> str:
    return (f"train_test.py -d VOC -v {NET} -s 300 --root {shlex.quote(s.bccd)} --device "
            f"{s.device} --save_folder {folder} --date {name} --train_sets trainval --test_sets "
            "test --num_workers 2 --basenet none")


def last(s: Settings, folder: Path, name: str) -> Path:
    """Return the last checkpoint of a run, also of one that was stopped."""
    net = TINY["-v"] if s.quick else NET
    return folder / f"{net}_300" / name / "last.pth"


def bccd(s: Settings, folder: Path) -> list[Stage]:
    """BCCD from scratch, both recipes and several seeds at the same time."""
    few = f"--batch_size 16 --max_epoch {s.epochs} --amp bf16 --log_iters 100 {s.options}"
    few += " --max_iters 2" if s.quick else ""
    quiet = "--test_frequency 0 --save_frequency 0 --save_minutes 1"
    trained: Stage = {}
    tested: Stage = {}
    for recipe in ("published", "modern"):
        for seed in s.seeds.split():
            name = f"{recipe}_{seed}"
            line = f"{training(s, folder, name)} --recipe {recipe} --seed {seed} {few} {quiet}"
            trained[name] = 230, line
            line = f"train_test.py --test {last(s, folder, name)} --score_threshold 0.01"
            tested[f"{name}_test"] = 35, f"{line} --device {s.device} --num_workers 2"
    return [trained, tested]


def nccl(s: Settings, folder: Path) -> list[Stage]:
    """One process under torchrun with NCCL, and exact resuming."""
    quiet = "--batch_size 16 --test_frequency 0 --overfit 32 --max_epoch 2"
    names = ("straight", "again", "resumed")
    first: Stage = {name: (90, f"{training(s, folder, name)} {quiet}") for name in names}
    first["resumed"] = 90, f"{first['resumed'][1]} --max_iters 2"
    if s.gpu:
        line = f"{training(s, folder, 'torchrun')} {quiet} --sync_bn"
        launcher = "torch.distributed.run --standalone --nproc-per-node 1"
        first["torchrun"] = 90, f"{launcher} {line}"
    files = " ".join(str(last(s, folder, name)) for name in names)
    return [first, {"resume": (60, f"{training(s, folder, 'resumed')} --resume auto")},
            {"differences": (30, f"-c {shlex.quote(COMPARE)} {files}")}]


class Part(NamedTuple):
    stages: Callable[[Settings, Path], list[Stage]]
    limit: float  # seconds
    least: float  # seconds that earlier parts leave for it
    needs: str = ""  # the setting that it cannot do without


PARTS = {"build": Part(build, 95, 0),
         "nms": Part(nms, 65, 20),
         "speed": Part(speed, 130, 40),
         "step": Part(step, 75, 40),
         "gather": Part(gather, 90, 30, "gpu"),
         "tests": Part(tests, 240, 150, "gpu"),
         "bccd": Part(bccd, 265, 150, "bccd"),
         "nccl": Part(nccl, 180, 150, "bccd")}
TOGETHER = ("tests", "bccd", "nccl")  # parts that run at the same time, last: they measure no times


# ---------------------------------------------------------------- running them


def perform(name: str, line: str, limit: float, env: Mapping[str, str], s: Settings,
            folder: Path) -> dict:
    """Run a call for at most ``limit`` seconds; return its result, whatever became of it."""
    out, output = (folder / f"{name}.{kind}" for kind in ("json", "txt"))
    argv, start, status = command_of(line, s, out), time.monotonic(), None
    with output.open("wb") as file:
        if limit > 1:
            process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, env={**os.environ, **env},
                                       start_new_session=True)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                stop(process)
    text = output.read_text(errors="replace")
    found = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    with LOCK, (s.out / "log.txt").open("a", errors="replace") as file:
        file.write(f"\n===== {name}: {shlex.join(argv)}\n{text}\n===== {found}\n")
    alone = 40 if line.startswith("benchmarks.") else 3
    count = 15 if status != 0 else 0 if env and PYTEST not in line else alone
    found["lines"] = text.strip().splitlines()[-count:] if count else []
    return {**found, "json": json.loads(out.read_text()) if out.is_file() else None}


def stop(process: subprocess.Popen) -> None:
    """End a process and its children; training saves its state."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(8)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def run_part(name: str, end: float, s: Settings, folder: Path) -> dict:
    """Run a part until ``end`` at most; write and return its row."""
    part, start, results = PARTS[name], time.monotonic(), {}
    lacks = part.needs and not getattr(s, part.needs)
    stages = [] if lacks else part.stages(s, folder)
    end = min(end, start + part.limit)
    for k, stage in enumerate(stages):
        rest = (max(limit for limit, _ in each.values()) for each in stages[k + 1 :])
        later = sum(min(40, limit) for limit in rest) if len(stage) > 1 else 0
        env = ONE_CORE if len(stage) > 1 else {}
        with ThreadPoolExecutor(len(stage)) as pool:
            for call, (limit, line) in stage.items():
                limit = min(limit, end - time.monotonic() - later)
                full = f"{name}_{call}"
                results[call] = pool.submit(perform, full, line, limit, env, s, folder)
        results |= {call: results[call].result() for call in stage}
    failed = [call for call, result in results.items() if result["status"] != 0]
    row = {"part": name, "seconds": round(time.monotonic() - start, 1), "results": results,
           "status": f"needs {part.needs}" if lacks else "failed" if failed else "ok",
           "failed": failed, "summary": summary(folder) if name == "bccd" else []}
    with LOCK, (s.out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{name}: {row['status']}, {row['seconds']} s", flush=True)
    return row


def summary(folder: Path) -> list[str]:
    """Return the AP of every BCCD run, with mean and deviation a recipe, in lines."""
    scores: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*_300/*_*/ss_predict/*/*/results.json")):
        found, recipe = json.loads(path.read_text()), path.parents[3].name.split("_")[0]
        for metric in ("voc07_11point", "area"):
            scores.setdefault(f"{recipe} {metric}", []).append(found[metric]["mean"])
    return [f"{name}: mean {statistics.mean(x):.4f}, deviation {statistics.pstdev(x):.4f}, each "
            f"{' '.join(f'{value:.4f}' for value in x)}" for name, x in scores.items()]


def show(rows: Sequence[dict]) -> None:
    for row in rows:
        print(f"\n{row['part']:8}{row['status']:12}{row['seconds']:6.0f} s")
        for name, result in row["results"].items():
            status = {0: "", None: "stopped"}.get(result["status"], f"status {result['status']}")
            lines = [f"  {name} {result['seconds']} s {status}", *result["lines"]]
            print("\n    ".join(line[:170] for line in lines))
        for line in row["summary"]:
            print(f"    {line}")


def main(wanted: Sequence[str], s: Settings) -> int:
    if unknown := [name for name in wanted if name not in PARTS]:
        print(f"no such part: {' '.join(unknown)}; there are {' '.join(PARTS)}", file=sys.stderr)
        return 2
    s.out.mkdir(parents=True, exist_ok=True)
    finish, rows = time.monotonic() + s.limit, []
    names = [name for name in PARTS if not wanted or name in wanted]
    phases = [[name] for name in names if name not in TOGETHER]
    phases.append([name for name in names if name in TOGETHER])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for k, phase in enumerate(phases):
            end = finish - reserve(phases[k + 1 :])
            with ThreadPoolExecutor(max(len(phase), 1)) as pool:
                rows += pool.map(partial(run_part, end=end, s=s, folder=Path(folder)), phase)
    show(rows)
    return int(any(row["failed"] for row in rows))


def reserve(phases: Sequence[Sequence[str]]) -> float:
    return sum(max((PARTS[name].least for name in phase), default=0) for phase in phases)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], Settings.of(os.environ)))
