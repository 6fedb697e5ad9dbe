#!/usr/bin/env bash
# Scores exported images with GenEval's own detector (Mask2Former, and CLIP for colours). It needs conda and an NVIDIA GPU,
# and runs in a separate environment (PyTorch, mmcv and mmdet of 2023). The two environments exchange only files.
#
#   bash launch/geneval.sh install --home=DIR              install the evaluator, its environment and its detector, once
#   bash launch/geneval.sh score --home=DIR --images=IMAGES --results=RESULTS.jsonl
#
# score checks that IMAGES holds four images for every prompt (trm_diffusion/metrics/geneval.py describes the layout), runs
# the detector on each, and prints the official scores of RESULTS.jsonl as one line of JSON.
#   --dry-run               print every command and run none
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/remote.sh
source launch/remote.sh

evaluator=https://github.com/djghosh13/geneval
evaluator_commit=16382b084e1f9ceeefed3a8cb102044e67486dd8
detector=https://github.com/open-mmlab/mmdetection # from source: its packages lack the detector's configs
detector_version=v2.27.0                          # fits mmcv-full 1.7.1, which the evaluator's environment pins

install() {
    need_tool git "install it with the system's package manager"
    need_tool conda "https://docs.conda.io/projects/miniconda"
    run git clone $evaluator "$home/geneval"
    run git -C "$home/geneval" checkout $evaluator_commit
    run git clone --depth=1 --branch=$detector_version $detector "$home/mmdetection"
    run conda env create "--prefix=$home/environment" "--file=$home/geneval/environment.yml"
    run conda run "--prefix=$home/environment" pip install --editable "$home/mmdetection"
    run conda run "--prefix=$home/environment" bash "$home/geneval/evaluation/download_models.sh" "$home/detector"
}

score() {
    need_option images results
    need_tool conda "https://docs.conda.io/projects/miniconda"
    local ours=(.venv/bin/python -m trm_diffusion.metrics.geneval)
    run "${ours[@]}" --prompts "$home/geneval/prompts/evaluation_metadata.jsonl" --images "$images"
    run conda run --no-capture-output "--prefix=$home/environment" python "$home/geneval/evaluation/evaluate_images.py" \
        "$images" --outfile "$results" --model-path "$home/detector"
    run "${ours[@]}" --results "$results"
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
    install | score) ;;
    help | --help | -h) usage && exit ;;
    *) fail "$command is not a command; bash $0 help lists them" ;;
esac
home='' images='' results=''
parse_options "home images results" "dry-run" "$@"
need_option home
"$command"
