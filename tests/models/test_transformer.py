"""The block of both towers: maps kept, masks, number types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax.models import transformer

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def stack(dtype=FLOAT32, depth=3, activation="quick_gelu"):
    return transformer.Transformer(depth, 2, activation, dtype)


@pytest.fixture(scope="module")
def variables():
    x = jnp.zeros((2, 5, 8))
    return jax.jit(stack().init)(jax.random.key(0), x)


@pytest.mark.parametrize("layers", ((), (0,), (1,), (0, 2), (0, 1, 2)))
def test_exactly_the_maps_asked_for_are_kept(variables, layers):
    shapes = jax.eval_shape(
        lambda x: stack().apply(variables, x, map_layers=layers), jnp.zeros((2, 5, 8))
    )
    assert tuple(sorted(shapes.attention)) == layers
    assert all(attention.shape == (2, 5, 5) for attention in shapes.attention.values())


def test_maps_are_means_over_heads_and_rows_sum_to_one(variables):
    """Against the softmax of q·k/√(d/h) computed per head in NumPy, for layer 0."""
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    out = jax.jit(lambda x: stack().apply(variables, x, map_layers=(0,)))(x)
    np.testing.assert_allclose(out.attention[0].sum(axis=-1), 1, rtol=1e-5)
    layer = jax.tree.map(np.asarray, variables["params"]["layer_0"])
    normal = np.asarray(x, np.float64)
    normal = normal - normal.mean(axis=-1, keepdims=True)
    normal = normal / np.sqrt(np.square(normal).mean(axis=-1, keepdims=True) + 1e-5)
    in_proj = layer["attention"]["in_proj"]
    q, k, _ = np.split(normal @ in_proj["kernel"] + in_proj["bias"], 3, axis=-1)
    maps = []
    for head in (slice(0, 4), slice(4, 8)):
        logits = np.einsum("bqd,bkd->bqk", q[..., head], k[..., head]) / 2.0
        weights = np.exp(logits)
        maps.append(weights / weights.sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(out.attention[0], np.mean(maps, axis=0), atol=2e-6)


def test_a_masked_key_is_never_attended_to(variables):
    """Key 3 is hidden from every query: the map's column is 0 and its token moves no other."""
    mask = jnp.ones((5, 5), bool).at[:, 3].set(False)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    run = jax.jit(lambda x: stack().apply(variables, x, mask, map_layers=(0, 1, 2)))
    out, other = run(x), run(x.at[:, 3].add(5.0))
    for attention in out.attention.values():
        assert (np.asarray(attention)[:, :, 3] == 0).all()
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(out.tokens[:, others], other.tokens[:, others])


def test_no_gradient_flows_through_a_map(variables):
    def total(x):
        out = stack().apply(variables, x, map_layers=(2,))
        return jnp.square(out.attention[2]).sum()

    gradient = jax.jit(jax.grad(total))(jax.random.normal(jax.random.key(1), (2, 5, 8)))
    assert (np.asarray(gradient) == 0).all()


def test_activations_by_hand():
    """x·σ(1.702x) at 1 is 1/(1 + e^-1.702) = 0.84579; the exact GELU is Φ(1) = 0.84134."""
    one = jnp.array(1.0)
    assert float(transformer.ACTIVATIONS["quick_gelu"](one)) == pytest.approx(0.845796, abs=1e-5)
    assert float(transformer.ACTIVATIONS["gelu"](one)) == pytest.approx(0.841345, abs=1e-5)


def primitives(jaxpr, name):
    """Every equation of one primitive, nested ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            found.append(equation)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += primitives(inner, name)
    return found


@pytest.mark.parametrize("dtype", (FLOAT32, BFLOAT16))
def test_float32_compute_is_true_float32_and_the_rest_uses_the_compute_type(variables, dtype):
    jaxpr = jax.make_jaxpr(lambda x: stack(dtype, depth=1).apply(variables, x, map_layers=(0,)))(
        jnp.zeros((2, 5, 8), dtype)
    )
    products = primitives(jaxpr.jaxpr, "dot_general")
    assert len(products) == 6, "in, logits, values, out, and two of the MLP"
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    for product in products:
        assert {v.aval.dtype for v in product.invars} == {dtype}
        if dtype == FLOAT32:
            assert product.params["precision"] == highest
    for name in ("exp", "rsqrt"):  # softmax and LayerNorm
        equations = primitives(jaxpr.jaxpr, name)
        assert equations
        assert all(e.outvars[0].aval.dtype == FLOAT32 for e in equations)


def test_layer_norm_of_bfloat16_tokens_is_computed_in_float32():
    """Of 1000 + (0, 4, 8, 12), all exact in bfloat16: mean 1006, deviation √20. The fast variance
    or bfloat16 statistics would be far off."""
    x = jnp.array([[[1000.0, 1004.0, 1008.0, 1012.0]]], jnp.bfloat16)
    module = transformer.layer_norm("norm")
    out = module.apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x)
    assert out.dtype == FLOAT32
    np.testing.assert_allclose(out[0, 0], np.array([-6, -2, 2, 6]) / np.sqrt(20), rtol=1e-5)
