#!/bin/sh
# Make .venv-optim: Triton, for the kernels' tests and their ahead-of-time compilation, and the peers that
# the optimizers are compared with. Running it again is harmless. Called by `make test`.
#
# An environment of its own over .venv, whose packages it sees: where Triton can be imported, torch imports
# it, which costs a process on a CPU 80 MiB (measured: 334 MiB resident after torch and transformers, 414
# with Triton) that no training there should pay. A GPU build of torch brings its own Triton.
set -eu
cd "$(dirname "$0")/.."
BASE=${BASE:-.venv}
VENV=${VENV:-.venv-optim}

[ -x "$VENV/bin/python" ] || "$BASE/bin/python" -m venv "$VENV"
site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
printf "import site; site.addsitedir('%s')\n" "$(site_of "$BASE")" >"$(site_of "$VENV")/base_environment.pth"
# --no-deps: all three ask for torch, which the base environment has.
"$VENV/bin/python" -m pip --disable-pip-version-check --no-input install --no-deps -c constraints.txt \
    triton bitsandbytes galore-torch
