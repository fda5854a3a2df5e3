"""GRAB on hand-sized banks: padding, pooling, BatchNorm."""

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax.models import grab, saliency, transformer

FLOAT32 = jnp.dtype(jnp.float32)


def bank(indices, kept, valid=None) -> saliency.Bank:
    indices, kept = jnp.asarray(indices), jnp.asarray(kept)
    valid = jnp.broadcast_to(kept, indices.shape) if valid is None else jnp.asarray(valid)
    return saliency.Bank(indices, kept, valid)


def apply(module, variables, tokens, bank, **kwargs):
    return module.apply(variables, saliency.take(tokens, bank.indices), bank, **kwargs)


def init(module, tokens, bank):
    return module.init(jax.random.key(0), saliency.take(tokens, bank.indices), bank, train=True)


@pytest.fixture(scope="module")
def head():
    """A small head with random weights, applied jitted: (tokens, bank) → (embedding, stats)."""
    module = grab.GRAB(8, True, FLOAT32)
    tokens = jax.random.normal(jax.random.key(1), (3, 6, 4))
    indices = jnp.array([[1, 2, 3], [2, 3, 4], [5, 1, 2]])
    example = bank(indices, [True] * 3)
    variables = jax.jit(lambda t, b: init(module, t, b))(tokens, example)

    @jax.jit
    def train(tokens, bank):
        out, updated = apply(module, variables, tokens, bank, train=True, mutable=["batch_stats"])
        return out, updated["batch_stats"]

    @jax.jit
    def infer(tokens, bank):
        return apply(module, variables, tokens, bank, train=False)

    return train, infer, variables, tokens, indices


def test_rows_beyond_k_change_nothing(head):
    """k_max = 5 with k = 3 equals k_max = 3: embedding, statistics, and at inference too."""
    train, infer, _, tokens, indices = head
    padded = jnp.concatenate([indices, jnp.array([[4, 5], [5, 0], [3, 4]])], axis=1)
    exact, wide = bank(indices, [True] * 3), bank(padded, [True] * 3 + [False] * 2)
    (expected, stats), (out, wide_stats) = train(tokens, exact), train(tokens, wide)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for name in ("mean", "var"):
        np.testing.assert_allclose(wide_stats["norm"][name], stats["norm"][name], rtol=1e-6)
    np.testing.assert_allclose(infer(tokens, wide), infer(tokens, exact), rtol=1e-6)
    # And they would change something if they were kept.
    other, _ = train(tokens, bank(padded, [True] * 5))
    assert np.abs(other - expected).max() > 1e-3


def test_invalid_rows_are_pooled_by_nobody_yet_enter_the_batch_norm(head):
    train, infer, _, tokens, indices = head
    valid = jnp.array([[True, True, False], [True] * 3, [True] * 3])
    some, every = bank(indices, [True] * 3, valid), bank(indices, [True] * 3)
    (out, stats), (whole, all_stats) = train(tokens, some), train(tokens, every)
    np.testing.assert_array_equal(stats["norm"]["mean"], all_stats["norm"]["mean"])
    np.testing.assert_allclose(out[1:], whole[1:], rtol=1e-6)
    assert (out[0] <= whole[0]).all() and (out[0] < whole[0]).any()
    # At inference the invalid row's token is free to be anything.
    changed = tokens.at[0, indices[0, 2]].set(100.0)
    np.testing.assert_array_equal(infer(changed, some), infer(tokens, some))


def test_the_embedding_is_the_maximum_of_skip_plus_mlp_by_hand(head):
    """The equation of method section 4 in NumPy float64, at inference."""
    _, infer, variables, tokens, indices = head
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    s = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["batch_stats"])
    x = np.stack([np.asarray(tokens, np.float64)[i, indices[i]] for i in range(3)])
    x = x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
    hidden = x @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"]
    hidden = (hidden - s["norm"]["mean"]) / np.sqrt(s["norm"]["var"] + 1e-5)
    hidden = np.maximum(hidden * p["norm"]["scale"] + p["norm"]["bias"], 0)
    rows = x @ p["skip"]["kernel"] + p["skip"]["bias"]
    rows = rows + hidden @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
    out = infer(tokens, bank(indices, [True] * 3))
    golden_model.assert_close(out, rows.max(axis=1), 1e-6)


