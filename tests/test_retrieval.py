from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import config as config_lib
from itself_jax import retrieval, sharding

GOLDEN = Path(__file__).parent / "golden"


def _embeddings(seed, texts=60, images=37, identities=12, width=16, local=24, scale=2.0):
    """Noisy copies of one vector per identity; every identity has an image."""
    rng = np.random.default_rng(seed)
    image_ids = np.concatenate(
        [np.arange(identities), rng.integers(0, identities, images - identities)]
    )
    text_ids = rng.integers(0, identities, texts)

    def side(ids, d, centres):
        return (centres[ids] + scale * rng.normal(size=(len(ids), d))).astype(np.float32)

    centres = rng.normal(size=(identities, width)), rng.normal(size=(identities, local))
    return retrieval.Embeddings(
        side(text_ids, width, centres[0]),
        side(text_ids, local, centres[1]),
        side(image_ids, width, centres[0]),
        side(image_ids, local, centres[1]),
        text_ids,
        image_ids,
    )


def _by_sorting(similarity, query_ids, gallery_ids):
    """The textbook way, one query at a time: sort, then walk down the list."""
    per_query = []
    for scores, identity in zip(similarity, query_ids, strict=True):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        ranks = [place + 1 for place, i in enumerate(order) if gallery_ids[i] == identity]
        if ranks:
            precisions = [(j + 1) / r for j, r in enumerate(ranks)]
            hits = [float(ranks[0] <= k) for k in (1, 5, 10)]
            per_query.append([*hits, np.mean(precisions), len(ranks) / ranks[-1]])
    return 100 * np.mean(per_query, axis=0)


# --- goldens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("case", ["small", "small_ties", "big", "big_ties"])
def test_metrics_equal_the_reference_under_stable_ties(case, direction):
    golden = np.load(GOLDEN / "golden_rank.npz")
    similarity, queries, gallery = (golden[f"{case}/{x}"] for x in ("sims", "q_pids", "g_pids"))
    if direction == "i2t":
        similarity, queries, gallery = similarity.T, gallery, queries
    metrics = retrieval.metrics_from_similarity(similarity, queries, gallery)

    stable = f"{case}/{direction}/stable"
    r1, r5, r10 = golden[f"{stable}/cmc"][[0, 4, 9]]
    expected = (r1, r5, r10, golden[f"{stable}/mAP"], golden[f"{stable}/mINP"], r1 + r5 + r10)
    np.testing.assert_allclose(metrics[:5], expected[:5], atol=1e-4, rtol=0)
    np.testing.assert_allclose(metrics.rSum, expected[5], atol=3e-4, rtol=0)
    assert (metrics.queries, metrics.skipped) == (len(queries), 0)


def _golden_fusion(golden, local):
    return retrieval.Embeddings(
        golden["text_global"],
        golden["text_grab"] if local else None,
        golden["image_global"],
        golden["image_grab"] if local else None,
        golden["q_pids"],
        golden["g_pids"],
    )


def test_fusion_rows_equal_the_reference_in_its_order():
    golden = np.load(GOLDEN / "golden_fusion.npz")
    rows = [r for r in retrieval.rank(_golden_fusion(golden, True)) if r.direction == "t2i"]
    names = [
        "global" if n.startswith("global-") else "local" if n.startswith("grab-") else n[12:-5]
        for n in golden["row_names"]
    ]
    assert [r.similarity.removeprefix("fused@") for r in rows] == names
    for row, expected in zip(rows, golden["rows"], strict=True):
        np.testing.assert_allclose(
            row.metrics[:6], expected, atol=1e-3, rtol=0, err_msg=row.similarity
        )
    assert max(r.metrics.R1 for r in rows) == pytest.approx(golden["top1"], abs=1e-3)


def test_without_local_embeddings_only_the_global_row_remains():
    golden = np.load(GOLDEN / "golden_fusion.npz")
    rows = retrieval.rank(_golden_fusion(golden, False))
    assert [(r.direction, r.similarity, r.alpha) for r in rows] == [
        ("t2i", "global", 1.0),
        ("i2t", "global", 1.0),
    ]
    np.testing.assert_allclose(
        rows[0].metrics[:6], golden["only_global_rows"][0], atol=1e-3, rtol=0
    )
    assert retrieval.choose_alpha(rows) == 1.0


# --- hand-sized examples -------------------------------------------------------------------------


