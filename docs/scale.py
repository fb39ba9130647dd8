"""Print the tables of docs/scale.md, COCO on 1, 8 and 64 GPUs: `python -m docs.scale`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tools.traffic import table

# ---------------------------------------------------------------- measured or counted

PICTURES = 118_287  # COCO train2017
JPEG = 19.3e9 / PICTURES  # bytes of a picture's file
DECODED = 0.82e6  # bytes of a picture as BGR uint8
PARAMETERS, BUFFERS, NORMS = 25_700_414, 11_080, 64  # SSD512-HarDNet68, 81 classes
MACS = 34_427_536_384  # of a forward pass on one picture
TRAFFIC = 2 * 128_510_732  # its bytes in bf16, by docs/traffic.md
KEPT = {"plain": 176.5, "`--recompute`": 125.7}  # MiB for the backward pass, a picture in bf16
INPUT = 3 * 512 * 512  # bytes of a sample that go to the GPU: uint8
FROM_JPEG, FROM_CACHE = 268, 554  # samples a second and core
CHECKPOINT, CHECKPOINT_EMA = 205_853_945, 308_835_971  # bytes
SAVING, SAVING_EMA = 0.46, 0.68  # seconds of writing one
SCORING = {"pycocotools": 43, "hotcoco": 1.1}  # seconds, 5,000 pictures with 100 detections
READING, READING_PEAK = 9.2, 1.0  # seconds, GiB: train2017's annotations
INDEX, INDEX_WORKER = 0.15, 3.3  # GiB that stay; MiB of a loading process's own

# ---------------------------------------------------------------- assumed

PEAK = 989e12  # FLOP/s of an H100 SXM in bf16, dense
UTILISATIONS = (0.30, 0.15)
GPU_MEMORY = 3.35e12  # bytes/s
PCIE = {"Gen4": 31.5e9, "Gen5": 63e9}  # bytes/s, x16, each way
NVLINK = 450e9  # bytes/s, each way
NETWORKS = (100, 400)  # Gb/s of a node, each way
LATENCY = 30e-6  # seconds of a small exchange between nodes
NODE = 8  # GPUs
WORKERS = 8  # loading processes a GPU, a core each: the default of --num_workers

# ---------------------------------------------------------------- the recipe

EPOCHS = 150
BATCH = 32  # pictures a GPU
TESTS = EPOCHS // 10
# last.pth after an epoch; a tested one writes it before, too, and best.pth and the epoch's; Final_.
SAVES = EPOCHS + 3 * TESTS + 2


@dataclass(frozen=True)
class Job:
    """A training run on ``gpus`` GPUs, in nodes of 8."""

    gpus: int
    utilisation: float
    """Share of the peak that a training step reaches."""
    network: float = NETWORKS[-1]
    """Gb/s of a node."""
    batch: int = BATCH
    """Pictures a GPU."""

    @property
    def forward(self) -> float:
        """Seconds of a step's forward pass: two FLOPs a multiply-accumulate."""
        return self.batch * 2 * MACS / (self.utilisation * PEAK)

    @property
    def backward(self) -> float:
        """Seconds: the gradients of inputs and of weights cost a forward pass each."""
        return 2 * self.forward

    @property
    def exchange(self) -> float:
        """Seconds of a ring all-reduce of the float32 gradients, by the slowest link of the ring.

        Each link carries every gradient twice but for the share of one GPU. Within a node that is
        NVLink; of several nodes each has one port in the ring.
        """
        link = NVLINK if self.gpus <= NODE else self.network * 1e9 / 8
        return 2 * (self.gpus - 1) / self.gpus * 4 * PARAMETERS / link

    @property
    def limits(self) -> dict[str, float]:
        """Pictures a second that each resource allows where all others are free.

        The exchange can run beside the backward pass, but not beside the forward pass.
        """
        pictures = self.gpus * self.batch
        return {
            "GPU": pictures / (self.forward + self.backward),
            "loading": self.gpus * WORKERS * FROM_JPEG,
            "PCIe": self.gpus * PCIE["Gen4"] / INPUT,
            "gradients": pictures / (self.forward + self.exchange),
        }

    @property
    def binding(self) -> str:
        """The resource with the lowest limit."""
        return min(self.limits, key=self.limits.__getitem__)

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.limits[self.binding]

    def steps(self, pictures: int = PICTURES) -> int:
        """Of an epoch, whose last, smaller batch is left out."""
        return pictures // (self.gpus * self.batch)

    def epoch(self, pictures: int = PICTURES) -> float:
        """Seconds of an epoch's steps."""
        return self.steps(pictures) * self.gpus * self.batch / self.rate


