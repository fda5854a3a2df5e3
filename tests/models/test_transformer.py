"""The block of both towers: maps kept, masks, number types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax.models import transformer

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def stack(dtype=FLOAT32, depth=3, activation="quick_gelu", **settings):
    return transformer.Transformer(depth, 2, activation, dtype, **settings)


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


def test_a_later_token_is_never_attended_to_in_a_causal_stack(variables):
    """The map of token 3 is 0 beyond it, and a change of token 3 moves no earlier one."""
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    run = jax.jit(lambda x: stack(causal=True).apply(variables, x, map_layers=(0, 1, 2)))
    out, other = run(x), run(x.at[:, 3].add(5.0))
    for attention in out.attention.values():
        assert (np.triu(np.asarray(attention), 1) == 0).all()
        assert (np.tril(np.asarray(attention)) > 0).sum() == 2 * 15
    np.testing.assert_array_equal(out.tokens[:, :3], other.tokens[:, :3])
    assert (np.asarray(out.tokens[:, 3:]) != np.asarray(other.tokens[:, 3:])).any(axis=-1).all()


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n", (4, 5))
def test_the_kernel_computes_what_the_layers_with_a_map_do(variables, causal, n, monkeypatch):
    """With XLA's implementation in the place of cuDNN's, which needs a card: the odd length's
    padding and the scale are ours. Tokens, maps and gradients."""
    of_xla = functools.partial(transformer.fused_attention, implementation="xla")
    used = []
    monkeypatch.setattr(
        transformer, "fused_attention", lambda *a, **k: used.append(1) or of_xla(*a, **k)
    )
    x = jax.random.normal(jax.random.key(2), (2, n, 8))

    def total(variables, x, **settings):
        out = stack(causal=causal, **settings).apply(variables, x, map_layers=(1,))
        return jnp.sin(out.tokens).sum(), out

    run = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    plain = jax.jit(run)(variables, x)
    assert not used
    fused = jax.jit(functools.partial(run, attention="cudnn"))(variables, x)
    assert len(used) == 2, "layers 0 and 2, whose maps nobody reads"
    for got, expected in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)


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


def test_what_is_together_keeps_its_values_and_gradients():
    def loss(x, kernel):
        x, kernel = transformer.together(x, kernel)
        return jnp.sum(jnp.square(x @ kernel))

    x, kernel = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 4)
    expected = jax.grad(lambda x, kernel: jnp.sum(jnp.square(x @ kernel)), (0, 1))(x, kernel)
    for got, want in zip(jax.jit(jax.grad(loss, (0, 1)))(x, kernel), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    # Where one of them is frozen, nobody waits for its gradient.
    both = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
    frozen = jax.jit(jax.grad(lambda x: loss(x, jax.lax.stop_gradient(kernel)))).trace(x)

    def barriers(traced, platform):
        return traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier")

    assert (barriers(both, "cpu"), barriers(both, "tpu"), barriers(frozen, "cpu")) == (1, 0, 0)


def test_layer_norm_of_bfloat16_tokens_is_computed_in_float32():
    """Of 1000 + (0, 4, 8, 12), all exact in bfloat16: mean 1006, deviation √20. The fast variance
    or bfloat16 statistics would be far off."""
    x = jnp.array([[[1000.0, 1004.0, 1008.0, 1012.0]]], jnp.bfloat16)
    module = transformer.LayerNorm(name="norm")
    out = module.apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x)
    assert out.dtype == FLOAT32
    np.testing.assert_allclose(out[0, 0], np.array([-6, -2, 2, 6]) / np.sqrt(20), rtol=1e-5)
