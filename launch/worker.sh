#!/usr/bin/env bash
# Runs a job in the background, so that it outlives the connection that started it.
#
#   bash launch/worker.sh start PLATFORM FLAGS...    start launch/job.sh with these arguments, unless it is running
#   bash launch/worker.sh status                     print one word: none, running, or the exit code
#   bash launch/worker.sh stop                       ask it to save and exit with code 75
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
mkdir -p runs
log=runs/job.log pid=runs/job.pid code=runs/job.exit

status() {
    if [ -e $code ]; then
        cat $code
    elif [ -e $pid ]; then
        # If it was killed together with its shell, as by a reboot, there is no exit code: report none.
        if kill -0 "$(cat $pid)" 2>/dev/null; then echo running; else echo none; fi
    else
        echo none
    fi
}

run() {
    bash launch/job.sh "$@" >>$log 2>&1 &
    echo $! >$pid
    local ended=0
    wait $! || ended=$?
    echo $ended >$code
}

case ${1:-} in
    start)
        shift
        [ "$(status)" != running ] || exit 0
        rm -f $code $pid
        # In its own session, which the end of the connection does not reach.
        setsid bash launch/worker.sh run "$@" </dev/null >/dev/null 2>&1 &
        until [ -s $pid ]; do sleep 0.1; done
        ;;
    run) run "${@:2}" ;;
    status) status ;;
    stop) [ "$(status)" != running ] || kill -TERM "$(cat $pid)" ;;
    *) fail "the command is '${1:-}'; bash launch/worker.sh start|status|stop" ;;
esac
