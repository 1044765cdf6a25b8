#!/bin/sh
# Install the allocators that benchmarks/allocator.py compares with: jemalloc and tcmalloc, as Debian and
# Ubuntu have them. Running it again is harmless. memtrain itself uses neither.
set -eu
tcmalloc=libtcmalloc-minimal4
# Ubuntu from 24.04 on: the name carries the 64-bit time transition.
apt-cache show "$tcmalloc" >/dev/null 2>&1 || tcmalloc=libtcmalloc-minimal4t64
if [ "$(id -u)" = 0 ]; then
    apt-get install -y -qq --no-install-recommends libjemalloc2 "$tcmalloc"
else
    echo "this needs root: sudo apt-get install --no-install-recommends libjemalloc2 $tcmalloc" >&2
    exit 1
fi
