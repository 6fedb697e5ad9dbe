#!/usr/bin/env bash
# Installs, then runs the linters and all tests except those of parity with PyTorch; --parity runs those, in a separate
# environment. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
export JAX_PLATFORMS=cpu
if [ "${1:-}" = --parity ]; then
    shift
    venv=.venv-parity
    setup_venv requirements.txt requirements-test.txt requirements-parity.txt requirements-torch.txt
    exec "$venv/bin/python" -m pytest tests/parity --numprocesses=auto --maxprocesses=2 --dist=loadfile "$@"
fi
setup_venv requirements.txt requirements-test.txt requirements-emoji.txt requirements-frozen-lake.txt \
    requirements-plots.txt
.venv/bin/python -m ruff check --quiet .
.venv/bin/python -m ruff format --check --quiet .
.venv/bin/lint-imports --no-logo --no-cache
exec .venv/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
