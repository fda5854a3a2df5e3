"""The one door for settings: what it accepts, what it refuses, and what it says."""

import dataclasses
import re

import ml_collections
import pytest

from itself_jax import config as config_lib
from tests import tiny


def given(key: str, value) -> config_lib.Config:
    """The configuration with one key, such as "local.ratio", changed."""
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return config_lib.from_dict(nested)


def value_of(config, key: str):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_nothing_given_is_the_published_setting():
    assert config_lib.from_dict({}) == config_lib.Config()


def test_default_is_a_config_dict_that_comes_back_unchanged():
    settings = config_lib.default()
    assert isinstance(settings, ml_collections.ConfigDict)
    assert config_lib.from_dict(settings) == config_lib.Config()


def test_a_changed_config_dict_and_its_json_form_come_back():
    settings = config_lib.default()
    settings.model.stride = 12
    settings.local.mars_layers = (2, 7)
    settings.eval_datasets = ("icfg_pedes", "rstp_reid")
    config = config_lib.from_dict(settings)
    assert (config.model.stride, config.local.mars_layers) == (12, (2, 7))
    plain = config_lib.to_dict(config)
    assert plain["local"]["mars_layers"] == [2, 7]
    assert config_lib.from_dict(plain) == config


def test_published_numbers():
    config = config_lib.Config()
    assert config.model.grid == (24, 8)
    assert (config.loss.temperature, config.loss.margin) == (0.015, 0.1)
    assert (config.local.ratio_start, config.local.ratio_end, config.local.ratio) == (
        0.65,
        0.5,
        0.4,
    )
    assert config.local.ats_horizon_steps == 1450
    assert (config.local.mars_layers, config.local.mars_discard) == (None, 0.25)
    optim = config_lib.Optim(1e-5, 1e-3, 1e-3, 4e-5)
    assert config.optim == optim
    assert (config.batch_size, config.num_instances) == (256, 2)
    assert (config.num_epochs, config.warmup_epochs) == (60, 5)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_lib.Config().model.stride = 12


@pytest.mark.parametrize(
    "key, near",
    (
        ("batchsize", "batch_size"),
        ("local.salience", "local.saliency"),
        ("model.strid", "model.stride"),
        ("optim.lerning_rate", "optim.learning_rate"),
        ("mars_discard", "local.mars_discard"),
    ),
)
def test_an_unknown_key_dies_with_the_nearest_known_one(key, near):
    message = f"config key {key!r} does not exist. Did you mean {near!r}?"
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        given(key, 1)


def test_an_unknown_key_like_no_other_points_to_the_list():
    with pytest.raises(config_lib.ConfigError, match="'xyzzy' does not exist. See itself_jax/conf"):
        given("xyzzy", 1)


@pytest.mark.parametrize(
    "key, value, expected",
    (
        ("batch_size", "12", 12),
        ("local.ats_horizon_steps", "10ep", "10ep"),
        ("local.ats_horizon_steps", 1450, 1450),
        ("model.image_size", "(96, 32)", (96, 32)),
        ("model.image_size", [96, 32], (96, 32)),
        ("local.mars_layers", "(2, 5, 11)", (2, 5, 11)),
        ("local.mars_layers", "None", None),
        ("local.mars_layers", (3,), (3,)),
        ("model.stride", "None", None),
        ("model.stride", "12", 12),
        ("precision", "None", None),
        ("precision", "bfloat16", "bfloat16"),
        ("eval.alpha", "0.68", 0.68),
        ("eval.alpha", 1, 1.0),
        ("optim.learning_rate", "1e-4", 1e-4),
        ("local.enabled", "False", False),
        ("data_root", "data", "data"),
        ("eval_datasets", "('cuhk_pedes',)", ("cuhk_pedes",)),
        ("eval_datasets", (), ()),
        ("synthetic.identities", (4, 2, 2), (4, 2, 2)),
    ),
)
def test_literals_from_the_command_line_take_the_type_of_their_key(key, value, expected):
    actual = value_of(given(key, value), key)
    assert actual == expected
    assert type(actual) is type(expected)


@pytest.mark.parametrize(
    "key, value, expected",
    (
        ("batch_size", 2.5, "int"),
        ("batch_size", True, "int"),
        ("batch_size", None, "int"),
        ("batch_size", "many", "int"),
        ("local.enabled", 1, "bool"),
        ("local.ratio", "half", "float"),
        ("local.ratio", True, "float"),
        ("model.stride", 1.5, "int or None"),
        ("model.image_size", (96,), "tuple[int, int]"),
        ("model.image_size", (96.0, 32), "tuple[int, int]"),
        ("local.mars_layers", 4, "tuple[int, …] or None"),
        ("local.saliency", 5, "str"),
        ("eval.alpha", "best", "float or None"),
    ),
)
def test_a_wrong_type_says_what_came_and_what_is_expected(key, value, expected):
    message = f"config.{key}={value!r} has the wrong type: expected {expected}."
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        given(key, value)


