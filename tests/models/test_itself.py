"""The whole model against the reference's numbers, and what its two modes select with."""

import json
import re

import flax.linen as nn
import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import config as config_lib
from itself_jax import losses, optim, step
from itself_jax.models import itself

GOLDEN = golden_model.load("golden_f32_mixed_s16.npz")
ALL_CONFIGS = (*golden_model.CONFIGS, "only_global")
# These biases sit before a BatchNorm, which removes them: their true gradient is zero.
NO_EFFECT = re.compile(r".*_emb_layer\.mlp\.layers\.0\.bias")


def golden(config: str, name: str) -> np.ndarray:
    return GOLDEN[f"stable/{config}/{name}"]


def branches(config: str) -> tuple[str, ...]:
    return ("global",) if config == "only_global" else ("global", "grab")


def param_names(config: str) -> list[str]:
    key = "param_names_only_global" if config == "only_global" else "param_names"
    return [str(name) for name in GOLDEN[key]]


def assert_selected_tokens(run: golden_model.Run, config: str) -> None:
    for side, bank in (("image", run.image.bank), ("text", run.text.bank)):
        expected = golden(config, f"topk_{side}")
        k = int(golden(config, f"k_{side}").item())
        assert bank.kept.sum() == k == expected.shape[1]
        np.testing.assert_array_equal(
            np.sort(bank.indices[:, :k], axis=1), np.sort(expected, axis=1)
        )
        assert bank.kept[:k].all()


@pytest.mark.parametrize("config", golden_model.CONFIGS)
def test_selected_tokens_are_the_references(config):
    assert_selected_tokens(golden_model.golden_run(config), config)


@pytest.mark.parametrize("config", golden_model.CONFIGS)
def test_local_embeddings_in_training_are_the_references(config):
    run = golden_model.golden_run(config)
    golden_model.assert_close(run.image.embedding.local, golden(config, "grab_image"), 3e-5)
    golden_model.assert_close(run.text.embedding.local, golden(config, "grab_text"), 3e-5)


def assert_losses(loss: step.Loss, config: str) -> None:
    cids = {"global": "closs1_cid_global", "grab": "closs2_cid_grab"}
    assert len(loss.branches) == len(branches(config))
    for branch, name in zip(loss.branches, branches(config), strict=True):
        golden_model.assert_close(branch.tal, golden(config, f"tal_{name}"), 5e-6, "TAL")
        golden_model.assert_close(branch.cid, golden(config, cids[name]), 5e-6, "CID")
        ids = golden(config, f"id_{name}_image") + golden(config, f"id_{name}_text")
        golden_model.assert_close(branch.id, ids, 5e-6, "ID")
    golden_model.assert_close(loss.total, golden(config, "total_loss"), 5e-6, "total")


@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_every_loss_term_is_the_references(config):
    assert_losses(golden_model.golden_run(config).loss, config)


def assert_gradient_norms(run: golden_model.Run, config: str) -> None:
    gradients = golden_model.flat(run.gradients)
    names = param_names(config)
    assert set(gradients) == {golden_model.our_name(name) for name in names}
    squares = 0.0
    worst = ("", 0.0)
    for name, expected in zip(names, golden(config, "grad/norms"), strict=True):
        ours = gradients[golden_model.our_name(name)].astype(np.float64)
        norm = np.sqrt(np.square(ours).sum())
        squares += norm**2
        if np.isnan(expected):  # the reference gives this parameter no gradient at all
            assert norm == 0, name
        elif NO_EFFECT.fullmatch(name):
            assert norm < 1e-5, name
        else:
            worst = max(worst, (name, abs(norm - expected) / expected), key=lambda x: x[1])
    assert worst[1] <= 1e-4, f"{worst[0]}: {worst[1]:.1e}"
    golden_model.assert_close(np.sqrt(squares), golden(config, "grad/global_norm"), 1e-5)


@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_gradient_norm_of_every_parameter_is_the_references(config):
    assert_gradient_norms(golden_model.golden_run(config), config)


@pytest.mark.parametrize("config", ("custom_s1", "sl", "only_global", "mean_none"))
def test_full_gradients_are_the_references(config):
    gradients = golden_model.flat(golden_model.golden_run(config).gradients)
    prefix = f"stable/{config}/grad/full/"
    names = [key.removeprefix(prefix) for key in GOLDEN if key.startswith(prefix)]
    assert len(names) == (9 if config == "only_global" else 13)
    for name in names:
        expected = golden_model.our_array(name, GOLDEN[prefix + name])
        golden_model.assert_close(gradients[golden_model.our_name(name)], expected, 1e-4, name)


def test_parameters_without_gradient_are_those_that_the_optimiser_leaves_alone():
    names = param_names("custom_s1")
    norms = golden("custom_s1", "grad/norms")
    without = {golden_model.our_name(n) for n, x in zip(names, norms, strict=True) if np.isnan(x)}
    groups = optim.groups(golden_model.variables()["params"], config_lib.Optim())
    untrained = {path for path, trained in golden_model.flat(groups.trained).items() if not trained}
    assert without == untrained
    assert len(without) == 6


