#!/usr/bin/env bash
# A job on a Cloud TPU VM or a pod slice of them: see --help.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Runs a job on a Cloud TPU: makes the TPU (or reuses it), copies this checkout to all its workers,
installs it, starts the job on every worker, prints worker 0's log until the job ends, and says what
is still billed. The job outlives the connection: the same command follows it again.

  launch/tpu_vm.sh --name=itself --zone=us-west4-a --accelerator_type=v5litepod-16 \
      --runtime_version=v2-alpha-tpuv5-lite --spot --queued -- \
      --config=configs/cuhk.py --config.data_root=gs://bucket/data --workdir=gs://bucket/runs/cuhk
  launch/tpu_vm.sh --action=delete --name=itself --zone=us-west4-a

  --action=ACTION           run · follow: print a worker's log · status: of TPU and job · stop: save
                            and end the job, keep the TPU · delete: the TPU and its request [run]
  --name=NAME --zone=ZONE   the TPU
  --project=PROJECT         [gcloud's own setting]
  --accelerator_type=TYPE   v5litepod-8 is one machine, v5litepod-16 a slice of several
  --runtime_version=NAME    e.g. v2-alpha-tpuv5-lite; gcloud compute tpus versions list
  --spot                    cheaper, may be taken away; then it is made again and the job goes on
  --queued                  ask by a queued resource, and wait for it
  --valid_until_duration=D  give the request up after, e.g. 6h
  --service_account=EMAIL   the account that the workers act as
  --internal_ips            no external addresses; run this where the internal ones are reached
  --source=SOURCE           what the workers install: `checkout` is this one with its changes, or
                            git+https://HOST/REPOSITORY[@REVISION] [checkout]
  --extras=LIST             of pyproject.toml [tpu,gcs]
  --python_version=V        [3.12]
  --compile_cache=DIR       keep compiled programs there, gs:// too (JAX_COMPILATION_CACHE_DIR)
  --worker=I                the worker to follow [0]
  --max_restarts=N          of the job on its workers, and of a TPU that was taken away [20]
  --max_quick=N             give up after N runs in a row of less than a minute [5]
  --delete_when_done        delete the TPU when the job is done or failed
  --poll=S                  seconds between two looks at the TPU [30]
  --dry_run                 print the commands, run nothing

Everything after -- goes to itself_jax.main. A pod slice needs a work directory that all workers see:
gs://BUCKET/FOLDER, or a folder on a disk that each of them mounts. Ends with the job's exit code,
or 75 if it was left by Ctrl-C: the job then goes on.
HELP
}

flag=([action]=run [name]="" [zone]="" [project]="" [accelerator_type]="" [runtime_version]=""
    [spot]=false [queued]=false [valid_until_duration]="" [service_account]="" [internal_ips]=false
    [source]=checkout [extras]="tpu,gcs" [python_version]=3.12 [compile_cache]="" [worker]=0
    [max_restarts]=20 [max_quick]=5 [delete_when_done]=false [poll]=30 [dry_run]=false)
parse_flags "$@"
require_one_of action run follow status stop delete
require name itself
require_name name 60
require zone us-west4-a
require_number worker 0
require_number max_restarts 0
require_number max_quick 1
require_number poll 0
name=${flag[name]}

