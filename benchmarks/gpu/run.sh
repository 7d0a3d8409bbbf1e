#!/usr/bin/env bash
# Measure correctness, speed and learning on one NVIDIA GPU: see README.md. Run it from the repository root.
set -eu
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
