"""`launch/local.sh`: what it starts, when it starts it again, and how it ends."""

import json
import os
import signal
import textwrap
import time

import launching
import pytest

JOB = ("--", "--config=configs/synthetic.py", "--workdir=runs/a b")


def python_that(machine, does: str) -> None:
    """A `python` stub; `does` is what the job does. Asked for a port, it knows one."""
    machine.stub(
        "python", does=f"if [[ $1 == -c ]]; then echo 4711; exit; fi\n{textwrap.dedent(does)}"
    )


def starts(machine) -> list[list[str]]:
    return [call[1:] for call in machine.calls_of("python") if call[0] == "-m"]


def test_one_process_is_the_plain_command_with_its_arguments_untouched(machine):
    python_that(machine, 'echo "port: ${JAX_COORDINATOR_ADDRESS-none}"')
    odd = ('--config.data_root=/data/it\'s "here" $HOME `id` *', "", "--debug")
    result = machine.run("local.sh", *JOB, *odd)
    assert (result.returncode, result.stdout, result.stderr) == (0, "port: none\n", "")
    assert starts(machine) == [["itself_jax.main", *JOB[1:], *odd]]


def test_processes_get_their_environment_and_their_lines_a_number(machine):
    python_that(
        machine,
        """
        echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PLATFORMS" \\
            "$XLA_FLAGS $JAX_COMPILATION_CACHE_DIR"
        echo "I am $JAX_PROCESS_ID" >&2
        """,
    )
    result = machine.run(
        "local.sh",
        "--processes=2",
        "--virtual_devices=4",
        "--compile_cache=a b",
        *JOB,
        XLA_FLAGS="--xla_dump_to=x",
    )
    assert result.returncode == 0
    seen = "127.0.0.1:4711 2 cpu --xla_dump_to=x --xla_force_host_platform_device_count=4 a b"
    assert sorted(result.stdout.splitlines()) == [f"[0] {seen}", f"[1] {seen}"]
    assert sorted(result.stderr.splitlines()) == ["[0] I am 0", "[1] I am 1"]


def test_gpus_are_dealt_out(machine):
    python_that(machine, "echo $CUDA_VISIBLE_DEVICES")
    result = machine.run("local.sh", "--processes=2", "--gpus_per_process=2", *JOB)
    assert sorted(result.stdout.splitlines()) == ["[0] 0,1", "[1] 2,3"]


def test_code_75_and_signals_start_the_same_command_again(machine):
    python_that(machine, "case $call in 1) exit 75;; 2) kill -KILL $$;; *) exit 0;; esac")
    result = machine.run("local.sh", *JOB)
    assert result.returncode == 0
    assert starts(machine) == [["itself_jax.main", *JOB[1:]]] * 3
    assert result.stderr.splitlines() == [
        "local.sh: the job ended with code 75; start 1 of at most 20",
        "local.sh: the job ended with signal 9; start 2 of at most 20",
    ]


@pytest.mark.parametrize("code", [1, 2, 3, 127])
def test_other_codes_stop(machine, code):
    python_that(machine, f"exit {code}")
    result = machine.run("local.sh", *JOB)
    assert result.returncode == code
    assert len(starts(machine)) == 1
    assert launching.only_error(result) == (
        f"local.sh: the job ended with code {code}; starting it again would not help"
    )


def test_restarts_are_bounded(machine):
    python_that(machine, "exit 75")
    result = machine.run("local.sh", "--max_restarts=2", *JOB)
    assert result.returncode == 1
    assert len(starts(machine)) == 3
    assert result.stderr.splitlines()[-1] == (
        "local.sh: the job ended with code 75 after 2 restarts (--max_restarts); giving up"
    )


def test_a_job_that_always_dies_at_once_is_given_up_early(machine):
    python_that(machine, "kill -SEGV $$")
    result = machine.run("local.sh", "--max_quick=3", *JOB)
    assert result.returncode == 1
    assert len(starts(machine)) == 3
    assert result.stderr.splitlines()[-1] == (
        "local.sh: the job ended with signal 11, 3 times in a row within 60 s of its start"
        " (--max_quick); giving up"
    )


def test_one_failure_ends_the_others_and_decides(machine):
    python_that(
        machine,
        """
        ((JAX_PROCESS_ID == 1)) && { sleep 0.5; exit 1; }
        trap 'echo asked; exit 75' TERM
        for _ in {1..600}; do sleep 0.1; done
        """,
    )
    began = time.monotonic()
    result = machine.run("local.sh", "--processes=3", *JOB)
    assert time.monotonic() - began < 30
    assert result.returncode == 1
    assert sorted(result.stdout.splitlines()) == ["[0] asked", "[2] asked"]
    assert result.stderr.splitlines() == [
        "local.sh: process 1 ended with code 1; ending the others",
        "local.sh: process 1 ended with code 1; starting it again would not help",
    ]


def test_a_failure_decides_even_when_a_peer_noticed_it_first(machine):
    python_that(
        machine, "if ((JAX_PROCESS_ID == 0)); then exit 75; else sleep 1; echo why >&2; exit 1; fi"
    )
    result = machine.run("local.sh", "--processes=2", *JOB)
    assert result.returncode == 1
    assert len(starts(machine)) == 2


def test_a_killed_process_leaves_the_others_time_and_all_start_together(machine):
    python_that(
        machine,
        """
        if ((call > 3)); then exit 0; fi  # the second start; call 1 or so asked for the port
        if ((JAX_PROCESS_ID == 1)); then kill -KILL $$; fi
        sleep 1; echo saved; exit 75
        """,
    )
    result = machine.run("local.sh", "--processes=2", *JOB)
    assert result.returncode == 0
    assert result.stdout.splitlines() == ["[0] saved"]
    assert result.stderr.splitlines() == [
        "local.sh: process 1 ended with signal 9; start 1 of at most 20"
    ]
    assert len(starts(machine)) == 4


