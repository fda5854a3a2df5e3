"""Real processes on loopback: how they join, compare, stop and lose each other."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny

from itself_jax import config as config_lib
from itself_jax import hosts

# What each process does; its index is the first argument.
PROGRAM = """
import sys
from itself_jax import config, hosts
ours = hosts.Hosts()
ours.start(config.Distributed(timeout_s={timeout}))
try:
    print("joined", ours.index, ours.count, flush=True)
{body}
    ours.finish()
except hosts.HostsError as error:
    ours.fail(1, error)
"""


def a_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def started(commands, devices: int = 1, **environment):
    """Processes that find each other by the environment; killed at the end."""
    port, running = a_port(), []
    try:
        for index, command in enumerate(commands):
            env = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
            env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
            env.pop("JAX_NUM_CPU_DEVICES", None)
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            env |= {"JAX_NUM_PROCESSES": str(len(commands)), "JAX_PROCESS_ID": str(index)}
            running.append(
                subprocess.Popen(
                    command,
                    cwd=tiny.ROOT,
                    env=env | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.communicate()


def script(body: str, timeout: int = 60) -> list[str]:
    lines = "\n".join("    " + line for line in body.splitlines())
    return [sys.executable, "-u", "-c", PROGRAM.format(body=lines, timeout=timeout)]


def ends(running, timeout: float = 100) -> list[tuple[int, str]]:
    """(exit code, our sentence) of each process."""
    result = []
    for process in running:
        _, errors = process.communicate(timeout=timeout)
        ours = [line for line in errors.splitlines() if line.startswith("itself_jax: ")]
        result.append((process.returncode, ours[-1] if ours else errors))
    return result


def test_facts_that_differ_are_named_with_both_values_and_both_processes():
    body = """
facts = {"config.batch_size": 64, "data cuhk_pedes train": "10 captions", "z": 1}
if ours.index:
    facts |= {"data cuhk_pedes train": "9 captions", "z": 2}
ours.agree({"a": [1, 2]})
ours.agree(facts)"""
    with started([script(body)] * 2) as running:
        (code, sentence), (other, _) = ends(running)
    assert code == other == 1
    assert "process 1 (" in sentence and "but process 0 (" in sentence
    assert "has data cuhk_pedes train = '9 captions'" in sentence and "'10 captions'" in sentence


def test_the_failure_of_one_ends_the_others_with_its_sentence_and_code():
    """As when one host lacks the data set: it never comes to the comparison."""
    body = """
if ours.index == 1:
    ours.fail(2, "data_root/x.json is missing on this host")
ours.agree({"a": 1})"""
    before = time.monotonic()
    with started([script(body)] * 2) as running:
        (code, sentence), (failed, own) = ends(running)
    assert failed == 2 and own == "itself_jax: data_root/x.json is missing on this host"
    assert code == 2
    assert sentence.startswith("itself_jax: process 1 (")
    assert sentence.endswith("failed: data_root/x.json is missing on this host")
    assert time.monotonic() - before < 60


@pytest.mark.parametrize("killed", (0, 1))
def test_a_process_that_is_killed_ends_the_other_within_thirty_seconds(killed):
    """Waiting in a collective, as in training: 75, and a sentence that names the dead process."""
    body = """
ours.agree({"a": 1})
print("ready", flush=True)
if ours.index == {killed}:
    import time
    time.sleep(100)
try:
    ours.agree({"b": 1})
except Exception as error:
    ours.explain(error)
    raise""".replace("{killed}", str(killed))
    with started([script(body)] * 2) as running:
        for line in running[killed].stdout:
            if line == "ready\n":
                break
        victim = running[killed].pid
        running[killed].send_signal(signal.SIGKILL)
        before = time.monotonic()
        ((code, sentence),) = ends([running[1 - killed]])
        assert time.monotonic() - before < 30
    assert code == 75
    assert f"process {killed} of 2 (" in sentence and f"process {victim}) is lost" in sentence
    assert "the same command" in sentence


@pytest.mark.parametrize("same_folder", (True, False))
def test_a_work_directory_must_be_shared(tmp_path, same_folder):
    body = """
