"""CLIP's encoders: tokens, attention and positions against the reference, and their geometry."""

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import config as config_lib
from itself_jax.models import clip

GOLDEN = golden_model.load("golden_f32_mixed_s16.npz")
POSITIONS = golden_model.load("resize_pos_embed.npz")
FLOAT32 = jnp.dtype(jnp.float32)


@pytest.mark.parametrize("side", ("image", "text"))
def test_all_tokens_are_the_references(side):
    tokens = getattr(golden_model.features(), side).tokens
    golden_model.assert_close(tokens, GOLDEN[f"feat/{side}_tokens"], 2e-5)


@pytest.mark.parametrize("side", ("image", "text"))
def test_attention_of_every_layer_is_the_references(side):
    attention = getattr(golden_model.features(), side).attention
    assert sorted(attention) == list(range(12))
    for layer, expected in enumerate(GOLDEN[f"feat/attn_{side}"]):
        golden_model.assert_close(attention[layer], expected, 2e-5, f"layer {layer}")


def test_pooled_tokens_are_cls_and_the_first_end_of_text():
    out = golden_model.features()
    ids = golden_model.batch()["ids"]
    np.testing.assert_array_equal(out.image.pool_index, 0)
    np.testing.assert_array_equal(out.image.pooled, out.image.tokens[:, 0])
    for row, eot in enumerate(out.text.pool_index):
        assert ids[row, eot] == 511 and 511 not in ids[row, :eot]
        np.testing.assert_array_equal(out.text.pooled[row], out.text.tokens[row, eot])


def test_the_first_of_two_ends_of_text_counts():
    ids = jnp.array([[510, 3, 511, 511, 0], [510, 511, 0, 0, 0], [510, 4, 5, 6, 511]])
    np.testing.assert_array_equal(clip.end_of_text(ids), [2, 1, 4])


@pytest.mark.parametrize(
    "case, grid",
    (
        ("14x14_to_24x8", (24, 8)),
        ("7x7_to_12x4", (12, 4)),
        ("14x14_to_31x10_stride12", (31, 10)),
        ("7x7_to_6x2_small", (6, 2)),
        ("7x7_to_7x2_small_s12", (7, 2)),
        ("14x14_to_14x14", (14, 14)),
    ),
)
def test_resized_positions_are_the_references(case, grid):
    resized = clip.resize_position_embedding(jnp.asarray(POSITIONS[f"{case}/in"]), grid)
    golden_model.assert_close(resized, POSITIONS[f"{case}/out"], 1e-6)
    np.testing.assert_array_equal(resized[0], POSITIONS[f"{case}/in"][0])


def test_positions_of_an_equal_grid_are_untouched():
    positions = jnp.asarray(POSITIONS["14x14_to_14x14/in"])
    assert clip.resize_position_embedding(positions, (14, 14)) is positions


def test_positions_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="192 patch positions do not form a square grid"):
        clip.resize_position_embedding(jnp.zeros((193, 4)), (24, 8))


def test_resized_positions_by_hand():
    """Patches 0 10 / 20 30 widened to 2x4, half-pixel centres: columns lie at -.25 .25 .75 1.25,
    so that the rows are 0 2.5 7.5 10 and 20 22.5 27.5 30 (clamped at the border)."""
    positions = jnp.array([[7.0], [0.0], [10.0], [20.0], [30.0]])
    expected = [7, 0, 2.5, 7.5, 10, 20, 22.5, 27.5, 30]
    resized = clip.resize_position_embedding(positions, (2, 4))
    np.testing.assert_allclose(resized[:, 0], expected, rtol=1e-6)


def tiny_image_encoder(image_size=(8, 8), patch_size=4, stride=4, dtype=FLOAT32):
    return clip.ImageEncoder(
        image_size=image_size,
        patch_size=patch_size,
        stride=stride,
        width=8,
        depth=2,
        heads=2,
        embed_dim=4,
        activation="quick_gelu",
        dtype=dtype,
    )


def tiny_text_encoder(dtype=FLOAT32):
    return clip.TextEncoder(
        vocab_size=16,
        text_length=8,
        width=8,
        depth=3,
        heads=2,
        embed_dim=4,
        activation="quick_gelu",
        dtype=dtype,
    )