def test_ties_go_to_the_lower_gallery_index():
    # query 0, id 7: order 3 | 0 1 | 2   -> positives 0 and 2 at ranks 2 and 4
    #                AP (1/2 + 2/4)/2 = 1/2, INP 2/4
    # query 1, id 8: order 0 1 | 3 | 2   -> positive 1 at rank 2: AP 1/2, INP 1/2
    # query 2, id 9: order 3 | 0 1 2     -> positive 3 at rank 1: AP 1, INP 1
    similarity = np.array([[0.5, 0.5, 0.2, 0.9], [0.5, 0.5, 0.1, 0.2], [0.3, 0.3, 0.3, 0.4]])
    metrics = retrieval.metrics_from_similarity(similarity, [7, 8, 9], [7, 8, 7, 9])
    assert metrics == pytest.approx((100 / 3, 100, 100, 200 / 3, 200 / 3, 700 / 3, 3, 0))


def test_a_constant_similarity_ranks_in_gallery_order():
    # Ranks are 1, 2, 3, 4: AP and INP are 1, 1/2, 1/3, 1/4, a mean of 25/48.
    metrics = retrieval.metrics_from_similarity(np.zeros((4, 4)), range(4), range(4))
    assert metrics == pytest.approx((25, 100, 100, 2500 / 48, 2500 / 48, 225, 4, 0))


def test_several_positives():
    # Descending: 1 3 2 0 4 5. The positives 1, 2 and 5 have ranks 1, 3 and 6:
    # AP (1/1 + 2/3 + 3/6)/3 = 13/18, INP 3/6.
    similarity = np.array([[0.3, 0.9, 0.4, 0.6, 0.2, 0.1]])
    metrics = retrieval.metrics_from_similarity(similarity, [1], [0, 1, 1, 0, 0, 1])
    assert metrics == pytest.approx((100, 100, 100, 1300 / 18, 50, 300, 1, 0))


def test_a_gallery_smaller_than_k_counts_positives_anywhere():
    # The one positive of query 0 is last of three: a miss at 1, found at 5 and 10.
    similarity = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    metrics = retrieval.metrics_from_similarity(similarity, [0, 2], [0, 1, 2])
    assert metrics == pytest.approx((50, 100, 100, 200 / 3, 200 / 3, 250, 2, 0))


def test_all_of_the_gallery_positive():
    metrics = retrieval.metrics_from_similarity(np.eye(3), [4, 4, 4], [4, 4, 4])
    assert metrics == (100, 100, 100, 100, 100, 300, 3, 0)


# --- queries without positives -------------------------------------------------------------------


def test_a_query_without_positives_changes_nothing_but_the_count_of_skipped():
    embeddings = _embeddings(0)
    before = retrieval.rank(embeddings)
    extra = embeddings._replace(
        text_global=np.insert(embeddings.text_global, 5, 1.0, axis=0),
        text_local=np.insert(embeddings.text_local, 5, 1.0, axis=0),
        text_ids=np.insert(embeddings.text_ids, 5, 99),
    )
    after = retrieval.rank(extra)
    for old, new in zip(before[:13], after[:13], strict=True):
        assert new == old._replace(metrics=old.metrics._replace(skipped=1))


def test_no_query_with_a_positive_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 queries has a positive among the 3 gal"):
        retrieval.metrics_from_similarity(np.zeros((2, 3)), [1, 2], [3, 4, 5])
    with pytest.raises(ValueError, match="none of the 0 queries has a positive among the 0 gal"):
        retrieval.metrics_from_similarity(np.zeros((0, 0)), [], [])


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_counting_equals_sorting_in_both_directions(seed):
    embeddings = _embeddings(seed)

    def cosine(kind):
        text, image = (
            getattr(embeddings, f"{side}_{kind}").astype(np.float64) for side in ("text", "image")
        )
        text = text / np.linalg.norm(text, axis=1, keepdims=True)
        return text @ (image / np.linalg.norm(image, axis=1, keepdims=True)).T

    for row in retrieval.rank(embeddings):
        similarity = row.alpha * cosine("global") + (1 - row.alpha) * cosine("local")
        ids = embeddings.text_ids, embeddings.image_ids
        if row.direction == "i2t":
            similarity, ids = similarity.T, ids[::-1]
        np.testing.assert_allclose(row.metrics[:5], _by_sorting(similarity, *ids), atol=1e-9)


