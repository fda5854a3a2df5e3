"""Real processes on loopback: how they join, compare, stop and lose each other."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from itself_jax import config as config_lib
from itself_jax import hosts, watching
from itself_jax.data import datasets, pipeline, synthetic

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


def test_a_checkpoint_that_one_process_cannot_write_ends_both_at_once(tmp_path):
    """Orbax alone would keep both waiting for each other for many minutes."""
    body = """
import pathlib, resource, numpy as np, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from itself_jax import checkpoint, sharding
mesh = Mesh(np.array(jax.devices()), ("data",))
values = np.random.default_rng(0).random(1 << 20, np.float32)
state = {"a": sharding.put(values, NamedSharding(mesh, PartitionSpec("data")))}
with checkpoint.Checkpoints(pathlib.Path(FOLDER), log=lambda line: None, ours=ours) as checkpoints:
    checkpoints.save(1, state, {"score": None})
    checkpoints.wait()
    if ours.index == 1:  # as a full disk, in the background
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    checkpoints.save(2, state, {"score": None})
""".replace("FOLDER", repr(str(tmp_path / "checkpoints")))
    with started([script(body)] * 2) as running:
        (code, sentence), (failed, own) = ends(running)
    assert code == failed == 1
    reason = f"step 2 could not be saved in {tmp_path}/checkpoints: File too large; earlier"
    assert own.startswith(f"itself_jax: {reason}")
    assert sentence.startswith("itself_jax: process 1 (") and f"failed: {reason}" in sentence
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["1", "2.orbax-checkpoint-tmp"]  # which the next save removes


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
def test_sigterm_just_after_a_save_stops_all(tmp_path, index):
    """Orbax asks jax for a stop as well, but in numbers of its own."""
    body = """
import os, pathlib, signal, time, numpy as np
from itself_jax import checkpoint
with checkpoint.Checkpoints(pathlib.Path(FOLDER), log=print, ours=ours) as checkpoints:
    assert not ours.stop_asked()
    checkpoints.save(1, {"a": np.zeros(3)}, {"score": None})
    checkpoints.wait()
    if ours.index == INDEX:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)  # until both have heard of it
    calls = [ours.stop_asked() for _ in range(5)]
    print("stopped", any(calls), flush=True)
""".replace("FOLDER", repr(str(tmp_path / "run"))).replace("INDEX", str(index))
    with started([script(body)] * 2) as running:
        outputs = [process.communicate(timeout=100) for process in running]
    for process, (output, errors) in zip(running, outputs, strict=True):
        assert process.returncode == 0, errors
        assert "stopped True" in output


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
    deadline = time.monotonic() + 600
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
        job = main_job(tmp_path / workdir, data, "--config.eval.watch=2", *changes)
        commands = [job] * processes
        with started(commands, devices=8 // processes, **cache) as running:
            if stop_at is not None:
                wait_for_step(tmp_path / workdir, stop_at, running)
                running[-1].send_signal(signal.SIGTERM)
            result = ends(running, timeout=600)
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
    # What it looked at is followed by both, and kept and shown by the one that writes.
    looked, wanted = (watching.saved(tmp_path / name) for name in ("two", "one"))
    assert list(looked) == list(wanted) == [1, 2, 3]
    np.testing.assert_allclose(looked[1].image_saliency, wanted[1].image_saliency, rtol=1e-3)
    assert (tmp_path / "two/report/index.html").read_text().count("<h2>") == 8


# Runs the main job with something of it replaced: the faults of one process.
REPLACED = """
import os, resource, runpy, signal, sys, time
from itself_jax import assessment, checkpoint, files
{change}
runpy.run_module("itself_jax.main", run_name="__main__", alter_sys=True)
"""
# SIGTERM to itself as soon as it encodes that split; the others have heard of it when it begins.
TERMINATED_AT = """
original = assessment.encode_and_rank
def encode_and_rank(this, variables, split, alpha):
    if split.split == {split!r}:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    return original(this, variables, split, alpha)
