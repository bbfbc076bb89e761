#!/bin/sh
# sh locks/install.sh EXTRAS PIP INSTALL ...: installs what the extras (cpu,otel) need, nothing without its hash, as in
#   sh locks/install.sh cpu,otel python3 -m pip install
# A lock holds everything that its extra needs, so nothing is left to resolve. What pip builds a source package with is
# not locked: tensorrt-rtx-cu13 and tensorrt-cu13, shells around two packages each, and tensorrt-cu13-libs, which fetches
# its wheel from NVIDIA's own index while it is built. `gpu` and `train` do not go together: each has the CUDA libraries
# that its own engine was built for.
set -eu
extras=$1
shift
set -- "$@" --no-deps --require-hashes
for extra in $(echo "$extras" | tr , ' '); do set -- "$@" -r "locks/$extra.txt"; done
exec "$@"
