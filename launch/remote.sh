# Sourced by the scripts that start jobs on other machines: --dry-run, and what they all need of their arguments.
# shellcheck source=launch/setup.sh
source launch/setup.sh

dry_run='' command='' # the script sets them
exec 3>&1 # where commands are printed, also from within $(...)

# run COMMAND...: runs it; with --dry-run prints it instead, so that it can be pasted into a shell.
run() {
    if [ -n "$dry_run" ]; then
        quoted "$@" >&3
    else
        "$@"
    fi
}

# ask ASSUMED COMMAND...: what the command prints; with --dry-run prints the command and answers ASSUMED.
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

# need_tool NAME HOW: the command is here, or one line says how to get it. A dry run needs no tools.
need_tool() {
    [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# need_option NAME...: each option --NAME was given, as the variable of that name (dashes as underscores).
need_option() {
    local option variable
    for option in "$@"; do
        variable=${option//-/_}
        [ -n "${!variable:-}" ] || fail "$command needs --$option; see bash $0 help"
    done
}

# parse_options "NAME..." "SWITCH..." ARGUMENT...: sets a variable for each --NAME=VALUE and --SWITCH, and the array
# job_flags to what follows "--": flags of trm_diffusion.main.
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
            fail "$argument is no option of $command; flags of the job come after --, and bash $0 help lists the rest"
        fi
    done
}

# need_job: there are flags of a job, and its workdir outlives the machines.
need_job() {
    [ ${#job_flags[@]} -gt 0 ] || fail "$command needs the job's flags after --, such as -- --config=configs/imagenet256.py"
    local flag
    for flag in "${job_flags[@]}"; do
        [[ $flag != --workdir=gs://* ]] || return 0
    done
    fail "$command needs --workdir=gs://BUCKET/RUN among the job's flags: disks of preempted machines are lost"
}

# usage: the comment at the top of the script.
usage() {
    sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
}
