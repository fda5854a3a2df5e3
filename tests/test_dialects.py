"""Names and layouts of other programs."""

import json
import pathlib
import re

import golden_model
import numpy as np
import published
import pytest

from itself_jax import dialects

GOLDEN = pathlib.Path(__file__).parent / "golden"


class Shape:
    """An array of which nobody may read the numbers."""

    def __init__(self, shape, dtype="float32"):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def read(self):
        raise AssertionError("mapping reads no array")


class Array(Shape):
    def __init__(self, values):
        super().__init__(values.shape, values.dtype)
        self.values = values

    def read(self):
        return self.values


def only_shapes(shapes):
    return {name: Shape(shape) for name, shape in shapes.items()}


def published_keys():
    return json.loads((GOLDEN / "itself_vitb16_keys.json").read_text())["full_stride16"]


def openai_shapes():
    keys = json.loads((GOLDEN / "openai_clip_vitb16_keys.json").read_text())
    return keys["state_dict"] | keys["openai_only"]


def test_the_tests_state_the_published_layout_as_the_reference_has_it():
    stated = published.shapes(published.VIT_B16)
    keys = published_keys()["state_dict"]
    assert list(stated) == list(keys)
    assert all(list(stated[name]) == shape for name, (shape, _) in keys.items())


def test_every_published_name_is_mapped_and_comes_back_in_order():
    arrays = only_shapes(published.shapes(published.VIT_B16))
    mapped = dialects.read(arrays)
    assert mapped.dialect is dialects.ITSELF and mapped.dropped == {}
    assert len(mapped.arrays) == len(arrays) == 351
    back, left_out = dialects.write(mapped.arrays, dialects.ITSELF)
    assert list(back) == list(arrays) and left_out == {}
    assert all(back[name].shape == arrays[name].shape for name in arrays)


def test_arrays_are_mapped_as_the_goldens_are():
    """Against the other table, that the goldens of the model are read with."""
    with np.load(GOLDEN / "small_s16_state.npz") as file:
        state = {name: file[name] for name in file.files}
    mapped = dialects.read({name: Array(values) for name, values in state.items()})
    assert len(mapped.arrays) == len(state)
    for name, values in state.items():
        path = golden_model.our_name(name)
        (found,) = (full for full, names in mapped.names.items() if names == (name,))
        assert found.partition("/")[2] == path
        expected = golden_model.our_array(name, values)
        np.testing.assert_array_equal(mapped.arrays[found].read(), expected)
        assert mapped.arrays[found].shape == expected.shape
        statistic = re.search(r"/(unused_norm_)?(mean|var|batches)$", path)
        assert found.startswith("batch_stats/" if statistic else "params/")


def test_arrays_come_back_bit_for_bit():
    state = published.state()
    mapped = dialects.read({name: Array(values) for name, values in state.items()})
    back, _ = dialects.write(mapped.arrays, dialects.ITSELF)
    assert list(back) == list(state)
    for name, values in state.items():
        np.testing.assert_array_equal(back[name].read(), values)


def test_openai_names_and_constants():
    arrays = only_shapes(openai_shapes())
    mapped = dialects.read(arrays)
    assert mapped.dialect is dialects.OPENAI and len(mapped.arrays) == 301
    assert set(mapped.dropped) == {
        "logit_scale",
        "input_resolution",
        "context_length",
        "vocab_size",
    }
    back, _ = dialects.write(mapped.arrays, dialects.OPENAI)
    assert list(back) == [name for name in arrays if name not in mapped.dropped]


def test_openai_layout_leaves_out_what_clip_does_not_have():
    mapped = dialects.read(only_shapes(published.shapes(published.TINY)))
    back, left_out = dialects.write(mapped.arrays, dialects.OPENAI)
    assert len(back) + len(left_out) == len(mapped.arrays)
    assert all(not name.startswith("base_model.") for name in back)
    assert {name.split("/")[1] for name in left_out} == {
        *("image_grab", "text_grab", "global_heads", "local_heads")
    }


def test_types_of_the_published_file():
    half = {
        name for name, (_, dtype) in published_keys()["state_dict"].items() if dtype == "float16"
    }
    names = published.shapes(published.VIT_B16)
    assert {name for name in names if dialects.HALF.fullmatch(name)} == half


