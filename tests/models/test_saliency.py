"""MARS and its rivals, ATS and the banks, against the reference and against worked examples."""

import json

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import config as config_lib
from itself_jax import step
from itself_jax.models import itself, saliency

GOLDEN = golden_model.load("golden_f32_mixed_s16.npz")
UNIT = golden_model.load("golden_unit_f32.npz")
ALL = tuple(range(12))
rollout = jax.jit(saliency.rollout, static_argnums=(1, 2))
discard_lowest = jax.jit(saliency.discard_lowest, static_argnums=1)


def attention_of(side: str) -> dict[int, jax.Array]:
    return {layer: jnp.asarray(GOLDEN[f"feat/attn_{side}"][layer]) for layer in ALL}


def queries(side: str) -> jax.Array:
    return jnp.asarray(getattr(golden_model.features(), side).pool_index)


# --- the fused maps of the reference ---------------------------------------------------------


@pytest.mark.parametrize("side", ("image", "text"))
@pytest.mark.parametrize("name, discard", (("custom", 0.25), ("custom_nodiscard", 0.0)))
def test_full_rollout_is_the_references(side, name, discard):
    fused = rollout(attention_of(side), (4, 11), discard)
    golden_model.assert_close(fused, GOLDEN[f"feat/fuse_{name}/{side}"], 2e-5)


@pytest.mark.parametrize("side", ("image", "text"))
def test_full_rollout_of_our_own_attention_is_the_references(side):
    attention = getattr(golden_model.features(), side).attention
    attention = {layer: jnp.asarray(attention[layer]) for layer in (4, 11)}
    fused = rollout(attention, (4, 11), 0.25)
    golden_model.assert_close(fused, GOLDEN[f"feat/fuse_custom/{side}"], 2e-5)


@pytest.mark.parametrize("side", ("image", "text"))
@pytest.mark.parametrize("name, fused", (("mars", "custom"), ("mean", "mean"), ("std", "std")))
def test_saliency_is_the_query_row_of_the_references_fused_map(side, name, fused):
    attention = getattr(golden_model.features(), side).attention
    attention = {layer: jnp.asarray(a) for layer, a in attention.items()}
    query = queries(side)
    row = saliency.saliency(attention, saliency.parse_source(name, 12), query)
    expected = GOLDEN[f"feat/fuse_{fused}/{side}"][np.arange(8), query]
    golden_model.assert_close(row, expected, 2e-5)


@pytest.mark.parametrize("side", ("image", "text"))
@pytest.mark.parametrize("name", ("mean", "std"))
def test_mean_and_deviation_of_all_rows_are_the_references(side, name):
    """Every row in turn as the query gives the full fused map."""
    attention, source = attention_of(side), saliency.parse_source(name, 12)
    n = attention[0].shape[-1]
    of = jax.jit(lambda i: saliency.saliency(attention, source, jnp.full(8, i)))
    full = np.stack([of(i) for i in range(n)], axis=1)
    golden_model.assert_close(full, GOLDEN[f"feat/fuse_{name}/{side}"], 2e-5)


@pytest.mark.parametrize("name, layer", (("last", 11), ("layer:5", 5), ("layer:0", 0)))
def test_single_layer_saliency_is_that_layers_query_row(name, layer):
    attention, query = attention_of("text"), queries("text")
    row = saliency.saliency(attention, saliency.parse_source(name, 12), query)
    np.testing.assert_array_equal(row, GOLDEN["feat/attn_text"][layer][np.arange(8), query])


@pytest.mark.parametrize("layer", (4, 11))
def test_discarded_entries_are_the_references(layer):
    attention = attention_of("image")[layer]
    kept = np.asarray(discard_lowest(attention, 0.25)) > 0
    np.testing.assert_array_equal(kept, GOLDEN[f"feat/rollout_kept/image_l{layer}"])
    assert GOLDEN["feat/rollout_num_discard/image"] == 42


@pytest.mark.parametrize("layer", (4, 11))
def test_discard_removes_only_causal_zeros_from_a_text_map(layer):
    """2926 of the 77² entries lie above the diagonal; int(77² · 0.25) = 1482 are discarded."""
    attention = attention_of("text")[layer]
    np.testing.assert_array_equal(discard_lowest(attention, 0.25), attention)