if [[ ${flag[action]} == run ]]; then
    require accelerator_type v5litepod-8
    require runtime_version v2-alpha-tpuv5-lite
    require_job gs://bucket/runs/cuhk
    [[ ${flag[source]} == checkout || ${flag[source]} == git+?* ]] ||
        reject "--source=$(quote "${flag[source]}") must be checkout or git+https://HOST/REPOSITORY[@REVISION]"
    workdir=$(job_flag workdir)
    [[ $workdir == gs://?* || $workdir == /* ]] ||
        reject "--workdir=$(quote "$workdir") would be deleted with the TPU: write gs://BUCKET/FOLDER or the absolute path of a disk that every worker mounts"
elif ((${#job[@]})); then
    reject "--action=${flag[action]} takes no flags of the job after --"
fi

where=("--zone=${flag[zone]}")
[[ -z ${flag[project]} ]] || where+=("--project=${flag[project]}")
reach=("${where[@]}" --quiet)
[[ ${flag[internal_ips]} == false ]] || reach+=(--internal-ip)
vm=(gcloud compute tpus tpu-vm)
request=(gcloud compute tpus queued-resources)

# --- what exists, what is billed

exists=unknown # no, perhaps, yes: said at the end, however this ends

again() { # the command line of another action on the same TPU
    quote "launch/tpu_vm.sh" "--action=$1" "--name=$name" "${where[@]}"
}

at_exit() {
    local code=$? left
    trap - EXIT INT TERM HUP
    mapfile -t left < <(jobs -p)
    ((${#left[@]} == 0)) || kill "${left[@]}" 2>/dev/null || true
    rm -rf "$scratch"
    case $exists in
        yes) say "$name is still there and billed; to end that: $(again delete)" ;;
        perhaps) say "$name may exist, now or when its request is granted, and then is billed; to end that: $(again delete)" ;;
    esac
    exit "$code"
}

interrupted() {
    [[ ${flag[action]} != run || $started == false ]] ||
        say "the job goes on; to see it: $(again follow); to save and end it: $(again stop)"
    exit "$INTERRUPTED"
}

started=false
scratch=$(mktemp -d)
trap at_exit EXIT
trap interrupted INT TERM HUP

nap() {
    sleep "${flag[poll]}" &
    wait $! # unlike the command alone, a wait lets a signal through at once
}

# describe FIELD COMMAND...: a field of a resource; nothing if there is no such resource.
describe() {
    local field=$1 words value
    shift
    if value=$("$@" describe "$name" "${where[@]}" "--format=value($field)" 2>"$scratch/describe"); then
        printf '%s\n' "$value"
        return
    fi
    words=$(<"$scratch/describe")
    [[ ${words,,} == *not_found* || ${words,,} == *"not found"* ]] ||
        fail "cannot look at $name in ${flag[zone]} (gcloud: $(last_line <<<"$words")): check --zone and --project, and gcloud auth login"
}

create() {
    local options=("${where[@]}" "--accelerator-type=${flag[accelerator_type]}")
    [[ ${flag[spot]} == false ]] || options+=(--spot)
    [[ ${flag[internal_ips]} == false ]] || options+=(--internal-ips)
    [[ -z ${flag[service_account]} ]] || options+=("--service-account=${flag[service_account]}")
    dry || exists=perhaps
    if [[ ${flag[queued]} == true ]]; then
        options+=("--runtime-version=${flag[runtime_version]}" "--node-id=$name")
        [[ -z ${flag[valid_until_duration]} ]] ||
            options+=("--valid-until-duration=${flag[valid_until_duration]}")
        run "${request[@]}" create "$name" "${options[@]}" ||
            fail "the request for $name was not accepted; gcloud says why above"
    else
        run "${vm[@]}" create "$name" "${options[@]}" "--version=${flag[runtime_version]}" ||
            fail "$name could not be made; gcloud says why above (no capacity: try --queued, --spot or another --zone)"
    fi
}

# Deletes the TPU and its request, whichever there are.
delete() {
    local state
    if dry; then
        run "${request[@]}" delete "$name" "${where[@]}" --force --quiet
        run "${vm[@]}" delete "$name" "${where[@]}" --quiet
        return
    fi
    exists=perhaps
    state=$(describe state.state "${request[@]}")
    if [[ -n $state ]]; then
        "${request[@]}" delete "$name" "${where[@]}" --force --quiet ||
            fail "the request of $name could not be deleted; gcloud says why above"
    fi
    state=$(describe state "${vm[@]}")
    if [[ -n $state ]]; then
        exists=yes
        "${vm[@]}" delete "$name" "${where[@]}" --quiet ||
            fail "$name could not be deleted; gcloud says why above"
    fi
    exists=no
    say "$name is deleted; nothing of it is billed any more"
}

# Returns when the TPU is ready; makes it where there is none.
ensure_there() {
    local state asked seen=""
    while :; do
        state=$(describe state "${vm[@]}")
        if [[ -z $state && ${flag[queued]} == true ]]; then
            asked=$(describe state.state "${request[@]}")
            state=${asked:+request $asked}
        fi
        [[ -z $state || $state == "$seen" ]] || say "$name: $state"
        seen=$state
        [[ -z $state ]] || exists=yes
        case $state in
            READY) return ;;
            "") create ;;
            STOPPED) "${vm[@]}" start "$name" "${where[@]}" || fail "$name could not be started; gcloud says why above" ;;
            PREEMPTED | TERMINATED | "request SUSPENDED") taken_away ;;
            "request FAILED")
                exists=no
                fail "the request for $name failed: see $(quote "${request[@]}" describe "$name" "${where[@]}"), delete it and ask again"
                ;;
            HIDDEN | HIDING | UNHIDING | UNKNOWN) fail "$name is $state and cannot be used: delete it and start again" ;;
            request*)
                exists=perhaps
                nap
                ;;
            *) nap ;; # CREATING, STARTING, REPAIRING, …
        esac
    done
}