def test_query_key_and_value_are_joined_in_this_order():
    rng = np.random.default_rng(0)
    stem = "vision_model.encoder.layers.0.self_attn"
    parts = {p: rng.normal(size=(4, 4)).astype(np.float32) for p in "vqk"}  # a file's order is free
    arrays = {f"{stem}.{p}_proj.weight": Array(values) for p, values in parts.items()}
    arrays |= only_shapes({name: (1,) for name in dialects.DIALECTS[3].signature})
    mapped = dialects.read(arrays)
    path = "params/image_encoder/transformer/layer_0/attention/in_proj/kernel"
    expected = np.concatenate([parts[p].T for p in "qkv"], axis=1)
    np.testing.assert_array_equal(mapped.arrays[path].read(), expected)
    assert mapped.arrays[path].shape == expected.shape
    assert mapped.names[path] == tuple(f"{stem}.{p}_proj.weight" for p in "qkv")


def test_a_lone_query_is_an_error_naming_the_missing_parts():
    stem = "text_model.encoder.layers.1.self_attn"
    arrays = only_shapes({name: (1,) for name in dialects.DIALECTS[3].signature})
    arrays[f"{stem}.q_proj.bias"] = Shape((4,))
    with pytest.raises(
        dialects.DialectError, match=rf"{stem}.k_proj.bias, {stem}.v_proj.bias miss"
    ):
        dialects.read(arrays)


def test_unknown_names_are_listed_at_once_with_their_shapes():
    shapes = published.shapes(published.TINY)
    shapes |= {"base_model.visual.adapter.weight": (3, 4), "momentum": ()}
    shapes["base_model.visual.transformer.resblocks.07.ln_1.weight"] = (64,)
    with pytest.raises(dialects.DialectError) as caught:
        dialects.read(only_shapes(shapes))
    for part in ("base_model.visual.adapter.weight [3, 4]", "momentum []", "resblocks.07.ln_1"):
        assert part in str(caught.value)


def test_arrays_of_no_known_model_are_refused_showing_some():
    with pytest.raises(
        dialects.DialectError, match=r"its 1 arrays \(conv\.weight\) are those of no"
    ):
        dialects.read(only_shapes({"conv.weight": (3, 3)}))


def clip_part():
    shapes = published.shapes(published.TINY, local=False)
    return {name: shape for name, shape in shapes.items() if name.startswith("base_model.")}


@pytest.mark.parametrize(
    "name, others, reason",
    [
        (
            "IRRA",
            (
                "classifier.weight",
                "cross_attn.in_proj_weight",
                "mlm_head.fc.weight",
                "ln_post.bias",
            ),
            "no class for mismatched pairs",
        ),
        (
            "RDE",
            ("visul_emb_layer.fc.weight", "texual_emb_layer.mlp.bns.0.running_var"),
            "pooled in another way",
        ),
    ],
)
def test_the_global_part_of_neighbouring_methods(name, others, reason):
    shapes = clip_part() | dict.fromkeys(others, (2,))
    mapped = dialects.read(only_shapes(shapes))
    assert mapped.dialect.name == name
    assert set(mapped.dropped) == set(others)
    assert any(reason in why for why in mapped.dropped.values())
    assert len(mapped.arrays) == len(clip_part())


def test_half_of_the_heads_of_itself_make_no_file_of_rde():
    names = published.shapes(published.TINY)
    half = {name: shape for name, shape in names.items() if not name.startswith("mlp_")}
    with pytest.raises(dialects.DialectError, match=r"classifier_id_grab\.weight"):
        dialects.read(only_shapes(half))


def test_custom_text_towers_of_open_clip():
    shapes = {name.removeprefix("base_model."): shape for name, shape in clip_part().items()}
    text = {f"text.{n}": s for n, s in shapes.items() if not n.startswith("visual.")}
    custom = {n: s for n, s in shapes.items() if n.startswith("visual.")} | text
    mapped = dialects.read(only_shapes(custom))
    plain = dialects.read(only_shapes(shapes))
    assert mapped.arrays.keys() == plain.arrays.keys()
    assert (mapped.dialect.activation, plain.dialect.activation) == ("gelu", "quick_gelu")