@pytest.mark.parametrize(
    "case, layers, discard",
    (
        ("default4", (4, 11), 0.25),
        ("nodiscard4", (4, 11), 0.0),
        ("all_layers4", ALL, 0.25),
        ("skip_odd4", (2, 4, 6, 8, 10), 0.1),
        ("ratio1_4", (4, 11), 1.0),
    ),
)
def test_rollout_options_are_the_references(case, layers, discard):
    maps = UNIT["rollout/attn5"].mean(axis=2)  # over heads, as the model hands them out
    attention = {layer: jnp.asarray(maps[layer]) for layer in layers}
    fused = jax.jit(lambda a: rollout(a, layers, discard))(attention)
    golden_model.assert_close(fused, UNIT[f"rollout/out/{case}"], 2e-5)


def test_rollout_at_half_the_entries_of_all_layers_is_the_references():
    maps = UNIT["rollout/attn5"].mean(axis=2)
    attention = {layer: jnp.asarray(maps[layer]) for layer in ALL}
    fused = jax.jit(lambda a: rollout(a, ALL, 0.5))(attention)
    golden_model.assert_close(fused, UNIT["rollout/out/all_layers_half5"], 2e-5)


def test_rollout_at_full_size_is_the_references():
    maps = UNIT["real193/attn_l4_l11"]
    attention = {4: jnp.asarray(maps[0]), 11: jnp.asarray(maps[1])}
    query = jnp.zeros(1, jnp.int32)
    row = saliency.saliency(attention, saliency.parse_source("mars", 12), query)
    golden_model.assert_close(row, UNIT["real193/cls_row"], 2e-5)
    for layer, zeroed in zip((4, 11), UNIT["real193/num_zeroed_l4_l11"], strict=True):
        dropped = np.asarray(discard_lowest(attention[layer], 0.25)) == 0
        assert dropped.sum() == zeroed == 9312
    for k in (124, 96, 76):
        bank = saliency.image_bank(row, k, k_max=k)
        # The smallest gap between neighbours is 4e-8: sets are compared, not the order.
        assert set(np.asarray(bank.indices[0]).tolist()) == set(
            UNIT[f"real193/topk_k{k}"][0].tolist()
        )


# --- rollout and discard ---------------------------------------------------------------------


def test_rollout_of_two_layers_by_hand():
    """One sample, two tokens, no discard. (A + I)/2 of [[.5, .5], [0, 1]] is [[.75, .25], [0, 1]],
    of [[1, 0], [.5, .5]] it is [[1, 0], [.25, .75]]; the later layer multiplies from the left:
    [[1, 0], [.25, .75]] · [[.75, .25], [0, 1]] = [[.75, .25], [.1875, .8125]]."""
    early = jnp.array([[[0.5, 0.5], [0.0, 1.0]]])
    late = jnp.array([[[1.0, 0.0], [0.5, 0.5]]])
    fused = rollout({0: early, 1: late}, (0, 1), 0.0)
    np.testing.assert_allclose(fused[0], [[0.75, 0.25], [0.1875, 0.8125]], rtol=1e-6)


def test_rows_are_normalised_after_the_discard():
    """int(4 · .5) = 2 lowest of [.9, .1, .3, .7] are .1 and .3: what stays, (A + I)/2, is
    [.95, 0] and [0, .85], and normalised the identity."""
    attention = jnp.array([[[0.9, 0.1], [0.3, 0.7]]])
    fused = rollout({0: attention}, (0,), 0.5)
    np.testing.assert_allclose(fused[0], np.eye(2), rtol=1e-6)


def random_maps(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(seed), shape))


def test_rows_of_a_rollout_sum_to_one():
    attention = {layer: random_maps(layer, (3, 17, 17)) for layer in (1, 2, 5)}
    fused = rollout(attention, (1, 2, 5), 0.25)
    np.testing.assert_allclose(fused.sum(axis=-1), 1, rtol=1e-5)
    assert (np.asarray(fused) >= 0).all()


def test_one_row_of_a_rollout_is_the_row_of_the_full_map():
    attention = {layer: random_maps(layer, (3, 17, 17)) for layer in (1, 5)}
    full = rollout(attention, (1, 5), 0.25)
    query = jnp.array([0, 16, 7])
    rows = jax.nn.one_hot(query, 17)[:, None]
    row = rollout(attention, (1, 5), 0.25, rows)
    golden_model.assert_close(row[:, 0], full[np.arange(3), query], 1e-6)


