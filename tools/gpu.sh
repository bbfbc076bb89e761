#!/usr/bin/env bash
# tools/gpu.sh [PRESET]: everything that needs an NVIDIA GPU: the tests marked gpu, checked plans of the demo model and of
# a PRESET (dsd-b, random weights), and the benchmark of docs/speed.md.
# Needs: pip install -e '.[gpu,train,export,tensorrt,dev]' -c constraints.txt, and for datacenter GPUs NVIDIA's tensorrt.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:-dsd-b}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python -m pytest -m gpu -rs
cp -r dsd_serve/demo "$work/demo"
python -m export "$work/demo" --trt --precision fp32 fp16 bf16
python -m export --untrained "$preset" -o "$work/$preset" --trt --precision fp32 fp16 bf16
python -m benchmarks.gpu_speed "$work/$preset" --device cuda
