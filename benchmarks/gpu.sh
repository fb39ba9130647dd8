#!/usr/bin/env bash
# Everything that waits for a GPU, in one script: what the machine is, the compiled routines, the
# GPU tests, the speed table, and training on BCCD. benchmarks/gpu/README.md lists the results.
#
#   benchmarks/gpu.sh tests                       compile, and run the tests marked "gpu"
#   benchmarks/gpu.sh speed                       each stage from picture to boxes by each route,
#                                                 training step of each network, suppression, and
#                                                 from outputs to detections
#   benchmarks/gpu.sh blocks [VERSION]            HarD blocks: concatenated, sliced, split, gathered
#   benchmarks/gpu.sh training [ROOT]             loss, step (eager and compiled), activation memory,
#                                                 loading; ROOT: data in VOC layout
#   benchmarks/gpu.sh bccd ROOT [train_test options]
#                                                 train SSD300-HarDNet68 on BCCD, test, print AP
# OUT=FOLDER keeps logs and results there (default: runs/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
"$python" - <<'PY'
import torch
assert torch.cuda.is_available(), "no GPU that PyTorch can use"
print(torch.cuda.get_device_name(), "| torch", torch.__version__, "| CUDA", torch.version.cuda)
PY
case "${1:-}" in
tests)
    "$python" utils/build.py
    "$python" utils/build.py --check
    "$python" -m pytest -m gpu -v
    ;;
speed)
    "$python" utils/build.py --check
    "$python" -m benchmarks.nms --device cuda --boxes 1000 10000 100000 --json "$out/nms.json"
    for batch in 1 32; do
        "$python" -m benchmarks.detect --device cuda --batch $batch --json "$out/detect_$batch.json"
    done
    nets=(SSD_HarDNet68 SSD_vgg SSD_HarDNet85 SSD_resnet101)
    "$python" -m benchmarks.speed --device cuda --roofline --rounds 30 --amp off tf32 bf16 fp16 \
        --routes plain deployed graph gather gather_graph --json "$out/speed.json"
    "$python" -m benchmarks.speed --device cuda --version "${nets[@]}" --rounds 30 \
        --amp off tf32 bf16 fp16 --routes plain deployed compiled --json "$out/speed_compiled.json"
    "$python" -m benchmarks.speed --device cuda --roofline --version "${nets[@]}" --rounds 10 \
        --batch 8 32 64 128 --amp off tf32 bf16 fp16 --routes plain deployed graph \
        --json "$out/speed_batches.json"
    "$python" -m benchmarks.network --device cuda --json "$out/network.json"
    ;;
blocks)
    version=${2:-SSD_HarDNet68}
    common=(--device cuda --version "$version" --amp bf16)
    "$python" -m benchmarks.blocks "${common[@]}" --routes concatenate slices split --compile \
        --json "$out/blocks_$version.json"
    # The gathering kernel is compiled for every layer and a few tiles: minutes the first time.
    "$python" -m benchmarks.blocks "${common[@]}" --routes gather --pad 1 8 \
        --json "$out/blocks_${version}_gather.json"
    ;;
training)
    data=()
    [[ -z ${2:-} ]] || data=(--root "$2")
    "$python" -m benchmarks.loss --device cuda --json "$out/loss.json"
    "$python" -m benchmarks.memory --device cuda --json "$out/memory.json"
    for amp in bf16 fp16; do
        "$python" -m benchmarks.step --device cuda --size 512 --batch 32 --amp $amp "${data[@]}" \
            --json "$out/step_$amp.json"
        "$python" -m benchmarks.step --device cuda --size 512 --batch 32 --amp $amp --compile \
            "${data[@]}" --json "$out/step_${amp}_compiled.json"
    done
    [[ -z ${2:-} ]] || "$python" -m benchmarks.loader "${data[@]}" --workers 8 16 \
        --json "$out/loader.json"
    ;;
bccd)
    root=${2:?"give the folder of BCCD"}
    shift 2
    "$python" train_test.py -d VOC -v SSD_HarDNet68 -s 300 --root "$root" -b 16 --amp bf16 \
        --train_sets trainval --test_sets test --save_folder "$out/bccd" "$@"
    ;;
*)
    echo "usage: benchmarks/gpu.sh tests | speed | blocks [VERSION] | training [ROOT] |" \
        "bccd ROOT [options]" >&2
    exit 2
    ;;
esac
