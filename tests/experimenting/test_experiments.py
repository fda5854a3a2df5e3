"""The command: what it refuses, and a whole experiment at toy size."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
from tests import tiny

def get_config():
    config = tiny.get_config()
    config.model.vision_depth = config.model.text_depth = 3
    config.num_epochs = 2
    config.data_root = {root!r}
    return config
"""


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "itself_jax.experiments", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def call(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give one experiment: variants, untrained, layers"),
        (("variant", "--workdir=x"), "give one experiment: variants"),
        (("variants", "ats", "--workdir=x"), "give one experiment"),
        (("variants", "--workdir=x", "--seeds=0"), "--seeds=0: at least one seed"),
        (("variants",), "--workdir=DIR is needed"),
        (("variants", "--workdir=gs://bucket/x"), "--workdir=gs://bucket/x: experiments are kept"),
        (("variants", "--workdir=x", "--config=configs/none.py"), "configs/none.py"),
        (
            ("variants", "--workdir=x", "--config=configs/synthetic.py:nosuch"),
            "itself_jax: --config=configs/synthetic.py:nosuch: variant 'nosuch' is unknown",
        ),
        (("variants", "--workdir=x", "--config=tests/conftest.py"), "--config=tests/conftest.py: "),
        (("variants", "--workdir=x", "--config.optim.lr=1"), "'optim.lr' does not exist"),
        (
            (
                *("variants", "--workdir=x"),
                *("--config=configs/synthetic.py", "--config.optim.lr=1"),
            ),
            "'optim.lr' does not exist",
        ),
        (
            ("layers", "--workdir=x", "--config=configs/synthetic.py:scratch"),  # of two layers
            "local.mars_layers",
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence(tmp_path, arguments, sentence):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    config = folder / "config.py"
    config.write_text(CONFIG.format(root=str(folder / "data")))
    return folder, (f"--config={config}", f"--workdir={folder / 'out'}")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_an_experiment_goes_on_after_a_stop_and_shares_its_runs(place):
    folder, flags = place
    out = folder / "out"
    process = start("protocol", *flags, "--seeds=2")
    deadline = time.monotonic() + 300
    while not list(out.glob("records/*/seed-0.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # most likely in the second run
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (75, "itself_jax: stopped; the same command goes on\n")
    kept = {path: read(path)["test"] for path in out.glob("records/*/*.json")}
    assert kept

    code, said, err = call("protocol", *flags, "--seeds=2")
    assert code == 0, err
    assert {path: read(path)["test"] for path in kept} == kept
    found = read(out / "protocol.json")
    rows = {row["row"]: row for row in found["rows"]}
    assert found["seeds"] == [0, 1]
    assert rows["baseline, both on val"]["R1"]["seeds"] == 2
    # The best of several can only be better.
    for arm in ("baseline", "itself"):
        assert rows[f"{arm}, both on test"]["difference"]["mean"] >= 0
    table = (out / "protocol.md").read_text(encoding="utf-8")
    assert table in said

    # The answer is that of the run itself, as far as both know it.
    for path in out.glob("records/*/*.json"):
        record = read(path)
        run = out / "runs" / path.parent.name / path.stem
        results = tiny.results(run)
        chosen = next(
            row["R1"]
            for row in results["rows"]
            if row["direction"] == "t2i" and row["similarity"] == similarity(record["chosen_alpha"])
        )
        assert record["answers"]["protocol"]["both on val"]["R1"] == pytest.approx(chosen)
        # Each validated epoch is kept, for questions that come later.
        assert len(list((run / "checkpoints").glob("*/state"))) == 2

    # Another experiment trains nothing that is there.
    times = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/metrics.jsonl")}
    code, said, err = call("early_evidence", *flags, "--seeds=1")
    assert code == 0, err
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/*/metrics.jsonl")} == times
    curves = read(out / "early_evidence.json")["curves"]
    whole = curves["R@1, itself"]["whole"]
    validations = read(next(out.glob("records/itself-*/seed-0.json")))["validations"]
    assert list(whole) == [str(line["epoch"]) for line in validations] == ["1", "2"]
    assert set(curves["entropy of attention (image), itself"]) == {"layer 0", "layer 1", "layer 2"}
    assert "mars" in curves["kept patches on the person, baseline"]

    code, said, err = call("inference_saliency", *flags, "--seeds=1")
    assert code == 0, err
    rows = {row["row"]: row for row in read(out / "inference_saliency.json")["rows"]}
    assert {"last 0.4", "mars 0.6"} <= rows.keys()

    # What is damaged is told before the tables lose what they have.
    second = next(out.glob("records/itself-*/seed-1.json"))
    content, table = second.read_bytes(), (out / "protocol.json").read_bytes()
    second.write_bytes(content[:100])
    code, said, err = call("protocol", *flags, "--seeds=2")
    assert (code, said) == (1, "") and "seed-1.json is no record of a run" in err
    assert (out / "protocol.json").read_bytes() == table

    # Gone, it is made anew of its run, but not of one with other settings.
    second.unlink()
    code, said, err = call("protocol", *flags, "--seeds=2")
    assert (code, second.read_bytes()) == (0, content), err
    os.rename(out / "records", out / "old")
    code, said, err = call("protocol", *flags, "--seeds=1", "--config.optim.learning_rate=5e-4")
    assert code == 1 and "optim.learning_rate" in err and len(err.splitlines()) == 1
    assert not list(out.glob("records/*/*.json"))
    os.rename(out / "old", out / "records")

    # Records suffice, whatever became of the runs.
    shutil.rmtree(out / "runs")
    code, said, err = call("early_evidence", *flags, "--seeds=1")
    assert code == 0, err
    assert not (out / "runs").exists()


def similarity(alpha):
    return "global" if alpha == 1 else "local" if alpha == 0 else f"fused@{alpha:g}"