def test_the_norm_of_a_tiny_token_has_1e_minus_8_added():
    """A token of norm 1e-8 becomes one of norm 1e-8/(1e-8 + 1e-8) = ½, and zero stays zero."""
    module = grab.GRAB(2, False, FLOAT32)
    tokens = jnp.array([[[1e-8, 0.0], [0.0, 0.0]]])
    chosen = bank([[0]], [True])
    variables = jax.jit(lambda t, b: init(module, t, b))(tokens, chosen)
    zero = jax.tree.map(jnp.zeros_like, variables)
    params = zero["params"] | {"skip": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    state = {"params": params, "batch_stats": variables["batch_stats"]}
    out = apply(module, state, tokens, chosen, train=False)
    np.testing.assert_allclose(out, [[0.5, 0.0]], rtol=1e-5)
    nothing = apply(module, state, tokens, bank([[1]], [True]), train=False)
    np.testing.assert_array_equal(nothing, [[0.0, 0.0]])


def test_batch_norm_by_hand():
    """Kept rows 1, 3 | 5, 7 (2 samples, k = 2, a third row masked): mean 4, biased variance
    (9 + 1 + 1 + 9)/4 = 5, unbiased 20/3. Output (x - 4)/√5 · 2 + 1. Running: .9·0 + .1·4 = .4 and
    .9·1 + .1·20/3 = 1.5667; the counter goes from 0 to 1."""
    x = jnp.array([[[1.0], [3.0], [99.0]], [[5.0], [7.0], [-99.0]]])
    norm = grab.BankBatchNorm()
    kept = jnp.array([True, True, False])
    state = {
        "params": {"scale": jnp.array([2.0]), "bias": jnp.array([1.0])},
        "batch_stats": {"mean": jnp.zeros(1), "var": jnp.ones(1), "batches": jnp.int32(0)},
    }
    out, updated = norm.apply(state, x, kept, train=True, mutable=["batch_stats"])
    expected = (np.array([1, 3, 5, 7]) - 4) / np.sqrt(5 + 1e-5) * 2 + 1
    np.testing.assert_allclose(out[:, :2, 0].ravel(), expected, rtol=1e-5)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.4, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * 20 / 3, rtol=1e-6)
    assert int(stats["batches"]) == 1
    # At inference the running statistics count, and do not move.
    out = norm.apply(state, x, kept, train=False)
    np.testing.assert_allclose(out[0, 1, 0], 3 / np.sqrt(1 + 1e-5) * 2 + 1, rtol=1e-6)


def test_linears_start_uniform_within_one_over_the_root_of_their_inputs():
    for fan_in in (16, 400):
        draw = transformer.uniform_fan_in(fan_in)(jax.random.key(0), (100, 100))
        bound = 1 / np.sqrt(fan_in)
        assert float(jnp.abs(draw).max()) <= bound
        assert float(jnp.abs(draw).max()) > 0.99 * bound
        assert float(draw.std()) == pytest.approx(bound / np.sqrt(3), rel=0.03)
        assert abs(float(draw.mean())) < 0.03 * bound


def test_only_the_image_side_owns_the_unused_skip(head):
    variables = head[2]
    assert {"unused_skip_kernel", "unused_skip_bias"} <= set(variables["params"])
    module = grab.GRAB(8, False, FLOAT32)
    tokens, chosen = jnp.zeros((2, 6, 4)), bank([[1], [2]], [True])
    shapes = jax.eval_shape(lambda t, b: init(module, t, b), tokens, chosen)
    assert not {"unused_skip_kernel", "unused_skip_bias"} & set(shapes["params"])
    assert {"unused_norm_scale", "unused_norm_bias"} <= set(shapes["params"])
