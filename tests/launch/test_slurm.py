"""`launch/slurm.sh` and the batch script: what sbatch, srun, scontrol and scancel are told."""

import subprocess
import textwrap

import launching
import pytest

JOB = ("--", "--config=configs/cuhk.py", "--workdir=/shared/runs/a b's")
RUN = ("--nodes=2", "--gpus_per_node=8", *JOB)
SCRIPT = f"{launching.ROOT}/launch/slurm_job.sh"


@pytest.fixture
def slurm(machine):
    machine.stub("sbatch", does="echo '4711;main'")
    machine.stub("scancel")
    machine.stub("squeue", does="[[ -e $HOME/running ]] && cat $HOME/running")
    machine.stub(
        "scontrol", does="[[ $1 != show ]] || echo 'JobState=RUNNING Requeue=1 Restarts=0'"
    )
    return machine


def test_a_job_is_submitted_with_one_process_per_gpu(slurm):
    result = slurm.run(
        "slurm.sh", "--name=it's mine", "--cpus_per_task=6", "--mem=0", "--time=24:00:00",
        "--partition=gpu", "--account=a", "--qos=q", "--constraint=a100|h100", "--warning=300",
        "--python=/shared/my venv/bin/python", "--logs=my logs/100%", "--max_restarts=3",
        "--compile_cache=/shared/cache, too", *RUN,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4711\n"
    assert slurm.calls() == [
        ["sbatch", "--parsable", "--job-name=it's mine", "--nodes=2", "--ntasks-per-node=8",
         "--gpus-per-node=8", "--cpus-per-task=6", "--mem=0", "--time=24:00:00",
         "--partition=gpu", "--account=a", "--qos=q", "--constraint=a100|h100", "--requeue",
         "--signal=TERM@300", "--open-mode=append", "--output=my logs/100%%/%j.log", SCRIPT,
         "3", "/shared/cache, too", "/shared/my venv/bin/python", *JOB[1:]]
    ]  # fmt: skip
    assert (slurm.folder / "my logs" / "100%").is_dir()  # or Slurm would lose the log
    assert launching.only_error(result).startswith("slurm.sh: submitted as job 4711; to see it: ")


def test_without_gpus_there_is_one_process_per_node(slurm):
    slurm.run("slurm.sh", "--nodes=2", "--gpus_per_node=0", *JOB)
    (call,) = slurm.calls()
    assert "--ntasks-per-node=1" in call
    assert not [word for word in call if "gpus" in word]


def test_dry_run_prints_the_commands_and_runs_nothing(slurm):
    result = slurm.run("slurm.sh", "--dry_run", "--logs=my logs", *RUN)
    assert (result.returncode, result.stderr, slurm.calls()) == (0, "", [])
    assert not (slurm.folder / "my logs").exists()
    printed = launching.printed_commands(result.stdout)
    assert printed[0] == ["mkdir", "-p", "my logs"]
    slurm.run("slurm.sh", "--logs=my logs", *RUN)
    assert slurm.calls() == printed[1:]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (JOB, "--gpus_per_node is required, e.g. --gpus_per_node=8"),
        (("--gpus_per_node=8", *JOB[:2]), "--workdir is required among the job's flags"),
        (("--gpus_per_node=two", *JOB), "--gpus_per_node=two must be a whole number of at least 0"),
        (("--nodes=0", *RUN[1:]), "--nodes=0 must be a whole number of at least 1"),
        (("--name=", *RUN), "--name is required"),
        (("--action=stop",), "--job is required, e.g. --job=4711"),
        (("--action=stop", "--job=all"), "--job=all must be the number of a job"),
        (("--action=stop", "--job=1", *JOB), "--action=stop takes no flags of the job"),
        (("--action=submit", *RUN), "--action=submit must be one of: run follow status stop"),
    ],
)
def test_rejected_flags(slurm, arguments, sentence):
    result = slurm.run("slurm.sh", *arguments)
    assert result.returncode == 2
    assert sentence in launching.only_error(result)
    assert slurm.calls() == []


