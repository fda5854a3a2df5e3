"""The command: kills and signals at any moment, exit codes, one sentence for each bad input."""

import json
import os
import pathlib
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import termios
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from itself_jax import interrupt
from itself_jax.data import synthetic


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tiny.shared(tmp_path_factory)


@pytest.fixture(scope="module")
def compiled(shared):
    return shared / "compiled"


@pytest.fixture(scope="module")
def data(shared):
    return shared / "data"


@pytest.fixture(scope="module")
def reference(shared, data, compiled):
    """An uninterrupted run by command."""
    path = shared / "by-command"
    done = tiny.call(f"--workdir={path}", f"--config.data_root={data}", cache=compiled)
    assert (done.returncode, done.stderr) == (0, "")
    (path / "stdout.txt").write_text(done.stdout)
    return path


class Started:
    """A command that runs, in a process group of its own, with its output in files."""

    def __init__(self, folder: pathlib.Path, *arguments: object, cache=None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                tiny.command(*arguments),
                cwd=tiny.ROOT,
                env=tiny.environment(cache),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def until(self, pattern: str, count: int = 1) -> None:
        """Waits for `count` lines of output that hold the pattern."""
        end = time.monotonic() + 240
        while len(re.findall(pattern, self.stdout)) < count:
            assert self.process.poll() is None, (self.process.returncode, self.stdout, self.stderr)
            assert time.monotonic() < end, self.stdout
            time.sleep(0.005)

    def until_it_catches(self, number: signal.Signals) -> None:
        """Waits until the process has installed a handler (Linux)."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status")
        while True:
            caught = re.search(r"SigCgt:\s*(\w+)", status.read_text())
            if int(caught[1], 16) >> (number - 1) & 1:
                return
            time.sleep(0.005)

    def stop(self, number: signal.Signals, *, group: bool = False) -> int:
        """Sends the signal; returns the exit code, which must come within 15 seconds."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        sent = time.monotonic()
        code = self.process.wait(60)
        assert time.monotonic() - sent < 15
        return code


def assert_metrics_are_whole(path: pathlib.Path) -> None:
    lines = tiny.metrics(path)
    steps = [(line["step"], "split" in line) for line in lines]
    assert steps == sorted(set(steps))


# --- kills and signals ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_three_moments_ends_as_if_never_killed(
    reference, data, compiled, tmp_path, seed
):
    moments = random.Random(seed)
    path = tmp_path / "run"
    arguments = [f"--workdir={path}", f"--config.data_root={data}"]
    for attempt in range(3):
        started = Started(tmp_path / str(attempt), *arguments, cache=compiled)
        started.until("epoch", moments.randint(2, 7))
        time.sleep(moments.uniform(0, 0.05))
        assert started.stop(signal.SIGKILL) == -signal.SIGKILL
    done = tiny.call(*arguments, cache=compiled)
    assert (done.returncode, done.stderr) == (0, "")
    tiny.assert_same_run(path, reference)


def test_a_run_stopped_by_signals_ends_as_if_never_stopped(reference, data, compiled, tmp_path):
    path = tmp_path / "run"
    arguments = [f"--workdir={path}", f"--config.data_root={data}"]
    for attempt, (number, group) in enumerate([(signal.SIGTERM, False), (signal.SIGINT, True)]):
        started = Started(tmp_path / str(attempt), *arguments, cache=compiled)
        started.until("epoch", 4)
        assert started.stop(number, group=group) == interrupt.EXIT_CODE
        assert "Stopped by a signal at step" in started.stdout
        assert started.stderr == ""
        assert_metrics_are_whole(path)
        last = tiny.train_lines(path)[-1]["step"]
        assert int(tiny.newest(path).name.split("-")[0]) == last  # nothing is lost
    done = tiny.call(*arguments, cache=compiled)
    assert (done.returncode, done.stderr) == (0, "")
    tiny.assert_same_run(path, reference)


