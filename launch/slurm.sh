#!/usr/bin/env bash
# Trains on a Slurm cluster with NVIDIA GPUs: one process per GPU, on any number of nodes.
#
#   bash launch/install.sh cuda                                   once, on the shared file system
#   bash launch/slurm.sh submit --nodes=N [OPTIONS] -- FLAGS OF trm_diffusion.main
#
# 300 seconds before its time limit, the job is asked to save, exits with code 75 and is requeued. The same happens when
# Slurm preempts it or a node fails. It resumes from its workdir, which must be on the shared file system.
# scancel JOB ends it for good.
#
#   --nodes=N               number of nodes
#   --gpus-per-node=N       8 by default
#   --cpus-per-task=N       8 by default: cores per process, for reading data
#   --time=TIME             24:00:00 by default: time limit between requeues
#   --name=NAME             trm_diffusion by default
#   --sbatch-flags="..."    further flags of sbatch, such as --partition=gpu --account=me
#   --dry-run               print every command and run none
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" # Slurm runs a copy of this script in another place
# shellcheck source=launch/remote.sh
source launch/remote.sh

submit() {
    local extra
    read -ra extra <<<"$sbatch_flags"
    [ -n "$dry_run" ] || [ -x .venv/bin/python ] || fail "there is no .venv; run bash launch/install.sh cuda first"
    run sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus_per_node" "--gpus-per-node=$gpus_per_node" \
        "--cpus-per-task=$cpus_per_task" "--time=$time" --requeue --signal=TERM@300 --open-mode=append --output=slurm-%j.log \
        ${extra[@]+"${extra[@]}"} launch/slurm.sh batch -- "${job_flags[@]}"
    [ -z "$dry_run" ] || batch
}

batch() {
    local ended=0
    # Each task sees all GPUs of its node and takes the one with its index. After one exits, the others have time to save.
    run srun --kill-on-bad-exit=0 --wait=600 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-$cpus_per_task}" \
        bash launch/job.sh cuda "${job_flags[@]}" || ended=$?
    if [ -n "$dry_run" ]; then
        echo "# if that ends with exit code 75:"
        ended=75
    fi
    [ $ended != 75 ] || run scontrol requeue "${SLURM_JOB_ID:-JOB}"
    [ -n "$dry_run" ] || exit $ended
}

command=${1:-help}
[ $# -eq 0 ] || shift
nodes='' gpus_per_node=8 cpus_per_task=8 time=24:00:00 name=trm_diffusion sbatch_flags=''
case $command in
    submit)
        parse_options "nodes gpus-per-node cpus-per-task time name sbatch-flags" "dry-run" "$@"
        need_option nodes
        need_tool sbatch "run this on a login node of a Slurm cluster"
        ;;
    batch) parse_options "" "" "$@" ;;
    help | --help | -h) usage && exit ;;
    *) fail "$command is not a command; bash $0 help lists them" ;;
esac
[ ${#job_flags[@]} -gt 0 ] || fail "$command needs the job's flags after --, such as -- --config=configs/imagenet256.py"
"$command"
