#!/usr/bin/env bash
# ./test.sh [pytest arguments]   environment, lint, and the test suite
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
. tools/environment.sh

prepare_environment requirements.txt requirements-dev.txt requirements-export.txt
lint=0
"$VENV_PYTHON" -m ruff check . || lint=$?
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the workers share the cores
"$VENV_PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
exit "$lint"