@pytest.mark.parametrize("seconds", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_while_modules_are_imported_exits_at_once(data, compiled, tmp_path, seconds):
    started = Started(
        tmp_path, f"--workdir={tmp_path / 'run'}", f"--config.data_root={data}", cache=compiled
    )
    started.until_it_catches(signal.SIGTERM)
    time.sleep(seconds)
    assert started.stop(signal.SIGTERM) == interrupt.EXIT_CODE
    assert "Traceback" not in started.stderr


def test_a_signal_while_pictures_are_drawn_leaves_no_half_data_set(tmp_path, compiled):
    root = tmp_path / "data"
    started = Started(
        tmp_path / "out",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data_root={root}",
        "--config.synthetic.identities=(500, 50, 50)",
        cache=compiled,
    )
    started.until("drawing")
    time.sleep(0.5)
    assert started.stop(signal.SIGTERM) == interrupt.EXIT_CODE
    assert started.stderr == ""
    assert [p.name for p in root.iterdir() if p.is_dir()] == []
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_drawing_that_was_killed_starts_anew(tmp_path, compiled):
    root = tmp_path / "data"
    arguments = [f"--workdir={tmp_path / 'run'}", f"--config.data_root={root}"]
    large = "--config.synthetic.identities=(500, 50, 50)"
    started = Started(tmp_path / "out", *arguments, large, cache=compiled)
    started.until("drawing")
    time.sleep(0.5)
    started.stop(signal.SIGKILL)
    again = Started(tmp_path / "again", *arguments, cache=compiled)
    again.until("drew 72 pictures")
    assert again.stop(signal.SIGTERM) == interrupt.EXIT_CODE
    (drawn,) = (p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    expected = synthetic.ensure(
        tmp_path / "fresh", seed=0, identities=(24, 6, 6), images_per_identity=2, log=print
    )
    for file in expected.rglob("*.jpg"):
        assert (drawn / file.relative_to(expected)).read_bytes() == file.read_bytes()


def test_a_signal_during_compilation_exits_within_seconds(data, tmp_path):
    path = tmp_path / "run"
    started = Started(tmp_path / "out", f"--workdir={path}", f"--config.data_root={data}")
    started.until("parameters in float32")
    time.sleep(1.5)
    assert started.stop(signal.SIGTERM) == interrupt.EXIT_CODE
    assert "Traceback" not in started.stderr
    assert list(path.iterdir()) == []


def test_a_signal_during_an_evaluation_leaves_no_results(reference, data, compiled, tmp_path):
    path = tmp_path / "run"
    arguments = [f"--workdir={path}", f"--config.data_root={data}"]
    started = Started(
        tmp_path / "out", *arguments, f"--config.init_from={reference}", "--mode=eval",
        cache=compiled,
    )  # fmt: skip
    started.until("Testing epoch")
    assert started.stop(signal.SIGINT, group=True) == interrupt.EXIT_CODE
    assert "Traceback" not in started.stderr
    assert not path.exists()


# --- what the user sees ---------------------------------------------------------------------------


def test_without_a_terminal_progress_is_plain_lines(reference):
    lines = (reference / "stdout.txt").read_text().splitlines()
    steps = [line for line in lines if line.startswith("epoch") and "step" in line]
    assert len(steps) == 16
    form = r"epoch [123]/3  step \d+/16  loss \d+\.\d{3}  \d+ pairs/s  ETA \d+:\d\d"
    assert all(re.fullmatch(form, line) for line in steps)
    assert not any("\r" in line or "\x1b" in line for line in lines)
    assert any(line.startswith("epoch 2: val R@1 ") for line in lines)


def test_on_a_terminal_progress_is_a_bar(data, compiled, tmp_path):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    process = subprocess.Popen(
        tiny.command(f"--workdir={tmp_path / 'run'}", f"--config.data_root={data}"),
        cwd=tiny.ROOT,
        env=tiny.environment(compiled),
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    assert process.wait(60) == 0
    text = shown.decode()
    assert re.search(r"<\d\d:\d\d, ", text)  # the time that is left
    assert re.search(r"100%\|.*\| 16/16 .*epoch=3, loss=\d+\.\d+, pairs/s=\d", text)
    assert "epoch 2: val R@1" in text
    assert "pairs/s  ETA" not in text


def test_evaluation_by_command_gives_the_run_s_own_results(reference, data, compiled, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(reference, path)
    shutil.rmtree(path / "results")
    done = tiny.call(
        f"--workdir={path}", f"--config.data_root={data}", "--mode=eval", "--config.seed=9",
        cache=compiled,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert tiny.results(path) == tiny.results(reference)
    assert "text to image" in done.stdout


# --- bad settings: 2, one sentence ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batch_sise=8"], r"'batch_sise' does not exist.* 'batch_size'\?"),
        (["--config.model.depth=8"], r"'model.depth' does not exist"),
        (["--config.model=8"], r"model.* is a group of keys"),
        (["--config.batch_size=many"], r"batch_size"),
        (["--config.model.image_size=32"], r"model.image_size=32 has the wrong type"),
        (["--config.batch_size=-4"], r"batch_size=-4: must be positive"),
        (["--config.local.ratio=1.5"], r"local.ratio=1.5: must lie in \(0, 1\]"),
        (["--config.batch_size=15"], r"batch_size=15: must be divisible by num_instances=2"),
        (["--config.model.stride=0"], r"model.stride=0: must be positive"),
        (["--config.model.patch_size=64"], r"leaves no patch of 64 pixels"),
        (["--config.local.saliency=marz"], r"local.saliency='marz' is no saliency source.*'mars'"),
        (["--config.local.saliency=layer:2"], r"layers 0\.\.1"),
        (["--config.local.mars_layers=(0, 5)"], r"layer 5 does not exist"),
        (["--config.dataset=rstp_reid", "--config.data_root=None"], r"data_root is not set"),
        (["--nosuchflag"], r"nosuchflag"),
        (["--mode=fly"], r"mode"),
        (["stray"], r"unexpected argument 'stray'"),
    ],
)
def test_a_rejected_setting_exits_with_2_and_one_sentence(tmp_path, arguments, message):
    path = tmp_path / "run"
    assert_refused(tiny.call(f"--workdir={path}", *arguments), 2, message)
    assert not path.exists() or not any(path.iterdir())


def test_a_batch_that_the_devices_cannot_share_exits_with_2(tmp_path):
    path = tmp_path / "run"
    done = tiny.call(f"--workdir={path}", "--config.mesh.data=3")
    assert_refused(done, 2, r"batch_size=16 is not divisible by the 3 devices")
    assert not path.exists()


def test_a_missing_flag_or_file_exits_with_2(tmp_path):
    assert_refused(tiny.call(), 2, r"--workdir is required, e\.g\. --workdir=")
    missing = tiny.call(f"--workdir={tmp_path / 'run'}", config="configs/none.py")
    assert_refused(missing, 2, r"configs/none\.py")
    broken = tmp_path / "broken.py"
    for raised, message in (
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("int('x')", "invalid literal"),
        ("{}['lr']", "KeyError: 'lr'"),
        ("__import__('json').loads('{')", "Expecting property name"),
    ):
        broken.write_text(f"def get_config():\n    return {raised}\n")
        done = tiny.call(f"--workdir={tmp_path / 'run'}", config=broken)
        assert_refused(done, 2, rf"^itself_jax: --config={broken}: {message}")
    assert not (tmp_path / "run").exists()


def assert_refused(done, code, message):
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr


# --- bad data and directories: 1, one sentence ----------------------------------------------------


def test_debug_shows_where_it_failed_with_the_same_code(tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [f"--workdir={tmp_path / 'file' / 'run'}"]
    assert_refused(tiny.call(*arguments), 1, r"file/run cannot be written \(Not a directory\)")
    done = tiny.call(*arguments, "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_another_configuration_s_directory_exits_with_1(reference, data):
    before = (reference / "config.json").read_bytes()
    done = tiny.call(f"--workdir={reference}", f"--config.data_root={data}", "--config.seed=4")
    assert_refused(done, 1, r"another configuration: seed was 0, now 4")
    assert (reference / "config.json").read_bytes() == before


def test_a_full_disk_while_saving_exits_with_1_and_goes_on_with_space(
    reference, data, compiled, tmp_path
):
    path = tmp_path / "run"
    arguments = [f"--workdir={path}", f"--config.data_root={data}"]
    shutil.copytree(reference, path)
    shutil.rmtree(path / "results")
    (path / "finished.json").unlink()
    shutil.rmtree(path / "checkpoints" / "16")
    before = tiny.newest(path)
    limited = Started(tmp_path / "limited", *arguments, cache=compiled)
    # Every file beyond 1 MB is refused, as by a full disk.
    resource.prlimit(limited.process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    limited.process.wait(240)
    done = subprocess.CompletedProcess(
        [], limited.process.returncode, limited.stdout, limited.stderr
    )
    assert_refused(done, 1, r"step \d+ could not be saved in .*(File too large|No space left)")
    assert tiny.newest(path) == before
    assert not list(path.rglob("*tmp*"))
    assert tiny.call(*arguments, cache=compiled).returncode == 0
    tiny.assert_same_run(path, reference)


# --- a benchmark on disk --------------------------------------------------------------------------

_ODD = ["", "?!...", "word " * 500, "a jekyll man", "red <|mask|> coat", "a\0b", "blue 👕 shirt"]


@pytest.fixture
def benchmark(tmp_path):
    """A small RSTPReid, with odd captions; one identity has one pair."""
    folder = tmp_path / "data" / "RSTPReid"
    (folder / "imgs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for identity in range(28):  # 24 to train on, as in `tiny`: the same compiled step serves
        for view in range(2):
            name = f"{identity:04d}_{view}.jpg"
            pixels = rng.integers(0, 255, (40, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "imgs" / name)
            odd = _ODD[(2 * identity + view) % len(_ODD)]
            split = "train" if identity < 24 else "val" if identity < 26 else "test"
            captions = [odd, f"a person with number {identity}"]
            records.append({"id": identity, "img_path": name, "captions": captions, "split": split})
    records = [r for r in records if r["img_path"] != "0003_1.jpg"]
    next(r for r in records if r["img_path"] == "0003_0.jpg")["captions"] = ["only one"]
    (folder / "data_captions.json").write_text(json.dumps(records))
    return folder


def benchmark_arguments(folder, tmp_path):
    return [
        f"--workdir={tmp_path / 'run'}",
        "--config.dataset=rstp_reid",
        f"--config.data_root={folder.parent}",
    ]


def test_odd_captions_and_lone_pairs_are_counted_and_trained_on(benchmark, compiled, tmp_path):
    done = tiny.call(*benchmark_arguments(benchmark, tmp_path), cache=compiled)
    assert done.returncode == 0, done.stderr
    found = tiny.results(tmp_path / "run", "rstp_reid-test")
    assert (found["queries"], found["gallery"]) == (8, 4)
    assert all(np.isfinite(row["R1"]) for row in found["rows"])
    assert "rstp_reid train has" in done.stderr
    (line,) = (x for x in done.stderr.splitlines() if "train has" in x)
    assert "6 empty captions" in line
    assert "7 captions without a word" in line
    assert "7 captions of more than 100 words" in line
    assert "14 captions with control characters or CLIP's special tokens" in line
    assert "1 identities with one pair" in line
    assert len(done.stderr.splitlines()) <= 3  # one for each split


def without_field(records):
    del records[2]["captions"]


def naming_a_missing_image(records):
    records[1]["img_path"] = "nowhere.jpg"


def without_validation(records):
    records[:] = [r for r in records if r["split"] != "val"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, r"data_captions\.json is not valid JSON.*line 1"),
        pytest.param(
            without_field,
            r"data_captions\.json: record 2 lacks the field 'captions'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            naming_a_missing_image,
            r"1 of 47 images .*do not exist.*'nowhere\.jpg'",
            marks=pytest.mark.slow,
        ),
        (without_validation, r"no record has split='val'"),
    ],
)
def test_a_broken_annotation_exits_with_1_and_one_sentence(
    benchmark, tmp_path, change, message, compiled
):
    annotation = benchmark / "data_captions.json"
    if change is None:
        annotation.write_text(annotation.read_text()[:100])
    else:
        records = json.loads(annotation.read_text())
        change(records)
        annotation.write_text(json.dumps(records))
    done = tiny.call(*benchmark_arguments(benchmark, tmp_path), cache=compiled)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert re.search(message, last), done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_a_data_root_without_the_data_set_exits_with_1(tmp_path):
    arguments = [f"--workdir={tmp_path / 'run'}", f"--config.data_root={tmp_path}"]
    done = tiny.call(*arguments, "--config.dataset=cuhk_pedes")
    assert_refused(done, 1, r"dataset='cuhk_pedes' needs CUHK-PEDES/reid_raw\.json")
