#!/usr/bin/env bash
# Everything that waits for a GPU, in one call; benchmarks/gpu/README.md lists the results.
#
#   BCCD=FOLDER benchmarks/gpu.sh [PART ...]      all parts (about 9 minutes on an H100), or some:
#
#   build   compile the routines, tell what the machine is      step   training step, loss, memory,
#   warm    fill the compilers' caches (beside build)                  loading
#   nms     suppression, and from outputs to detections         tests  those marked "gpu"
#   speed   forward pass of four networks by each route         bccd   training, several seeds
#   gather  the gathered convolutions beside the other routes   nccl   torchrun, exact resuming
#
# The last three run at the same time. Every call has a limit of time, and what fails stops nothing
# else. OUT=FOLDER (runs/gpu) gets log.txt, results.jsonl (a line a part) and bccd.json.
# BCCD=FOLDER: BCCD in VOC layout; EPOCHS=60, SEEDS="0 1 2"; LIMIT=570: seconds of everything.
# DEVICE=cpu QUICK=1 tries the script itself, tiny.
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-python3}" -m benchmarks.on_gpu "$@"
