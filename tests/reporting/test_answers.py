"""What a report says a query is answered with, against metrics and by hand."""

import numpy as np
import pytest

from itself_jax import retrieval
from itself_jax.reporting import answers


def embeddings(rng, queries=37, gallery=23, people=6, local=True):
    def some(n, d):
        return rng.standard_normal((n, d)).astype(np.float32)

    return retrieval.Embeddings(
        text_global=some(queries, 8),
        text_local=some(queries, 5) if local else None,
        image_global=some(gallery, 8),
        image_local=some(gallery, 5) if local else None,
        text_ids=rng.integers(0, people, queries).astype(np.int32),
        image_ids=rng.integers(0, people, gallery).astype(np.int32),
    )


@pytest.mark.parametrize("direction", retrieval.DIRECTIONS)
@pytest.mark.parametrize("alpha", (1.0, 0.0, 0.3))
def test_first_right_answers_give_the_metrics(monkeypatch, direction, alpha):
    monkeypatch.setattr(answers, "_BLOCK", 10)
    found = embeddings(np.random.default_rng(1))
    answered = answers.find(found, alpha, direction)
    row = next(
        row
        for row in retrieval.rank(found, alphas=(0.3,))
        if (row.direction, row.alpha) == (direction, alpha)
    )
    ranks = answered.first_right[answered.first_right > 0]
    for k, expected in ((1, row.metrics.R1), (5, row.metrics.R5), (10, row.metrics.R10)):
        assert 100 * (ranks <= k).mean() == pytest.approx(expected)


def test_an_answer_is_where_a_sort_puts_it():
    found = embeddings(np.random.default_rng(2))
    answered = answers.find(found, 0.4, "t2i", top=4)

    def cosine(a, b):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return a @ b.T

    similarity = 0.4 * cosine(found.text_global, found.image_global) + 0.6 * cosine(
        found.text_local, found.image_local
    )
    order = np.argsort(-similarity, axis=1, kind="stable")
    np.testing.assert_array_equal(answered.top, order[:, :4])
    np.testing.assert_allclose(
        answered.top_similarity, np.take_along_axis(similarity, order[:, :4], 1), atol=1e-6
    )
    right = found.text_ids[:, None] == found.image_ids[order]
    np.testing.assert_array_equal(answered.first_right, 1 + right.argmax(axis=1))
    np.testing.assert_array_equal(
        answered.right, np.take_along_axis(order, right.argmax(1)[:, None], 1)[:, 0]
    )
    is_right = found.text_ids[:, None] == found.image_ids
    expected, _ = np.histogram(similarity[is_right], np.linspace(-1, 1, answers.BINS + 1))
    assert answered.matched.sum() == is_right.sum()
    assert answered.unmatched.sum() == (~is_right).sum()
    assert np.abs(answered.matched - expected).sum() <= 2  # on an edge


def test_ties_keep_the_order_of_the_gallery_and_strangers_have_no_right_answer():
    one = np.ones((4, 3), np.float32)
    found = retrieval.Embeddings(
        one[:3], None, one, None, np.asarray([7, 8, 9]), np.asarray([8, 7, 8, 7])
    )
    answered = answers.find(found, 1.0, "t2i")
    assert answered.top.tolist() == [[0, 1, 2, 3]] * 3
    assert answered.first_right.tolist() == [2, 1, 0]
    assert answered.right[:2].tolist() == [1, 0]


def test_best_median_and_worst_are_of_different_people():
    ranks = np.asarray([1, 1, 5, 0, 9, 9, 3, 30])
    answered = answers.Answers(
        first_right=ranks,
        right=np.zeros(8, int),
        right_similarity=np.asarray([0.5, 0.9, 0.1, 0.0, 0.3, 0.2, 0.4, 0.1], np.float32),
        top=np.zeros((8, 1), int),
        top_similarity=np.zeros((8, 1), np.float32),
        matched=np.zeros(3, int),
        unmatched=np.zeros(3, int),
    )
    people = np.asarray([10, 11, 12, 13, 14, 14, 15, 16])
    found = answers.spread(answered, people, 2)
    assert found["best"] == [1, 0]  # both first, the more similar one before
    assert found["worst"] == [7, 5]  # of person 14 the less similar one
    # In order 1, 0, 6, 2, 4, 5, 7: query 3 has no right answer, and the middle is 2.
    assert found["median"] == [2, 6]
    assert answers.spread(answered, people, 50)["best"] == [1, 0, 6, 2, 4, 7]