def _share(x: float) -> str:
    return f"{100 * x:.0f} %"


def inputs() -> str:
    """What was measured or counted, and how."""
    loader, scorer = "`benchmarks.loader --cache memory`", "`benchmarks.coco_eval`"
    rows = [
        ("parameters, buffers", f"{PARAMETERS:,}, {BUFFERS:,}", "`tools.traffic`"),
        ("MACs of a forward pass on a picture", f"{MACS / 1e9:.2f} G", "`tools.traffic`"),
        ("its traffic in bf16", f"{TRAFFIC / 1e6:.0f} MB", "[traffic.md](traffic.md)"),
        *(
            (f"kept for the backward pass, {name}", f"{size} MiB", "`benchmarks.memory`")
            for name, size in KEPT.items()
        ),
        ("batch normalisations", f"{NORMS}", "counted"),
        ("a sample on its way to the GPU", f"{INPUT:,} bytes", "uint8, 3 x 512 x 512"),
        ("samples a second and core, from JPEG", f"{FROM_JPEG}", loader),
        ("samples a second and core, decoded before", f"{FROM_CACHE}", loader),
        ("train2017", f"{PICTURES:,} files, {PICTURES * JPEG / 1e9:.1f} GB", "published"),
        ("a picture decoded", f"{DECODED / 1e6:.2f} MB", "mean of 239 pictures of COCO"),
        ("a checkpoint, with moving average", _both(CHECKPOINT, CHECKPOINT_EMA), "saved"),
        ("writing it, with moving average", f"{SAVING} s, {SAVING_EMA} s", "median of 7, fsync"),
        *((f"scoring of 5,000 pictures, {name}", f"{s} s", scorer) for name, s in SCORING.items()),
        ("reading train2017's annotations", f"{READING} s", "`benchmarks.coco_load`"),
    ]
    return table(("measured or counted", "figure", "by"), rows)


def _both(*sizes: int) -> str:
    return ", ".join(f"{size / 1e6:.0f} MB" for size in sizes)


def assumptions() -> str:
    gen4, gen5 = (f"{PCIE[name] / 1e9:g}" for name in ("Gen4", "Gen5"))
    rows = [
        ("bf16 peak of a GPU", f"{PEAK / 1e12:.0f} TFLOP/s", "H100 SXM, dense"),
        ("share of it that training reaches", " or ".join(map(_share, UTILISATIONS)), "a guess"),
        ("memory of a GPU", f"{GPU_MEMORY / 1e12} TB/s", "H100 SXM"),
        ("PCIe x16, each way", f"{gen4} or {gen5} GB/s", "Gen4, Gen5"),
        ("NVLink, each way", f"{NVLINK / 1e9:.0f} GB/s", "H100 SXM"),
        ("network of a node", " or ".join(f"{n} Gb/s" for n in NETWORKS), "one port"),
        ("a small exchange between nodes", f"{LATENCY * 1e6:.0f} µs", "a guess"),
        ("GPUs of a node, loading processes a GPU", f"{NODE}, {WORKERS}", "a core each"),
    ]
    return table(("assumed", "figure", "of"), rows)


def needs() -> str:
    """What one GPU takes in, at each utilisation."""
    jobs = [Job(1, u) for u in UTILISATIONS]
    rates = [job.rate for job in jobs]
    rows = [
        ("pictures a second", [f"{r:,.0f}" for r in rates]),
        ("step", [f"{1e3 * (job.forward + job.backward):.1f} ms" for job in jobs]),
        ("weights, gradients, momentum", [f"{3 * 4 * PARAMETERS / 2**30:.1f} GiB"] * 2),
        *(
            (f"kept for the backward pass, {name}", [f"{BATCH * size / 2**10:.1f} GiB"] * 2)
            for name, size in KEPT.items()
        ),
        ("GPU memory traffic", [_share(r * 3 * TRAFFIC / GPU_MEMORY) for r in rates]),
        ("cores that load from JPEG", [f"{r / FROM_JPEG:.1f}" for r in rates]),
        ("cores that load from `--cache`", [f"{r / FROM_CACHE:.1f}" for r in rates]),
        ("PCIe", [f"{r * INPUT / 1e9:.2f} GB/s" for r in rates]),
        *(
            (f"share of PCIe {name}", [f"{100 * r * INPUT / speed:.1f} %" for r in rates])
            for name, speed in PCIE.items()
        ),
        ("JPEG files read", [f"{r * JPEG / 1e6:.0f} MB/s" for r in rates]),
        ("`--cache DIR` read", [f"{r * DECODED / 1e9:.2f} GB/s" for r in rates]),
    ]
    header = ("one GPU, batch 32", *(f"{_share(u)} of peak" for u in UTILISATIONS))
    return table(header, [(what, *cells) for what, cells in rows])


