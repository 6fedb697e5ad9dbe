#!/usr/bin/env bash
# Installs, then trains, samples and evaluates a small recursive DiT on scanned digits: five minutes on two CPU cores.
# Further arguments go to the job, such as --workdir=DIR or --config.seed=1.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
setup_venv requirements.txt

workdir=runs/digits
for argument in "$@"; do
    case "$argument" in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
.venv/bin/python -m trm_diffusion.main --config=configs/digits.py "$@"
cat >&2 <<MESSAGE

Where to look:
  $workdir/samples/evaluation.png   generated digits, one row per class
  $workdir/evaluation.json          class accuracy, Frechet distance, memorisation, evaluation settings
  $workdir/metrics.jsonl            the training curve
To sample another grid: .venv/bin/python -m trm_diffusion.main --config=configs/digits.py --workdir=$workdir --mode=sample --config.sample.classes=3,7
MESSAGE
