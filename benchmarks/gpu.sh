#!/usr/bin/env bash
# Checks and measures the library on one GPU; see benchmarks/gpu.py.
#
#   bash benchmarks/gpu.sh OUT [--small] [--stages correctness,speed] [--limit SECONDS]
set -euo pipefail
out=$(realpath -m -- "${1:?usage: bash benchmarks/gpu.sh OUT [options of benchmarks/gpu.py]}")
shift
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu --out "$out" "$@"
