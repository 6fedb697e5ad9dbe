#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one slice or several, through queued resources.
#
#   bash launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- FLAGS OF trm_diffusion.main]
#
#   keep      everything until the job is done: create, install, start, watch; if the slices are preempted, repeat, and
#             resume the job from its workdir on gs://
#   create    request the slices, and wait for them
#   install   copy this checkout to every worker and install its environment there
#   start     start the job on every worker in the background; its flags go after --
#   status    the state of the slices; for every worker: none, running, or the exit code of its job
#   logs      follow the first worker's log
#   stop      ask the job to save and exit with code 75; start resumes it. A running keep resumes it at once: end that first
#   delete    delete the slices
#
#   --name=NAME           name of the queued resource
#   --zone=ZONE           such as us-east5-a
#   --project=PROJECT     by default gcloud's project
#   --type=TYPE           keep, create: accelerator type of a slice, such as v5p-128 or v6e-64
#   --slices=N            number of slices, 1 by default; give it to every command
#   --runtime=VERSION     keep, create: the image; by default the one for --type
#   --spot                keep, create: cheaper, but can be preempted
#   --reserved            keep, create: use the project's reservation
#   --create-flags="..."  keep, create: further flags of gcloud compute tpus queued-resources create
#   --dry-run             print every command and run none
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/remote.sh
source launch/remote.sh

queued=(gcloud --quiet compute tpus queued-resources)
vm=(gcloud --quiet compute tpus tpu-vm)
archive=trm_diffusion.tar.gz
poll_seconds=${POLL_SECONDS:-60}

runtime_for() {
    case $1 in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v[234]-*) echo tpu-ubuntu2204-base ;;
        *) fail "--type=$1 is not a known accelerator type (v4-, v5litepod-, v5p-, v6e-); give its --runtime too" ;;
    esac
}

request() {
    need_option type
    local flags=("--accelerator-type=$type") extra
    runtime=${runtime:-$(runtime_for "$type")}
    flags+=("--runtime-version=$runtime")
    if [ "$slices" = 1 ]; then
        flags+=("--node-id=$name")
    else
        flags+=("--node-count=$slices" "--node-prefix=$name")
    fi
    [ -z "$spot" ] || flags+=(--spot)
    [ -z "$reserved" ] || flags+=(--reserved)
    read -ra extra <<<"$create_flags"
    run "${queued[@]}" create "$name" "${place[@]}" "${flags[@]}" ${extra[@]+"${extra[@]}"}
}

slices_state() { # $1: the state that a dry run assumes
    ask "$1" "${queued[@]}" describe "$name" "${place[@]}" --format="value(state.state)" 2>/dev/null || echo NONE
}

wait_for_slices() { # fails if they will not become active
    local state
    while true; do
        state=$(slices_state ACTIVE)
        case $state in
            ACTIVE) return ;;
            SUSPENDING | SUSPENDED | FAILED | NONE) return 1 ;;
        esac
        echo "$name is $state" >&2
        sleep "$poll_seconds"
    done
}

create() {
    request
    wait_for_slices || fail "the request for $name failed; bash $0 status says why, and keep would retry"
}

on_workers() { # $1: command
    local node
    for node in "${nodes[@]}"; do
        run "${vm[@]}" ssh "$node" "${place[@]}" --worker=all --command="$1" || return
    done
}

install() {
    local files=(git ls-files --cached --others --exclude-standard -z) node
    if [ -n "$dry_run" ]; then
        echo "$(quoted "${files[@]}") | tar --null --files-from=- --ignore-failed-read -czf $archive"
    else
        "${files[@]}" | tar --null --files-from=- --ignore-failed-read -czf $archive
    fi
    for node in "${nodes[@]}"; do
        run "${vm[@]}" scp $archive "$node:" "${place[@]}" --worker=all || return
    done
    run rm $archive
    on_workers "mkdir -p trm_diffusion && tar -xzf $archive -C trm_diffusion && bash trm_diffusion/launch/install.sh tpu"
}

start() {
    need_job
    on_workers "bash trm_diffusion/launch/worker.sh start tpu $(quoted "${job_flags[@]}")"
}

job_status() { # of the first worker, which all others wait for; $1: the status that a dry run assumes
    ask "$1" "${vm[@]}" ssh "${nodes[0]}" "${place[@]}" --worker=0 --command="bash trm_diffusion/launch/worker.sh status" \
        2>/dev/null || echo unreachable
}

delete() {
    run "${queued[@]}" delete "$name" "${place[@]}" --force
}

keep() {
    need_job
    need_option type
    local state ended failures=0
    while true; do
        state=$(slices_state NONE)
        case $state in
            SUSPENDING | SUSPENDED | FAILED)
                echo "$name is $state; requesting it again" >&2
                delete
                request
                ;;
            NONE) request ;;
        esac
        wait_for_slices || continue
        if [ "$(job_status none)" != running ] && ! { install && start; }; then
            failures=$((failures + 1))
            [ $failures -lt 5 ] || fail "$name could not be installed $failures times in a row; see above"
            sleep "$poll_seconds"
            continue
        fi
        failures=0
        while ended=$(job_status 0) && [ "$ended" = running ]; do
            sleep "$poll_seconds"
        done
        case $ended in
            0)
                [ -n "$dry_run" ] || echo "the job of $name is done; bash $0 delete deletes the slices" >&2
                return
                ;;
            75 | none | unreachable) echo "the job of $name stopped ($ended); resuming it" >&2 ;;
            *) fail "the job of $name ended with exit code $ended; bash $0 logs shows why" ;;
        esac
        sleep "$poll_seconds" # preempted slices stay ACTIVE for a moment
    done
}

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
    keep | create | install | start | status | logs | stop | delete) ;;
    help | --help | -h) usage && exit ;;
    *) fail "$command is not a command; bash $0 help lists them" ;;
esac
name='' zone='' project='' type='' slices=1 runtime='' create_flags='' spot='' reserved=''
parse_options "name zone project type slices runtime create-flags" "spot reserved dry-run" "$@"
need_option name zone
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices is not a number of slices"
need_tool gcloud "https://cloud.google.com/sdk/docs/install"
place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
nodes=("$name")
if [ "$slices" != 1 ]; then
    nodes=()
    for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
fi

case $command in
    status)
        run "${queued[@]}" describe "$name" "${place[@]}"
        on_workers "bash trm_diffusion/launch/worker.sh status"
        ;;
    logs) run "${vm[@]}" ssh "${nodes[0]}" "${place[@]}" --worker=0 --command="tail -n 100 -F trm_diffusion/runs/job.log" ;;
    stop) on_workers "bash trm_diffusion/launch/worker.sh stop" ;;
    *) "$command" ;;
esac
