#!/usr/bin/env bash
# Every test, from nothing. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
setup_venv requirements.txt requirements-test.txt
export JAX_PLATFORMS=cpu
exec .venv/bin/python -m pytest "$@"
