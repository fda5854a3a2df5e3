#!/usr/bin/env bash
# N processes of one job on this machine, started again together: see --help.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Runs a job as several processes on this machine, and starts it again when it stopped or was killed.

  launch/local.sh --processes=2 --virtual_devices=4 -- \
      --config=configs/synthetic.py --workdir=runs/synthetic

  --processes=N         processes of the job [1]
  --virtual_devices=M   M virtual CPU devices in each process, to try a mesh without accelerators
  --gpus_per_process=M  process i sees GPUs i*M to i*M+M-1 [all see all: right for one process]
  --module=NAME         what to run instead of itself_jax.main, e.g. itself_jax.bench
  --python=PATH         the Python that has itself_jax [python]
  --compile_cache=DIR   keep compiled programs there (JAX_COMPILATION_CACHE_DIR)
  --grace=S             seconds that the others get to notice a lost process, save and end [60]
  --max_restarts=N      start again at most so often [20]
  --max_quick=N         give up after N runs in a row of less than a minute [5]
  --dry_run             print the commands, run nothing

Everything after -- goes to the job. Each line of output says which process wrote it. Ctrl-C and
SIGTERM reach every process and are waited for. The launcher ends with the job's exit code; with 75
after a signal (the same command goes on), with 1 if the job died too often.
HELP
}

flag=([processes]=1 [virtual_devices]="" [gpus_per_process]="" [module]=itself_jax.main
    [python]=python [compile_cache]="" [grace]=60 [max_restarts]=20 [max_quick]=5 [dry_run]=false)
parse_flags "$@"
require_number processes 1
require_number grace 0
require_number max_restarts 0
require_number max_quick 1
[[ -z ${flag[virtual_devices]} ]] || require_number virtual_devices 1
[[ -z ${flag[gpus_per_process]} ]] || require_number gpus_per_process 1
[[ -z ${flag[virtual_devices]} || -z ${flag[gpus_per_process]} ]] ||
    reject "--virtual_devices are CPU devices: leave --gpus_per_process out"
[[ ${flag[module]} != itself_jax.main ]] || require_job runs/cuhk
count=${flag[processes]}
need "${flag[python]}" "name the Python that has itself_jax by --python=PATH"

# The command of process $1 in `command`.
process_command() {
    command=(env)
    if ((count > 1)); then
        command+=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$1")
    fi
    if [[ -n ${flag[virtual_devices]} ]]; then
        command+=(JAX_PLATFORMS=cpu
            "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${flag[virtual_devices]}")
    elif [[ -n ${flag[gpus_per_process]} ]]; then
        local each=${flag[gpus_per_process]} gpus="" gpu
        for ((gpu = $1 * each; gpu < ($1 + 1) * each; gpu++)); do gpus+=,$gpu; done
        command+=("CUDA_VISIBLE_DEVICES=${gpus#,}")
    fi
    [[ -z ${flag[compile_cache]} ]] || command+=("JAX_COMPILATION_CACHE_DIR=${flag[compile_cache]}")
    command+=("${flag[python]}" -m "${flag[module]}" "${job[@]}")
}

if dry; then
    port=PORT # a free one, chosen at each start
    for ((i = 0; i < count; i++)); do
        process_command "$i"
        run "${command[@]}"
    done
    exit 0
fi

start_process() {
    if (($1 == 0 && count > 1)); then # a new port for each start: the old one may linger
        port=$("${flag[python]}" -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])') || fail "${flag[python]} does not run: name the Python that has itself_jax by --python=PATH"
    fi
    process_command "$1"
    if ((count == 1)); then
        "${command[@]}" {messages}>&- &
        return
    fi
    local out err
    exec {out}> >(prefix "[$1] ")
    readers+=("$!")
    exec {err}> >(prefix "[$1] " >&2)
    readers+=("$!")
    "${command[@]}" >&"$out" 2>&"$err" {out}>&- {err}>&- {messages}>&- &
    exec {out}>&- {err}>&- # $! is still the process: `run_group` takes it from there
}

readers=()
supervise "$count" "${flag[grace]}" "${flag[max_restarts]}" "${flag[max_quick]}"
for reader in "${readers[@]}"; do # the last lines are out before this ends
    wait "$reader" || true
done
exit "$exit_code"