@pytest.mark.parametrize(
    "tool, arguments",
    [
        ("sbatch", RUN),
        ("squeue", ("--action=follow", "--job=1")),
        ("squeue", ("--action=status", "--job=1")),
        ("scontrol", ("--action=stop", "--job=1")),
        ("scancel", ("--action=stop", "--job=1")),
    ],
)
def test_an_absent_tool_is_named(slurm, tool, arguments):
    (slurm.bin / tool).unlink()
    result = slurm.run("slurm.sh", *arguments)
    assert result.returncode == 1
    assert launching.only_error(result) == (
        f"slurm.sh: {tool} is not installed or not on the PATH:"
        " run this on a login node of the SLURM cluster"
    )
    assert slurm.calls() == []


def test_a_refused_submission_shows_why(slurm):
    slurm.stub("sbatch", does="echo 'sbatch: error: invalid partition' >&2; exit 1")
    result = slurm.run("slurm.sh", *RUN)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "sbatch: error: invalid partition",
        "slurm.sh: sbatch did not take the job; its reason is above",
    ]


def test_a_bucket_without_permission_is_named(slurm):
    slurm.stub("gcloud", does="echo 'HTTPError 404' >&2; exit 1")
    result = slurm.run("slurm.sh", *RUN, "--workdir=gs://bucket/x")
    assert result.returncode == 1
    assert launching.only_error(result) == (
        "slurm.sh: cannot list gs://bucket (gcloud: HTTPError 404): create it, or grant the account"
        " roles/storage.objectUser on it"
    )
    assert slurm.calls_of("sbatch") == []


def test_stop_forbids_another_start_then_asks_the_processes_to_save(slurm):
    result = slurm.run("slurm.sh", "--action=stop", "--job=4711")
    assert result.returncode == 0
    assert slurm.calls() == [
        ["scontrol", "update", "JobId=4711", "Requeue=0"],
        ["scancel", "--state=PENDING", "4711"],
        ["scancel", "--state=RUNNING", "--signal=TERM", "4711"],
    ]


def test_stop_that_fails_midway_says_so(slurm):
    slurm.stub("scontrol", does="echo 'Access denied' >&2; exit 1")
    result = slurm.run("slurm.sh", "--action=stop", "--job=4711")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "slurm.sh: job 4711 cannot be changed; scontrol says why above"
    )
    assert slurm.calls_of("scancel") == []


def test_follow_prints_the_log_until_the_job_leaves_the_queue(slurm):
    (slurm.folder / "slurm_logs").mkdir()
    log = slurm.folder / "slurm_logs" / "4711.log"
    log.write_text("0: step 1\n")
    leaves = f'case $call in 1) echo RUNNING;; 2) echo "0: step 2" >>{log}; echo RUNNING;; esac'
    slurm.stub("squeue", does=leaves)
    result = slurm.run("slurm.sh", "--action=follow", "--job=4711", "--poll=0")
    assert result.returncode == 0
    assert result.stdout == "0: step 1\n0: step 2\n"
    assert result.stderr.splitlines() == [
        "slurm.sh: job 4711: RUNNING",
        "slurm.sh: job 4711 is not in the queue any more",
    ]


