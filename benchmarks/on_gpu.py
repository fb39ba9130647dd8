"""Everything that needs a GPU, part by part; `benchmarks/gpu.sh` calls it and says how.

Every call has its own limit of time, and its failure stops nothing else. The limits of all parts
add up to at most the default of LIMIT; a smaller LIMIT stops the last parts.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from utils.signals import ENDING, heeded

NET = "SSD_HarDNet68"
TWO, OTHERS = f"{NET} SSD_vgg", "SSD_HarDNet85 SSD_resnet101"
ONE_CORE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
"""Environment of calls that run at the same time."""
TINY = {"--version": "SSD_HarDNet39ds", "-v": "SSD_HarDNet39ds", "--size": "300", "--batch": "2",
        "--rounds": "1", "--boxes": "300", "--routes": "plain deployed", "--amp": "off",
        "--images": "32", "--workers": "2", "--max_epoch": "2", "--batch_size": "4",
        "--overfit": "8"}  # values of options with QUICK=1

Stage = dict[str, tuple[float, str]]
"""Name of a call -> (limit in seconds, arguments of Python). Calls of a stage run together."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, as it stands there; `benchmarks/gpu.sh` describes it."""

    device: str = "cuda"
    quick: str = ""
    bccd: str = ""
    epochs: str = "60"
    rows: str = "no_expansion"
    seeds: str = "0 1 2"
    options: str = ""
    limit: str = "720"
    out: str = "runs/gpu"

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Settings:
        """Read DEVICE, QUICK, BCCD, EPOCHS, ROWS, SEEDS, OPTIONS, LIMIT and OUT."""
        names = cls.__dataclass_fields__
        return cls(**{name: env[name.upper()] for name in names if env.get(name.upper())})

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"


def command_of(line: str, s: Settings) -> list[str]:
    """Return the program and arguments of a call."""
    words = shlex.split(line)
    if words[0].startswith("benchmarks.") or "train_test.py" in words:
        words += ["--device", s.device]
    if s.quick:  # of an option that is given twice, the last value counts
        for option in set(words) & set(TINY):
            words += [option, *TINY[option].split()]
    file = words[0].endswith(".py") or words[0] == "-c"
    return [sys.executable, *([] if file else ["-m"]), *words]


# ---------------------------------------------------------------- the parts, as gpu.sh says

COMPARE = """
import sys
from utils.checkpoint import load_checkpoint
runs = [load_checkpoint(file) for file in sys.argv[1:]]
assert len({run["step"] for run in runs}) == 1, "a training was stopped"
a, b, c = (run["model"] for run in runs)
def most(x, y):
    return max(float((x[k].double() - y[k].double()).abs().max()) for k in x)
print("largest weight", max(float(x.double().abs().max()) for x in a.values()),
      "differences: the same run again", most(a, b), "stopped and resumed", most(a, c))
"""
PYTEST = "pytest -m gpu -v -rfEs --tb short -p no:cacheprovider"


def build(s: Settings, folder: Path) -> list[Stage]:
    first: Stage = {"compile": (60, "utils/build.py")}
    once = "benchmarks.speed --size 512 --forward --amp bf16 --rounds 1 --routes compiled"
    for net, batch in product(f"{TWO} {OTHERS}".split() if s.gpu else (), (1, 32)):
        first[f"warm_{net}_{batch}"] = 80, f"{once} --version {net} --batch {batch}"
    return [first, {"check": (15, "utils/build.py --check")}]


def nms(s: Settings, folder: Path) -> list[Stage]:
    line = "benchmarks.nms suppress --rounds 10"
    return [{"suppress": (25, f"{line} --boxes 1000 10000 100000")},
            {"detect": (20, "benchmarks.nms detect --amp off bf16 --rounds 5")},
            {"suppress_32": (20, f"{line} --boxes 10000 --classes 80 --batch 32")}]


