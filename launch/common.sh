# shellcheck shell=bash
# What the launchers share: flags, one-sentence errors, quoting, dry runs, and starting a job again.
# Sourced, never run. A launcher defines `usage` and fills `flag` before it calls `parse_flags`.
#
# Exit codes of itself_jax.main: 0 done, 1 failed, 2 flag or setting rejected, 75 stopped and saved.
# 75 and death by a signal (129 to 192) start the same command again; anything else ends the launch.

set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "${0##*/}: needs bash 4.4 or newer, this is $BASH_VERSION" >&2
    exit 1
fi

readonly FAILED=1 REJECTED=2 INTERRUPTED=75
readonly QUICK=60 # seconds; a job that is over sooner did no work worth starting it again for

program=${0##*/}
declare -A flag=() # the launcher's flags, name → value; "false" and "true" make a switch
declare -a job=()  # what stands after --, unchanged: the flags of itself_jax.main

# Messages go to the standard error that the launcher began with: `run_group` silences its own.
exec {messages}>&2

say() { printf '%s: %s\n' "$program" "$*" >&"$messages"; }

fail() {
    say "$*"
    exit "$FAILED"
}

reject() {
    say "$*"
    exit "$REJECTED"
}

# The words of a command so that a shell reads the same words again.
quote() {
    local word line=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]]; then
            line+=" $word"
        else
            printf -v word '%q' "$word"
            line+=" $word"
        fi
    done
    printf '%s\n' "${line# }"
}

# --- flags