def test_a_group_is_not_a_value():
    with pytest.raises(config_lib.ConfigError, match="config.model is a group of keys, not 3"):
        given("model", 3)


OUT_OF_RANGE = (
    ("dataset", "cuhk", "must be one of"),
    ("eval_datasets", ("cuhk",), "must be one of"),
    ("precision", "float16", "must be one of"),
    ("sharding", "zero", "must be one of"),
    ("remat", "some", "must be one of"),
    ("micro_batches", 0, "must be positive"),
    ("mesh.model", 0, "must be positive"),
    ("freeze_layers", 13, "must lie in 0..12"),
    ("freeze_layers", -2, "must lie in 0..12"),
    ("distributed.timeout_s", 0, "must be positive"),
    ("model.activation", "relu", "must be one of"),
    ("loss.mismatch_label", "none", "must be one of"),
    ("eval.protocol", "test", "must be one of"),
    ("eval.captions", "two", "must be one of"),
    ("model.patch_size", 0, "must be positive"),
    ("model.vision_width", -1, "must be positive"),
    ("model.vision_depth", 0, "must be positive"),
    ("model.text_heads", 0, "must be positive"),
    ("model.embed_dim", 0, "must be positive"),
    ("local.dim", 0, "must be positive"),
    ("loss.temperature", 0.0, "must be positive"),
    ("loss.temperature", float("inf"), "must be positive"),
    ("loss.temperature", float("nan"), "must be positive"),
    ("optim.learning_rate", 0.0, "must be positive"),
    ("optim.eps", 0.0, "must be positive"),
    ("batch_size", 0, "must be positive"),
    ("num_instances", 0, "must be positive"),
    ("num_epochs", 0, "must be positive"),
    ("log_every", 0, "must be positive"),
    ("eval.batch_size", 0, "must be positive"),
    ("eval.chunk_mb", 0, "must be positive"),
    ("synthetic.images_per_identity", 0, "must be positive"),
    ("synthetic.identities", (4, 0, 2), "must be positive"),
    ("synthetic.named", (0, 3), "from 1 on"),
    ("synthetic.named", (4, 2), "from 1 on"),
    ("seed", -1, "must be zero or more"),
    ("num_workers", -1, "must be zero or more"),
    ("augment.pad", -1, "must be zero or more"),
    ("warmup_epochs", -1, "must be zero or more"),
    ("optim.weight_decay", -1e-5, "must be zero or more"),
    ("loss.margin", -0.1, "must be zero or more"),
    ("mesh.data", 0, "must be positive, or -1 for all devices"),
    ("mesh.data", -2, "must be positive, or -1 for all devices"),
    ("eval.alpha", 1.01, "must lie in [0, 1]"),
    ("eval.alpha", -0.01, "must lie in [0, 1]"),
    ("model.stride", 0, "must be positive, or None for the patch size"),
    ("model.image_size", (0, 32), "must be positive (height, width)"),
    ("model.image_size", (384, 15), "leaves no patch of 16 pixels"),
    ("model.stride", 400, "leaves fewer than two patches"),
    ("model.image_size", (16, 16), "leaves fewer than two patches"),
    ("model.vision_heads", 7, "must divide the width 768"),
    ("model.text_heads", 7, "must divide the width 512"),
    ("model.text_length", 3, "must be 4..248"),
    ("model.text_length", 249, "must be 4..248"),
    ("model.vocab_size", 3, "must be at least 4"),
    ("local.dim", 7, "must be even"),
    ("batch_size", 255, "must be divisible by num_instances=2"),
    ("batch_size", 2, "must hold at least two identities"),
    ("num_epochs", 5, "must exceed warmup_epochs=5"),
    ("last_epoch", 0, "must lie in 1..num_epochs=60"),
    ("last_epoch", 61, "must lie in 1..num_epochs=60"),
    ("train_on_all", True, "only icfg_pedes, jsonl may have no val of their own"),
    ("local.ratio", 0.0, "must lie in (0, 1]"),
    ("local.ratio_start", 1.1, "must lie in (0, 1]"),
    ("local.ratio_end", -0.5, "must lie in (0, 1]"),
    ("local.ratio", 0.001, "keeps no token of a picture with 192 tokens"),
    ("local.mars_discard", 1.0, "must lie in [0, 1)"),
    ("local.mars_discard", -0.1, "must lie in [0, 1)"),
    ("local.ats_horizon_steps", 0, "must be a positive number of steps"),
    ("local.ats_horizon_steps", "0ep", "must be a positive number of steps"),
    ("local.ats_horizon_steps", "ten", "must be a positive number of steps"),
    ("local.mars_layers", (4, 12), "layer 12 does not exist, the encoders have layers 0..11"),
    ("local.mars_layers", (-1, 4), "layer -1 does not exist"),
    ("local.mars_layers", (), "names no layer"),
    ("local.mars_layers", (11, 4), "must be strictly increasing"),
    ("local.mars_layers", (4, 4), "must be strictly increasing"),
    ("local.saliency", "layer:12", "layer"),
    ("local.inference_saliency", "layer:99", "layer"),
    ("local.saliency", "marz", "'mars'"),
    ("local.inference_saliency", "lst", "'last'"),
)