@pytest.mark.parametrize("levels", [2, 5, 20])
def test_counting_equals_sorting_with_ties(levels):
    rng = np.random.default_rng(levels)
    similarity = rng.integers(0, levels, (40, 30)).astype(np.float32)
    ids = rng.integers(0, 9, 40), rng.integers(0, 9, 30)
    metrics = retrieval.metrics_from_similarity(similarity, *ids)
    np.testing.assert_allclose(metrics[:5], _by_sorting(similarity, *ids), atol=1e-9)


def test_permuting_the_gallery_changes_no_metric():
    embeddings = _embeddings(1)
    order = np.random.default_rng(0).permutation(len(embeddings.image_ids))
    permuted = embeddings._replace(
        image_global=embeddings.image_global[order],
        image_local=embeddings.image_local[order],
        image_ids=embeddings.image_ids[order],
    )
    for old, new in zip(retrieval.rank(embeddings), retrieval.rank(permuted), strict=True):
        assert new[:3] == old[:3]
        np.testing.assert_allclose(new.metrics, old.metrics, atol=1e-9)


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 4000, 20_000, 50_000, 200_000])
def test_the_size_of_a_block_changes_no_bit(chunk_bytes):
    embeddings = _embeddings(2)
    assert retrieval.rank(embeddings, chunk_bytes=chunk_bytes) == retrieval.rank(embeddings)


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 100_000])
def test_the_size_of_a_block_changes_no_bit_with_ties(chunk_bytes):
    golden = np.load(GOLDEN / "golden_rank.npz")
    case = [golden[f"big_ties/{x}"][:200] for x in ("sims", "q_pids")] + [golden["big_ties/g_pids"]]
    blocks = retrieval.metrics_from_similarity(*case, chunk_bytes=chunk_bytes)
    assert blocks == retrieval.metrics_from_similarity(*case)


@pytest.mark.parametrize("chunk_bytes", [1, 500, 3000])
def test_a_gallery_in_blocks_ranks_equal_similarities_as_a_whole_one(chunk_bytes):
    """Copies of pictures all over the gallery: a tie is one across the blocks, too."""
    embeddings = _embeddings(3, texts=30, images=40, identities=40)
    copies = np.random.default_rng(0).integers(0, 5, 40)
    embeddings = embeddings._replace(
        image_global=embeddings.image_global[copies],
        image_local=embeddings.image_local[copies],
    )
    expected = retrieval.rank(embeddings)
    assert retrieval.rank(embeddings, chunk_bytes=chunk_bytes) == expected


def test_scaling_an_embedding_changes_no_rank():
    embeddings = _embeddings(3)
    # Powers of two scale without rounding; 1e-12 is far below any norm here.
    scales = 2.0 ** np.random.default_rng(0).integers(-8, 9, (len(embeddings.text_ids), 1))
    scaled = embeddings._replace(text_global=(embeddings.text_global * scales).astype(np.float32))
    assert retrieval.rank(scaled) == retrieval.rank(embeddings)


def test_zero_embeddings_tie_instead_of_becoming_nan():
    embeddings = _embeddings(4)
    zero = embeddings._replace(text_global=np.zeros_like(embeddings.text_global))
    shape = len(zero.text_ids), len(zero.image_ids)
    expected = retrieval.metrics_from_similarity(np.zeros(shape), zero.text_ids, zero.image_ids)
    assert retrieval.rank(zero)[0].metrics == expected


def test_a_perfect_model_scores_100_everywhere():
    for row in retrieval.rank(_embeddings(5, scale=0.0)):
        assert row.metrics[:6] == (100, 100, 100, 100, 100, 300)


# --- fusion weights ------------------------------------------------------------------------------


def test_rows_come_per_direction_global_local_then_fused():
    rows = retrieval.rank(_embeddings(0), alphas=(0.68, 0.55, 1.0, 0.0, 0.68))
    names = ["global", "local", "fused@0.68", "fused@0.55"]
    assert [r.similarity for r in rows] == 2 * names
    assert [r.direction for r in rows] == ["t2i"] * 4 + ["i2t"] * 4
    assert [r.alpha for r in rows] == 2 * [1.0, 0.0, 0.68, 0.55]
    # A further weight adds rows and leaves the others as they were.
    assert set(retrieval.rank(_embeddings(0), alphas=(0.68,))) < set(rows)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_0_1_is_an_error(alpha):
    with pytest.raises(ValueError, match=r"fusion weights must lie in \[0, 1\]"):
        retrieval.rank(_embeddings(0), alphas=(0.5, alpha))


