"""AP of the training recipes, part by part: every variant with several seeds, as a table.

    python -m benchmarks.recipes --root BCCD [--runs runs/ablation] [--version SSD_HarDNet39ds]
        [--epochs 20] [--seeds 3] [--amp bf16]

Finished runs are not repeated; an interrupted run is resumed. Every run keeps a moving average of
its weights, which does not change the training, and is scored with it and without it.
"""

import argparse
import json
import statistics
from pathlib import Path

import train_test
from benchmarks.harness import program
from utils.arguments import positive
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import command

SGD = ("--lr", "2e-3")
COSINE = (*SGD, "--warm_epoch", "3", "--schedule", "cosine")
VARIANTS = {"published": (*SGD, "--warm_epoch", "1"),
            "cosine": COSINE,
            "cosine, no decay of norms": (*COSINE, "--norm_decay", "false"),
            "cosine, clipped at 100": (*COSINE, "--clip_norm", "100"),
            "modern": ("--recipe", "modern")}
SIZE = 300


def call(args: argparse.Namespace, *options: str) -> None:
    loading = ["--num_workers", str(args.num_workers)]
    if status := train_test.main([*options, "--amp", args.amp, *loading]):
        raise SystemExit(status)


def train(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Train a variant, unless that is done; return the run's folder."""
    name = f"{variant.replace(', ', '-').replace(' ', '_')}-{seed}"
    run = args.runs / f"{args.version}_{SIZE}" / name
    if not (run / f"Final_{args.version}_VOC.pth").is_file():
        call(args, "-d", "VOC", "-v", args.version, "-s", str(SIZE), "--root", str(args.root),
             "--basenet", "none", "-b", "8", "-max", str(args.epochs), "--seed", str(seed), "--ema",
             "0.9998", *VARIANTS[variant], "--date", name, "--save_folder", str(args.runs),
             "--test_frequency", "1000", "--save_frequency", "0", "--resume", "auto")
    return run


def scores(args: argparse.Namespace, run: Path) -> dict[str, tuple[float, dict[str, float]]]:
    """Return the AP (area metric), mean and per class, of the average and of the raw weights."""
    raw = run / "raw.pth"
    found = run / "ss_predict" / raw.stem / "test" / "results.json"
    if not found.is_file():
        saved = load_checkpoint(run / f"Final_{args.version}_VOC.pth")
        saved["model"] = saved.pop("raw_model")
        save_checkpoint(raw, saved)
        call(args, "--test", str(raw), "--score_threshold", "0.01")
    paths = {"average": run / "ss_predict" / "final" / "test" / "results.json", "raw": found}
    results = {key: json.loads(path.read_text())["area"] for key, path in paths.items()}
    return {key: (result["mean"], result["per_class"]) for key, result in results.items()}


def shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def parser() -> argparse.ArgumentParser:
    p = program("recipes", __doc__)
    p.add_argument("--root", type=Path, required=True, help="BCCD, or any folder in VOC layout")
    p.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    p.add_argument("--version", default="SSD_HarDNet39ds")
    p.add_argument("--epochs", type=positive, default=20)
    p.add_argument("--seeds", type=positive, default=3)
    p.add_argument("--amp", default="bf16")
    p.add_argument("--num_workers", type=int, default=2)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    found: dict[str, list] = {variant: [] for variant in VARIANTS}
    for seed in range(args.seeds):
        for variant in VARIANTS:
            found[variant].append(scores(args, train(args, variant, seed)))
    classes = list(found["published"][0]["raw"][1])
    print(f"| recipe | weights | {' | '.join(classes)} | mean | seeds |")
    print("|---" * (len(classes) + 4) + "|")
    for variant, runs in found.items():
        for weights in ("raw", "average"):
            means = [run[weights][0] for run in runs]
            cells = [shown([run[weights][1][name] for run in runs]) for name in classes]
            each = " ".join(f"{value:.3f}" for value in means)
            print(f"| {variant} | {weights} | {' | '.join(cells)} | {shown(means)} | {each} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
