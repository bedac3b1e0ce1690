#!/usr/bin/env bash
# Checks the style and runs all tests on the CPU: bash tests/run.sh [arguments of pytest]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../examples/setup_venv.sh"

export OMP_NUM_THREADS=1  # several ranks share the cores
ruff check .
ruff format --check .
if (($#)); then
  exec python -m pytest "$@"
fi
# Two files at a time; what measures time or pretends to be several machines has this one to itself.
failed=0
python -m pytest -n 2 --dist loadfile -m "not alone" || failed=1
python -m pytest -m alone || failed=1
exit "$failed"
