#!/usr/bin/env bash
# The environment of a machine with accelerators: bash launch/install.sh tpu|cuda
# Where the system has no Python 3.11 (images of TPU VMs have 3.10), uv brings one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh

platform=${1:-}
[[ $platform =~ ^(cuda|tpu)$ ]] || fail "the platform is '$platform'; bash launch/install.sh tpu|cuda"
if [ ! -x .venv/bin/python ] && ! (find_python >/dev/null 2>&1); then
    python3 -m pip install --quiet --user uv || fail "neither Python 3.11 nor pip is here; install one of them"
    PYTHON=$(python3 -m uv python install --quiet 3.11 && python3 -m uv python find 3.11) ||
        fail "uv could not install Python 3.11; see its message above"
    export PYTHON
fi
setup_venv requirements.txt "requirements-$platform.txt"
