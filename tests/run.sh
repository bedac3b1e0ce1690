#!/usr/bin/env bash
# Checks the style and runs all tests on the CPU: bash tests/run.sh [arguments of pytest]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../examples/setup_venv.sh"

export OMP_NUM_THREADS=1  # several ranks share the cores
ruff check .
ruff format --check .
exec python -m pytest "$@"