def speed(s: Settings, folder: Path) -> list[Stage]:
    line = "benchmarks.speed --size 512 --rounds 15"
    bf16 = f"{line} --forward --amp bf16 --batch 1 32"
    return [{"bf16": (55, f"{bf16} --roofline --version {TWO} --routes plain graph compiled")},
            {"others": (40, f"{bf16} --version {OTHERS} --routes graph compiled")},
            {"files": (35, f"{line} --version {TWO} --amp tf32 --routes plain graph")}]


def gather(s: Settings, folder: Path) -> list[Stage]:
    line = f"benchmarks.speed --forward --few_tiles --version {NET} --amp bf16 --rounds 30"
    return [{f"warm_{k}": (45, f"benchmarks.gather --share {k}/12") for k in range(12)},
            {"bf16": (45, f"{line} --batch 1 32 --routes graph compiled gather_graph")}]


def step(s: Settings, folder: Path) -> list[Stage]:
    line = "benchmarks.train step --amp bf16"
    loader = f"benchmarks.loader --root {shlex.quote(s.bccd)} --size 512 --workers 16 --rounds 2"
    return [{"step_300": (25, f"{line} --size 300 --batch 16 --rounds 20 --version {TWO}")},
            {"step_512": (20, f"{line} --size 512 --batch 32 --rounds 12 --version {NET}")},
            {"loss": (15, "benchmarks.train loss --size 512 --batch 32 --rounds 15")},
            *([{"loader": (15, loader)}] if s.bccd else [])]


def tests(s: Settings, folder: Path) -> list[Stage]:
    """The tests marked gpu. The longest, which compiles every route, is on its own."""
    others = "tests/test_gpu.py tests/test_gathered_conv.py tests/test_loading.py"
    return [{"every_route": (240, f"{PYTEST} tests/test_speed.py"),
             "others": (240, f"{PYTEST} -n 6 {others}")}]


def training(s: Settings, folder: Path, name: str) -> tuple[str, Path]:
    """Return the line of a training, and its last checkpoint, which a stopped one has, too."""
    line = (f"train_test.py -d VOC -v {NET} -s 300 --root {shlex.quote(s.bccd)} --batch_size 16 "
            f"--save_folder {folder} --date {name} --train_sets trainval --test_sets test "
            "--num_workers 2 --basenet none --test_frequency 0")
    net = TINY["-v"] if s.quick else NET
    return line, folder / f"{net}_300" / name / "last.pth"


ROWS = {"published": "", "modern": "--recipe modern", "fit": "--recipe modern --priors fit",
        "no_expansion": "--recipe modern --priors fit --expansion 0",
        "negatives": "--recipe modern --priors fit --background_negatives 12"}
"""Trainings of the part bccd."""


def bccd(s: Settings, folder: Path) -> list[Stage]:
    options = (f"--max_epoch {s.epochs} --amp bf16 --log_iters 100 --save_frequency 0 "
               f"--save_minutes 1 {s.options} {'--max_iters 2' if s.quick else ''}")
    test = "train_test.py --score_threshold 0.01 --num_workers 2 --test"
    score = f"data.voc_eval --root {shlex.quote(s.bccd)} --set test"
    trained, tested, scored = {}, {}, {}
    for row, seed in product(s.rows.split(), s.seeds.split()):
        name = f"{row}_{seed}"
        line, last = training(s, folder, name)
        trained[name] = 220, f"{line} {options} --cache memory {ROWS[row]} --seed {seed}"
        tested[f"{name}_test"] = 35, f"{test} {last}"
        scored[f"{name}_AP"] = 10, f"{score} {last.parent}/ss_predict/last/test"
    return [trained, tested, scored]


def resume(s: Settings, folder: Path) -> list[Stage]:
    more = "--overfit 32 --max_epoch 2"
    runs = {name: training(s, folder, name) for name in ("straight", "again", "resumed")}
    first: Stage = {name: (90, f"{line} {more}") for name, (line, _) in runs.items()}
    first["resumed"] = 90, f"{first['resumed'][1]} --max_iters 2"
    files = " ".join(str(last) for _, last in runs.values())
    return [first, {"resume": (60, f"{runs['resumed'][0]} --resume auto")},
            {"differences": (30, f"-c {shlex.quote(COMPARE)} {files}")}]


