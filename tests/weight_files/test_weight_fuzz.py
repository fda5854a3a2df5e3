"""A thousand damaged files of every kind: arrays or a sentence, never anything else."""

import json
import os
import pathlib
import subprocess
import sys

import craft

HERE = pathlib.Path(__file__).parent


def test_a_thousand_damaged_files_give_arrays_or_a_sentence(tmp_path):
    count = 1000
    command = [sys.executable, "-W", "error", "fuzz_weights.py", str(tmp_path), str(count), "0"]
    here = {"cwd": HERE, "env": os.environ | {"PYTHONPATH": os.fspath(HERE.parent.parent)}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bad"] == []
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == count
    # The damage is neither always the same nor without effect.
    assert outcomes["refused"] > 700 and outcomes["arrays"] > 40
    assert found["kinds"] > 100
    assert found["memory"] < 500 << 20
    assert len(list(craft.FILES.iterdir())) == 19
