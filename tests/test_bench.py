"""Figures are what was measured; every command writes its documented keys."""

import gc
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from itself_jax import aot, comparing, retrieval, timing, workloads
from itself_jax import config as config_lib

SPREAD = {"count", "median", "min", "max", "lower_quartile", "upper_quartile", "samples"}
ROW = {
    *("name", "changed", "unit", "amount", "devices", "seconds", "per_second", "compile_seconds"),
    *("peak_resident_bytes", "peak_device_bytes", "temporary_bytes", "flops", "bytes_accessed"),
    *("flops_counted_by", "dtype", "gflops", "matmul_gflops", "share_of_matmul"),
    *("peak_flops", "mfu"),
}
DOCUMENT = {
    *("schema", "command", "machine", "versions", "config", "settings", "rows", "growth"),
}
# One layer, no local branch: compiled in seconds.
SMALLEST = {
    "model.vision_depth": 1,
    "model.text_depth": 1,
    "model.vocab_size": 49408,
    "local.enabled": False,
    "batch_size": 4,
    "eval.batch_size": 4,
}


def smallest(tmp_path, **changes) -> config_lib.Config:
    return config_lib.replace(tiny.settings(tmp_path), SMALLEST | changes)


def bench(*arguments: str, cache: os.PathLike | None = None):
    return subprocess.run(
        [sys.executable, "-m", "itself_jax.bench", "--config=tests/tiny.py", *arguments],
        cwd=tiny.ROOT,
        # Compiled in a hurry: nothing here depends on how fast a program is.
        env=tiny.environment(cache)
        | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


# --- statistics -------------------------------------------------------------------------------


def test_statistics_of_given_samples():
    """Sorted 1 2 3 4 10: quartiles lie at ranks 1 and 3 from 0."""
    got = timing.spread([10.0, 1.0, 3.0, 2.0, 4.0])
    assert got == (5, 3.0, 1.0, 10.0, 2.0, 4.0, (10.0, 1.0, 3.0, 2.0, 4.0))


def test_quartiles_between_samples_are_interpolated():
    """Of 1 2: a quarter and three quarters of the way."""
    got = timing.spread([2.0, 1.0])
    assert (got.median, got.lower_quartile, got.upper_quartile) == (1.5, 1.25, 1.75)


def test_no_samples_have_no_statistics():
    with pytest.raises(ValueError, match="at least one sample"):
        timing.spread([])


def test_warm_up_calls_do_not_count():
    calls = []
    got = timing.measure(lambda: calls.append(1), repeats=3, warmup=2)
    assert got.count == 3 and len(calls) == 5


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_growth_is_the_exponent(power):
    values = [4, 8, 16]
    assert timing.exponent(values, [3 * v**power for v in values]) == pytest.approx(power)


def test_growth_without_two_values_is_not_known():
    assert timing.exponent([4, 4], [1.0, 2.0]) is None
    assert timing.exponent([0, 4], [1.0, 2.0]) is None


def test_growth_is_told_of_numbers_only():
    def row(changed, seconds, **more):
        return {"name": "x", "changed": changed, "seconds": {"median": seconds}, **more}

    rows = [row({"batch_size": 4}, 1.0), row({"batch_size": 8}, 2.0)]
    assert workloads.growth(rows) == [
        {"name": "x", "key": "batch_size", "exponent": pytest.approx(1)}
    ]
    assert workloads.growth([row({"remat": "none"}, 1.0), row({"remat": "block"}, 2.0)]) == []
    ours = [{"name": "x", "mode": "lean", "changed": r["changed"], "ours": r} for r in rows]
    assert workloads.growth(ours)[0]["name"] == "x, mode lean"


def test_peak_memory_is_of_what_came_after_the_reset():
    gc.collect()  # and 400 MB: much more than other threads may free meanwhile
    timing.reset_peak()
    before = timing.peak_resident_bytes()
    held = np.ones(400 << 20, np.uint8)
    assert timing.peak_resident_bytes() - before > 300 << 20
    del held
    timing.reset_peak()
    if sys.platform == "linux":
        assert timing.peak_resident_bytes() < before + (20 << 20)


def test_a_rate_is_operations_by_the_median_and_beside_the_machines():
    """2 GFLOP in 0.5 s are 4 GFLOP/s, of a machine that does 16 a quarter."""
    job = workloads.Job("x", "pairs", 10, lambda: None, dtype="float32", flops=2e9)
    row = workloads.row_of(job, timing.spread([0.5, 0.4, 0.9]), {"float32": 16.0}, 7, None)
    assert row["per_second"] == 20 and row["gflops"] == 4 and row["share_of_matmul"] == 0.25
    assert row["peak_resident_bytes"] == 7
    assert row["mfu"] is None and row["peak_flops"] is None  # nobody states a peak of this CPU
    assert {"changed", *row} == ROW


def test_use_of_a_chip_is_of_the_vendors_peak_of_all_devices(monkeypatch):
    """100 TFLOP in a second on 2 of 100 TFLOP/s: half."""

    class Device:
        platform, device_kind = "tpu", "TPU v5 lite"

    chip = aot.Chip(1, 100e12, 1, 1, "https://example.org")
    monkeypatch.setitem(aot.CHIPS, "v5e", chip)
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    job = workloads.Job("x", "pairs", 1, lambda: None, dtype="bfloat16", flops=100e12, devices=2)
    machine = {"float32": 1.0, "bfloat16": 80e3}
    row = workloads.row_of(job, timing.spread([1.0]), machine, None, 5)
    assert row["mfu"] == 0.5 and row["share_of_matmul"] == pytest.approx(100 / 160)


def test_matmul_rate_is_positive_and_finite():
    rate = timing.matmul_gflops("float32", size=64, repeats=3)
    assert 0 < rate < 1e6


def test_columns_are_aligned():
    assert timing.aligned([("a", "bb"), ("ccc", "d")]) == ["  a  bb", "ccc   d"]


# --- generated input --------------------------------------------------------------------------


def test_pictures_made_when_they_are_read_rank_like_those_in_memory(tmp_path):
    config = config_lib.replace(tiny.settings(tmp_path), {"eval.chunk_mb": 1})
    settings = workloads.Settings(queries=30, gallery=9000, streamed=True)
    made = workloads.random_embeddings(config, settings)
    assert made.image_local.shape == (9000, config.local.dim)
    whole = made._replace(image_global=made.image_global[:9000], image_local=made.image_local[:])
    np.testing.assert_array_equal(made.image_global[4000:8200], whole.image_global[4000:8200])
    assert len(np.unique(whole.image_global[:, 0])) > 8900  # no block repeats another
    rows = workloads.ranking(config, settings).call()
    assert {row.direction for row in rows} == {"t2i"} and len(rows) == 13
    assert rows == retrieval.rank(whole, directions=("t2i",), chunk_bytes=1 << 20)


def test_captions_are_as_long_as_those_of_pedestrians():
    config = config_lib.Config()
    ids = workloads.random_captions(config, 2000, np.random.default_rng(0))
    words = (ids > 0).sum(axis=1) - 2
    assert words.mean() == pytest.approx(23.5, rel=0.03)
    assert words.min() >= 1 and words.max() <= 75 and len(set(words.tolist())) > 20
    assert (ids[:, 0] == 49406).all() and (ids.max(axis=1) == 49407).all()


def test_a_batch_has_two_pairs_of_each_identity(tmp_path):
    batch = workloads.random_batch(smallest(tmp_path), 5)
    assert np.unique(batch.pids, return_counts=True)[1].tolist() == [2, 2]
    assert batch.pids.max() < 5 and batch.images.dtype == np.uint8
    with pytest.raises(config_lib.ConfigError, match="--identities=1: config.batch_size=4 holds 2"):
        workloads.random_batch(smallest(tmp_path), 1)


def test_every_random_query_has_a_positive(tmp_path):
    found = workloads.random_embeddings(
        tiny.settings(tmp_path), workloads.Settings(queries=50, gallery=20)
    )
    assert set(found.text_ids) <= set(found.image_ids)
    assert found.text_local.shape == (50, 32) and found.image_global.shape == (20, 32)


# --- jobs -------------------------------------------------------------------------------------


def test_a_trace_is_written_for_each_job(tmp_path):
    double = jax.jit(lambda x: 2 * x)
    job = workloads.Job("two words", "numbers", 8, lambda: double(jnp.ones(8)))
    row = workloads.measure(job, repeats=1, warmup=1, profile=tmp_path)
    assert row["seconds"]["count"] == 1 and row["flops"] is None
    names = {path.name for path in (tmp_path / "two-words").rglob("*") if path.is_file()}
    assert any(name.endswith(".xplane.pb") for name in names)
    assert "perfetto_trace.json.gz" in names


def test_an_iterator_that_ends_begins_anew():
    job = workloads._endless("x", "rows", 2, lambda: iter(range(3)))
    assert job.amount == 8
    assert job.call() == job.call() == 4


def test_missing_data_libraries_are_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "itself_jax.data.pipeline", None)
    with pytest.raises(workloads.WorkloadError, match="needs the data libraries"):
        workloads.require_data_libraries()