def test_a_part_of_the_model_is_absent_as_a_whole_or_not_at_all():
    name = "params/image_grab/skip/kernel"
    assert dialects.absent_reason(dialects.OPENAI, name, []) == "the file has no local branch"
    assert dialects.absent_reason(dialects.OPENAI, name, ["params/text_grab/skip/bias"]) is None
    assert dialects.absent_reason(dialects.ITSELF, "params/global_heads/pair_mlp/bias", []) is None
    assert dialects.absent_reason(dialects.OPENAI, "params/image_encoder/projection", []) is None


# transformers and open_clip leave out what equals these.
HF_DEFAULTS = {
    "model.patch_size": 32,
    "model.vision_width": 768,
    "model.vision_depth": 12,
    "model.vision_heads": 12,
    "model.text_width": 512,
    "model.text_depth": 12,
    "model.text_heads": 8,
    "model.vocab_size": 49408,
    "model.embed_dim": 512,
    "model.activation": "quick_gelu",
}
OPEN_CLIP_DEFAULTS = HF_DEFAULTS | {"model.patch_size": 16, "model.activation": "gelu"}


def said(settings):
    found = dialects.stated(settings)
    assert found.objection is None
    return found.values


def test_what_json_beside_a_model_says():
    both = {"hidden_act": "gelu", "num_attention_heads": 3}
    hugging_face = {"vision_config": both, "text_config": {"hidden_act": "gelu"}}
    assert said(hugging_face) == HF_DEFAULTS | {
        "model.vision_heads": 3,
        "model.activation": "gelu",
    }
    old = {"vision_config": {}, "vision_config_dict": {"hidden_size": 1024, "patch_size": 14}}
    assert said(old | {"projection_dim": 768, "text_config_dict": None}) == HF_DEFAULTS | {
        "model.vision_width": 1024,
        "model.patch_size": 14,
        "model.embed_dim": 768,
    }
    model = {"embed_dim": 9, "vision_cfg": {"width": 1024, "layers": 2}, "text_cfg": {"heads": 5}}
    assert said({"model_cfg": model}) == OPEN_CLIP_DEFAULTS | {
        "model.vision_width": 1024,
        "model.vision_depth": 2,
        "model.vision_heads": 16,
        "model.text_heads": 5,
        "model.embed_dim": 9,
    }
    assert said({"model_cfg": model | {"quick_gelu": True}})["model.activation"] == "quick_gelu"
    for other in ({"model_type": "bert"}, {"model_cfg": 3}, {"config": {"model": {}}}):
        assert dialects.stated(other) is None


def test_open_clip_may_say_its_defaults_and_that_its_text_tower_is_custom():
    model = {
        "embed_dim": 512,
        "custom_text": True,
        "init_logit_scale": 2.0,
        "vision_cfg": {"pool_type": "tok", "mlp_ratio": 4.0, "timm_model_name": None},
        "text_cfg": {"pool_type": "argmax", "proj_type": "linear", "no_causal_mask": False},
    }
    assert said({"model_cfg": model}) == OPEN_CLIP_DEFAULTS


@pytest.mark.parametrize(
    "config, message",
    [
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act=gelu, quick_gelu"),
        ({"vision_config": {"num_attention_heads": True}}, "that vision has True heads"),
        ({"text_config": {"num_attention_heads": "8"}}, "that text has '8' heads"),
        ({"model_cfg": {"text_cfg": {"heads": 0}}}, "that text has 0 heads"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "vision_config.layer_norm_eps=1e-06"),
        ({"model_cfg": {"vision_cfg": {"timm_model_name": "vit"}}}, "timm_model_name"),
        ({"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}, "pool_type"),
        ({"model_cfg": {"vision_cfg": {"head_width": 0}}}, "vision_cfg.head_width=0"),
        ({"model_cfg": {"text_cfg": {"hf_model_name": "roberta"}}}, "hf_model_name"),
        ({"model_cfg": {"text_cfg": {"no_causal_mask": True}}}, "no_causal_mask"),
        ({"model_cfg": {"init_logit_bias": -10}}, "init_logit_bias"),
    ],
)
def test_models_that_are_computed_otherwise_are_objected_to(config, message):
    assert message in dialects.stated(config).objection