def run_batch(machine, *, restarts: int = 0, max_restarts: int = 3, cpus: str = "4"):
    """The batch script as a node runs it: alone in another folder."""
    script = machine.folder / "spool" / "slurm_script"
    script.parent.mkdir(exist_ok=True)
    script.write_bytes((launching.ROOT / "launch" / "slurm_job.sh").read_bytes())
    variables = {"SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": cpus}
    if restarts:
        variables["SLURM_RESTART_COUNT"] = str(restarts)
    return subprocess.run(
        [machine.bin / "bash", script, str(max_restarts), "/cache", "/py thon", *JOB[1:]],
        env=machine.environment(**{k: v for k, v in variables.items() if v}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


REQUEUED = [["requeue", "Incomplete", "4711"]]


def requeues(machine) -> list[list[str]]:
    return [call for call in machine.calls_of("scontrol") if call[0] == "requeue"]


def test_srun_starts_all_processes_and_a_done_job_is_done(slurm):
    slurm.stub("srun", does="echo $JAX_COMPILATION_CACHE_DIR")
    result = run_batch(slurm)
    assert (result.returncode, result.stdout, result.stderr) == (0, "/cache\n", "")
    (call,) = slurm.calls()
    assert call[:6] == [
        "srun", "--kill-on-bad-exit=1", "--label", "--cpus-per-task=4", "bash", "-c"
    ]  # fmt: skip
    assert call[7:] == ["task", "/py thon", "-m", "itself_jax.main", *JOB[1:]]


def test_without_cpus_per_task_srun_gets_none(slurm):
    slurm.stub("srun")
    run_batch(slurm, cpus="")
    assert not [word for word in slurm.calls()[0] if word.startswith("--cpus-per-task")]


@pytest.mark.parametrize("code", [75, 137, 143])
def test_a_job_that_stopped_or_was_killed_goes_back_into_the_queue(slurm, code):
    slurm.stub("srun", does=f"exit {code}")
    result = run_batch(slurm, restarts=2)
    assert (result.returncode, requeues(slurm)) == (75, REQUEUED)
    assert result.stderr == (
        f"slurm_job.sh: the job ended with code {code}; start 3 of at most 3\n"
    )


def test_restarts_are_bounded(slurm):
    slurm.stub("srun", does="exit 75")
    result = run_batch(slurm, restarts=3)
    assert (result.returncode, requeues(slurm)) == (1, [])
    assert result.stderr == (
        "slurm_job.sh: the job ended with code 75 after 3 restarts (--max_restarts); giving up\n"
    )


@pytest.mark.parametrize("code, seen", [(251, 1), (252, 2), (3, 3), (253, 253)])
def test_a_failure_stops(slurm, code, seen):
    slurm.stub("srun", does=f"exit {code}")
    result = run_batch(slurm)
    assert (result.returncode, requeues(slurm)) == (seen, [])
    assert f"the job ended with code {seen}; starting it again would not help" in result.stderr


def test_a_job_that_slurm_ends_is_left_to_slurm(slurm):
    slurm.stub("srun", does="kill -TERM $PPID; sleep 0.5; exit 75")
    result = run_batch(slurm)
    assert (result.returncode, slurm.calls_of("scontrol")) == (75, [])
    assert "Slurm ended the job" in result.stderr


def test_a_job_that_was_asked_to_stop_stays_stopped(slurm):
    slurm.stub("srun", does="exit 75")
    slurm.stub("scontrol", does="echo 'Requeue=0 Restarts=0'")
    result = run_batch(slurm)
    assert (result.returncode, requeues(slurm)) == (75, [])
    assert result.stderr == "slurm_job.sh: stopped on request; the same command goes on\n"


def test_a_refused_requeue_says_how_to_go_on(slurm):
    slurm.stub("srun", does="exit 75")
    slurm.stub("scontrol", does="[[ $1 != requeue ]] || { echo 'disabled' >&2; exit 1; }")
    result = run_batch(slurm)
    assert result.returncode == 75
    assert result.stderr.splitlines()[-1] == (
        "slurm_job.sh: Slurm did not queue it again (its reason is above); the same command goes on"
    )


@pytest.mark.parametrize(
    "does, code",
    [
        ("exit 0", 0),
        ("exit 1", 251),
        ("exit 2", 252),
        ("exit 75", 75),
        ("kill -KILL $$", 137),
        # Slurm signals the shell of the task and the job in it.
        ("trap 'sleep 0.3; exit 75' TERM; kill -TERM $PPID $$; sleep 5", 75),
    ],
)
def test_the_code_of_a_task(slurm, does, code):
    slurm.stub("srun")
    run_batch(slurm)
    task = slurm.calls()[0][6]
    python = slurm.bin / "job"
    python.write_text(f"#!/usr/bin/env bash\n{textwrap.dedent(does)}\n")
    python.chmod(0o755)
    result = subprocess.run(
        [slurm.bin / "bash", "-c", task, "task", python, "-m", "x"], env=slurm.environment()
    )
    assert result.returncode == code


def test_help_shows_an_example(machine):
    result = machine.run("slurm.sh", "--help")
    assert (result.returncode, "launch/slurm.sh --name=itself" in result.stdout) == (0, True)