def test_a_run_that_does_not_start_is_a_sentence(tmp_path):
    config = tmp_path / "broken.py"
    config.write_text("def get_config():\n    raise ValueError('no such thing')\n")
    with pytest.raises(
        workloads.WorkloadError, match="made no step .exit code 2.: .*no such thing"
    ):
        workloads._first_step(config, tmp_path / "run", tmp_path / "cache")


# --- beside the twin; with torch in tests/benchmarks/ -----------------------------------------


def test_our_side_answers_line_by_line(tmp_path):
    config = smallest(tmp_path)
    settings = workloads.Settings(queries=12, gallery=9)
    twin = comparing.Twin(tmp_path)
    spec = comparing._spec(config, settings, "eval", "lean", twin, 1, tmp_path)
    spec["cpus"] = sorted(os.sched_getaffinity(0))  # this process is that of all tests
    lines = [json.dumps(x) + "\n" for x in (spec, {}, {}, {"row": [0.5, 1.5]})] + [""]
    answers = []
    comparing.main(lambda: lines.pop(0), answers.append)
    ready, first, second, last = answers
    assert ready == {"platform": "cpu", "precision": "float32", "matmul_size": timing.matmul_size()}
    assert len(first["check"]) == 2 and first["check"] == second["check"]  # t2i and i2t
    assert last["row"]["seconds"]["median"] == 1.0 and last["row"]["amount"] == 21