def sorted_discard(
    attention: np.ndarray, share: float, order: np.ndarray | None = None
) -> np.ndarray:
    """The plain version: a stable sort; among equals the lower flat index goes first.

    `order`, of the same shape, is what is sorted in place of the entries themselves.
    """
    result = []
    for sample, keys in zip(attention, attention if order is None else order, strict=True):
        flat = sample.ravel().copy()
        first = flat[0]
        flat[np.argsort(keys.ravel(), kind="stable")[: int(flat.size * share)]] = 0
        flat[0] = first
        result.append(flat.reshape(sample.shape))
    return np.stack(result)


TINY = np.finfo(np.float32).tiny


def assert_discarded(result: jax.Array, maps: np.ndarray, share: float, name: str = "") -> None:
    """As the plain version does, whether the backend takes denormals for themselves or for 0.

    XLA's CPU arithmetic flushes them unless the compiler drops that arithmetic, so both happen.
    Either way as many entries go as should, and the others keep every bit.
    """
    zeros = np.where(np.abs(maps) < TINY, 0, maps)
    allowed = sorted_discard(maps, share), sorted_discard(maps, share, order=zeros)
    assert any(np.array_equal(result, expected) for expected in allowed), name


def adversarial_maps() -> dict[str, np.ndarray]:
    random = np.asarray(random_maps(0, (4, 13, 13)))
    levels = np.round(np.random.default_rng(0).random((4, 13, 13)) * 4).astype(np.float32) / 4
    lowest_first = random.copy()
    lowest_first[:, 0, 0] = 1e-9
    zeros = np.where(levels > 0.4, 0, random)
    denormal = np.random.default_rng(2).integers(0, 2**23, (4, 13, 13), np.int32).view(np.float32)
    assert (0 < denormal.max() < TINY) and (denormal[:, 0, 0] > 0).all()
    ulps = np.float32(0.5) + np.arange(169, dtype=np.float32) * np.float32(2**-24)
    return {
        "random": random,
        "ties": levels,
        "all equal": np.full((2, 13, 13), 0.25, np.float32),
        "all zero": np.zeros((2, 13, 13), np.float32),
        "many zeros": zeros.astype(np.float32),
        "flat index 0 among the lowest": lowest_first,
        "all zero but flat index 0": np.zeros((1, 13, 13), np.float32)
        + (np.arange(169) == 0).reshape(1, 13, 13).astype(np.float32),
        "neighbouring floats": np.random.default_rng(1).permutation(ulps).reshape(1, 13, 13),
        "tiny": (random * np.float32(1e-37)).astype(np.float32),
        "denormal": denormal,
        "denormals and zeros": np.where(levels > 0.4, 0, denormal),
        "denormals and numbers": np.where(levels > 0.4, random, denormal),
        "denormals tied": np.where(levels > 0.4, np.float32(1e-40), np.float32(2e-40)),
        "smallest of all floats": np.full((1, 13, 13), 1e-45, np.float32),
        "denormal flat index 0": np.where(np.arange(169).reshape(13, 13) == 0, denormal, random),
        "one": np.ones((1, 13, 13), np.float32),
        "negative zero": np.where(levels > 0.4, random, np.float32(-0.0)).astype(np.float32),
    }


@pytest.mark.parametrize(
    "share", (0.25, 0.6, 0.99, 0.005, 1.0, 0.0, 1 / 169, 168 / 169, 1 - 2**-40, 2**-40)
)
def test_discard_by_bisection_is_a_stable_sort(share):
    discard = jax.jit(lambda x: discard_lowest(x, share))
    for name, maps in adversarial_maps().items():
        assert_discarded(discard(jnp.asarray(maps)), maps, share, name)


@pytest.mark.parametrize("share", (0.0, 0.005, 2**-40))
def test_a_share_of_less_than_one_entry_leaves_every_bit(share):
    """int(169 · .005) = 0; negative zeros and denormals stay what they are."""
    for name, maps in adversarial_maps().items():
        result = np.asarray(discard_lowest(jnp.asarray(maps), share))
        np.testing.assert_array_equal(result.view(np.int32), maps.view(np.int32), err_msg=name)


