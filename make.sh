#!/usr/bin/env bash
# Install the packages and compile the NMS extensions.
#
# The packages go into the active virtual or conda environment, else into .venv here, which is
# created. SSD_VENV=DIR selects another environment, and creates it if needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
usage: ./make.sh              set up: install what is missing, compile the extensions
       ./make.sh demo [ARG]   set up, then python -m demo.run ARG...
       ./make.sh test [ARG]   set up with the test tools, then ruff and python -m pytest ARG...
USAGE
}

die() {
    echo "make.sh: $1" >&2
    exit "${2:-1}"
}

python_of() {
    local candidate
    for candidate in "$1/bin/python" "$1/Scripts/python.exe" "$1/python.exe"; do
        if [[ -x $candidate ]]; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

require_python() {
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        die "$1 does not run; activate an environment with Python 3.10 or newer" 2
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$1 is Python $version, and 3.10 or newer is needed; activate an environment with it" 2
}

# Print the python to use; create its environment if there is none.
environment() {
    local folder=.venv
    if [[ -n ${SSD_VENV:-} ]]; then
        folder=$SSD_VENV
    elif [[ -n ${VIRTUAL_ENV:-} ]]; then
        folder=$VIRTUAL_ENV
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
        folder=$CONDA_PREFIX
    fi
    if ! python_of "$folder"; then
        local base
        base=$(command -v python3 || command -v python) ||
            die "python3 was not found; install Python 3.10 or newer" 2
        require_python "$base"
        [[ ! -e $folder ]] || die "$folder holds no Python; remove it, or name another in SSD_VENV" 2
        echo "creating the environment $folder" >&2
        if ! "$base" -m venv "$folder" >&2; then
            rm -rf "$folder"
            die "$base cannot create environments (on Debian and Ubuntu: apt install python3-venv)"
        fi
        python_of "$folder"
    fi
}

task=${1:-}
shift || true
case $task in
    '' | demo | test) ;;
    -h | --help) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac

python=$(environment)
require_python "$python"
extra=core
[[ $task != test ]] || extra=test
missing=$("$python" utils/build.py --missing "$extra")
if [[ -n $missing ]]; then
    packages=()
    while read -r line; do
        packages+=("$line")
    done <<<"$missing"
    echo "installing ${packages[*]}"
    "$python" -m pip install --quiet "${packages[@]}" ||
        die "pip could not install ${packages[*]} into the environment of $python"
fi
"$python" utils/build.py
[[ $(command -v python || true) -ef $python || ! -e ${python%/*}/activate ]] ||
    echo "set up in ${python%/*/*}; to use it: source ${python%/*}/activate"

case $task in
    demo) exec "$python" -m demo.run "$@" ;;
    test)
        "$python" -m ruff check .
        # One process per core. The tests of a file share fixtures and stay in one process.
        exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
        ;;
esac
