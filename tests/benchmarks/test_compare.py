"""Both sides of a comparison do the same work, in turn."""

import sys

import numpy as np
import pytest
import tiny

from itself_jax import command, comparing, retrieval, workloads

torch = pytest.importorskip("torch")

from benchmarks import twin_ranking  # noqa: E402

SETTINGS = workloads.Settings(identities=24, queries=40, gallery=30)
COMPARED = {"name", "mode", "threads", "ours", "twin", "ratio", "difference"}
TWIN = {
    *("seconds", "per_second", "peak_resident_bytes", "matmul_gflops", "compiled", "torch"),
}


@pytest.mark.parametrize("mode", comparing.MODES)
@pytest.mark.parametrize("local", [True, False])
def test_both_rankings_give_the_same_metrics(mode, local, tmp_path):
    config = tiny.settings(tmp_path, local__enabled=local)
    found = workloads.random_embeddings(config, SETTINGS)
    expected = retrieval.rank(found)

    def side(name):
        arrays = [getattr(found, f"{name}_{part}") for part in ("global", "local", "ids")]
        return twin_ranking.Side(*(None if x is None else torch.from_numpy(x) for x in arrays))

    alphas = [row.alpha for row in expected if row.direction == "t2i"]
    assert alphas == comparing._alphas(config)
    # Blocks of three queries, of which the last one has fewer.
    rows = twin_ranking.rank(side("text"), side("image"), alphas, mode, block_bytes=3 * 4 * 30)
    got = np.array([row[:5] for row in rows])
    np.testing.assert_allclose(got, np.array([row.metrics[:5] for row in expected]), rtol=1e-5)


@pytest.mark.parametrize("part, mode", [("train", "published"), ("captions", "lean")])
def test_a_ratio_is_of_the_same_weights_and_inputs(part, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiled in a hurry
    config = tiny.settings(
        tmp_path, model__vision_depth=1, model__text_depth=1, batch_size=8, eval__batch_size=8
    )
    row = comparing.compare(
        config,
        SETTINGS,
        part,
        mode,
        comparing.find_twin(),
        repeats=2,
        warmup=1,
        threads=1,
        scratch=tmp_path,
    )
    assert set(row) == COMPARED and set(row["twin"]) == TWIN
    assert row["difference"] < 1e-4  # one loss, or norms of both embeddings
    ours, theirs = row["ours"]["seconds"], row["twin"]["seconds"]
    assert ours["count"] == theirs["count"] == row["ratio"]["count"] == 2
    quotients = [a / b for a, b in zip(ours["samples"], theirs["samples"], strict=True)]
    assert row["ratio"]["samples"] == quotients
    assert row["mode"] == mode and row["threads"] == 1
    (line,) = comparing.table([{"changed": {"batch_size": 8}, **row}])[1:]
    assert "batch_size=8" in line and mode in line


@pytest.mark.parametrize("by_the_user", [False, True])
def test_the_twin_has_its_users_memory_settings(tmp_path, monkeypatch, by_the_user):
    """What our commands set for themselves does not reach the twin; what the user sets does."""
    for key, value in command.HUGE_PAGES.items():
        monkeypatch.setenv(key, value)
    if by_the_user:
        monkeypatch.delenv("ITSELF_JAX_HUGE_PAGES")
    program = (
        "import json, os, sys; sys.stdin.readline();"
        "print(json.dumps({'found': os.environ.get('GLIBC_TUNABLES')}), flush=True)"
    )
    found = {}
    for name in ("ours", "the twin"):
        with comparing._Side([sys.executable, "-c", program], name, tmp_path) as side:
            found[name] = side.ask({})["found"]
    setting = command.HUGE_PAGES["GLIBC_TUNABLES"]
    assert found == {"ours": setting, "the twin": setting if by_the_user else None}
