#!/usr/bin/env bash
# tools/gpu.sh [PRESET]: everything that needs an NVIDIA GPU: the tests marked gpu, checked plans of the demo model and of
# a PRESET (dsd-b, random weights), and the benchmark of docs/speed.md. A step that fails does not end the others, because
# time on a GPU is dear; the exit status is then 1.
# Needs: pip install -e '.[gpu,train,export,tensorrt,dev]' -c constraints.txt, or tensorrt-rtx on GeForce RTX and RTX PRO.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
preset=${1:-dsd-b}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
failed=()
step() {
  echo "gpu.sh: $*"
  "$@" || failed+=("$*")
}
step nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step python -m pytest -m gpu -rs
cp -r dsd_serve/demo "$work/demo"
step python -m export "$work/demo" --precision fp16 bf16
step python -m export --untrained "$preset" -o "$work/$preset" --precision fp16 bf16
for precision in fp32 fp16 bf16; do
  step python -m export "$work/demo" --trt --precision "$precision"
  step python -m export "$work/$preset" --trt --precision "$precision"
done
step python -m benchmarks.gpu_speed "$work/$preset" --device cuda
for command in "${failed[@]+"${failed[@]}"}"; do echo "gpu.sh: failed: $command" >&2; done
[ ${#failed[@]} -eq 0 ]