def _row(alpha, r1, mean_ap, direction="t2i"):
    metrics = retrieval.Metrics(r1, 0.0, 0.0, mean_ap, 0.0, r1, 10, 0)
    return retrieval.Row(direction, retrieval.similarity_name(alpha), alpha, metrics)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([_row(1.0, 50, 9), _row(0.5, 60, 1), _row(0.0, 55, 9)], 0.5),  # R@1 first
        ([_row(1.0, 60, 30), _row(0.4, 60, 31), _row(0.5, 60, 29)], 0.4),  # then mAP
        ([_row(0.32, 60, 30), _row(0.68, 60, 30), _row(0.5, 60, 30)], 0.68),  # then the larger
        ([_row(0.0, 60, 30), _row(1.0, 60, 30)], 1.0),
        ([_row(0.0, 61, 30), _row(1.0, 60, 30)], 0.0),
        ([_row(0.2, 60, 30), _row(0.9, 99, 99, direction="i2t")], 0.2),  # i2t has no say
    ],
)
def test_the_weight_is_chosen_by_r1_then_map_then_the_larger(rows, expected):
    assert retrieval.choose_alpha(rows) == expected
    assert retrieval.choose_alpha(rows[::-1]) == expected


def test_choosing_a_weight_needs_a_t2i_row():
    with pytest.raises(ValueError, match="at least one t2i row"):
        retrieval.choose_alpha([_row(0.5, 1, 1, direction="i2t")])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(value):
    embeddings = _embeddings(0)
    embeddings.image_local[3, 2] = value
    with pytest.raises(ValueError, match="image_local has NaN or infinite values in 1 of 37 rows"):
        retrieval.rank(embeddings)
    similarity = np.full((2, 2), value)
    with pytest.raises(ValueError, match="similarity has NaN or infinite values in 2 of 2 rows"):
        retrieval.metrics_from_similarity(similarity, [0, 1], [0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_ids": np.arange(3)}, "text_global has 60 rows, but there are 3 text_ids"),
        ({"image_local": None}, "both have local embeddings, or neither"),
        ({"image_global": np.ones((37, 5), np.float32)}, r"same d, got \(60, 16\) and \(37, 5\)"),
    ],
)
def test_inconsistent_embeddings_are_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        retrieval.rank(_embeddings(0)._replace(**change))


def test_a_similarity_of_the_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but there are 3 query ids and 2 gal"):
        retrieval.metrics_from_similarity(np.zeros((2, 3)), [0, 1, 2], [0, 1])


def test_a_memory_bound_below_one_byte_is_an_error():
    with pytest.raises(ValueError, match="chunk_bytes must be positive, got 0"):
        retrieval.rank(_embeddings(0), chunk_bytes=0)


# --- memory, compilation, transfers --------------------------------------------------------------


