#!/usr/bin/env bash
# A job on a Kubernetes cluster with JobSet, such as GKE: see --help.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Runs a job as a JobSet: fills launch/jobset.yaml, applies it by kubectl and prints its log until it
ends. The cluster restarts it; the job outlives this command, and the same command follows it again.

  launch/gke.sh --name=itself --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/itself_jax:tpu --build \
      --accelerator=tpu-v5-lite-podslice --topology=4x4 --hosts=4 --devices_per_host=4 --spot -- \
      --config=configs/cuhk.py --config.data_root=gs://bucket/data --workdir=gs://bucket/runs/cuhk
  launch/gke.sh --action=stop --name=itself

  --action=ACTION        run · manifest: print it · follow · status · stop: save, end and delete the
                         JobSet [run]
  --name=NAME            of the JobSet
  --image=IMAGE          made by launch/Dockerfile
  --build                build the image for the accelerator and push it, first
  --accelerator=TYPE     tpu-… (cloud.google.com/gke-tpu-accelerator) or nvidia-…
                         (cloud.google.com/gke-accelerator) [none: CPUs]
  --topology=AxB         of a TPU slice
  --hosts=N              machines; for a TPU, as many as the slice has [1]
  --devices_per_host=M   TPU chips or GPUs of each
  --cpu=N --memory=SIZE  what each host is asked for, e.g. 8 and 32Gi
  --spot                 on spot nodes
  --volume=CLAIM:/PATH   mount a PersistentVolumeClaim, for data and work directories without gs://
  --service_account=NAME the pods' Kubernetes account, with access to the bucket
  --namespace=NAME       [default]
  --context=NAME         of kubectl [its current one]
  --compile_cache=DIR    keep compiled programs there, gs:// too (JAX_COMPILATION_CACHE_DIR)
  --max_restarts=N       of the whole job [20]
  --poll=S               seconds between two looks at the job [10]
  --dry_run              print the commands, run nothing

Everything after -- goes to itself_jax.main. Ends with 0 if the job is done, 1 or 2 as the job failed,
75 if it was left by Ctrl-C: the job then goes on.
HELP
}

flag=([action]=run [name]="" [image]="" [build]=false [accelerator]="" [topology]="" [hosts]=1
    [devices_per_host]="" [cpu]="" [memory]="" [spot]=false [volume]="" [service_account]=""
    [namespace]=default [context]="" [compile_cache]="" [max_restarts]=20 [poll]=10 [dry_run]=false)
parse_flags "$@"
require_one_of action run manifest follow status stop
require name itself
require_name name 40 # pods are called NAME-job-0-INDEX-xxxxx and must fit into 63
require namespace default
require_name namespace 63
require_number poll 0
name=${flag[name]}
kubectl=(kubectl)
[[ -z ${flag[context]} ]] || kubectl+=("--context=${flag[context]}")
kubectl+=("--namespace=${flag[namespace]}")
pods="jobset.sigs.k8s.io/jobset-name=$name"

