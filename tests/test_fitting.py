"""Weights in the model of a run."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from itself_jax import config as config_lib
from itself_jax import fitting, weights
from itself_jax.models import clip, itself

GOLDEN = pathlib.Path(__file__).parent / "golden"
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
PICTURE = {"model.image_size": (32, 16), "model.text_length": 16}
TEXT_POSITIONS = "params/text_encoder/position_embedding"
IMAGE_POSITIONS = "params/image_encoder/position_embedding"


def quiet(line):
    del line


def but_grid(log):
    """The lines without the one on the grid, which no published file states."""
    return [line for line in log if "patch positions; 4x2, as here, is assumed" not in line]


def opened(path):
    return weights.open_(path, quiet)


@pytest.fixture
def found(tmp_path):
    return opened(published.write(tmp_path / "best.pth"))


def resolved(found, log=quiet, *, training=True, **changes):
    changes = PICTURE | {key.replace("__", "."): value for key, value in changes.items()}
    return fitting.resolve(config_lib.Config(), found, log, training=training, changes=changes)


@functools.cache
def template(config, identities=5):
    model = itself.ITSELF(config.model, config.local, identities)
    images = jax.ShapeDtypeStruct((2, *config.model.image_size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, config.model.text_length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, ids)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE),
        {"batch_stats": {}, **shapes},
    )


def fresh(shapes):
    return jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), shapes)


def test_sizes_come_from_the_weights_and_the_picture_from_the_run(found):
    config = resolved(found, model__stride=4)
    model = config.model
    assert (model.patch_size, model.vision_width, model.vision_depth) == (8, 64, 2)
    assert (model.image_size, model.stride, model.text_length) == ((32, 16), 4, 16)
    assert (config.local.dim, config.local.enabled) == (24, True)
    assert model.activation == "quick_gelu"


def test_a_chosen_activation_overrides_and_says_so(found):
    log = []
    assert resolved(found, log.append, model__activation="gelu").model.activation == "gelu"
    assert "'gelu' overrides 'quick_gelu'" in log[-1]


def test_patches_must_fit_the_picture(found):
    with pytest.raises(config_lib.ConfigError, match=r"image_size=\(6, 6\).* no patch of 8 pixels"):
        resolved(found, model__image_size=(6, 6))


def test_heads_that_nobody_says_are_asked_for(found):
    unknown = found._replace(sizes={**found.sizes, "model.vision_heads": None})
    with pytest.raises(config_lib.ConfigError, match=r"model.vision_heads is not known.* width 64"):
        resolved(unknown)
    log = []
    config = resolved(unknown, log.append, model__vision_heads=2)
    assert config.model.vision_heads == 2 and "vision_heads=2" in log[-1]


def test_given_heads_go_before_the_rule_and_say_so(found):
    log = []
    assert resolved(found, log.append, model__text_heads=4).model.text_heads == 4
    assert "model.text_heads=4 overrides 1" in log[-1]


def test_replaced_sizes_are_said_once_with_what_was_configured(found):
    log = []
    fitting.say_replaced(config_lib.Config(), found.sizes, found.source, log.append)
    assert len(log) == 1 and "model.patch_size=8 (was 16)" in log[0]
    assert "model.vocab_size=64 (was 49408)" in log[0]
    fitting.say_replaced(resolved(found), found.sizes, found.source, log.append)
    assert len(log) == 1


def test_a_square_of_pre_training_is_resized_though_as_many_patches_are_wanted():
    """4x4 patches of a CLIP for pictures of 8x2 ones."""
    found, log = opened(GOLDEN / "hugging_face"), []
    changes = {"model.image_size": (64, 16), "model.text_length": 16, "local.enabled": False}
    config = fitting.resolve(config_lib.Config(), found, quiet, training=True, changes=changes)
    shapes = fitting.encoders_only(template(config))
    fitting.fit(found, shapes, config.model, log.append)
    assert len(log) == 1 and "4x4 grid were resized to 8x2" in log[0]


def test_layers_of_the_local_branch_must_exist_in_the_weights(found):
    with pytest.raises(config_lib.ConfigError, match="layer:5"):
        resolved(found, local__saliency="layer:5")


@pytest.mark.parametrize("training", [True, False])
def test_without_a_local_branch_only_training_keeps_one(tmp_path, training):
    found = opened(published.write(tmp_path / "best.pth", local=False))
    log = []
    config = resolved(found, log.append, training=training)
    assert config.local.enabled == training and config.local.dim == 4096
    assert any("global embedding alone" in line for line in log) == (not training)


def test_every_array_arrives_where_the_template_says(found):
    shapes = template(resolved(found))
    log = []
    fitted = fitting.fit(found, shapes, resolved(found).model, log.append)
    assert jax.tree.structure(fitted) == jax.tree.structure(shapes) and but_grid(log) == []
    for name, array in weights.flat(fitted).items():
        assert isinstance(array, jax.Array) and array.sharding == DEVICE
        np.testing.assert_array_equal(array, found.arrays[name].read())
        assert array.dtype == (np.int32 if name.endswith("batches") else np.float32)


def test_classifiers_of_other_identities_start_anew_and_say_so(found):
    config, log = resolved(found), []
    shapes = template(config, 8)
    fitted = weights.flat(fitting.fit(found, shapes, config.model, log.append, fresh=fresh(shapes)))
    for name, array in fitted.items():
        renewed = "classifier" in name
        if renewed:
            np.testing.assert_array_equal(array, np.full(array.shape, 0.5))
        else:
            np.testing.assert_array_equal(array, found.arrays[name].read())
    (line,) = but_grid(log)
    assert "WARNING" in line and "knows 5 identities" in line


def test_classifiers_of_as_many_identities_are_kept_with_a_warning(found):
    config, log = resolved(found), []
    shapes = template(config, 5)
    fitted = weights.flat(fitting.fit(found, shapes, config.model, log.append, fresh=fresh(shapes)))
    for name, array in fitted.items():
        np.testing.assert_array_equal(array, found.arrays[name].read())
    (line,) = but_grid(log)
    assert line.startswith("WARNING") and "as many identities as this run has, 5" in line
    assert "only if it was trained on this very data set" in line


def test_classifiers_of_other_identities_are_an_error_without_fresh_ones(found):
    config = resolved(found)
    with pytest.raises(
        weights.WeightsError, match=r"classifier_id_grab\.bias is \[6\] there and \[9\]"
    ):
        fitting.fit(found, template(config, 8), config.model, quiet)


def test_encoders_need_no_classifiers(found):
    config = resolved(found)
    shapes, log = fitting.encoders_only(template(config, 1)), []
    fitted = weights.flat(fitting.fit(found, shapes, config.model, log.append))
    assert fitted and not any("heads" in name for name in fitted)
    assert any("grab" in name for name in fitted) and but_grid(log) == []


def test_a_branch_that_is_off_is_left_out_and_said_so(found):
    config, log = resolved(found, local__enabled=False), []
    fitted = fitting.fit(found, template(config), config.model, log.append)
    assert set(fitted["params"]) == {"image_encoder", "text_encoder", "global_heads"}
    (line,) = but_grid(log)
    assert "config.local.enabled is off" in line


def test_what_clip_does_not_have_starts_from_random_numbers_with_reasons():
    found = opened(GOLDEN / "hugging_face")
    changes = {"model.image_size": (32, 32), "model.text_length": 16, "local.dim": 24}
    config = fitting.resolve(config_lib.Config(), found, quiet, training=True, changes=changes)
    shapes, log = template(config), []
    fitted = weights.flat(fitting.fit(found, shapes, config.model, log.append, fresh=fresh(shapes)))
    for name, array in fitted.items():
        if name in found.arrays:
            np.testing.assert_array_equal(array, found.arrays[name].read().astype(np.float32))
        else:
            np.testing.assert_array_equal(array, np.full(array.shape, 0.5, array.dtype))
    assert {line.rpartition(": ")[2] for line in log} == {
        "the file has no identity classifiers.",
        "the file has no local branch.",
    }
    with pytest.raises(weights.WeightsError, match=r"global_heads/pair_norm/scale is missing"):
        fitting.fit(found, shapes, config.model, quiet)


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    path = published.write(
        tmp_path / "best.pth",
        texual_emb_layer__linear__weight=None,
        base_model__visual__ln_post__weight=None,
        mlp_grab__1__bias=np.zeros(7, np.float32),
        base_model__visual__transformer__resblocks__1__mlp__c_fc__weight=np.zeros((64, 256), "f"),
    )
    found = opened(path)
    config = resolved(found)
    with pytest.raises(weights.WeightsError) as caught:
        # Although there are fresh ones: half a branch is a defect, not an absence.
        shapes = template(config)
        fitting.fit(found, shapes, config.model, quiet, fresh=fresh(shapes))
    for part in (
        "texual_emb_layer.linear.weight is missing, expected [24, 16]",
        "base_model.visual.ln_post.weight is missing, expected [64]",
        "resblocks.1.mlp.c_fc.weight is [64, 256] there and [256, 64] here",
        "mlp_grab.1.bias is [7] there and [24] here",
        str(path),
    ):
        assert part in str(caught.value)


def test_a_layer_too_many_is_a_layer_that_lacks_arrays(tmp_path):
    extra = np.zeros(64, np.float32)
    name = "base_model__transformer__resblocks__2__ln_1__bias"
    found = opened(published.write(tmp_path / "best.pth", **{name: extra}))
    config = resolved(found)
    assert config.model.text_depth == 3
    with pytest.raises(weights.WeightsError, match=r"resblocks\.2\.ln_1\.weight is missing"):
        fitting.check(found, template(config), config.model)


def test_check_accounts_without_reading(found):
    class Unreadable:
        def __init__(self, array):
            self.shape, self.dtype = array.shape, array.dtype

        def read(self):
            raise AssertionError("read")

    unread = found._replace(arrays={n: Unreadable(a) for n, a in found.arrays.items()})
    config = resolved(found)
    assert fitting.check(unread, template(config), config.model) == {}
    clip_only = {n: a for n, a in unread.arrays.items() if "_encoder/" in n}
    absent = fitting.check(
        unread._replace(arrays=clip_only, dialect=opened(GOLDEN / "open_clip").dialect),
        template(config),
        config.model,
    )
    assert set(absent.values()) == {
        "the file has no local branch",
        "the file has no identity classifiers",
    }
    assert absent.keys() | clip_only.keys() == weights.flat(template(config)).keys()


def positions(found, name, log=quiet, **changes):
    config = resolved(found, **changes)
    fitted = fitting.fit(found, template(config), config.model, log)
    return np.asarray(weights.flat(fitted)[name])


def test_patch_positions_are_untouched_when_equal_and_resized_else(tmp_path):
    """9 patches, a square as in pre-training, for 32x16 pictures of 4x2 patches."""
    found = opened(published.write(tmp_path / "best.pth", published.TINY._replace(patches=9)))
    given = found.arrays[IMAGE_POSITIONS].read()
    log = []
    np.testing.assert_array_equal(
        positions(found, IMAGE_POSITIONS, log.append, model__image_size=(24, 24)), given
    )
    assert len(log) == 1 and "3x3, as here, is assumed" in log.pop()
    resized = positions(found, IMAGE_POSITIONS, log.append)
    expected = clip.resize_position_embedding(jnp.asarray(given), (4, 2))
    np.testing.assert_array_equal(resized, expected)
    assert len(log) == 1 and "3x3 grid were resized to 4x2" in log[0]


@pytest.mark.parametrize(
    "patches, picture, said",
    [
        (12, (48, 16), None),  # 6x2, three times as high as wide
        (8, (32, 16), None),  # nothing is likelier
        (12, (32, 24), "have 6x2. If it has, set model.image_size=(48, 16)."),
        (
            1900,
            (400, 304),
            "have 76x25. If it has, set model.image_size=(384, 128) and model.stride=5.",
        ),
    ],
)
def test_an_assumed_grid_is_said_and_loudly_if_another_one_is_likelier(
    patches, picture, said, tmp_path
):
    found = opened(published.write(tmp_path / "a.pth", published.TINY._replace(patches=patches)))
    log = []
    positions(found, IMAGE_POSITIONS, log.append, model__image_size=picture)
    (line,) = log
    rows, columns = picture[0] // 8, picture[1] // 8
    assert f"{patches} patch positions; {rows}x{columns}, as here, is assumed" in line
    assert ("WARNING" in line) == (said is not None) and (said or "") in line


def test_positions_of_another_stride_are_recognised(found):
    """4x2 positions of stride 8 become 7x3 ones of stride 4."""
    given, log = found.arrays[IMAGE_POSITIONS].read(), []
    resized = positions(found, IMAGE_POSITIONS, log.append, model__stride=4)
    assert resized.shape == (22, 64) and "4x2 grid were resized to 7x3" in log[0]
    np.testing.assert_array_equal(resized[0], given[0])
    # Output (0, 1) lies halfway between columns 0 and 1: (1.5 / 3) * 2 - 0.5 = 0.5.
    row = (given[1] + given[2]) / 2
    np.testing.assert_allclose(resized[2], row, rtol=1e-5, atol=1e-7)


def test_positions_of_an_unknown_grid_are_refused(tmp_path):
    found = opened(published.write(tmp_path / "best.pth", published.TINY._replace(patches=7)))
    with pytest.raises(weights.WeightsError, match="positions for 7 patches.* picture of 32x16"):
        positions(found, IMAGE_POSITIONS)


def test_a_run_says_its_own_grid(found):
    """The same 8 positions, of 2x4 patches."""
    made_with = resolved(found, model__image_size=(16, 32))
    log = []
    positions(found._replace(config=made_with), IMAGE_POSITIONS, log.append)
    assert len(log) == 1 and "2x4 grid were resized to 4x2" in log[0]


@pytest.mark.parametrize("length, word", [(12, "cut"), (50, "stretched behind the first 20")])
def test_text_positions_follow_the_text_length_with_one_line(tmp_path, length, word):
    sizes = published.TINY._replace(length=30)
    found, log = opened(published.write(tmp_path / "best.pth", sizes)), []
    after = positions(found, TEXT_POSITIONS, log.append, model__text_length=length)
    before = found.arrays[TEXT_POSITIONS].read()
    assert after.shape == (length, 64)
    np.testing.assert_array_equal(after[:12], before[:12])
    if length > 30:
        np.testing.assert_array_equal(after[:20], before[:20])
        # Ten rows became thirty: output i lies at (i + 0.5) / 3 - 0.5 of the old tail.
        np.testing.assert_allclose(after[21], before[20], rtol=1e-6)
        np.testing.assert_allclose(after[22], (2 * before[20] + before[21]) / 3, rtol=1e-4)
    (line,) = but_grid(log)
    assert word in line and f"model.text_length={length}" in line


def test_positions_without_a_tail_cannot_be_stretched(found):
    with pytest.raises(weights.WeightsError, match=r"positional_embedding is \[16, 64\] there and"):
        positions(found, TEXT_POSITIONS, model__text_length=30)
