#!/bin/sh
# Make a virtual environment with memtrain in it; running it again is harmless. Called by `make setup`.
#
#   VENV=.venv PYTHON=python3.11 TORCH=torch==2.13.0+cpu sh scripts/setup.sh
#
# torch comes first and by its full local version: a bare `torch` brings gigabytes of CUDA with it, and a
# package that only says `torch` would then be content with what is there.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
TORCH=${TORCH:-torch==2.13.0+cpu}
VENV=${VENV:-.venv}
CPU_INDEX=https://download.pytorch.org/whl/cpu

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "memtrain needs Python 3.11 or newer; '$PYTHON' is not one. On Debian or Ubuntu:" >&2
    echo "    sudo apt-get install python3.11 python3.11-venv" >&2
    exit 1
fi
if [ ! -x "$VENV/bin/python" ]; then
    "$PYTHON" -m venv "$VENV" || {
        echo "could not make $VENV; on Debian or Ubuntu: sudo apt-get install python3.11-venv" >&2
        exit 1
    }
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

pip install -c constraints.txt setuptools wheel
# First from what this machine's pip is configured with (a mirror may carry the CPU build), then from
# PyTorch's own index.
if ! pip install -c constraints.txt "$TORCH" 2>/dev/null; then
    pip install -c constraints.txt --extra-index-url "$CPU_INDEX" "$TORCH"
fi
pip install -c constraints.txt --no-build-isolation -e '.[hf,plots,dev]'
# memtrain's optimizers on a CPU, compiled now: the compiler takes 160 MiB, which a run under a budget may not
# have. Without a compiler they run as plain torch; it says so itself, and set-up goes on. So with the planned
# allocator, a call of two seconds.
"$VENV/bin/python" -m memtrain.optim.kernels.native || true
"$VENV/bin/python" -m memtrain.arena || true
