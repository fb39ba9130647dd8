#!/usr/bin/env bash
# Everything that needs a GPU, in one call; benchmarks/gpu/README.md has the results.
#
#   BCCD=FOLDER benchmarks/gpu.sh [PART ...]      all parts, or some:
#
#   build   compile the routines, fill torch.compile's cache; first on a new machine
#   nms     suppression beside torchvision's, and from outputs to detections
#   speed   forward passes of four networks by each route, from files to boxes
#   step    training step, loss, loading
#   gather  the gathered convolutions beside the other routes
#   tests   the tests marked gpu                these three run at the same time
#   bccd    training, several seeds
#   resume  the same run again, and stopped and resumed
#
# Every call has a limit of time, and a failure stops nothing else. The rows of every call are
# printed at the end of its part. OUT=FOLDER (runs/gpu) gets log.txt with all output.
# BCCD=FOLDER: BCCD in VOC layout. ROWS="no_expansion" (on_gpu.ROWS has others),
# EPOCHS=60, SEEDS="0 1 2", OPTIONS="more options of train_test.py".
# LIMIT=720: seconds of everything. DEVICE=cpu QUICK=1 tries the script itself with tiny inputs.
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-python3}" -m benchmarks.on_gpu "$@"