def test_a_process_that_does_not_notice_is_ended_after_the_grace(machine):
    python_that(
        machine,
        """
        if ((call > 3)); then exit 0; fi
        if ((JAX_PROCESS_ID == 1)); then exit 75; fi
        trap '' TERM
        for _ in {1..600}; do sleep 0.1; done
        """,
    )
    began = time.monotonic()
    result = machine.run("local.sh", "--processes=2", "--grace=1", *JOB)
    assert 1.5 < time.monotonic() - began < 30  # once to notice SIGTERM, once before SIGKILL
    assert result.returncode == 0
    assert len(starts(machine)) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_is_waited_for(machine, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests were started to ignore it (`… &`), and a shell cannot undo that")
    python_that(
        machine,
        """
        trap 'sleep 1; echo saved; exit 75' TERM
        echo ready
        for _ in {1..600}; do sleep 0.1; done
        """,
    )
    process = machine.start("local.sh", "--processes=2", *JOB)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert err == "local.sh: stopped; the same command goes on\n"
    assert len(starts(machine)) == 2  # and not started again


def test_dry_run_prints_the_commands_and_runs_nothing(machine):
    python_that(machine, "exit 9")
    odd = '--config.data_root=/data/it\'s "here" $HOME'
    result = machine.run("local.sh", "--processes=2", "--virtual_devices=4", "--dry_run", *JOB, odd)
    assert result.returncode == 0
    assert machine.calls() == []
    expected = [
        "JAX_NUM_PROCESSES=2",
        "JAX_PLATFORMS=cpu",
        "XLA_FLAGS=--xla_force_host_platform_device_count=4",
        "python", "-m", "itself_jax.main", *JOB[1:], odd,
    ]  # fmt: skip
    commands = launching.printed_commands(result.stdout)
    assert [[w for w in c if "_ID=" not in w and "_ADDRESS=" not in w][1:] for c in commands] == [
        expected,
        expected,
    ]
    assert [word for c in commands for word in c if "_ID=" in word] == [
        "JAX_PROCESS_ID=0",
        "JAX_PROCESS_ID=1",
    ]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--process=2", *JOB), "--process is not a flag of local.sh"),
        (("--a[$(id)]=2", *JOB), "is not a flag of local.sh"),
        (("--processes", *JOB), "--processes needs a value: --processes=VALUE"),
        (("--processes=0", *JOB), "--processes=0 must be a whole number of at least 1"),
        (("--processes=two", *JOB), "--processes=two must be a whole number of at least 1"),
        (("--processes=08", *JOB), "--processes=08 must be a whole number of at least 1"),
        (("--dry_run=yes", *JOB), "--dry_run=yes must be true or false"),
        (("runs/x", *JOB), "unexpected argument runs/x: write --name=value"),
        (("--", "--config=c.py"), "--workdir is required among the job's flags, after --"),
        (("--", "--workdir=w"), "--config is required among the job's flags, after --"),
        (
            ("--virtual_devices=2", "--gpus_per_process=1", *JOB),
            "--virtual_devices are CPU devices",
        ),
    ],
)
def test_rejected_flags(machine, arguments, sentence):
    python_that(machine, "exit 9")
    result = machine.run("local.sh", *arguments)
    assert result.returncode == 2
    assert sentence in launching.only_error(result)
    assert machine.calls() == []


def test_an_absent_python_is_named(machine):
    result = machine.run("local.sh", "--python=/no/python", *JOB)
    assert result.returncode == 1
    assert launching.only_error(result) == (
        "local.sh: /no/python is not installed or not on the PATH:"
        " name the Python that has itself_jax by --python=PATH"
    )


def test_help_shows_an_example(machine):
    result = machine.run("local.sh", "--help")
    assert result.returncode == 0
    assert "launch/local.sh --processes=2 --virtual_devices=4 -- \\" in result.stdout


PSUM = """
import json
import os
import signal
import sys

import jax

jax.distributed.initialize(
    os.environ["JAX_COORDINATOR_ADDRESS"],
    int(os.environ["JAX_NUM_PROCESSES"]),
    int(os.environ["JAX_PROCESS_ID"]),
)
first = not os.path.exists("stopped")
local = jax.local_device_count()
ones = jax.numpy.arange(local) + local * jax.process_index()
total = jax.pmap(lambda x: jax.lax.psum(x, "i"), "i")(ones)
print(json.dumps({"devices": jax.device_count(), "sum": int(total[0])}), flush=True)
jax.distributed.shutdown()
if first and jax.process_index() == 0:
    open("stopped", "w").close()
sys.exit(75 if first else 0)
"""


def test_two_real_processes_of_four_devices_compute_together_and_start_again(machine):
    (machine.folder / "psum.py").write_text(PSUM)
    paths = os.pathsep.join([str(machine.folder)])
    result = machine.run(
        "local.sh", "--processes=2", "--virtual_devices=4", "--module=psum",
        f"--python={launching.PYTHON}", PYTHONPATH=paths,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [line.split(" ", 1)[1] for line in result.stdout.splitlines()]
    values = [json.loads(line) for line in lines if line.startswith("{")]  # Gloo has its say, too
    # 0 + 1 + … + 7 over eight devices, in both processes, in both starts.
    assert values == [{"devices": 8, "sum": 28}] * 4