@pytest.mark.parametrize("stride, grid", ((16, (24, 8)), (12, (31, 10))))
def test_overlapping_patches_never_read_padding(stride, grid):
    """VALID: (384 - 16) // 12 + 1 = 31 rows and (128 - 16) // 12 + 1 = 10 columns."""
    assert config_lib.Model(stride=stride).grid == grid
    encoder = tiny_image_encoder((384, 128), 16, stride)
    images = jax.ShapeDtypeStruct((1, 384, 128, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: encoder.init_with_output(jax.random.key(0), x), images)
    out, variables = shapes
    assert out.tokens.shape[1] == grid[0] * grid[1] + 1
    assert variables["params"]["position_embedding"].shape == (grid[0] * grid[1] + 1, 8)


def test_patches_are_numbered_row_by_row():
    """A picture bright in patch (row 0, column 1) alone changes only token 2 before mixing."""
    encoder = tiny_image_encoder()
    images = jnp.zeros((1, 8, 8, 3))
    variables = jax.jit(encoder.init)(jax.random.key(0), images)
    bright = images.at[:, :4, 4:].set(1.0)

    @jax.jit
    def patches(x):
        _, state = encoder.apply(
            variables, x, capture_intermediates=lambda m, _: m.name == "ln_pre", mutable=True
        )
        return state["intermediates"]["ln_pre"]["__call__"][0]

    changed = np.abs(patches(bright) - patches(images)).sum(axis=-1)[0]
    np.testing.assert_array_equal(changed > 0, [False, False, True, False, False])


def test_a_picture_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"pictures have shape \(8, 4, 3\), expected \(8, 8\)"):
        tiny_image_encoder().init(jax.random.key(0), jnp.zeros((1, 8, 4, 3)))


def test_a_caption_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="captions have 9 positions, at most 8 expected"):
        tiny_text_encoder().init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))


def test_text_token_never_attends_to_the_future():
    """Changing the words after position 3 changes no token up to 3, and no map above the diagonal
    is other than zero."""
    encoder = tiny_text_encoder()
    ids = jnp.array([[14, 3, 4, 5, 6, 7, 15, 0]])
    variables = jax.jit(encoder.init)(jax.random.key(0), ids)
    apply = jax.jit(lambda ids: encoder.apply(variables, ids, map_layers=range(3)))
    out, other = apply(ids), apply(ids.at[0, 4:].set(jnp.array([9, 9, 9, 15])))
    np.testing.assert_array_equal(out.tokens[0, :4], other.tokens[0, :4])
    assert (np.abs(out.tokens[0, 4:] - other.tokens[0, 4:]) > 1e-4).any(axis=-1).all()
    for attention in out.attention.values():
        future = np.triu(np.ones((8, 8), bool), k=1)
        assert (np.asarray(attention[0])[future] == 0).all()
        np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("make", (tiny_image_encoder, tiny_text_encoder))
def test_initialisation_has_clips_deviations(make):
    """Width d, depth L: attention d^-.5, its output and the MLP's (d^-.5)(2L)^-.5, MLP (2d)^-.5.

    The patch embedding is PyTorch's U(±1/√fan_in), whose deviation is (3·fan_in)^-.5.
    """
    image = make is tiny_image_encoder
    encoder = make().clone(width=64, depth=2, heads=2, embed_dim=64)
    shape = (1, 8, 8, 3) if image else (1, 8)
    dtype = jnp.float32 if image else jnp.int32
    if not image:
        encoder = encoder.clone(vocab_size=512)
    params = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros(shape, dtype))["params"]
    layer = params["transformer"]["layer_1"]
    expected = [
        (layer["attention"]["in_proj"]["kernel"], 64**-0.5),
        (layer["attention"]["out_proj"]["kernel"], 64**-0.5 * 4**-0.5),
        (layer["mlp_in"]["kernel"], 128**-0.5),
        (layer["mlp_out"]["kernel"], 64**-0.5 * 4**-0.5),
        (params["projection"], 64**-0.5),
    ]
    if image:
        expected.append((params["position_embedding"], 64**-0.5))
        expected.append((params["patch_embedding"]["kernel"], (3 * 48) ** -0.5))
    else:
        expected.append((params["position_embedding"], 0.01))
        expected.append((params["token_embedding"]["embedding"], 0.02))
    for value, deviation in expected:
        # Four standard errors of a deviation estimated from that many draws.
        assert abs(float(value.std()) / deviation - 1) < 4 / np.sqrt(2 * value.size)
        assert abs(float(value.mean())) < 4 * deviation / np.sqrt(value.size)
    for path, value in golden_model.flat(params).items():
        if path.endswith("bias"):
            assert (value == 0).all(), path
        if path.endswith("scale"):
            assert (value == 1).all(), path
