# Sourced by the scripts that start jobs on other machines: --dry-run and the parsing of options.
# shellcheck source=launch/setup.sh
source launch/setup.sh

dry_run='' command='' # set by the script
exec 3>&1 # commands are printed here, even inside $(...)

# run COMMAND...: runs it; with --dry-run prints it instead, quoted for pasting into a shell.
run() {
    if [ -n "$dry_run" ]; then
        quoted "$@" >&3
    else
        "$@"
    fi
}

# ask ASSUMED COMMAND...: prints the command's output; with --dry-run prints the command, then ASSUMED as its output.
ask() {
    local assumed=$1
    shift
    run "$@" || return
    [ -z "$dry_run" ] || echo "$assumed"
}

quoted() {
    local word line=
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            line+=" $word"
        else
            line+=" '${word//\'/\'\\\'\'}'"
        fi
    done
    echo "${line# }"
}

# need_tool NAME HOW: fails with how to install the command if it is missing. A dry run needs no tools.
need_tool() {
    [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# need_option NAME...: fails unless each option --NAME is set, in the variable of that name (dashes become underscores).
need_option() {
    local option variable
    for option in "$@"; do
        variable=${option//-/_}
        [ -n "${!variable:-}" ] || fail "$command needs --$option; see bash $0 help"
    done
}

# parse_options "NAME..." "SWITCH..." ARGUMENT...: sets a variable for each --NAME=VALUE and --SWITCH. What follows "--",
# flags of trm_diffusion.main, goes into the array job_flags.
parse_options() {
    local options=" $1 " switches=" $2 " argument option
    shift 2
    job_flags=()
    while [ $# -gt 0 ]; do
        argument=$1
        shift
        [ "$argument" != -- ] || { job_flags=("$@") && return; }
        option=${argument%%=*}
        option=${option#--}
        if [[ $argument == --*=* && $options == *" $option "* ]]; then
            declare -g "${option//-/_}=${argument#*=}"
        elif [[ $argument == --* && $switches == *" $option "* ]]; then
            declare -g "${option//-/_}=1"
        else
            fail "$argument is not an option of $command; flags of the job go after --; bash $0 help lists the options"
        fi
    done
}

# need_job: fails unless there are flags of a job, with a workdir that outlives the machines.
need_job() {
    [ ${#job_flags[@]} -gt 0 ] || fail "$command needs the job's flags after --, such as -- --config=configs/imagenet256.py"
    local flag
    for flag in "${job_flags[@]}"; do
        [[ $flag != --workdir=gs://* ]] || return 0
    done
    fail "$command needs --workdir=gs://BUCKET/RUN among the job's flags: preempted machines lose their disks"
}

# usage: prints the comment at the top of the script.
usage() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
}