@pytest.mark.parametrize("config", golden_model.CONFIGS)
def test_batch_norm_statistics_after_one_step_are_the_references(config):
    before = golden_model.flat(golden_model.variables()["batch_stats"])
    after = golden_model.flat(golden_model.golden_run(config).loss.batch_stats)
    prefix = f"stable/{config}/bn_after/"
    names = [key.removeprefix(prefix) for key in GOLDEN if key.startswith(prefix)]
    assert len(names) == 6
    for name in names:
        path = golden_model.our_name(name)
        golden_model.assert_close(after[path], GOLDEN[prefix + name], 1e-5, path)
        assert not np.array_equal(after[path], before[path])
    unused = [path for path in after if "unused" in path]
    assert len(unused) == 6
    for path in unused:
        np.testing.assert_array_equal(after[path], before[path])


def pair_logits_and_features(heads, first, second) -> tuple[jax.Array, jax.Array]:
    """`pair_logits`, and what its classifier is given there: the output of the pair MLP."""
    seen = []

    def listen(call, args, kwargs, context):
        if context.module.name == "pair_classifier":
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(listen):
        logits = heads.pair_logits(first, second)
    (features,) = seen
    return logits, features


@pytest.mark.parametrize(
    "config, branch",
    [
        (config, branch)
        for config in ("custom_s725", "custom_s1", "sl", "mean_none", "only_global")
        for branch in branches(config)
    ],
)
def test_logits_of_pairs_and_identities_are_the_references(config, branch):
    """`pair_logits` and `identity_logits` on the reference's pairs, both orders."""
    run = golden_model.golden_run(config)
    side = 0 if branch == "global" else 1
    image, text = (jnp.asarray(x.embedding[side]) for x in (run.image, run.text))
    width = image.shape[1]
    heads = itself.IdentityHeads(golden_model.NUM_IDENTITIES + 1, width)
    params = golden_model.variables()["params"]["global_heads" if side == 0 else "local_heads"]
    bound = heads.bind({"params": params})
    for name, embedding in (("image", image), ("text", text)):
        logits = bound.identity_logits(embedding)
        golden_model.assert_close(logits, golden(config, f"id_logits_{name}_{branch}"), 3e-5)
    # Pairs of the reference by i: (v_i, t_i), (v_neg, t_i), (v_i, t_neg).
    visual, textual = (golden(config, f"neg_{s}_{branch}") for s in ("visual", "text"))
    i = np.arange(len(image))
    images = image[np.stack([i, visual, i], axis=1).ravel()]
    texts = text[np.stack([i, i, textual], axis=1).ravel()]
    forward, features = pair_logits_and_features(bound, images, texts)
    backward = bound.pair_logits(texts, images)
    golden_model.assert_close(forward, golden(config, f"cid_logits1_{branch}"), 3e-5)
    golden_model.assert_close(backward, golden(config, f"cid_logits2_{branch}"), 3e-5)
    if config in ("custom_s1", "sl", "only_global"):
        golden_model.assert_close(features, golden(config, f"cid_z1_{branch}"), 3e-5)


def test_model_without_the_local_branch_has_exactly_the_references_parameters():
    """309 of the 339, every one with a gradient, and no statistics."""
    names = param_names("only_global")
    images, ids, _ = golden_model.batch().values()
    created = jax.eval_shape(golden_model.build(enabled=False).init, jax.random.key(0), images, ids)
    assert set(created) == {"params"}
    leaves, _ = jax.tree_util.tree_flatten_with_path(created["params"])
    shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    with np.load(golden_model.FOLDER / "small_s16_state.npz") as state:
        expected = {
            golden_model.our_name(name): golden_model.our_array(name, state[name]).shape
            for name in names
        }
    assert len(names) == 309
    assert shapes == expected
    assert not np.isnan(golden("only_global", "grad/norms")).any()
    run = golden_model.golden_run("only_global")
    assert run.image.embedding.local is run.text.embedding.local is None
    assert run.image.bank is run.text.bank is None
    assert run.loss.batch_stats == {}


def test_hard_negatives_without_the_local_branch_are_the_references():
    run = golden_model.golden_run("only_global")
    image, text = (jnp.asarray(x.embedding.global_) for x in (run.image, run.text))
    negatives = losses.hard_negatives(image, text, jnp.asarray(golden_model.batch()["pids"]))
    np.testing.assert_array_equal(negatives.image, golden("only_global", "neg_visual_global"))
    np.testing.assert_array_equal(negatives.text, golden("only_global", "neg_text_global"))


def test_default_settings_alone_select_and_cost_what_the_reference_does():
    """Nothing of the saliency is replaced: `Local()` itself must lead to MARS and the ATS."""
    run = golden_model.plain_pass(
        golden_model.build(), golden_model.variables(), golden_model.limits(725), backward=False
    )
    assert_selected_tokens(run, "custom_s725")
    assert_losses(run.loss, "custom_s725")