from itself_jax import train, workdir
folder = {folder!r} + ("" if {same} else str(ours.index))
directory = workdir.Workdir(folder, writes=ours.leads)
directory.claim(config.Config(), "float32", print)
directory.sees.__func__.__defaults__ = (1.0,)  # seconds of patience
train.check_shared(directory, ours)
""".format(folder=str(tmp_path / "run"), same=same_folder)
    with started([script(body)] * 2) as running:
        results = ends(running)
    if same_folder:
        assert [code for code, _ in results] == [0, 0]
    else:
        assert [code for code, _ in results] == [1, 1]
        assert "is not the same directory for all processes" in results[0][1]
    assert not list(tmp_path.glob("run*/.tmp-*"))


def test_a_checkpoint_that_one_process_finds_damaged_is_left_by_all(tmp_path):
    """An array in pieces has no checksum: only the process that needs the damaged piece notices."""
    body = """
import pathlib, sys, numpy as np, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from itself_jax import checkpoint, sharding
mesh = Mesh(np.array(jax.devices()), ("data",))
place = NamedSharding(mesh, PartitionSpec("data"))
state = {"a": sharding.put(np.arange(4096, dtype=np.float32), place)}
folder = pathlib.Path(FOLDER)
with checkpoint.Checkpoints(folder, log=lambda line: None, ours=ours) as checkpoints:
    checkpoints.save(1, state, {"score": None})
    checkpoints.save(2, state, {"score": None})
ours.barrier("saved")
if ours.leads:
    pieces = list((folder / "2" / "state" / "ocdbt.process_1" / "d").iterdir())
    assert pieces
    for piece in pieces:
        piece.unlink()
ours.barrier("damaged")
template = {"a": jax.ShapeDtypeStruct((4096,), np.float32, sharding=place)}
with checkpoint.Checkpoints(folder, log=print, ours=ours) as checkpoints:
    print("restored", checkpoints.restore_latest(template).step, flush=True)
""".replace("FOLDER", repr(str(tmp_path / "checkpoints")))
    with started([script(body)] * 2) as running:
        outputs = [process.communicate(timeout=100) for process in running]
    for process, (output, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors
        assert "restored 1" in output
    assert (tmp_path / "checkpoints" / "damaged-2").is_dir()


def test_sigterm_to_one_stops_all_at_the_same_call():
    body = """
