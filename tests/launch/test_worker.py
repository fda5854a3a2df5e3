"""`launch/worker.sh`: a job that outlives its connection, on this machine."""

import os
import signal
import time

import launching
import pytest

JOB = ("--", "--config=configs/cuhk.py", "--workdir=gs://bucket/runs/a b's")


def act(machine, action: str, *arguments: str):
    return machine.run("worker.sh", f"--action={action}", "--run=cuhk", *arguments)


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def state(machine) -> str:
    return act(machine, "status").stdout.splitlines()[0]


def test_a_job_runs_on_without_the_one_who_started_it_and_is_started_again(machine):
    machine.stub("python", does='echo "run $call"; ((call > 1)) || exit 75; echo "$PWD"')
    assert state(machine) == "absent"
    result = act(machine, "start", "--compile_cache=gs://bucket/cache", *JOB)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    wait_until(lambda: state(machine) == "ended 0")
    assert machine.calls_of("python") == [["-m", "itself_jax.main", *JOB[1:]]] * 2
    log = act(machine, "follow").stdout.splitlines()
    assert log == [
        "run 1",
        "worker.sh: the job ended with code 75; start 1 of at most 20",
        "run 2",
        str(launching.ROOT),  # where configs/cuhk.py is found
    ]


def test_the_state_of_a_failed_run_comes_with_its_sentence(machine):
    machine.stub("python", does='echo "itself_jax: no such file" >&2; exit 1')
    act(machine, "start", *JOB)
    wait_until(lambda: state(machine) == "ended 1")
    assert act(machine, "status").stdout == "ended 1\nitself_jax: no such file\n"


def test_stop_waits_until_the_job_has_saved_and_follow_sees_it_end(machine):
    machine.stub(
        "python",
        does="trap 'sleep 1; echo saved; exit 75' TERM; echo ready;"
        " for _ in {1..600}; do sleep 0.1; done",
    )
    act(machine, "start", *JOB)
    follower = machine.start("worker.sh", "--action=follow", "--run=cuhk")
    assert follower.stdout.readline() == "ready\n"
    assert state(machine) == "running"
    assert act(machine, "stop").stdout == "ended 75\n"
    out, _ = follower.communicate(timeout=60)
    assert out.splitlines() == ["saved", "worker.sh: stopped; the same command goes on"]
    assert len(machine.calls()) == 1


def test_a_repeated_start_changes_nothing_and_another_command_is_refused(machine):
    machine.stub("python", does="trap 'exit 75' TERM; for _ in {1..600}; do sleep 0.1; done")
    act(machine, "start", *JOB)
    again = act(machine, "start", *JOB)
    assert (again.returncode, launching.only_error(again)) == (0, "worker.sh: cuhk runs already")
    other = act(machine, "start", *JOB, "--config.seed=1")
    assert other.returncode == 1
    assert "another command runs as cuhk; stop it first: env python -m" in other.stderr
    act(machine, "stop")
    assert len(machine.calls()) == 1


def test_a_run_whose_machine_went_down_is_lost(machine):
    machine.stub("python", does="for _ in {1..600}; do sleep 0.1; done")
    act(machine, "start", *JOB)
    pid = int((machine.home / ".itself_jax/cuhk/pid").read_text())
    wait_until(lambda: len(machine.calls()) == 1)
    os.killpg(pid, signal.SIGKILL)  # setsid made it the leader of all its processes
    wait_until(lambda: state(machine) == "lost")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--run=cuhk",), "--action is required"),
        (
            ("--action=begin", "--run=cuhk"),
            "--action=begin must be one of: start follow status stop",
        ),
        (("--action=start",), "--run is required, e.g. --run=cuhk"),
        (
            ("--action=start", "--run=../x", *JOB),
            "--run=../x must be at most 63 lower-case letters",
        ),
        (("--action=start", "--run=cuhk"), "--config is required among the job's flags"),
    ],
)
def test_rejected_flags(machine, arguments, sentence):
    result = machine.run("worker.sh", *arguments)
    assert result.returncode == 2
    assert sentence in launching.only_error(result)


def test_a_run_that_is_not_there_cannot_be_followed(machine):
    result = act(machine, "follow")
    assert result.returncode == 1
    assert launching.only_error(result) == "worker.sh: there is no run cuhk on this machine"


def test_an_absent_python_is_named(machine):
    result = act(machine, "start", "--python=.venv/bin/nothing", *JOB)
    assert result.returncode == 1
    assert ".venv/bin/nothing is not installed or not on the PATH" in launching.only_error(result)