PARTS: dict[str, Callable[[Settings, Path], list[Stage]]] = {
    part.__name__: part for part in (build, nms, speed, step, gather, tests, bccd, resume)}
NEEDS = {"gather": "gpu", "tests": "gpu", "bccd": "bccd", "resume": "bccd"}  # settings
SIGNALS: list[int] = []
"""Signals received: then all calls are stopped. Their own sessions do not receive them."""
TOGETHER = ("tests", "bccd", "resume")  # parts that run at the same time, last: they time nothing


# ---------------------------------------------------------------- running them


def perform(name: str, line: str, end: float, env: Mapping[str, str], s: Settings,
            folder: Path) -> tuple[int | None, list[str]]:
    """Run a call until ``end`` at most, add its output to log.txt; return its status and a report.

    The status of a call that was stopped is None.
    """
    argv, start = command_of(line, s), time.monotonic()
    with (folder / f"{name}.txt").open("wb+") as file:
        process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, env={**os.environ, **env},
                                   start_new_session=True)
        while (status := process.poll()) is None and time.monotonic() < end and not SIGNALS:
            time.sleep(0.1)
        if status is None:
            stop(process)
        file.seek(0)
        text = file.read().decode(errors="replace")
    how = {0: "", None: "stopped"}.get(status, f"status {status}")
    title = f"  {name} {time.monotonic() - start:.1f} s {how}"
    with Path(s.out, "log.txt").open("ab", buffering=0) as log:  # unmixed with other calls' output
        log.write(f"\n====={title}\n{shlex.join(argv)}\n{text}".encode(errors="replace"))
    lines = text.strip().splitlines()[-40 if status != 0 or not env else -4 :]
    return status, [title, *(f"    {line}" for line in lines)]


def stop(process: subprocess.Popen) -> None:
    """End a process and its children; training saves its state."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(8)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def run_part(name: str, end: float, s: Settings, folder: Path) -> bool:
    """Run a part until ``end`` at most, print its report and return whether a call failed."""
    start, needs, results = time.monotonic(), NEEDS.get(name), []
    lacks = needs and not getattr(s, needs)
    for stage in [] if lacks or SIGNALS else PARTS[name](s, folder):
        env, now = ONE_CORE if len(stage) > 1 else {}, time.monotonic()
        with ThreadPoolExecutor(len(stage)) as pool:
            results += [pool.submit(perform, f"{name}_{call}", line, min(end, now + limit), env, s,
                                    folder) for call, (limit, line) in stage.items()]
    found = [each.result() for each in results]
    failed = any(status != 0 for status, _ in found)
    how = f"needs {needs}" if lacks else "failed" if failed else "ok"
    title = f"{name}: {how}, {time.monotonic() - start:.1f} s"
    print("\n".join([title, *(line for _, lines in found for line in lines)]), flush=True)
    return failed


def main(wanted: Sequence[str], s: Settings) -> int:
    if unknown := [name for name in wanted if name not in PARTS]:
        print(f"no such part: {' '.join(unknown)}; there are {' '.join(PARTS)}", file=sys.stderr)
        return 2
    Path(s.out).mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS if not wanted or name in wanted]
    phases = [[name] for name in names if name not in TOGETHER]
    phases.append([name for name in names if name in TOGETHER])
    end, failed = time.monotonic() + float(s.limit), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        part = partial(run_part, end=end, s=s, folder=Path(folder))
        for phase in phases:
            with ThreadPoolExecutor(max(len(phase), 1)) as pool:
                failed += pool.map(part, phase)
    return int(any(failed))


if __name__ == "__main__":
    for number in heeded((signal.SIGINT, *ENDING)):
        signal.signal(number, lambda number, _: SIGNALS.append(number))
    raise SystemExit(main(sys.argv[1:], Settings.of(os.environ)))