import time
ours.agree({"a": 1})
for call in range(600):
    if call == 5:
        print("ready", flush=True)
    if ours.stop_asked():
        print("stopped at", call, flush=True)
        break
    time.sleep(0.02 * (1 + ours.index))"""
    with started([script(body)] * 2) as running:
        for line in running[1].stdout:
            if line == "ready\n":
                break
        running[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0]
    calls = [output.split("stopped at ")[1] for output in outputs]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("index", (0, 1))
def test_a_process_whose_peers_do_not_come_says_where_and_how_long_it_waited(index):
    port = a_port()
    where = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    with started([script("", timeout=2)], **where, JAX_PROCESS_ID=str(index)) as running:
        ((code, sentence),) = ends(running)
    assert code == 1
    if index:
        assert f"process 1 of 2 could not reach the coordinator 127.0.0.1:{port} in 2 s" in sentence
    else:
        assert f"process 0 waited 2 s at the coordinator 127.0.0.1:{port}" in sentence


@pytest.mark.parametrize(
    "settings, environment, message",
    [
        ({"coordinator": "a:1"}, {}, "num_processes is not set (nor is JAX_NUM_PROCESSES)"),
        ({}, {"JAX_PROCESS_ID": "1"}, "coordinator is not set"),
        (
            {"coordinator": "a", "num_processes": 2, "process_id": 0},
            {},
            "coordinator='a' must be HOST:PORT",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            {},
            "process_id=2 must be less than num_processes=2",
        ),
        (
            {"coordinator": "a:1", "process_id": 0},
            {"JAX_NUM_PROCESSES": "two"},
            "num_processes='two' must be a number",
        ),
    ],
)
def test_incomplete_settings_are_refused(settings, environment, message):
    with pytest.raises(config_lib.ConfigError) as error:
        hosts._explicit(config_lib.Distributed(**settings), environment)
    assert message in str(error.value)


def test_settings_come_before_the_environment():
    environment = {
        "JAX_COORDINATOR_ADDRESS": "b:2",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }
    settings = config_lib.Distributed(coordinator="a:1", process_id=1)
    assert hosts._explicit(settings, environment) == ("a:1", 4, 1)
    assert hosts._explicit(config_lib.Distributed(), {}) is None


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # a shell inside an allocation
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ],
)
def test_a_scheduler_that_started_several_processes_is_recognised(environment, several):
    assert hosts._in_a_cluster(environment) == several


# --- the main job -----------------------------------------------------------------------------


def main_job(workdir: pathlib.Path, data: pathlib.Path, *changes: str) -> list[str]:
    common = (f"--workdir={workdir}", f"--config.data_root={data}", "--config.mesh.data=-1")
    return tiny.command(*common, *changes)


def wait_for_step(workdir: pathlib.Path, step: int, running) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert all(process.poll() is None for process in running), ends(running)
        time.sleep(0.1)
    raise AssertionError(f"step {step} was never reached")


def losses(workdir: pathlib.Path) -> list[float]:
    lines = tiny.train_lines(workdir)
    assert [line["step"] for line in lines] == list(range(1, 17))
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_and_go_on_in_any_number(tmp_path):
    """Two of four devices against one of eight; a SIGTERM; on as one; and back to two."""
    data, cache = tmp_path / "data", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def run(workdir, processes, *changes, stop_at=None):
        commands = [main_job(tmp_path / workdir, data, *changes)] * processes
        with started(commands, devices=8 // processes, **cache) as running:
            if stop_at is not None:
                wait_for_step(tmp_path / workdir, stop_at, running)
                running[-1].send_signal(signal.SIGTERM)
            result = ends(running, timeout=280)
        assert {code for code, _ in result} == {75 if stop_at else 0}, result

    run("one", 1)
    expected = losses(tmp_path / "one")
    run("two", 2, stop_at=6)
    stopped = len(tiny.train_lines(tmp_path / "two"))
    assert 5 <= stopped < 16
    assert tiny.document(tiny.newest(tmp_path / "two"))["step"] == stopped
    run("two", 1, stop_at=stopped + 1)  # the same work directory, one process of eight devices
    run("two", 2)  # and back
    ours = losses(tmp_path / "two")
    # The first steps agree to rounding; later ones drift as any two orders of summing do.
    for got, wanted in zip(ours[:5], expected[:5], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    assert ours == pytest.approx(expected, rel=0.02)
    queries = json.loads((tmp_path / "two/results/synthetic-test.json").read_text())["queries"]
    assert queries == 24


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ("replicated", "fsdp"))
def test_two_runs_of_two_processes_are_bit_for_bit_equal(tmp_path, sharding):
    """Also when the second one is stopped and goes on, on the same topology."""
    data, cache = tmp_path / "data", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    changes = (f"--config.sharding={sharding}",)
    for workdir, stops in (("whole", ()), ("cut", (7, None))):
        for stop_at in stops or (None,):
            commands = [main_job(tmp_path / workdir, data, *changes)] * 2
            with started(commands, devices=2, **cache) as running:
                if stop_at:
                    wait_for_step(tmp_path / workdir, stop_at, running)
                    running[0].send_signal(signal.SIGTERM)
                codes = [code for code, _ in ends(running, timeout=280)]
            assert codes == [75 if stop_at else 0] * 2
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert tiny.results(tmp_path / "cut") == tiny.results(tmp_path / "whole")