device=cpu
case ${flag[action]} in
    run | manifest)
        require image REGION-docker.pkg.dev/PROJECT/REPOSITORY/itself_jax:tpu
        require_number hosts 1
        require_number max_restarts 0
        require_job gs://bucket/runs/cuhk
        case ${flag[accelerator]} in
            "") [[ -z ${flag[devices_per_host]} ]] || reject "--devices_per_host needs --accelerator=TYPE" ;;
            tpu-*)
                device=tpu
                require topology 4x4
                [[ ${flag[topology]} =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
                    reject "--topology=$(quote "${flag[topology]}") must be AxB or AxBxC, e.g. 4x4"
                ;;
            nvidia-*) device=cuda ;;
            *) reject "--accelerator=$(quote "${flag[accelerator]}") must begin with tpu- or nvidia-" ;;
        esac
        if [[ $device != cpu ]]; then
            require devices_per_host 4
            require_number devices_per_host 1
        fi
        if [[ $device == tpu ]]; then
            chips=$((${flag[topology]//x/*}))
            ((chips == flag[hosts] * flag[devices_per_host])) ||
                reject "--topology=${flag[topology]} has $chips chips, but --hosts=${flag[hosts]} times --devices_per_host=${flag[devices_per_host]} are $((flag[hosts] * flag[devices_per_host]))"
        elif [[ -n ${flag[topology]} ]]; then
            reject "--topology belongs to a TPU: --accelerator=tpu-…"
        fi
        mount=""
        if [[ -n ${flag[volume]} ]]; then
            [[ ${flag[volume]} =~ ^[a-z0-9][-.a-z0-9]*:/.+$ ]] ||
                reject "--volume=$(quote "${flag[volume]}") must be CLAIM:/PATH"
            mount=${flag[volume]#*:}
            mount=${mount%/}
        fi
        workdir=$(job_flag workdir)
        [[ $workdir == gs://?* || (-n $mount && $workdir == "$mount"/?*) ]] ||
            reject "--workdir=$(quote "$workdir") would be lost with its pod: write gs://BUCKET/FOLDER or a folder on --volume=CLAIM:/PATH"
        ;;
    *) ((${#job[@]} == 0)) || reject "--action=${flag[action]} takes no flags of the job after --" ;;
esac

# --- the manifest

json() { # a string
    local text=$1
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$text"
}

# json_map KEY VALUE KEY VALUE…, of strings.
json_map() {
    local text=""
    while (($#)); do
        text+=", $(json "$1"): $(json "$2")"
        shift 2
    done
    printf '{%s}' "${text#, }"
}

# The JSON values of the manifest by name.
fill() {
    local argument args="" env="" volumes mounts
    local -a nodes=() asked=() limits=()
    declare -gA value=()
    value[NAME]=$(json "$name")
    value[IMAGE]=$(json "${flag[image]}")
    value[HOSTS]=${flag[hosts]}
    value[MAX_RESTARTS]=${flag[max_restarts]}
    value[SERVICE_ACCOUNT]=$(json "${flag[service_account]:-default}")
    value[ANNOTATIONS]="{}"
    case $device in
        tpu)
            nodes+=(cloud.google.com/gke-tpu-accelerator "${flag[accelerator]}"
                cloud.google.com/gke-tpu-topology "${flag[topology]}")
            limits+=(google.com/tpu "${flag[devices_per_host]}")
            # All hosts of a slice are one node pool; two pools may have the same topology.
            value[ANNOTATIONS]=$(json_map alpha.jobset.sigs.k8s.io/exclusive-topology cloud.google.com/gke-nodepool)
            ;;
        cuda)
            nodes+=(cloud.google.com/gke-accelerator "${flag[accelerator]}")
            limits+=(nvidia.com/gpu "${flag[devices_per_host]}")
            ;;
    esac
    value[TOLERATIONS]="[]"
    if [[ ${flag[spot]} == true ]]; then
        nodes+=(cloud.google.com/gke-spot true)
        value[TOLERATIONS]="[$(json_map key cloud.google.com/gke-spot operator Equal value true effect NoSchedule)]"
    fi
    value[NODES]=$(json_map "${nodes[@]}")
    [[ -z ${flag[cpu]} ]] || asked+=(cpu "${flag[cpu]}")
    [[ -z ${flag[memory]} ]] || asked+=(memory "${flag[memory]}")
    value[RESOURCES]="{\"requests\": $(json_map "${asked[@]}"), \"limits\": $(json_map "${limits[@]}")}"
    for argument in "${job[@]}"; do
        args+=", $(json "${argument//\$/\$\$}")" # Kubernetes reads $$ as a plain dollar sign
    done
    value[ARGS]="[${args#, }]"
    if ((flag[hosts] > 1)); then
        env+=", $(json_map name JAX_COORDINATOR_ADDRESS value "$name-job-0-0.$name:8476")"
        env+=", $(json_map name JAX_NUM_PROCESSES value "${flag[hosts]}")"
        env+=", {\"name\": \"JAX_PROCESS_ID\", \"valueFrom\": {\"fieldRef\": {\"fieldPath\": \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}}"
    fi
    [[ -z ${flag[compile_cache]} ]] || env+=", $(json_map name JAX_COMPILATION_CACHE_DIR value "${flag[compile_cache]//\$/\$\$}")"
    value[ENV]="[${env#, }]"
    # The data workers share memory; a container has 64 MB of it by default.
    volumes="{\"name\": \"shm\", \"emptyDir\": {\"medium\": \"Memory\"}}"
    mounts=$(json_map name shm mountPath /dev/shm)
    if [[ -n $mount ]]; then
        volumes+=", {\"name\": \"disk\", \"persistentVolumeClaim\": $(json_map claimName "${flag[volume]%%:*}")}"
        mounts+=", $(json_map name disk mountPath "$mount")"
    fi
    value[VOLUMES]="[$volumes]"
    value[MOUNTS]="[$mounts]"
}

manifest() {
    local rest text="" key
    fill
    rest=$(<"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")
    while [[ $rest =~ @([A-Z_]+)@ ]]; do # once through: values may contain at signs
        key=${BASH_REMATCH[1]}
        text+=${rest%%"@$key@"*}${value[$key]}
        rest=${rest#*"@$key@"}
    done
    printf '%s\n' "$text$rest"
}

# --- the cluster

need_kubectl() { need kubectl "install it (for GKE: gcloud components install kubectl gke-gcloud-auth-plugin), then: gcloud container clusters get-credentials CLUSTER"; }

nap() {
    sleep "${flag[poll]}" &
    wait $! # unlike the command alone, a wait lets a signal through at once
}

# state FIELD: a field of the JobSet's status; nothing if there is none. Sets `found`.
state() {
    local words
    if ! words=$("${kubectl[@]}" get jobset "$name" --ignore-not-found "--output=jsonpath=found {.status.$1}" 2>&1); then
        [[ $words != *"resource type"* ]] ||
            fail "the cluster has no JobSet: install it (https://jobset.sigs.k8s.io), then start again"
        fail "the cluster does not answer (kubectl: $(last_line <<<"$words")): check kubectl config current-context and your permission"
    fi
    printf '%s\n' "$words"
}

there="" # said at the end, however this ends
at_exit() {
    local code=$? left
    trap - EXIT INT TERM HUP
    mapfile -t left < <(jobs -p)
    ((${#left[@]} == 0)) || kill "${left[@]}" 2>/dev/null || true
    [[ -z $there ]] || say "$there"
    exit "$code"
}
interrupted() {
    exit "$INTERRUPTED"
}
trap at_exit EXIT
trap interrupted INT TERM HUP

again() { quote launch/gke.sh "--action=$1" "--name=$name" "--namespace=${flag[namespace]}" ${flag[context]:+"--context=${flag[context]}"}; }

# Prints the log of all pods until the JobSet ends, over its restarts.
follow() {
    local terminal restarts seen="" shown="" words
    local -a phases tail
    while :; do
        terminal=$(state terminalState)
        case $terminal in
            "") fail "there is no JobSet $name in ${flag[namespace]}" ;;
            "found Completed")
                say "done"
                exit_code=0
                return
                ;;
            "found Failed")
                name_failures
                return
                ;;
        esac
        restarts=$(state restarts)
        restarts=${restarts#found }
        words=$("${kubectl[@]}" get pods "--selector=$pods" '--output=jsonpath={range .items[*]}{.status.phase} {end}') || true
        read -ra phases <<<"$words"
        words="start $((${restarts:-0} + 1)): ${phases[*]:-no pods yet}"
        [[ $words == "$seen" ]] || say "$words"
        seen=$words
        if [[ " ${phases[*]} " == *" Running "* ]]; then
            tail=(--tail=-1)
            [[ $shown != "$restarts" ]] || tail=(--tail=10) # most of it was seen before
            shown=$restarts
            "${kubectl[@]}" logs --follow --prefix "--selector=$pods" "--max-log-requests=${#phases[@]}" "${tail[@]}" </dev/null &
            wait $! || true # unlike the command alone, a wait lets a signal through at once
        fi
        nap
    done
}

# Which pods failed and how; the exit code of the job, in `exit_code`.
name_failures() {
    local pod code
    exit_code=$FAILED
    while read -r pod code; do
        case $code in
            "" | 0) continue ;;
            "$REJECTED") exit_code=$REJECTED ;;
        esac
        say "pod $pod ended with $(ending "$code"): $("${kubectl[@]}" logs "$pod" --tail=20 2>/dev/null | last_line)"
    done < <("${kubectl[@]}" get pods "--selector=$pods" '--output=jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].state.terminated.exitCode}{"\n"}{end}' || true)
    say "the job failed for good, or was restarted ${flag[max_restarts]} times (--max_restarts): see kubectl describe jobset $name"
}

build() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    need docker "install Docker, or build launch/Dockerfile elsewhere and leave --build out"
    run docker build "--file=$root/launch/Dockerfile" "--build-arg=DEVICE=$device" "--tag=${flag[image]}" "$root" ||
        fail "the image ${flag[image]} could not be built; docker says why above"
    run docker push "${flag[image]}" ||
        fail "the image ${flag[image]} could not be pushed (for Artifact Registry: gcloud auth configure-docker HOST); docker says why above"
}

case ${flag[action]} in
    manifest) manifest ;;
    run)
        check_buckets
        need_kubectl
        if dry; then
            [[ ${flag[build]} == false ]] || build
            run "${kubectl[@]}" get jobset "$name" --ignore-not-found '--output=jsonpath=found {.status.terminalState}'
            printf "%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(quote "${kubectl[@]}" apply --filename=-)" "$(manifest)"
            run "${kubectl[@]}" logs --follow --prefix "--selector=$pods" "--max-log-requests=${flag[hosts]}" --tail=-1
            exit 0
        fi
        found=$(state terminalState)
        if [[ $found == "found " ]]; then
            say "$name runs already; following it"
        else
            [[ ${flag[build]} == false ]] || build
            if [[ -n $found ]]; then # a JobSet that ended cannot be started again, only replaced
                say "the JobSet $name ended (${found#found }); replacing it"
                "${kubectl[@]}" delete jobset "$name" --wait=true ||
                    fail "the ended JobSet $name could not be deleted; kubectl says why above"
            fi
            manifest | "${kubectl[@]}" apply --filename=- ||
                fail "the JobSet $name could not be made; kubectl says why above"
        fi
        there="the JobSet $name is still there, and its nodes are billed as long as their pool keeps them; to see it: $(again follow); to save and end it: $(again stop)"
        follow
        there="the JobSet $name is over; its nodes are billed as long as their pool keeps them; to delete it: $(again stop)"
        exit "$exit_code"
        ;;
    follow)
        need_kubectl
        if dry; then
            run "${kubectl[@]}" logs --follow --prefix "--selector=$pods" --tail=-1
            exit 0
        fi
        follow
        exit "$exit_code"
        ;;
    status)
        need_kubectl
        run "${kubectl[@]}" get jobset "$name"
        run "${kubectl[@]}" get pods "--selector=$pods"
        ;;
    stop)
        need_kubectl
        run "${kubectl[@]}" delete jobset "$name" --wait=true ||
            fail "the JobSet $name could not be deleted; kubectl says why above"
        dry || say "$name is deleted; the same command goes on from what it saved. Its nodes are billed as long as their pool keeps them"
        ;;
esac