parse_flags() {
    local name value
    while (($#)); do
        case $1 in
            --help)
                usage
                exit 0
                ;;
            --)
                shift
                job=("$@")
                return
                ;;
            --*) ;;
            *) reject "unexpected argument $(quote "$1"): write --name=value, and the job's own flags after --" ;;
        esac
        name=${1%%=*}
        name=${name#--}
        # The name becomes a subscript, which bash would expand: only plain names get that far.
        if [[ ! $name =~ ^[a-z_]+$ || -z ${flag[$name]+known} ]]; then
            reject "--$name is not a flag of $program: see --help, and write the job's own flags after --"
        fi
        if [[ $1 == *=* ]]; then
            value=${1#*=}
        elif [[ ${flag[$name]} == true || ${flag[$name]} == false ]]; then
            value=true
        else
            reject "--$name needs a value: --$name=VALUE"
        fi
        if [[ ${flag[$name]} == true || ${flag[$name]} == false ]] && [[ $value != true && $value != false ]]; then
            reject "--$name=$value must be true or false"
        fi
        flag[$name]=$value
        shift
    done
}

# require NAME EXAMPLE: the flag has a value.
require() {
    [[ -n ${flag[$1]} ]] || reject "--$1 is required, e.g. --$1=$2"
}

# require_number NAME SMALLEST: the flag is a whole number.
require_number() {
    if [[ ! ${flag[$1]} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((flag[$1] < $2)); then
        reject "--$1=${flag[$1]} must be a whole number of at least $2"
    fi
}

# require_name NAME LONGEST: the flag is a name that Google Cloud and Kubernetes take.
require_name() {
    local value=${flag[$1]} longest=$2
    if [[ ! $value =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || ((${#value} > longest)); then
        reject "--$1=$(quote "$value") must be at most $longest lower-case letters, digits and dashes, a letter first"
    fi
}

# require_one_of NAME VALUE...
require_one_of() {
    local name=$1 value
    shift
    for value in "$@"; do
        [[ ${flag[$name]} == "$value" ]] && return
    done
    reject "--$name=$(quote "${flag[$name]}") must be one of: $*"
}

# The value of a flag of the job; empty where it is not given.
job_flag() {
    local i value=""
    for ((i = 0; i < ${#job[@]}; i++)); do
        case ${job[i]} in
            "--$1="*) value=${job[i]#*=} ;;
            "--$1") value=${job[i + 1]-} ;;
        esac
    done
    printf '%s\n' "$value"
}

# The job names its config and its work directory; asked before anything is started or paid for.
require_job() {
    local name example
    for name in config workdir; do
        if [[ -z $(job_flag "$name") ]]; then
            example=$1
            [[ $name == config ]] && example=configs/cuhk.py
            reject "--$name is required among the job's flags, after --, e.g. -- --$name=$example"
        fi
    done
}

# --- commands

dry() { [[ ${flag[dry_run]} == true ]]; }

# Runs a command; with --dry_run prints it instead.
run() {
    if dry; then quote "$@"; else "$@"; fi
}

# need TOOL WHAT_TO_DO: the program is there. A dry run needs none.
need() {
    dry || command -v "$1" >/dev/null ||
        fail "$1 is not installed or not on the PATH: $2"
}

need_gcloud() { need gcloud "install the Google Cloud CLI, then run: gcloud auth login"; }

# The last line that says something, for an error's one sentence.
last_line() {
    local line last=""
    while IFS= read -r line || [[ -n $line ]]; do
        [[ -z ${line//[[:space:]]/} ]] || last=$line
    done
    printf '%s\n' "${last:-it said nothing}"
}

# May this account list the bucket of a gs:// address and, with "write", put a file there?
# The account that runs the job may be another one; then this only proves that the bucket exists.
check_bucket() {
    local url=$1 access=$2 bucket words role=roles/storage.objectViewer
    bucket=${url#gs://}
    bucket=gs://${bucket%%/*}
    [[ $access == write ]] && role=roles/storage.objectUser
    if dry; then
        quote gcloud storage ls "$bucket"
        if [[ $access == write ]]; then
            quote gcloud storage cp - "${url%/}/.itself_jax_probe"
            quote gcloud storage rm "${url%/}/.itself_jax_probe"
        fi
        return
    fi
    words=$(gcloud storage ls "$bucket" 2>&1 >/dev/null) ||
        fail "cannot list $bucket (gcloud: $(last_line <<<"$words")): create it, or grant the account $role on it"
    [[ $access == write ]] || return 0
    words=$(gcloud storage cp - "${url%/}/.itself_jax_probe" <<<"may be deleted" 2>&1) ||
        fail "no permission to write to $bucket (gcloud: $(last_line <<<"$words")): grant the account $role on it"
    words=$(gcloud storage rm "${url%/}/.itself_jax_probe" 2>&1) ||
        fail "no permission to delete in $bucket (gcloud: $(last_line <<<"$words")): grant the account $role on it"
}

# The buckets of the job's work directory and data, before anything is paid for.
check_buckets() {
    local workdir data
    workdir=$(job_flag workdir)
    data=$(job_flag config.data_root)
    if [[ $workdir == gs://* || $data == gs://* ]]; then
        need_gcloud
    fi
    [[ $workdir != gs://* ]] || check_bucket "$workdir" write
    [[ $data != gs://* ]] || check_bucket "$data" read
}

# --- processes of this machine

stopped=false # a signal asked this launcher to stop

# verdict CODE: done, again or stop.
verdict() {
    if (($1 == 0)); then
        echo "done"
    elif (($1 == INTERRUPTED || ($1 > 128 && $1 <= 192))); then
        echo again
    else
        echo stop
    fi
}

# "code 75", or "signal 9"
ending() {
    if (($1 > 128 && $1 <= 192)); then echo "signal $(($1 - 128))"; else echo "code $1"; fi
}

# run_group COUNT GRACE: starts COUNT processes, each by `start_process INDEX`, and waits for all.
# Sets group_code, the code of the process that decides, and group_index. A process that fails ends
# the others at once; one that stops or dies leaves them GRACE seconds to notice and save.
run_group() {
    local count=$1 grace=$2 i code running ending_since="" asked_since=""
    local -a pids=() codes=() asked=()
    group_code=0 group_index=0
    for ((i = 0; i < count; i++)); do
        start_process "$i"
        pids[i]=$!
    done
    exec 2>/dev/null # without bash's own word on each process that a signal ends
    while :; do
        running=0
        for ((i = 0; i < count; i++)); do
            [[ -z ${codes[i]-} ]] || continue
            if kill -0 "${pids[i]}"; then
                running=$((running + 1))
                if [[ $stopped == true && -z ${asked[i]-} ]]; then
                    kill -TERM "${pids[i]}" || true
                    asked[i]=yes
                fi
                continue
            fi
            code=0
            wait "${pids[i]}" || code=$?
            codes[i]=$code
            ((code != 0)) || continue
            # The first to end decides, except that a failure of its own decides over all others.
            if ((group_code == 0)) ||
                [[ -z ${asked[i]-} && $(verdict "$group_code") == again && $(verdict "$code") == stop ]]; then
                group_code=$code group_index=$i
            fi
            ending_since=${ending_since:-$SECONDS}
        done
        ((running > 0)) || break
        if [[ -n $ending_since && -z $asked_since && $stopped == false ]]; then
            if [[ $(verdict "$group_code") == stop ]] || ((SECONDS - ending_since >= grace)); then
                ((count == 1)) || say "process $group_index ended with $(ending "$group_code"); ending the others"
                for ((i = 0; i < count; i++)); do
                    [[ -n ${codes[i]-} ]] || kill -TERM "${pids[i]}" || true
                    asked[i]=yes
                done
                asked_since=$SECONDS
            fi
        elif [[ -n $asked_since ]] && ((SECONDS - asked_since >= grace)); then
            for ((i = 0; i < count; i++)); do
                [[ -n ${codes[i]-} ]] || kill -KILL "${pids[i]}" || true
            done
        fi
        sleep 0.2 || true # a Ctrl-C ends the sleep, too
    done
    exec 2>&"$messages"
}

# supervise COUNT GRACE MAX_RESTARTS MAX_QUICK: the group, started again while that makes sense.
# Sets exit_code: 0, the job's own code if that stops, 75 if a signal stopped this launcher, 1 if
# the job died too often.
# shellcheck disable=SC2034 # the launchers read exit_code
supervise() {
    local count=$1 grace=$2 max_restarts=$3 max_quick=$4 restarts=0 quick=0 began who="the job"
    trap 'stopped=true' TERM INT HUP
    while :; do
        began=$SECONDS
        run_group "$count" "$grace"
        ((count == 1)) || who="process $group_index"
        case $(verdict "$group_code") in
            "done")
                exit_code=0
                return
                ;;
            stop)
                say "$who ended with $(ending "$group_code"); starting it again would not help"
                exit_code=$group_code
                return
                ;;
        esac
        if [[ $stopped == true ]]; then
            say "stopped; the same command goes on"
            exit_code=$INTERRUPTED
            return
        fi
        if ((SECONDS - began < QUICK)); then quick=$((quick + 1)); else quick=0; fi
        restarts=$((restarts + 1))
        exit_code=$FAILED
        if ((restarts > max_restarts)); then
            say "$who ended with $(ending "$group_code") after $max_restarts restarts (--max_restarts); giving up"
            return
        elif ((quick >= max_quick)); then
            say "$who ended with $(ending "$group_code"), $quick times in a row within $QUICK s of its start (--max_quick); giving up"
            return
        fi
        say "$who ended with $(ending "$group_code"); start $restarts of at most $max_restarts"
    done
}

# Prints each line of the input after a prefix.
prefix() {
    local line
    trap '' INT TERM HUP # the last lines come after the signal
    while IFS= read -r line || [[ -n $line ]]; do
        printf '%s%s\n' "$1" "$line"
    done
}
