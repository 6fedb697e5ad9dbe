#!/usr/bin/env bash
# A job in the background of one machine, so that it outlives the connection that started it.
#
#   bash launch/worker.sh start PLATFORM FLAGS...    starts launch/job.sh with them, unless it runs already
#   bash launch/worker.sh status                     one word: none, running, or the exit code
#   bash launch/worker.sh stop                       asks it to save and leave with 75
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
        # Killed with its shell, as by the machine's restart, it left no code: as if it had never run.
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
        # In a session of its own, which the end of the connection does not reach.
        setsid bash launch/worker.sh run "$@" </dev/null >/dev/null 2>&1 &
        until [ -s $pid ]; do sleep 0.1; done
        ;;
    run) run "${@:2}" ;;
    status) status ;;
    stop) [ "$(status)" != running ] || kill -TERM "$(cat $pid)" ;;
    *) fail "the command is '${1:-}'; bash launch/worker.sh start|status|stop" ;;
esac
