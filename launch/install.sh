#!/usr/bin/env bash
# Installs the environment on a machine with accelerators: bash launch/install.sh tpu|cuda
# If the system has no Python 3.11 (TPU VM images have 3.10), uv installs one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

platform=${1:-}
[[ $platform =~ ^(cuda|tpu)$ ]] || fail "the platform is '$platform'; bash launch/install.sh tpu|cuda"
if [ ! -x .venv/bin/python ] && ! (find_python >/dev/null 2>&1); then
    python3 -m pip install --quiet --user uv || fail "neither Python 3.11 nor pip was found; install one of them"
    PYTHON=$(python3 -m uv python install --quiet 3.11 && python3 -m uv python find 3.11) ||
        fail "uv could not install Python 3.11; see its message above"
    export PYTHON
fi
setup_venv requirements.txt "requirements-$platform.txt"
