#!/bin/sh
# Make .venv-deepspeed, the peer that benchmarks/ measures memtrain against, and build its CPU operators.
# Running it again is harmless. Five to ten minutes on two cores, most of them compiling.
#
#     sh scripts/setup_deepspeed.sh
#
# An environment of its own: DeepSpeed's operators are compiled against one exact torch and kept in the
# environment's folder, and nothing that DeepSpeed pulls in can touch what memtrain is tested with.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11}
TORCH=${TORCH:-torch==2.13.0+cpu}
VENV=.venv-deepspeed
CPU_INDEX=https://download.pytorch.org/whl/cpu

if [ ! -e /usr/include/libaio.h ] || ! command -v g++ >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq g++ libaio-dev
    else
        echo "DeepSpeed's asynchronous I/O needs a compiler and libaio's headers; on Debian or Ubuntu:" >&2
        echo "    sudo apt-get install g++ libaio-dev" >&2
        exit 1
    fi
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input --quiet "$@"; }

pip install -c constraints.txt setuptools wheel
pip install ninja
# torch before DeepSpeed, by its full local version: DeepSpeed asks for any torch.
if ! pip install -c constraints.txt "$TORCH" 2>/dev/null; then
    pip install -c constraints.txt --extra-index-url "$CPU_INDEX" "$TORCH"
fi
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install -c constraints.txt --no-build-isolation \
    deepspeed==0.19.8 transformers==5.23.0 safetensors

# DeepSpeed compiles operators at first use. Do it here, so that no benchmark pays for it.
export DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$PWD/$VENV/torch_extensions" MAX_JOBS="${MAX_JOBS:-2}"
export PATH="$PWD/$VENV/bin:$PATH"
nice -n 10 python - <<'END'
from deepspeed.accelerator import get_accelerator

for name in ("AsyncIOBuilder", "CPUAdamBuilder", "PinMemoryBuilder", "ShareMemCommBuilder"):
    get_accelerator().get_op_builder(name)().load(verbose=False)
    print(f"{name.removesuffix('Builder')}: built", flush=True)
END