def test_settings_that_the_twin_lacks_are_refused(tmp_path):
    for changes, message in (
        ({"loss.margin": 0.3}, "config.loss.margin=0.3: the twin has 0.1 only"),
        ({"freeze_layers": 1}, "config.freeze_layers=1: the twin has 0 only"),
        ({"local.saliency": "min_std"}, "config.local.saliency='min_std': the twin does not"),
    ):
        with pytest.raises(config_lib.ConfigError, match=message):
            comparing._as_the_twin_has_it(smallest(tmp_path, **changes), workloads.Settings())


def test_a_python_without_torch_is_a_sentence():
    with pytest.raises(workloads.WorkloadError, match="/bin/true has no torch: pip install"):
        comparing.find_twin("/bin/true")
    with pytest.raises(workloads.WorkloadError, match="/nowhere/python cannot be started"):
        comparing.find_twin("/nowhere/python")


def test_outputs_are_compared_relatively():
    assert comparing._difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert comparing._difference([1.0], [1.0, 2.0]) == math.inf


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--sweep=batch_size"], "--sweep=batch_size: expected a key and its values"),
        (["eval", "--sweep=galery=4"], "--sweep: config key 'galery' does not exist."),
        (["eval", "--sweep=gallery=4,x"], "--sweep=gallery=4,x: x is no positive number"),
        (["data", "--profile=x"], "--profile=x: data runs no program of ours here"),
        (["compare", "--mode=fast"], "--mode=fast: must be some of lean, published"),
        (["train", "--repeats=0"], "--repeats"),
        (["train", "--json=tests"], "--json=tests: expected a file"),
        (["train", "--config.optim.lr=1"], "itself_jax: config key 'optim.lr' does not exist"),
        (
            ["train", "--config=configs/synthetic.py:x"],
            "itself_jax: --config=configs/synthetic.py:x: variant 'x' is unknown",
        ),
    ],
)
def test_bad_flags_are_rejected(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_all_of_it_at_toy_size(tmp_path):
    path, data = tmp_path / "new" / "all.json", tmp_path / "data"
    done = bench(
        *("all", f"--json={path}", f"--config.data_root={data}", "--repeats=1", "--warmup=1"),
        *("--identities=24", "--queries=20", "--gallery=12"),
        *(f"--config.{key}={value}" for key, value in SMALLEST.items()),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert set(document) == DOCUMENT and document["schema"] == 1
    assert document["command"] == "all" and document["config"]["batch_size"] == 4
    assert document["machine"]["platform"] == "cpu" and document["versions"]["jax"]
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == [
        *("train step", "encode images", "encode captions", "evaluate"),
        *("train batches", "test pictures", "first start", "second start"),
    ]
    for name, row in rows.items():
        assert set(row) == ROW and set(row["seconds"]) == SPREAD, name
        assert row["seconds"]["count"] == 1 and row["per_second"] > 0
        assert row["peak_resident_bytes"] > 50e6 and row["matmul_gflops"]["float32"] > 0
        assert name in done.stdout
    for name in ("train step", "encode images", "encode captions"):
        assert rows[name]["flops"] > 1e5 and rows[name]["compile_seconds"] > 0
        assert rows[name]["flops_counted_by"] == "compiler"
    # Two directions of 20 x 12 pairs, 32 multiplications and additions each.
    assert rows["evaluate"]["flops"] == 2 * 20 * 12 * 2 * 32
    assert rows["first start"]["seconds"]["min"] > 1


def test_a_sweep_has_a_row_for_each_value(tmp_path):
    path = tmp_path / "sweep.json"
    done = bench(
        *("eval", f"--json={path}", "--sweep=gallery=12,24", "--queries=20", "--repeats=2"),
        "--config.local.enabled=False",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    assert [row["changed"] for row in document["rows"]] == [{"gallery": 12}, {"gallery": 24}]
    (growth,) = document["growth"]
    assert growth["name"] == "evaluate" and growth["key"] == "gallery"
    assert "evaluate gallery=24" in done.stdout and "gallery^" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