@pytest.mark.parametrize("key, value, message", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(key, value, message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)) as error:
        given(key, value)
    assert f"config.{key}" in str(error.value) or key == "local.ratio"


def test_training_on_all_identities_needs_a_fusion_weight_from_elsewhere():
    settings = {"dataset": "icfg_pedes", "train_on_all": True}
    with pytest.raises(config_lib.ConfigError, match="eval.alpha=None: must be given"):
        config_lib.from_dict(settings)
    assert config_lib.from_dict({**settings, "eval": {"alpha": 0.3}}).train_on_all
    assert config_lib.from_dict({**settings, "local": {"enabled": False}}).train_on_all


def test_bounds_themselves_are_allowed():
    for key, value in (
        ("last_epoch", 1),
        ("last_epoch", 60),
        ("model.text_length", 248),
        ("eval.alpha", 0.0),
        ("eval.alpha", 1.0),
        ("local.mars_discard", 0.0),
        ("local.ratio_start", 1.0),
        ("local.saliency", "layer:11"),
        ("local.mars_layers", (0, 11)),
        ("batch_size", 4),
        ("num_epochs", 6),
        ("model.text_length", 8),
    ):
        assert value_of(given(key, value), key) == value


def test_a_layer_that_one_tower_lacks_is_refused():
    with pytest.raises(config_lib.ConfigError, match="layer"):
        config_lib.from_dict({"model": {"text_depth": 6}, "local": {"mars_layers": (4, 11)}})


def test_differences_name_each_changed_key_with_both_values():
    old = config_lib.to_dict(config_lib.Config())
    new = config_lib.from_dict({"seed": 3, "local": {"mars_layers": (2, 5)}})
    assert config_lib.differences(old, new) == {
        "local.mars_layers": (None, [2, 5]),
        "seed": (0, 3),
    }
    assert config_lib.differences(config_lib.to_dict(new), new) == {}


def test_differences_show_keys_that_only_one_side_has():
    old = config_lib.to_dict(config_lib.Config())
    old["retired"] = 1
    del old["seed"]
    assert config_lib.differences(old, config_lib.Config()) == {
        "seed": (None, 0),
        "retired": (1, None),
    }


def test_flatten_joins_names_with_dots():
    assert config_lib.flatten({"a": 1, "b": {"c": (1, 2), "d": {"e": None}}}) == {
        "a": 1,
        "b.c": [1, 2],
        "b.d.e": None,
    }


@pytest.mark.parametrize(
    "size, patch, stride, grid",
    (
        ((384, 128), 16, None, (24, 8)),
        ((384, 128), 16, 12, (31, 10)),
        ((384, 128), 32, 32, (12, 4)),
        ((96, 32), 16, 16, (6, 2)),
        ((100, 36), 16, 16, (6, 2)),
    ),
)
def test_grid_counts_whole_patches(size, patch, stride, grid):
    assert config_lib.Model(image_size=size, patch_size=patch, stride=stride).grid == grid


def test_the_embedded_job_starts_from_shipped_weights_or_from_scratch():
    module = tiny.configs("synthetic")
    config = config_lib.from_dict(module.get_config("sl"))
    assert (config.init_from, config.local.saliency) == ("synthetic_clip", "layer:0")
    scratch = config_lib.from_dict(module.get_config("scratch,sl"))
    assert (scratch.init_from, scratch.local.saliency) == (None, "layer:0")
    assert (scratch.model.vision_depth, scratch.num_epochs) == (2, 14)
    with pytest.raises(config_lib.ConfigError, match="'scrach' is unknown"):
        module.get_config("scrach")


def test_the_shipped_weights_are_made_from_other_people():
    here = config_lib.from_dict(tiny.configs("synthetic").get_config())
    there = config_lib.from_dict(tiny.configs("synthetic_pretrain").get_config())
    assert there.synthetic.seed != here.synthetic.seed and there.init_from is None
    assert there.model == here.model and not there.local.enabled


@pytest.mark.parametrize("name", ["synthetic", "cuhk", "icfg", "rstp"])
def test_the_tiny_variant_is_small_for_every_config_and_combines(name):
    module = tiny.configs(name)
    config = config_lib.from_dict(module.get_config("tiny,baseline"))
    assert config.dataset == config_lib.from_dict(module.get_config()).dataset
    assert not config.local.enabled and config.init_from is None
    assert (config.model.vision_depth, config.model.text_depth, config.num_epochs) == (2, 2, 2)
    assert (config.model.vision_width, config.model.vision_heads) == (64, 4)
    single = config_lib.from_dict(module.get_config("sl,tiny"))
    assert single.local.saliency == "layer:0" and single.model.patch_size == 16
    assert module.get_config("vit_b32,tiny").model.patch_size == 32
    overlapping = config_lib.from_dict(module.get_config("stride12,tiny"))
    assert overlapping.model.stride == 12 and overlapping.model.vision_width == 64
