#!/usr/bin/env bash
# A job on a SLURM cluster: see --help.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Submits a job to SLURM, one process per GPU. Before its time limit, on preemption and after a lost
node it saves where it can, goes back into the queue and goes on.

  launch/slurm.sh --name=itself --nodes=2 --gpus_per_node=8 --cpus_per_task=8 --time=24:00:00 \
      --python=/shared/venv/bin/python -- \
      --config=configs/cuhk.py --config.data_root=/shared/data --workdir=/shared/runs/cuhk
  launch/slurm.sh --action=follow --job=4711

  --action=ACTION     run: submit · follow: print the log until the job leaves the queue · status ·
                      stop: save and end, without another start [run]
  --job=ID            the job to follow, show or stop
  --name=NAME         of the job [itself]
  --nodes=N           [1]
  --gpus_per_node=G   a process for each; 0: one process per node, on its CPUs
  --cpus_per_task=N   of each process
  --mem=SIZE          of each node
  --time=LIMIT        e.g. 24:00:00 [the partition's]
  --partition=NAME --account=NAME --qos=NAME --constraint=LIST   as sbatch takes them
  --python=PATH       the Python that has itself_jax, on a disk that all nodes see [python]
  --logs=DIR          for the log, JOB.log [slurm_logs]
  --compile_cache=DIR keep compiled programs there (JAX_COMPILATION_CACHE_DIR)
  --warning=S         seconds before the time limit to save and queue again [120]
  --max_restarts=N    back into the queue at most so often [20]
  --poll=S            seconds between two looks at the queue [10]
  --dry_run           print the commands, run nothing

Everything after -- goes to itself_jax.main, which runs in the folder that this is called in. The
work directory must be on a disk that all nodes see, or gs://. For options of sbatch that are not
here, set its environment variables, e.g. SBATCH_RESERVATION.
HELP
}

flag=([action]=run [job]="" [name]=itself [nodes]=1 [gpus_per_node]="" [cpus_per_task]="" [mem]=""
    [time]="" [partition]="" [account]="" [qos]="" [constraint]="" [python]=python [logs]=slurm_logs
    [compile_cache]="" [warning]=120 [max_restarts]=20 [poll]=10 [dry_run]=false)
parse_flags "$@"
require_one_of action run follow status stop
require_number poll 0
here=$(dirname "${BASH_SOURCE[0]}")

if [[ ${flag[action]} == run ]]; then
    require name itself
    require gpus_per_node 8
    require_number nodes 1
    require_number gpus_per_node 0
    require_number warning 0
    require_number max_restarts 0
    [[ -z ${flag[cpus_per_task]} ]] || require_number cpus_per_task 1
    require_job /shared/runs/cuhk
else
    require job 4711
    [[ ${flag[job]} =~ ^[0-9]+$ ]] || reject "--job=$(quote "${flag[job]}") must be the number of a job"
    ((${#job[@]} == 0)) || reject "--action=${flag[action]} takes no flags of the job after --"
fi

need_slurm() { need "$1" "run this on a login node of the SLURM cluster"; }

submit() {
    local submit option id tasks=${flag[gpus_per_node]}
    check_buckets
    need_slurm sbatch
    # Every process sees the GPUs of its node; JAX takes the one of its rank there (SLURM_LOCALID).
    # So --gpus-per-task, which hides the others, would be wrong.
    ((tasks > 0)) || tasks=1
    submit=(sbatch --parsable "--job-name=${flag[name]}" "--nodes=${flag[nodes]}" "--ntasks-per-node=$tasks")
    ((flag[gpus_per_node] == 0)) || submit+=("--gpus-per-node=${flag[gpus_per_node]}")
    [[ -z ${flag[cpus_per_task]} ]] || submit+=("--cpus-per-task=${flag[cpus_per_task]}")
    for option in mem time partition account qos constraint; do
        [[ -z ${flag[$option]} ]] || submit+=("--$option=${flag[$option]}")
    done
    # The signal goes to the processes, not to the batch script, which tells it from scancel so.
    submit+=(--requeue "--signal=TERM@${flag[warning]}" --open-mode=append
        "--output=${flag[logs]//%/%%}/%j.log" "$here/slurm_job.sh"
        "${flag[max_restarts]}" "${flag[compile_cache]}" "${flag[python]}" "${job[@]}")
    if dry; then
        run mkdir -p "${flag[logs]}"
        run "${submit[@]}"
        return
    fi
    mkdir -p "${flag[logs]}" || fail "--logs=$(quote "${flag[logs]}") cannot be made"
    id=$("${submit[@]}") || fail "sbatch did not take the job; its reason is above"
    id=${id%%;*} # a federation adds the cluster
    echo "$id"
    say "submitted as job $id; to see it: $(quote "$here/slurm.sh" --action=follow "--job=$id" "--logs=${flag[logs]}"); to save and end it: $(quote "$here/slurm.sh" --action=stop "--job=$id")"
}

follow() {
    local log=${flag[logs]}/${flag[job]}.log state seen=""
    need_slurm squeue
    if dry; then
        run squeue --noheader "--jobs=${flag[job]}" --format=%T
        run tail -n +1 -F "$log"
        return
    fi
    tail -n +1 -F "$log" 2>/dev/null &
    reader=$! # not local: the trap runs outside
    trap 'kill "$reader" 2>/dev/null || true' EXIT
    trap 'exit "$INTERRUPTED"' INT TERM HUP
    # squeue fails for a job that it has forgotten.
    while state=$(squeue --noheader "--jobs=${flag[job]}" --format=%T 2>/dev/null) && [[ -n $state ]]; do
        [[ $state == "$seen" ]] || say "job ${flag[job]}: $state"
        seen=$state
        sleep "${flag[poll]}" &
        wait $! # unlike the command alone, a wait lets a signal through at once
    done
    sleep 1 # tail has its last lines
    say "job ${flag[job]} is not in the queue any more"
}

stop() {
    need_slurm scontrol
    need_slurm scancel
    run scontrol update "JobId=${flag[job]}" Requeue=0 ||
        fail "job ${flag[job]} cannot be changed; scontrol says why above"
    run scancel --state=PENDING "${flag[job]}" || fail "job ${flag[job]} was not stopped; scancel says why above"
    run scancel --state=RUNNING --signal=TERM "${flag[job]}" ||
        fail "job ${flag[job]} was not stopped; scancel says why above"
    dry || say "job ${flag[job]} saves and ends; the command that submitted it goes on later"
}

case ${flag[action]} in
    run) submit ;;
    follow) follow ;;
    status)
        need_slurm squeue
        run squeue "--jobs=${flag[job]}"
        ;;
    stop) stop ;;
esac
