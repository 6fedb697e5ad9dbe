#!/usr/bin/env bash
# Trains on TPUs of Google Kubernetes Engine, through xpk; see launch/xpk.md.
#
#   bash launch/xpk.sh COMMAND --cluster=CLUSTER --zone=ZONE --project=PROJECT [OPTIONS] [-- FLAGS OF trm_diffusion.main]
#
#   create    create the cluster, with nodes for the slices
#   image     build the image of launch/Dockerfile and push it
#   start     start the job; its flags go after --. If it is preempted or fails, it restarts and resumes from its workdir
#   status    list the jobs of the cluster
#   logs      follow the first worker's log
#   stop      ask the job to save, and remove it; start resumes it
#   delete    delete the cluster
#
#   --cluster, --zone, --project
#   --name=NAME         start, logs, stop: name of the job
#   --type=TYPE         create, start: TPU type of a slice, such as v5p-128 or v6e-64
#   --slices=N          create, start: number of slices, 1 by default
#   --image=IMAGE       image, start: such as us-docker.pkg.dev/PROJECT/REPOSITORY/trm_diffusion:latest
#   --spot              create: cheaper, but can be preempted
#   --restarts=N        start: maximum number of restarts, 100 by default
#   --dry-run           print every command and run none
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/remote.sh
source launch/remote.sh

grace_seconds=300 # time to save when a node is preempted

create() {
    need_option type
    local flags=("--tpu-type=$type" "--num-slices=$slices")
    [ -z "$spot" ] || flags+=(--spot)
    run xpk cluster create "${place[@]}" "${flags[@]}"
}

image() {
    need_option image
    need_tool docker "https://docs.docker.com/engine/install"
    run docker build --file=launch/Dockerfile "--tag=$image" .
    run docker push "$image"
}

start() {
    need_option name type image
    need_job
    run xpk workload create "${place[@]}" "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" \
        "--docker-image=$image" "--max-restarts=$restarts" --restart-on-user-code-failure \
        "--termination-grace-period-seconds=$grace_seconds" \
        "--command=exec bash launch/job.sh tpu $(quoted "${job_flags[@]}")"
}

logs() {
    need_option name
    need_tool kubectl "gcloud components install kubectl"
    local labels=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0
    run gcloud container clusters get-credentials "$cluster" "--location=${zone%-*}" "--project=$project"
    run kubectl logs --follow --selector="$labels,batch.kubernetes.io/job-completion-index=0"
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
    create | image | start | status | logs | stop | delete) ;;
    help | --help | -h) usage && exit ;;
    *) fail "$command is not a command; bash $0 help lists them" ;;
esac
cluster='' zone='' project='' name='' type='' slices=1 image='' spot='' restarts=100
parse_options "cluster zone project name type slices image restarts" "spot dry-run" "$@"
place=("--cluster=$cluster" "--zone=$zone" "--project=$project")
if [ "$command" != image ]; then
    need_option cluster zone project
    need_tool xpk "pip install xpk, in an environment of its own"
fi

case $command in
    status) run xpk workload list "${place[@]}" ;;
    stop)
        need_option name
        run xpk workload delete "${place[@]}" "--workload=$name" --force
        ;;
    delete) run xpk cluster delete "${place[@]}" ;;
    *) "$command" ;;
esac