losses=0
taken_away() {
    losses=$((losses + 1))
    ((losses <= flag[max_restarts])) ||
        fail "$name was taken away $losses times, more than --max_restarts=${flag[max_restarts]}; giving up"
    say "$name was taken away; making it again ($losses of at most ${flag[max_restarts]})"
    delete
}

# --- the workers

count_workers() {
    local ips
    if dry; then
        run "${vm[@]}" describe "$name" "${where[@]}" --flatten='networkEndpoints[]' '--format=value(networkEndpoints.ipAddress)'
        workers=1
        return
    fi
    ips=$("${vm[@]}" describe "$name" "${where[@]}" --flatten='networkEndpoints[]' '--format=value(networkEndpoints.ipAddress)') ||
        fail "the workers of $name could not be listed; gcloud says why above"
    mapfile -t ips <<<"$ips"
    workers=${#ips[@]}
}

worker_name() { echo "worker $1 of $workers (counted from 0)"; }

# each_worker WHAT COMMAND...: the command with --worker=I for all I, sixteen at a time. Names those
# that fail. What they print is left in $scratch/I.out.
each_worker() {
    local what=$1 first i code failed=0
    local -a pids
    shift
    if dry; then
        quote "$@" --worker=0
        echo "# and the same for every further worker"
        return
    fi
    for ((first = 0; first < workers; first += 16)); do
        pids=()
        for ((i = first; i < workers && i < first + 16; i++)); do
            "$@" "--worker=$i" >"$scratch/$i.out" 2>"$scratch/$i.err" </dev/null &
            pids[i]=$!
        done
        for i in "${!pids[@]}"; do
            code=0
            wait "${pids[i]}" || code=$?
            ((code != 0)) || continue
            failed=$((failed + 1))
            say "$(worker_name "$i") failed to $what (exit $code): $(last_line <"$scratch/$i.err")"
        done
    done
    ((failed == 0))
}

ssh_all() { # WHAT WORDS...: the words as a command on every worker
    local what=$1
    shift
    each_worker "$what" "${vm[@]}" ssh "$name" "${reach[@]}" "--command=$*"
}

ssh_one() { # WORKER WORDS...
    local worker=$1
    shift
    run "${vm[@]}" ssh "$name" "${reach[@]}" "--command=$*" "--worker=$worker"
}

# The log of a worker until its run ends, or the connection. A dead one is noticed in two minutes.
show_log() {
    local words=("${vm[@]}" ssh "$name" "${reach[@]}" --ssh-flag=-oServerAliveInterval=40
        "--command=$(on_worker follow)" "--worker=$1")
    if dry; then
        quote "${words[@]}"
    else
        "${words[@]}" </dev/null &
        wait $! # unlike the command alone, a wait lets a signal through at once
    fi
}

on_worker() { # ACTION [FLAGS...]: the command line of worker.sh there, as one word for a shell
    local action=$1
    shift
    quote bash itself_jax/launch/worker.sh "--action=$action" "--run=$name" "$@"
}

# The checkout as one file, before anything is paid for: what git knows or would add, as it is now.
pack() {
    local root file
    [[ ${flag[source]} == checkout ]] && ! dry || return 0
    need git "it lists the files of the checkout"
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    git -C "$root" ls-files -z --cached --others --exclude-standard -- ':!tests' >"$scratch/known" ||
        fail "$root is not a git checkout: use --source=git+https://HOST/REPOSITORY"
    while IFS= read -r -d '' file; do
        [[ ! -f $root/$file ]] || printf '%s\0' "$file"
    done <"$scratch/known" >"$scratch/files"
    tar -czf "$scratch/itself_jax.tar.gz" -C "$root" --null -T "$scratch/files" ||
        fail "the checkout $root could not be packed"
}

install() {
    local python url revision="" fetch
    if [[ ${flag[source]} == checkout ]]; then
        each_worker "receive the checkout" "${vm[@]}" scp "$scratch/itself_jax.tar.gz" "$name:itself_jax.tar.gz" "${reach[@]}" ||
            fail "the checkout did not reach every worker; nothing was started"
        fetch="mkdir itself_jax && tar -xzf itself_jax.tar.gz -C itself_jax"
    else
        url=${flag[source]#git+}
        if [[ ${url##*/} == *@* ]]; then
            revision=${url##*@}
            url=${url%@*}
        fi
        fetch="git clone --quiet $(quote "$url") itself_jax"
        [[ -z $revision ]] || fetch+=" && git -C itself_jax checkout --quiet $(quote "$revision")"
    fi
    # The machine's own Python may be too old; and an environment of another version must not survive.
    python="python3 -m pip install --quiet --user uv"
    python+=" && python3 -m uv venv --quiet --python=$(quote "${flag[python_version]}") .venv"
    python+=" && python3 -m uv pip install --quiet --python=.venv/bin/python -e $(quote ".[${flag[extras]}]")"
    ssh_all "install" "rm -rf itself_jax && $fetch && cd itself_jax && $python" ||
        fail "the installation failed on some worker; nothing was started"
}

start() {
    local words
    words=$(on_worker start --python=.venv/bin/python "--compile_cache=${flag[compile_cache]}" \
        "--max_restarts=${flag[max_restarts]}" "--max_quick=${flag[max_quick]}" -- \
        "${job[@]}" --config.distributed.detect=True) # jax asks the machine who the others are
    started=true
    if ! ssh_all "start the job" "$words"; then
        ssh_all "stop the job" "$(on_worker stop)" || true
        started=false
        fail "the job did not start on every worker, and was stopped on the others"
    fi
}

# The state of the run on worker $1 by its last answer: running, ended CODE, lost, absent.
answer() {
    local line=""
    IFS= read -r line <"$scratch/$1.out" || true
    printf '%s\n' "$line"
}

# Follows worker 0 until its run has ended, over lost connections. Returns 1 if the TPU was taken
# away or its machines restarted.
follow() {
    local misses=0
    while :; do
        show_log 0 || true
        if ! ssh_one 0 "$(on_worker status)" >"$scratch/0.out" 2>"$scratch/0.err" </dev/null; then
            [[ $(describe state "${vm[@]}") == READY ]] || return 1
            misses=$((misses + 1))
            ((misses < 10)) ||
                fail "worker 0 does not answer (gcloud: $(last_line <"$scratch/0.err")); the job may go on: $(again follow)"
            nap
            continue
        fi
        misses=0
        case $(answer 0) in
            running) say "the connection was lost; following again" ;;
            ended*) return 0 ;;
            *) return 1 ;;
        esac
    done
}

# What the run came to on all workers, in `exit_code`; those that failed are named.
judge() {
    local i tries=0 state code still
    if [[ $(answer 0) == "ended 0" ]]; then # the others end within moments
        while :; do
            ssh_all "report" "$(on_worker status)" || true
            still=0
            for ((i = 0; i < workers; i++)); do
                [[ $(answer "$i") != running ]] || still=$((still + 1))
            done
            tries=$((tries + 1))
            ((still > 0 && tries < 10)) || break
            nap
        done
    fi
    # A worker that lost its peers would start again and wait for them.
    ssh_all "stop the job" "$(on_worker stop)" || true
    ssh_all "report" "$(on_worker status)" || true
    exit_code=0
    for ((i = 0; i < workers; i++)); do
        state=$(answer "$i")
        code=${state#ended }
        [[ $state == ended* ]] || code=$FAILED
        ((code != 0)) || continue
        if ((code != INTERRUPTED)); then
            say "$(worker_name "$i") ${state/#ended/ended with code}: $(last_line <"$scratch/$i.out")"
        fi
        if ((exit_code == 0 || exit_code == INTERRUPTED)); then exit_code=$code; fi
    done
    case $exit_code in
        0) say "done" ;;
        "$INTERRUPTED") say "stopped; the same command goes on" ;;
    esac
}

# The first connection makes the ssh key and makes it known: alone, before sixteen do so at once.
connect() {
    ssh_one 0 true >"$scratch/0.out" 2>"$scratch/0.err" </dev/null ||
        fail "worker 0 cannot be reached by ssh (gcloud: $(last_line <"$scratch/0.err"))"
}

running_somewhere() {
    local i
    ssh_all "report" "if [ -e itself_jax/launch/worker.sh ]; then $(on_worker status); else echo absent; fi" ||
        fail "not every worker of $name answers; nothing was started"
    for ((i = 0; i < workers; i++)); do
        [[ $(answer "$i") != running ]] || return 0
    done
    return 1
}

# --- actions

[[ ${flag[action]} != run ]] || check_buckets
need_gcloud

case ${flag[action]} in
    run)
        if dry; then
            run "${vm[@]}" describe "$name" "${where[@]}" '--format=value(state)'
            create
            [[ ${flag[queued]} == false ]] ||
                run "${request[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
            count_workers
            ssh_one 0 true
            install
            start
            show_log 0
            ssh_all report "$(on_worker status)"
            [[ ${flag[delete_when_done]} == false ]] || delete
            exit 0
        fi
        pack
        while :; do
            ensure_there
            count_workers
            say "$name is ready: $workers workers"
            connect
            if running_somewhere; then
                say "the job runs already; following it"
                started=true
            else
                install
                start
            fi
            if follow; then break; fi
            state=$(describe state "${vm[@]}")
            if [[ $state == READY ]]; then # its machines restarted: as good as taken away
                losses=$((losses + 1))
                ((losses <= flag[max_restarts])) || fail "the workers lost the job $losses times; giving up"
                say "the workers restarted; starting the job again ($losses of at most ${flag[max_restarts]})"
                ssh_all "stop the job" "$(on_worker stop)" || true
            elif [[ -z $state ]]; then
                taken_away
            fi # else ensure_there sees to it
        done
        judge
        if [[ ${flag[delete_when_done]} == true && $exit_code != "$INTERRUPTED" ]]; then delete; fi
        exit "$exit_code"
        ;;
    follow)
        exists=yes
        show_log "${flag[worker]}"
        ;;
    status | stop)
        if dry; then
            count_workers
            ssh_all "answer" "$(on_worker "${flag[action]}")"
            exit 0
        fi
        state=$(describe state "${vm[@]}")
        if [[ -z $state ]]; then
            say "there is no TPU $name in ${flag[zone]}"
            state=$(describe state.state "${request[@]}")
            if [[ -n $state ]]; then
                say "its request is $state"
                exists=perhaps
            fi
            exit 0
        fi
        exists=yes
        say "$name is $state"
        [[ $state == READY ]] || exit 0
        count_workers
        ssh_all "answer" "$(on_worker "${flag[action]}")" || exit "$FAILED"
        for ((i = 0; i < workers; i++)); do
            echo "worker $i: $(answer "$i"): $(last_line <"$scratch/$i.out")"
        done
        ;;
    delete) delete ;;
esac