assessment.encode_and_rank = encode_and_rank
"""
DISK_FULL_AT = """
original = checkpoint.Checkpoints.save
def save(self, step, state, meta):
    if step == {step}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    original(self, step, state, meta)
checkpoint.Checkpoints.save = save
"""
TELLS_WRITES = """
original = files.write
def write(path, content):
    print("writes", path, flush=True)
    return original(path, content)
files.write = write
"""


def replaced(command: list[str], change: str) -> list[str]:
    python, *module = command[:3]
    assert module == ["-m", "itself_jax.main"]
    return [python, "-c", REPLACED.format(change=change), *command[3:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding, stops",
    [
        ("replicated", ("while validating", "while testing")),
        ("fsdp", ("in training", "kill 1", "kill 0")),
    ],
)
def test_two_runs_of_two_processes_are_bit_for_bit_equal(tmp_path, sharding, stops):
    """Also when the second one is stopped or killed, and goes on, on the same topology."""
    data, cache = tmp_path / "data", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Small batches of evaluation, for many places where it may stop.
    changes = (f"--config.sharding={sharding}", "--config.eval.batch_size=4")

    def run(name, stop=None):
        command = main_job(workdir := tmp_path / name, data, *changes)
        commands = [command, command]
        if stop in ("while validating", "while testing"):
            split = "val" if stop == "while validating" else "test"
            commands[1] = replaced(command, TERMINATED_AT.format(split=split))
        with started(commands, devices=2, **cache) as running:
            if stop == "in training":
                wait_for_step(workdir, 7, running)
                running[0].send_signal(signal.SIGTERM)
            elif stop in ("kill 0", "kill 1"):
                at = len(tiny.train_lines(workdir)) + 1
                wait_for_step(workdir, at, running)
                victim = running[int(stop[-1])]
                victim.send_signal(signal.SIGKILL)
                before = time.monotonic()
                ((code, sentence),) = ends([running[1 - int(stop[-1])]])
                assert time.monotonic() - before < 30
                assert code == 75
                assert f"process {stop[-1]} of 2 (" in sentence
                assert f"process {victim.pid}) is lost" in sentence
                return
            results = ends(running, timeout=600)
        assert [code for code, _ in results] == [75 if stop else 0] * 2, results
        newest = tiny.document(tiny.newest(workdir))
        if stop == "while validating":
            assert newest["step"] == 5 and not newest["meta"]["validated"]
            assert len(tiny.metrics(workdir)) == 5
        elif stop == "while testing":
            assert newest["step"] == 16 and newest["meta"]["validated"]
            assert not list(workdir.glob("results/*"))

    run("whole")
    for stop in (*stops, None):
        run("cut", stop)
    for name in ("whole", "cut"):
        assert len(losses(tmp_path / name)) == 16
    whole, cut = (tiny.metrics(tmp_path / name) for name in ("whole", "cut"))
    for line in whole + cut:
        line.pop("pairs_per_second", None)
    assert cut == whole
    assert tiny.results(tmp_path / "cut") == tiny.results(tmp_path / "whole")
    whole, cut = (tiny.document(tiny.newest(tmp_path / name)) for name in ("whole", "cut"))
    assert cut == whole  # with the checksums of all arrays that every process has


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_write_ends_both_and_is_none(tmp_path):
    """First the disk of process 1 is full, at the second save; then that of process 0."""
    data, cache = tmp_path / "data", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    workdir = tmp_path / "run"
    command = main_job(workdir, data, "--config.sharding=fsdp")
    for index, step, last_good in ((1, 11, 5), (0, 16, 11)):
        commands = [command, command]
        commands[index] = replaced(command, DISK_FULL_AT.format(step=step))
        with started(commands, devices=2, **cache) as running:
            wait_for_step(workdir, step, running)
            before = time.monotonic()
            results = ends(running, timeout=600)
            assert time.monotonic() - before < 60
        assert [code for code, _ in results] == [1, 1], results
        reason = f"step {step} could not be saved in {workdir}/checkpoints: File too large; "
        assert results[index][1].startswith(f"itself_jax: {reason}")
        assert results[1 - index][1].startswith(f"itself_jax: process {index} (")
        assert f"failed: {reason}" in results[1 - index][1]
        assert tiny.document(tiny.newest(workdir))["step"] == last_good
    with started([command, command], devices=2, **cache) as running:
        outputs = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert "Going on at step 11, after epoch 2." in outputs[0][0]
    assert "damaged" not in outputs[0][0]
    assert len(losses(workdir)) == 16
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in names) and "16" in names, names


@pytest.mark.slow
def test_pictures_that_one_process_cannot_read_end_both(tmp_path):
    """Each host has its own copy of the data; in that of process 1 a picture is damaged."""
    commands = []
    for index in range(2):
        data = tmp_path / f"data{index}"
        folder = synthetic.ensure(data, identities=(24, 6, 6), images_per_identity=2, log=print)
        if index:
            (folder / "imgs" / picture_of_step(folder, 3)).write_bytes(b"")
        commands.append(main_job(tmp_path / "run", data))
    with started(commands, devices=2) as running:
        results = ends(running, timeout=600)
    assert [code for code, _ in results] == [1, 1], results
    reason = "1 of 48 pictures of synthetic train cannot be read, more than 1%: "
    assert results[1][1].startswith(f"itself_jax: {reason}")
    assert results[0][1].startswith("itself_jax: process 1 (")
    assert f"failed: {reason}" in results[0][1]


def picture_of_step(folder: pathlib.Path, step: int) -> str:
    """One that process 1 of two reads for this step (from 1), and nobody for one before it."""
    config = tiny.settings(folder.parent)
    split = datasets.read("synthetic", folder, "train", image_size=config.model.image_size)
    order = pipeline.epoch_order(
        split.caption_ids,
        batch_size=config.batch_size,
        num_instances=config.num_instances,
        seed=config.seed,
        epoch=1,
    ).reshape(-1, config.batch_size)
    before = set(split.caption_images[order[: step - 1]].ravel().tolist())
    own = split.caption_images[order[step - 1, config.batch_size // 2 :]].tolist()
    return pathlib.Path(split.images.name(next(i for i in own if i not in before))).name


@pytest.mark.slow
def test_two_processes_evaluate_as_one_and_one_of_them_writes(tmp_path):
    data, cache = tmp_path / "data", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    workdir, embeddings = tmp_path / "run", "embeddings-synthetic-test.npz"
    changes = ("--config.last_epoch=1", "--config.eval.dump_embeddings")
    command = main_job(workdir, data, *changes)
    with started([command], devices=4, **cache) as running:
        assert [code for code, _ in ends(running, timeout=600)] == [0]
    expected = tiny.results(workdir)
    with np.load(workdir / embeddings) as arrays:
        expected_arrays = dict(arrays)
    before = {path for path in workdir.rglob("*") if path.is_file()}
    command = replaced([*command, "--mode=eval"], TELLS_WRITES)
    with started([command, command], devices=2, **cache) as running:
        outputs = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    written = [re.findall(r"^writes (.*)$", output, re.M) for output, _ in outputs]
    assert sorted(written[0]) == [
        f"{workdir}/{embeddings}",
        f"{workdir}/results/synthetic-test.json",
    ]
    assert written[1] == []
    assert ["protocol val" in output for output, _ in outputs] == [True, False]  # the table
    assert {path for path in workdir.rglob("*") if path.is_file()} == before
    assert tiny.results(workdir) == expected
    with np.load(workdir / embeddings) as arrays:
        assert arrays.keys() == expected_arrays.keys()
        for name, array in arrays.items():
            if array.dtype == np.float32:
                np.testing.assert_allclose(array, expected_arrays[name], rtol=0, atol=1e-5)
            else:
                np.testing.assert_array_equal(array, expected_arrays[name])