@pytest.mark.parametrize("discard", (discard_lowest, saliency.discard_lowest))
def test_denormals_are_discarded_in_their_order_or_as_ties_with_zero(discard):
    """int(9 · .5) = 4 lowest. In order: flat indices 0 (which stays), 1, 2, 8; as ties: 0, 1, 2, 3.
    Never a normal number, although one denormal is left over."""
    maps = np.array([0, 1e-45, 1e-40, 5e-39, TINY, 1, 2, 3, 1e-39], np.float32).reshape(1, 3, 3)
    left = np.asarray(discard(jnp.asarray(maps), 0.5)).ravel()
    assert left.tolist() in (
        [0, 0, 0, np.float32(5e-39), TINY, 1, 2, 3, 0],
        [0, 0, 0, 0, TINY, 1, 2, 3, np.float32(1e-39)],
    )
    assert_discarded(left.reshape(1, 3, 3), maps, 0.5)


def test_flat_index_zero_counts_among_the_lowest_but_stays():
    """int(9 · .4) = 3 lowest of 1..9 (index 0 holds the lowest, 1): 2 and 3 go, 1 stays."""
    attention = jnp.arange(1.0, 10.0).reshape(1, 3, 3)
    kept = np.asarray(discard_lowest(attention, 0.4)).ravel()
    np.testing.assert_array_equal(kept, [1, 0, 0, 4, 5, 6, 7, 8, 9])