def test_one_block_of_a_large_corpus_stays_within_its_memory_bound():
    queries, gallery, positives, weights, width = 2_000, 20_000, 40, 13, 8
    bound = 16 * 2**20  # The whole similarity matrix is ten times that.
    tally = retrieval._Tally(
        np.arange(queries) % (gallery // positives),
        np.arange(gallery) // positives,
        weights=weights,
    )
    shape = retrieval.Blocks.fit(tally, weights=weights, width=2 * width, chunk_bytes=bound)
    assert 1 < shape.queries < queries and tally.most == positives

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    counters = shape.queries, weights, positives
    used = (
        jax.jit(retrieval.count_ahead)
        .lower(
            (floats(shape.queries, width), floats(shape.queries, width)),
            (floats(shape.gallery, width), floats(shape.gallery, width)),
            floats(weights, 2),
            integers(shape.queries, positives),
            floats(*counters),
            integers(*counters),
            integers(3),
        )
        .compile()
        .memory_analysis()
    )
    assert used.temp_size_in_bytes + used.output_size_in_bytes <= bound


def test_a_bound_smaller_than_one_query_means_one_query_at_a_time():
    tally = retrieval._Tally(np.arange(10), np.arange(1000) // 10, weights=13)
    shape = retrieval.Blocks.fit(tally, weights=13, width=64, chunk_bytes=1)
    assert shape == (1, 1)


def recorded_blocks(monkeypatch) -> list[Any]:
    """What `count_ahead` is called with from now on, in NumPy."""
    calls, counting = [], retrieval._counting

    def recording(rows):
        def count(*args):
            calls.append(jax.tree.map(np.asarray, args))
            return counting(rows)(*args)

        return count

    monkeypatch.setattr(retrieval, "_counting", recording)
    return calls


def test_uneven_blocks_and_positives_share_one_shape_per_direction(monkeypatch):
    calls = recorded_blocks(monkeypatch)
    retrieval.rank(_embeddings(6), chunk_bytes=30_000)
    assert len(calls) > 4
    assert len({str(jax.tree.map(jnp.shape, call)) for call in calls}) == 2


def test_a_gallery_in_blocks_is_computed_twice_only_where_the_positives_are(monkeypatch):
    embeddings = _embeddings(6, texts=64, images=48)
    order = np.argsort(embeddings.image_ids, kind="stable")
    embeddings = embeddings._replace(
        image_global=embeddings.image_global[order],
        image_local=embeddings.image_local[order],
        image_ids=embeddings.image_ids[order],
    )
    expected = retrieval.rank(embeddings, directions=("t2i",))
    calls = recorded_blocks(monkeypatch)
    assert retrieval.rank(embeddings, directions=("t2i",), chunk_bytes=1500) == expected
    queries, gallery = (len(calls[0][i][0]) for i in (0, 1))
    whole = -(-64 // queries) * -(-48 // gallery)
    assert gallery <= 12 and whole >= 16
    for_scores = [call for call in calls if call[6][2] == 0]
    assert len(calls) - len(for_scores) == whole
    # Each query has positives in two blocks of the gallery at most.
    assert len(for_scores) < whole / 2


@pytest.mark.parametrize("chunk_bytes", [1, 1500, 5000])
def test_a_gallery_in_blocks_ranks_the_same_on_a_mesh(chunk_bytes):
    config = config_lib.Config(mesh=config_lib.Mesh(data=4, model=2))
    mesh = sharding.make_mesh(config)
    embeddings = _embeddings(6)
    with jax.transfer_guard("disallow"):
        rows = retrieval.rank(embeddings, chunk_bytes=chunk_bytes, mesh=mesh)
    assert rows == retrieval.rank(embeddings)


@pytest.mark.parametrize("positives", [2, 200])
def test_queries_that_share_a_reading_of_the_gallery_are_few_enough(monkeypatch, positives):
    """Their embeddings and counts, of 13 weights, stay within eight chunks."""
    chunk, width = 20_000, 16 + 24
    embeddings = _embeddings(0, texts=400, images=400, identities=400 // positives)
    together = []
    placed = retrieval._placed

    def counted(side, chosen, rows, where):
        if not isinstance(chosen, slice):
            together[-1] += rows
        elif chosen.start == 0:  # the gallery is read from its start once or twice a group
            together.append(0)
        return placed(side, chosen, rows, where)

    together.append(0)
    monkeypatch.setattr(retrieval, "_placed", counted)
    retrieval.rank(embeddings, directions=("t2i",), chunk_bytes=chunk)
    most = int(np.bincount(embeddings.image_ids).max())
    queries = max(together)
    assert 0 < queries < 400 and len([x for x in together if x]) > 1
    per_query = 4 * (width + 27 * most)
    assert queries * per_query <= max(8 * chunk, per_query * 2)


def test_embeddings_may_lie_in_files(tmp_path):
    embeddings = _embeddings(2)
    for name, array in embeddings._asdict().items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = retrieval.Embeddings(
        *(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in embeddings._fields)
    )
    assert retrieval.rank(mapped, chunk_bytes=2000) == retrieval.rank(embeddings)


def test_one_direction_alone_is_a_part_of_both():
    both = retrieval.rank(_embeddings(2))
    for direction in ("t2i", "i2t"):
        rows = retrieval.rank(_embeddings(2), directions=(direction,))
        assert rows == [row for row in both if row.direction == direction]
    with pytest.raises(ValueError, match=r"directions must be some of .*, got \['both'\]"):
        retrieval.rank(_embeddings(2), directions=("both",))


def test_every_transfer_is_explicit():
    embeddings = _embeddings(7)
    with jax.transfer_guard("disallow"):
        rows = retrieval.rank(embeddings)
    assert rows == retrieval.rank(embeddings)
