#!/bin/sh
# Pascal VOC 2007, trainval and test: data/scripts/VOC2007.sh [--root ~/data] [--url-base URL]
set -eu
repo=$(cd "$(dirname "$0")/../.." && pwd)
# The module is run by its path: with -m, a data/ or utils/ in the caller's folder would win.
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
exec python3 "$repo/data/scripts/voc.py" 2007 "$@"
