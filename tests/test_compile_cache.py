"""Compiled programs are kept and found again, by several processes, and never in the way."""

import os
import pathlib
import subprocess
import sys
import time

import pytest
import tiny

from itself_jax import compile_cache

# Compiles one program and prints how many came from the cache, and how many it keeps.
PROGRAM = """
import sys
import jax
from itself_jax import compile_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
compile_cache.keep(*sys.argv[1:])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = jax.numpy.arange(8.0)
print(jax.jit(lambda x: (x * x).sum())(x), sum(n.endswith("/cache_hits") for n in hits))
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env |= {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def hits(process: subprocess.Popen, *, warns: bool = False) -> int:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert bool(errors) == warns, errors
    value, found = out.split()
    assert value == "140.0"
    return int(found)


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.rglob("*-cache"))


def test_a_second_process_finds_what_the_first_ones_compiled(tmp_path):
    together = [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for process in together:
        hits(process)
    kept = entries(tmp_path / "itself_jax" / "compiled")
    assert kept
    assert hits(start(XDG_CACHE_HOME=str(tmp_path))) == len(kept)
    assert entries(tmp_path) == kept


def test_another_folder_none_and_jaxs_own(tmp_path):
    home, given, jaxs = tmp_path / "home", tmp_path / "with space", tmp_path / "jax"
    hits(start(str(given), XDG_CACHE_HOME=str(home)))
    assert entries(given) and not home.exists()
    hits(start("", XDG_CACHE_HOME=str(home), JAX_COMPILATION_CACHE_DIR=str(jaxs)))
    assert not home.exists() and not jaxs.exists()
    hits(start(XDG_CACHE_HOME=str(home), JAX_COMPILATION_CACHE_DIR=str(jaxs)))
    assert not home.exists() and entries(jaxs)


def test_a_damaged_entry_is_compiled_again(tmp_path):
    hits(start(str(tmp_path)))
    for entry in entries(tmp_path):
        entry.write_bytes(entry.read_bytes()[:100])
    assert hits(start(str(tmp_path)), warns=True) == 0


def test_what_a_kill_left_unfinished_is_removed_and_the_rest_kept(tmp_path):
    hits(start(str(tmp_path)))
    kept = entries(tmp_path)
    machine = kept[0].parent
    old, new = machine / "jit_old-cache", machine / "jit_new-cache"
    for path in (old, new):
        path.write_bytes(b"half")
    an_hour_ago = time.time() - 3600
    for path in (old, *kept):
        os.utime(path, (an_hour_ago, an_hour_ago))
    compile_cache._drop_unfinished(machine)
    assert entries(tmp_path) == sorted([*kept, new])  # the new one may be being written just now


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_place_that_cannot_be_written_is_no_reason_to_stop(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" if where == "a file" else tmp_path / "file" / "home"
    assert hits(start(XDG_CACHE_HOME=str(place))) == 0
    assert (tmp_path / "file").read_text() == "mine"
