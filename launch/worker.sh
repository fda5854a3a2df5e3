#!/usr/bin/env bash
# One process of a job on this machine, which outlives the connection that started it: see --help.
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'HELP'
Runs a job on this machine without a terminal, and starts it again when it stopped or was killed.
tpu_vm.sh calls it on every worker; over ssh it serves any other machine.

  launch/worker.sh --action=start --run=cuhk --python=.venv/bin/python -- \
      --config=configs/cuhk.py --workdir=gs://bucket/runs/cuhk
  launch/worker.sh --action=follow --run=cuhk

  --action=ACTION      start · follow: print the log until the run ends · status: `running`,
                       `ended CODE`, `lost` (the machine restarted) or `absent`, then the last
                       words of its log · stop: save and end
  --run=NAME           the run; its log is ~/.itself_jax/NAME/log
  --python=PATH        the Python that has itself_jax [python]
  --compile_cache=DIR  keep compiled programs there (JAX_COMPILATION_CACHE_DIR)
  --max_restarts=N     start again at most so often [20]
  --max_quick=N        give up after N runs in a row of less than a minute [5]
  --dry_run            print the command of the job, run nothing

Everything after -- goes to itself_jax.main, which runs in the folder above launch/.
HELP
}

flag=([action]="" [run]="" [python]=python [compile_cache]="" [max_restarts]=20 [max_quick]=5
    [dry_run]=false)
parse_flags "$@"
require action start
require_one_of action start follow status stop attend
require run cuhk
require_name run 63
require_number max_restarts 0
require_number max_quick 1

folder=$HOME/.itself_jax/${flag[run]}
command=(env)
[[ -z ${flag[compile_cache]} ]] || command+=("JAX_COMPILATION_CACHE_DIR=${flag[compile_cache]}")
command+=("${flag[python]}" -m itself_jax.main "${job[@]}")

# Is the supervisor of the run alive? After a restart of the machine its number may be another's.
alive() {
    local pid words
    [[ -s $folder/pid ]] || return 1
    pid=$(<"$folder/pid")
    words=$(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) || return 1
    [[ $words == *"--action=attend --run=${flag[run]} "* ]]
}

state() {
    if alive; then
        echo running
    elif [[ -s $folder/ended ]]; then
        echo "ended $(<"$folder/ended")"
    elif [[ -e $folder/pid ]]; then
        echo lost
    else
        echo absent
    fi
}

start() {
    require_job gs://bucket/runs/cuhk
    if dry; then
        run "${command[@]}"
        return
    fi
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    need "${flag[python]}" "name the Python that has itself_jax by --python=PATH"
    mkdir -p "$folder"
    if alive; then # also a start that was repeated because its answer got lost
        [[ $(<"$folder/command") == "$(quote "${command[@]}")" ]] ||
            fail "another command runs as ${flag[run]}; stop it first: $(<"$folder/command")"
        say "${flag[run]} runs already"
        return
    fi
    rm -f "$folder/ended" "$folder/pid"
    quote "${command[@]}" >"$folder/command"
    nohup setsid bash launch/worker.sh --action=attend "--run=${flag[run]}" "--python=${flag[python]}" \
        "--compile_cache=${flag[compile_cache]}" "--max_restarts=${flag[max_restarts]}" \
        "--max_quick=${flag[max_quick]}" -- "${job[@]}" \
        >>"$folder/log" 2>&1 </dev/null {messages}>&- &
    for _ in {1..100}; do
        [[ ! -s $folder/pid ]] || return 0
        sleep 0.1
    done
    fail "${flag[run]} did not start: see $folder/log"
}

attend() {
    echo "$$" >"$folder/pid"
    start_process() { "${command[@]}" {messages}>&- & }
    supervise 1 60 "${flag[max_restarts]}" "${flag[max_quick]}"
    echo "$exit_code" >"$folder/ended.new"
    mv "$folder/ended.new" "$folder/ended"
}

case ${flag[action]} in
    start) start ;;
    attend) attend ;;
    status)
        state
        [[ ! -e $folder/log ]] || { grep '^itself_jax: ' "$folder/log" || cat "$folder/log"; } | last_line
        ;;
    follow)
        [[ -e $folder/log ]] || fail "there is no run ${flag[run]} on this machine"
        if alive; then
            tail -n +1 -F "--pid=$(<"$folder/pid")" "$folder/log"
        else
            cat "$folder/log"
        fi
        ;;
    stop)
        if alive; then
            kill -TERM "$(<"$folder/pid")"
            while alive; do sleep 0.2; done # as long as saving takes
        fi
        state
        ;;
esac