def test_among_equals_the_lower_flat_index_is_discarded_first():
    """int(9 · .5) = 4 of nine equal entries: flat indices 0..3, of which 0 stays."""
    kept = np.asarray(discard_lowest(jnp.full((1, 3, 3), 0.5), 0.5)).ravel()
    np.testing.assert_array_equal(kept > 0, [1, 0, 0, 0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("share", (0.25, 0.45, 0.461, 0.462, 0.6))
@pytest.mark.parametrize("peaked", (1, 40))
def test_what_a_causal_map_discards_is_zero_already(share, peaked):
    """13 tokens: 78 zeros above the diagonal; int(169 · .461) = 77, int(169 · .462) = 78, and .6
    takes 101. Peaked maps have underflown entries below it, too. Equal to the last bit."""
    random = np.random.default_rng(3)
    logits = peaked * random.standard_normal((2, 2, 13, 13)).astype(np.float32)
    logits = np.where(np.tril(np.ones((13, 13), bool)), logits, -np.inf)
    maps = dict(enumerate(jax.nn.softmax(jnp.asarray(logits), axis=-1)))
    source, query = saliency.Source("mars", (0, 1), share), jnp.array([12, 5])

    def scores(causal):
        return jax.jit(lambda maps: saliency.saliency(maps, source, query, causal=causal))

    np.testing.assert_array_equal(scores(True)(maps), scores(False)(maps))
    looked_for = "while" in scores(True).lower(maps).as_text()
    assert looked_for == (share == 0.6)
    assert "while" in scores(False).lower(maps).as_text()


# --- sources ---------------------------------------------------------------------------------


def test_lowest_first_sources_reverse_their_order():
    attention, query = attention_of("image"), queries("image")
    for kind in ("mean", "std"):
        high = saliency.saliency(attention, saliency.parse_source(kind, 12), query)
        low = saliency.saliency(attention, saliency.parse_source(f"min_{kind}", 12), query)
        np.testing.assert_allclose(low, 1 - high, rtol=1e-6)
        assert (np.asarray(low) > 0).all()
        top = saliency.image_bank(low, 4, k_max=4).indices
        patches = np.argsort(np.asarray(high)[:, 1:], axis=1)[:, :4] + 1
        np.testing.assert_array_equal(np.sort(top, axis=1), np.sort(patches, axis=1))


def test_deviation_is_the_populations():
    """Layers 0.2 and 0.6: mean 0.4, population deviation 0.2 (the sample's would be 0.283)."""
    attention = {0: jnp.full((1, 2, 2), 0.2), 1: jnp.full((1, 2, 2), 0.6)}
    query = jnp.zeros(1, jnp.int32)
    std = saliency.saliency(attention, saliency.Source("std", (0, 1), 0.25), query)
    mean = saliency.saliency(attention, saliency.Source("mean", (0, 1), 0.25), query)
    np.testing.assert_allclose(std, 0.2, rtol=1e-6)
    np.testing.assert_allclose(mean, 0.4, rtol=1e-6)


@pytest.mark.parametrize(
    "name, depth, expected",
    (
        ("mars", 12, ("mars", (4, 11))),
        ("mars", 6, ("mars", (2, 5))),
        ("mars", 1, ("mars", (0,))),
        ("last", 12, ("layer", (11,))),
        ("layer:3", 12, ("layer", (3,))),
        ("mean", 3, ("mean", (0, 1, 2))),
        ("min_std", 2, ("min_std", (0, 1))),
    ),
)
def test_source_names_say_what_to_read(name, depth, expected):
    assert saliency.parse_source(name, depth)[:2] == expected


def test_mars_layers_and_discard_can_be_chosen():
    source = saliency.parse_source("mars", 12, mars_layers=(2, 7, 10), discard=0.1)
    assert source == ("mars", (2, 7, 10), 0.1)


@pytest.mark.parametrize("name", ("marz", "layer", "layer:", "layer:x", "layer:-1", "max_mean", ""))
def test_an_unknown_source_is_refused(name):
    with pytest.raises(ValueError, match=f"saliency source {name!r} is unknown"):
        saliency.parse_source(name, 12)


def test_a_layer_beyond_the_depth_is_refused():
    with pytest.raises(ValueError, match=r"'layer:12' reads layer 12 of 0\.\.11"):
        saliency.parse_source("layer:12", 12)
    with pytest.raises(ValueError, match=r"'mars' reads layer 12 of 0\.\.11"):
        saliency.parse_source("mars", 12, mars_layers=(4, 12))


def test_no_gradient_flows_through_any_saliency():
    query = jnp.array([0, 2])
    for name in ("mars", "last", "mean", "std", "min_mean", "min_std"):
        source = saliency.parse_source(name, 3)
        maps = tuple(random_maps(i, (2, 5, 5)) for i in range(3))

        def total(maps, source=source):
            row = saliency.saliency(dict(enumerate(maps)), source, query)
            return jnp.sum(row * jnp.arange(5.0)[None])

        assert float(total(maps)) > 0
        for gradient in jax.jit(jax.grad(total))(maps):
            assert (np.asarray(gradient) == 0).all(), name


# --- ATS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tokens", (("image", 193), ("image", 311), ("image", 197), ("image", 13), ("image", 15))
)
def test_k_of_pictures_is_the_references_at_every_step(name, tokens):
    expected = golden_model.load("k_sequence.npz")[f"k_{name}_{tokens}"]
    ours = saliency.bank_schedule(tokens - 1, start=0.65, end=0.5, horizon=1450)
    np.testing.assert_array_equal(ours[np.minimum(np.arange(1501), 1450)], expected)


def test_k_of_captions_is_the_references_at_every_step():
    expected = golden_model.load("k_sequence.npz")["k_text_77"]
    ours = saliency.bank_schedule(75, start=0.65, end=0.5, horizon=1450)
    np.testing.assert_array_equal(ours[np.minimum(np.arange(1501), 1450)], expected)


def test_k_table_is_the_references():
    table = json.loads((golden_model.FOLDER / "k_table.json").read_text())["table"]
    assert len(table) == 6
    for name, row in table.items():
        tokens = int(name.split("_")[-1].split()[0])
        n = tokens - 2 if name.startswith("text") else tokens - 1
        ours = saliency.bank_schedule(n, start=0.65, end=0.5, horizon=1450)
        for current_step, k in row.items():
            if current_step == "None":
                assert saliency.bank_size(n, 0.4) == k
            else:
                assert ours[min(int(current_step), 1450)] == k, (name, current_step)


def test_k_read_inside_a_compiled_step_is_the_references():
    """`step.bank_schedule` and `Training.bank_limits` with a traced step, for every step."""
    model = config_lib.Model(vision_depth=1, text_depth=1)  # k depends on the grid alone
    config = config_lib.Config(model=model)
    training = step.make(config, num_identities=3, steps_per_epoch=(144,) * 60)
    limits = jax.jit(jax.vmap(training.bank_limits, in_axes=(0, None)))
    k = limits(jnp.arange(1501), jnp.int32(3))
    sequence = golden_model.load("k_sequence.npz")
    np.testing.assert_array_equal(k.image, sequence["k_image_193"])
    np.testing.assert_array_equal(k.text, sequence["k_text_77"])
    assert itself.bank_limits(config.model, config.local, True) == (124, 48)
    assert itself.bank_limits(config.model, config.local, False) == (76, 30)


# --- banks -----------------------------------------------------------------------------------


def test_image_bank_takes_the_most_salient_patches_without_cls():
    """CLS (0.9) is left out; 3 and 4 tie and the lower index comes first."""
    scores = jnp.array([[0.9, 0.1, 0.5, 0.3, 0.3, 0.2]])
    bank = saliency.image_bank(scores, 3, k_max=4)
    np.testing.assert_array_equal(bank.indices, [[2, 3, 4, 5]])
    np.testing.assert_array_equal(bank.kept, [True, True, True, False])
    np.testing.assert_array_equal(bank.valid, [[True, True, True, False]])


def test_text_bank_takes_words_then_pads_in_order_of_index():
    """SOT at 0 and EOT at 4 are out, whatever their saliency; the pads 5.. have saliency 0 even
    where attention is not, follow in order of index, are kept (BatchNorm) but not valid."""
    ids = jnp.array([[14, 3, 4, 5, 15, 0, 0, 0]])
    scores = jnp.array([[0.9, 0.1, 0.3, 0.2, 0.8, 0.7, 0.0, 0.0]])
    bank = saliency.text_bank(scores, ids, jnp.array([4]), 5, k_max=6)
    np.testing.assert_array_equal(bank.indices, [[2, 3, 1, 5, 6, 7]])
    np.testing.assert_array_equal(bank.kept, [True] * 5 + [False])
    np.testing.assert_array_equal(bank.valid, [[True] * 3 + [False] * 3])


def test_a_caption_longer_than_k_fills_the_bank_with_its_top_words():
    ids = jnp.array([[14, 3, 4, 5, 6, 7, 8, 15]])
    scores = jnp.array([[0.0, 0.1, 0.6, 0.2, 0.5, 0.3, 0.4, 0.9]])
    bank = saliency.text_bank(scores, ids, jnp.array([7]), 3, k_max=4)
    np.testing.assert_array_equal(bank.indices, [[2, 4, 6, 5]])
    np.testing.assert_array_equal(bank.valid, [[True, True, True, False]])


def test_a_caption_of_exactly_one_word_has_that_word_as_its_valid_row():
    ids = jnp.array([[14, 3, 15, 0, 0, 0]])
    bank = saliency.text_bank(jnp.full((1, 6), 0.2), ids, jnp.array([2]), 3, k_max=3)
    np.testing.assert_array_equal(bank.indices, [[1, 3, 4]])
    np.testing.assert_array_equal(bank.valid, [[True, False, False]])


def test_a_caption_without_words_keeps_its_end_of_text_as_its_one_valid_row():
    """Row 0 has SOT and EOT alone; row 1, an ordinary caption, is what it is without row 0."""
    ids = jnp.array([[14, 15, 0, 0, 0, 0], [14, 3, 4, 5, 15, 0]])
    scores = jnp.array([[0.5, 0.5, 0, 0, 0, 0], [0.1, 0.2, 0.4, 0.3, 0.5, 0]])
    bank = saliency.text_bank(scores, ids, jnp.array([1, 4]), 3, k_max=4)
    np.testing.assert_array_equal(bank.indices[0], [1, 3, 4, 5])
    np.testing.assert_array_equal(bank.valid, [[True, False, False, False], [True] * 3 + [False]])
    alone = saliency.text_bank(scores[1:], ids[1:], jnp.array([4]), 3, k_max=4)
    np.testing.assert_array_equal(bank.indices[1:], alone.indices)
    np.testing.assert_array_equal(bank.valid[1:], alone.valid)


def test_token_id_zero_inside_a_caption_counts_as_padding():
    """As in the reference: the word at 2 has id 0 ("!" inside a word), loses its saliency and
    shortens the caption to three words."""
    ids = jnp.array([[14, 3, 0, 5, 6, 15, 0, 0]])
    scores = jnp.array([[0.0, 0.1, 0.9, 0.2, 0.3, 0.9, 0.0, 0.0]])
    bank = saliency.text_bank(scores, ids, jnp.array([5]), 4, k_max=4)
    np.testing.assert_array_equal(bank.indices, [[4, 3, 1, 2]])
    np.testing.assert_array_equal(bank.valid, [[True, True, True, False]])


def test_one_compilation_serves_every_k():
    traces = []

    @jax.jit
    def both(scores, ids, eot, k):
        traces.append(k)
        return (
            saliency.image_bank(scores, k, k_max=5),
            saliency.text_bank(scores, ids, eot, k, k_max=5),
        )

    ids = jnp.array([[14, 3, 4, 5, 6, 15, 0, 0]])
    scores = jnp.linspace(0.1, 0.8, 8)[None]
    for k in (5, 3, 1):
        image, text = both(scores, ids, jnp.array([5]), jnp.int32(k))
        assert image.kept.sum() == text.kept.sum() == k
        assert image.valid.sum() == k and text.valid.sum() == min(k, 4)
    assert len(traces) == 1
