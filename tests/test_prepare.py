"""`python -m itself_jax.prepare`: exit codes, the one sentence, what it leaves behind."""

import json
import os
import pathlib
import subprocess
import sys

import miniature
import numpy as np
import pytest

from itself_jax.data import datasets

ROOT = pathlib.Path(__file__).parents[1]
SIZE = (40, 20)


def _prepare(*arguments, cwd=ROOT, env=()):
    """Runs the command; returns (exit code, standard output, the lines of standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "itself_jax.prepare", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **dict(env)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def _tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def data(tmp_path):
    miniature.write(tmp_path / "data", "cuhk_pedes", image_size=SIZE)
    return tmp_path / "data"


def test_good_data_is_reported_packed_and_read_from_the_packed_form(data):
    annotation = data / "CUHK-PEDES" / "reid_raw.json"
    code, out, err = _prepare("--dataset=cuhk_pedes", f"--root={data}")
    assert (code, err) == (0, [])
    assert f"cuhk_pedes: {annotation}" in out and "Errors: 0. Warnings: 1." in out
    assert out.endswith(f"Train from it with --config.data_root={data}\n")
    report = json.loads((data / "doctor.json").read_text())
    assert (report["verdict"], report["source"]) == ("warning", str(annotation))
    assert len(report["checks"]) == out.count("  ok  ") + out.count("  warning  ")
    files = datasets.files("cuhk_pedes", data)
    found = datasets.corpus("cuhk_pedes", data)
    assert found.records == files.records and "packed" in found.source
    assert found.images.content(3) == files.images.content(3)


def test_resized_pixels_go_to_the_named_folder_and_the_root_stays_as_it_was(data, tmp_path):
    before = _tree(data)
    out = tmp_path / "out"
    code, _, err = _prepare(
        "--dataset=cuhk_pedes", f"--root={data}", f"--out={out}", "--resize=24x12"
    )
    assert (code, err) == (0, [])
    assert _tree(data) == before and (out / "doctor.json").is_file()
    found = datasets.corpus("cuhk_pedes", out, (24, 12))
    wanted = datasets.files("cuhk_pedes", data).images.load(4, (24, 12))
    np.testing.assert_array_equal(found.images.load(4, (24, 12)), wanted)


def test_errors_exit_with_1_are_named_and_nothing_is_packed(data, tmp_path):
    (data / "CUHK-PEDES" / "imgs" / "CUHK01" / "0001001.png").write_bytes(b"")
    (data / "CUHK-PEDES" / "imgs" / "CUHK01" / "0001002.png").unlink()
    out = tmp_path / "out"
    code, printed, err = _prepare("--dataset=cuhk_pedes", f"--root={data}", f"--out={out}")
    assert code == 1
    (line,) = err
    assert line.startswith(
        f"itself_jax: {data}/CUHK-PEDES/reid_raw.json fails 2 of 22 checks (missing images, "
        "unreadable images), so it is not packed;"
    )
    assert "Errors: 2. Warnings: 1." in printed
    assert _tree(out) == ["doctor.json"]
    assert json.loads((out / "doctor.json").read_text())["verdict"] == "error"


def test_check_only_of_own_data_by_its_file_writes_the_report_alone(tmp_path):
    miniature.write(tmp_path, "jsonl", image_size=SIZE)
    before = _tree(tmp_path)
    code, out, err = _prepare(
        *("--dataset=jsonl", f"--root={tmp_path}/pictures.jsonl", "--check_only"),
        "--text-length=10",
        env={"PYTHONIOENCODING": "ascii"},  # as a terminal that has no accents
    )
    assert (code, err) == (0, [])
    assert f"Written to {tmp_path}/doctor.json." in out
    assert _tree(tmp_path) == sorted([*before, "doctor.json"])
    assert "cut at 10 tokens" in out and "person 0 \\xe9/0.jpg" in out
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["text_length"] == 10 and report["splits"]["train"]["images"] == 12


def test_a_packed_form_is_verified_examined_and_resized(data, tmp_path):
    out = tmp_path / "out"
    assert _prepare("--dataset=cuhk_pedes", f"--root={data}", f"--out={out}")[0] == 0
    code, printed, err = _prepare("--dataset=cuhk_pedes", f"--root={out}", "--resize=24x12")
    assert (code, err) == (0, []) and "Verifying the checksums of" in printed
    assert datasets.corpus("cuhk_pedes", out, (24, 12)).source.endswith("24x12/1.0.0")
    (shard, *_) = (out / "packed" / "cuhk_pedes-original").rglob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, _, (line,) = _prepare("--dataset=cuhk_pedes", f"--root={out}", "--check-only")
    assert code == 1 and shard.name in line and "differ from the checksums" in line


def test_data_that_cannot_be_read_is_one_sentence_and_leaves_nothing(data):
    annotation = data / "CUHK-PEDES" / "reid_raw.json"
    annotation.write_text(annotation.read_text()[:500])
    before = _tree(data)
    code, out, err = _prepare("--dataset=cuhk_pedes", f"--root={data}")
    assert (code, out) == (1, "") and len(err) == 1
    assert err[0].startswith(f"itself_jax: {annotation} is not valid JSON: ")
    assert "line 1, column 5" in err[0] or "line 1, column 4" in err[0]
    assert _tree(data) == before
    code, _, err = _prepare("--dataset=cuhk_pedes", f"--root={data}", "--debug")
    assert code == 1 and err[0].startswith("Traceback")


def test_a_report_that_cannot_be_written_says_to_name_a_folder(data, tmp_path):
    (data / "doctor.json").mkdir()  # a folder in its place: even root cannot write there
    (data / "doctor.json" / "x").touch()
    before = _tree(data)
    code, _, (line,) = _prepare("--dataset=cuhk_pedes", f"--root={data}")
    assert code == 1
    assert f"cannot write to --root={data}" in line and "name a writable folder with --out" in line
    assert _tree(data) == before
    code, out, err = _prepare(
        "--dataset=cuhk_pedes", f"--root={data}", "--check-only", cwd=tmp_path
    )
    assert (code, err) == (0, []) and f"Written to {tmp_path}/doctor.json." in out


@pytest.mark.parametrize("flag", ["root", "out"])
def test_an_address_that_is_no_path_is_one_sentence(data, flag):
    flags = {"root": data, flag: "https://host/data"}
    code, out, err = _prepare(
        "--dataset=cuhk_pedes", *(f"--{name}={value}" for name, value in flags.items())
    )
    assert (code, out) == (1, "")
    assert err == [
        "itself_jax: https://host/data is no path of a data set: https:// cannot be read; use a "
        "local path or a bucket's, such as gs://BUCKET/FOLDER."
    ]


REJECTED = {
    "--root=x": "--dataset is required, e.g. --dataset=cuhk_pedes",
    "--dataset=cuhk_pedes": "--root is required, e.g. --root=/data",
    "--dataset=cuhk --root=x": "--dataset=cuhk is not known; use one of cuhk_pedes, icfg_pedes, ",
    "--dataset=jsonl --root=x --resize=384": "--resize=384 must be HEIGHTxWIDTH in pixels",
    "--dataset=jsonl --root=x --resize=0x12": "--resize=0x12 must be HEIGHTxWIDTH in pixels",
    "--dataset=jsonl --root=x --text_length=2": "text_length",
    "--dataset=jsonl --root=x y": "unexpected argument 'y'; values with spaces need quotes",
}
# A process of its own for each, without importing everything again.
FORK = """
import os, sys
from itself_jax import prepare
for line in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            prepare.parse_flags(["prepare", *line.split()])
            os._exit(0)
        except SystemExit as stop:
            sys.stderr.flush()
            os._exit(stop.code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_rejected_flag_is_2_and_one_sentence():
    code, out, err = _prepare("--dataset=jsonl", "--root=x", "--chek")
    assert (code, out) == (2, "")
    assert err == ["itself_jax: Unknown command line flag 'chek'. Did you mean: check_only ?"]
    done = subprocess.run(
        [sys.executable, "-c", FORK, *REJECTED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["2"] * len(REJECTED)
    for line, message in zip(done.stderr.splitlines(), REJECTED.values(), strict=True):
        assert line.startswith("itself_jax: ") and message in line


def test_ctrl_c_is_75_and_one_sentence():
    code = """
from absl import app
from itself_jax import prepare
def stop(*arguments, **options):
    raise KeyboardInterrupt
prepare.prepare = stop
app.run(prepare.main, flags_parser=prepare.parse_flags)
"""
    command = [sys.executable, "-c", code, "--dataset=jsonl", "--root=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75
    assert done.stderr == "itself_jax: stopped; the same command goes on\n"
