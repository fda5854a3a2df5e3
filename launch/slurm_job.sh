#!/usr/bin/env bash
# The batch script that slurm.sh submits: runs the job on all tasks, then decides whether Slurm is to
# run it again. Slurm copies this file alone to a node, so it needs no other.
#
#   slurm_job.sh MAX_RESTARTS COMPILE_CACHE PYTHON FLAG...
set -euo pipefail

max_restarts=$1
[[ -z $2 ]] || export JAX_COMPILATION_CACHE_DIR=$2
python=$3
shift 3
restarts=${SLURM_RESTART_COUNT:-0} # starts again, by this script and by Slurm itself

say() { printf 'slurm_job.sh: %s\n' "$*" >&2; }

# scancel and preemption signal this script, too; the warning before the time limit does not.
ended_by_slurm=false
trap 'ended_by_slurm=true' TERM

# srun reports the highest code of all tasks. That of a failure (1, 2) must win over the 75 of peers
# that noticed it. The shell of a task outlives the signals by which the job in it saves and ends.
# shellcheck disable=SC2016 # expanded by the task's shell
task='trap : TERM INT; code=0; "$@" || code=$?; case $code in 1 | 2) exit $((250 + code)) ;; esac; exit "$code"'

# Since Slurm 22.05 srun does not take the number of CPUs over from sbatch.
srun --kill-on-bad-exit=1 --label ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    bash -c "$task" task "$python" -m itself_jax.main "$@" &
child=$!
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not srun
    code=0
    wait "$child" || code=$?
done

case $code in
    0) exit 0 ;;
    251 | 252)
        say "the job ended with code $((code - 250)); starting it again would not help"
        exit $((code - 250))
        ;;
esac
if ((code != 75 && (code <= 128 || code > 192))); then
    say "the job ended with code $code; starting it again would not help"
    exit "$code"
elif [[ $ended_by_slurm == true ]]; then
    say "Slurm ended the job; after a preemption Slurm starts it again itself, after scancel the same command goes on"
    exit 75
elif [[ $(scontrol show job "$SLURM_JOB_ID") == *Requeue=0* ]]; then
    say "stopped on request; the same command goes on"
    exit 75
elif ((restarts >= max_restarts)); then
    say "the job ended with code $code after $restarts restarts (--max_restarts); giving up"
    exit 1
fi
say "the job ended with code $code; start $((restarts + 1)) of at most $max_restarts"
# Incomplete: never a job that somebody cancels at this moment.
scontrol requeue Incomplete "$SLURM_JOB_ID" ||
    say "Slurm did not queue it again (its reason is above); the same command goes on"
exit 75