def binding() -> str:
    """The limits of each resource, in pictures a second."""
    shapes = [(1, BATCH, None), (NODE, BATCH, None)]
    shapes += [(64, batch, network) for batch in (BATCH, 8) for network in NETWORKS]
    rows = []
    for gpus, batch, network in shapes:
        for utilisation in UTILISATIONS:
            job = Job(gpus, utilisation, network or NETWORKS[-1], batch)
            limits = {name: f"{limit:,.0f}" for name, limit in job.limits.items()}
            if gpus == 1:
                limits["gradients"] = "-"
            wires = f"{network} Gb/s" if network else "NVLink" if gpus > 1 else "-"
            rows.append(
                (gpus, gpus * batch, wires, _share(utilisation), *limits.values(), job.binding)
            )
    header = ("GPUs", "batch", "between them", "of peak", "GPU", "loading", "PCIe Gen4")
    return table((*header, "gradients", "binds"), rows)


def durations() -> str:
    """Seconds of the whole training, and what of them is not training."""
    rows = []
    for gpus in (1, NODE, 64):
        for utilisation in UTILISATIONS:
            job = Job(gpus, utilisation)
            training = EPOCHS * job.epoch()
            scoring = {name: TESTS * seconds for name, seconds in SCORING.items()}
            # The other processes read what rank 0 has found to be right.
            beside = (EPOCHS * BATCH / FROM_JPEG, SAVES * SAVING, READING * min(gpus, 2))
            total = training + sum(beside) + scoring["hotcoco"]
            seconds = (training, *beside, *scoring.values(), total)
            rows.append((gpus, _share(utilisation), job.steps(), *map(round, seconds)))
    header = ("GPUs", "of peak", "steps an epoch", "training", "first batches", "saving")
    return table((*header, "annotations", *SCORING, "all with hotcoco"), rows)


def larger(pictures: int = 2_000_000) -> str:
    """What grows with the number of pictures."""
    both = (PICTURES, pictures)
    factors = [n / PICTURES for n in both]
    eight, many = (Job(gpus, UTILISATIONS[0]) for gpus in (NODE, 64))
    others = NODE - 1  # read at once, after rank 0
    rows = [
        ("JPEG files", [f"{n * JPEG / 1e9:,.0f} GB" for n in both]),
        ("decoded, as `--cache` keeps them", [f"{n * DECODED / 1e9:,.0f} GB" for n in both]),
        ("reading the annotations", [f"{READING * x:.0f} s" for x in factors]),
        ("memory for that, a node", [f"{others * READING_PEAK * x:.0f} GiB" for x in factors]),
        ("memory that stays, a node", [f"{NODE * INDEX * x:.1f} GiB" for x in factors]),
        ("a loading process's own", [f"{INDEX_WORKER * x:.0f} MiB" for x in factors]),
        ("order of an epoch", [f"{8 * n / 1e6:.1f} MB" for n in both]),
        ("epoch, 8 GPUs", [f"{eight.epoch(n):.1f} s" for n in both]),
        ("epoch, 64 GPUs", [f"{many.epoch(n):.1f} s" for n in both]),
        ("shards of 1 GB", [f"{math.ceil(n * JPEG / 1e9):,}" for n in both]),
    ]
    header = ("30 % of peak", *(f"{n:,} pictures" for n in both))
    return table(header, [(what, *cells) for what, cells in rows])


def main() -> None:
    print("\n\n".join([inputs(), assumptions(), needs(), binding(), durations(), larger()]))


if __name__ == "__main__":
    main()