@pytest.mark.slow
def test_default_settings_alone_have_the_references_gradients():
    run = golden_model.plain_pass(
        golden_model.build(), golden_model.variables(), golden_model.limits(725)
    )
    assert_selected_tokens(run, "custom_s725")
    assert_losses(run.loss, "custom_s725")
    assert_gradient_norms(run, "custom_s725")


def test_inference_embeddings_are_the_references():
    """Global features, and GRAB on the running statistics fed by the last layer at ratio 0.4."""
    image, text = golden_model.features().encoded["last"]
    golden_model.assert_close(image.embedding.global_, GOLDEN["feat/encode_image"], 2e-5)
    golden_model.assert_close(text.embedding.global_, GOLDEN["feat/encode_text"], 2e-5)
    for side, encoded in (("image", image), ("text", text)):
        for mode in ("stable", "native"):
            expected = GOLDEN[f"feat/encode_{side}_grab_eval/{mode}"]
            golden_model.assert_close(encoded.embedding.local, expected, 3e-5, side)


def test_inference_may_select_with_mars_instead():
    encoded = golden_model.features().encoded
    for i, side in enumerate(("image", "text")):
        expected = GOLDEN[f"feat/grab_eval_on_custom_{side}/stable"]
        golden_model.assert_close(encoded["mars"][i].embedding.local, expected, 3e-5, side)
        last = encoded["last"][i].embedding.local
        assert golden_model.error(last, expected) > 1e-3, "the sources must differ here"


@pytest.mark.parametrize("source", ("last", "layer:0", "mars", "mean", "std"))
def test_captions_cut_to_the_shorter_length_have_the_same_embeddings_and_words(source):
    model = golden_model.build(inference_saliency=source)
    length, whole = itself.caption_lengths(model.model, model.local)
    assert whole == model.model.text_length and 8 < length < whole
    random = np.random.default_rng(0)
    ids = np.zeros((length - 1, whole), np.int32)
    end = model.model.vocab_size - 1
    for words, row in enumerate(ids):  # none at all, up to as many as fit
        row[: words + 2] = [end - 1, *random.integers(0, end - 1, words), end]

    @jax.jit
    def encode(variables, ids):
        return model.apply(variables, ids, method="encode_text")

    variables = golden_model.variables()
    short, long = encode(variables, ids[:, :length]), encode(variables, ids)
    for name in ("global_", "local"):
        ours, expected = (getattr(x.embedding, name) for x in (short, long))
        golden_model.assert_close(ours, expected, 2e-6, name)
    np.testing.assert_array_equal(short.bank.valid, long.bank.valid)
    kept = np.asarray(long.bank.valid)
    np.testing.assert_array_equal(short.bank.indices[kept], long.bank.indices[kept])


@pytest.mark.parametrize(
    "changes, lengths",
    (
        ({}, (40, 77)),
        ({"local.ratio": 0.6}, (47, 77)),  # 45 rows of the bank, SOT and EOT
        ({"local.ratio": 1.0}, (77,)),
        ({"local.ratio": 1.0, "local.enabled": False}, (40, 77)),
        ({"model.text_length": 248, "local.ratio": 0.2}, (128, 248)),
        ({"local.inference_saliency": "mars", "local.mars_discard": 0.48}, (40, 77)),
        # It takes more than the zeros of the future: which entries, depends on the length.
        ({"local.inference_saliency": "mars", "local.mars_discard": 0.495}, (77,)),
        ({"local.mars_discard": 0.495}, (40, 77)),  # in training alone
    ),
)
def test_captions_are_cut_only_where_that_changes_nothing(changes, lengths):
    config = config_lib.replace(config_lib.Config(), changes)
    assert itself.caption_lengths(config.model, config.local) == lengths


@pytest.mark.parametrize("part", ("full_stride16", "full_stride12", "only_global_stride16"))
def test_full_size_model_has_exactly_the_published_tensors(part):
    published = json.loads((golden_model.FOLDER / "itself_vitb16_keys.json").read_text())
    shapes = {name: shape for name, (shape, _) in published["full_stride16"]["state_dict"].items()}
    settings = config_lib.Model()
    if part == "full_stride12":
        changed = published[part]["state_dict"]
        shapes |= {name: shape for name, (shape, _) in changed.items()}
        settings = config_lib.Model(stride=12)
    local = part != "only_global_stride16"
    if not local:
        shapes = {n: s for n, s in shapes.items() if "emb_layer" not in n and "grab" not in n}
    assert len(shapes) == published[part]["num_keys"]
    expected = {}
    for name, shape in shapes.items():
        empty = np.broadcast_to(np.float16(0), shape)  # takes no memory
        expected[golden_model.our_name(name)] = golden_model.our_array(name, empty).shape

    model = itself.ITSELF(settings, config_lib.Local(enabled=local), num_identities=11003)
    images = jax.ShapeDtypeStruct((2, 384, 128, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    created = jax.eval_shape(model.init, jax.random.key(0), images, ids)
    ours = {}
    for collection in created.values():
        leaves, _ = jax.tree_util.tree_flatten_with_path(collection)
        ours |= {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    assert ours == expected
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(created["params"]))
    assert count == round(published[part]["params_M"] * 1e6)
