#!/usr/bin/env bash
# Runs one process of a job; the other launch scripts call it: bash launch/job.sh PLATFORM FLAGS...
# PLATFORM is cpu, cuda or tpu; FLAGS go to trm_diffusion.main, whose exit code is returned (75: start it again).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
# shellcheck source=launch/xla_flags.sh
source launch/xla_flags.sh

platform=${1:-}
[[ $platform =~ ^(cpu|cuda|tpu)$ ]] || fail "the platform is '$platform'; bash launch/job.sh cpu|cuda|tpu FLAGS..."
shift
python=.venv/bin/python
[ -x $python ] || python=$(find_python) # in a container, where the system's Python has the requirements
xla_flags "$platform"
exec "$python" -m trm_diffusion.main --platform="$platform" "$@"
