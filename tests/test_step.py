"""The compiled step: schedules, number types, devices, transfers and the batches that are odd."""

import dataclasses
import re
import types
from typing import NamedTuple
from unittest import mock

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import config as config_lib
from itself_jax import sharding, step
from itself_jax.models import itself, saliency

MODEL = config_lib.Model(
    patch_size=8,
    image_size=(32, 16),
    vision_width=16,
    vision_depth=2,
    vision_heads=2,
    text_width=16,
    text_depth=2,
    text_heads=2,
    text_length=12,
    vocab_size=32,
    embed_dim=16,
)
# The learning rate is large, so that one step shows against float32.
CONFIG = config_lib.Config(
    model=MODEL,
    local=config_lib.Local(dim=32, ats_horizon_steps=4),
    optim=config_lib.Optim(learning_rate=1e-2, local_learning_rate=1e-1),
    batch_size=8,
    num_epochs=8,
    precision="float32",
)


class Batch(NamedTuple):
    images: np.ndarray
    erase: np.ndarray
    captions: np.ndarray
    pids: np.ndarray
    epoch: np.ndarray


def make(config: config_lib.Config = CONFIG) -> step.Training:
    return step.make(config, num_identities=5, steps_per_epoch=(3,) * config.num_epochs)


def batch(seed: int = 0, epoch: int = 1) -> Batch:
    """Eight pairs of four identities; captions of 1 to 10 words (SOT is 30, EOT 31)."""
    random = np.random.default_rng(seed)
    captions = np.zeros((8, 12), np.int32)
    for row, words in enumerate((1, 10, 3, 4, 7, 2, 10, 5)):
        captions[row, : words + 2] = [30, *random.integers(1, 30, words), 31]
    erase = np.zeros((8, 4), np.int32)
    erase[3] = (2, 3, 10, 8)
    images = random.integers(0, 256, (8, 32, 16, 3), dtype=np.uint8)
    pids = np.array([2, 2, 0, 0, 4, 4, 1, 1], np.int32)
    return Batch(images, erase, captions, pids, np.array(epoch, np.int32))


@pytest.fixture(scope="module")
def training() -> step.Training:
    return make()


@pytest.fixture(scope="module")
def init(training):
    return jax.jit(training.init, static_argnums=0)


@pytest.fixture(scope="module")
def start(init) -> step.TrainState:
    return init(0)


@pytest.fixture(scope="module")
def traced(training):
    """The jitted step and the list that grows with each of its traces."""
    traces = []

    def counted(state, batch):
        traces.append(None)
        return training.step(state, batch)

    return jax.jit(counted), traces


@pytest.fixture(scope="module")
def loss_of(training):
    """Jitted `compute_loss` and gradients: (params, batch_stats, images, captions, pids, k)."""

    @jax.jit
    def run(params, batch_stats, images, captions, pids, k):
        def total(params):
            variables = {"params": params, "batch_stats": batch_stats}
            loss = golden_model.compute_loss(
                training.model, CONFIG.loss, variables, images, captions, pids, k
            )
            return loss.total, loss

        return jax.grad(total, has_aux=True)(params)

    return run


def k_of(image: int, text: int) -> itself.BankLimits:
    return itself.BankLimits(jnp.int32(image), jnp.int32(text))


def evaluate(loss_of, state, b: Batch, k=None):
    images = step.prepare_images(jnp.asarray(b.images), jnp.asarray(b.erase))
    k = k_of(5, 6) if k is None else k
    arguments = (jnp.asarray(b.captions), jnp.asarray(b.pids))
    return loss_of(state.params, state.batch_stats, images, *arguments, k)


# --- pictures --------------------------------------------------------------------------------


def test_pixels_are_normalised_as_clip_does():
    """Red 255 is (1 - 0.48145466)/0.26862954 = 1.93034; black is -0.48145466/0.26862954."""
    pixels = np.zeros((1, 1, 2, 3), np.uint8)
    pixels[0, 0, 0] = (255, 128, 0)
    out = np.asarray(step.prepare_images(jnp.asarray(pixels)))
    expected = (1.930336, (128 / 255 - 0.4578275) / 0.26130258, -0.40821073 / 0.27577711)
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(out[0, 0, 1, 0], -1.792263, rtol=1e-5)


def test_erased_boxes_hold_clips_mean_after_normalisation_and_nothing_else_changes():
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 10, 6, 3), dtype=np.uint8))
    boxes = np.array([[2, 1, 4, 3], [0, 0, 0, 0], [9, 5, 1, 1]], np.int32)
    plain = np.asarray(step.prepare_images(pixels))
    erased = np.asarray(step.prepare_images(pixels, jnp.asarray(boxes)))
    inside = np.zeros((3, 10, 6), bool)
    inside[0, 2:6, 1:4] = True
    inside[2, 9, 5] = True
    np.testing.assert_array_equal(erased[~inside], plain[~inside])
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    np.testing.assert_array_equal(erased[inside], np.broadcast_to(mean, (13, 3)))


# --- the step is loss, gradient, Adam and schedule -------------------------------------------


def test_a_step_is_the_gradient_of_the_loss_through_adam_times_the_epochs_factor(
    training, start, traced, loss_of
):
    jitted, _ = traced
    b = batch(epoch=3)
    after, metrics = jitted(start, b)
    gradients, loss = evaluate(loss_of, start, b, training.bank_limits(jnp.int32(1), jnp.int32(3)))
    updates, _ = jax.jit(training.optimizer.update)(gradients, start.opt_state, start.params)
    factor = training.rate_factors[3]
    assert factor == pytest.approx(0.46)
    ours, before = golden_model.flat(after.params), golden_model.flat(start.params)
    for path, update in golden_model.flat(updates).items():
        if path.endswith("grab/mlp_in/bias"):  # before a BatchNorm: its gradient is noise
            continue
        moved = ours[path].astype(np.float64) - before[path]
        # Two programs: a gradient off by 1e-5 moves eps = 1e-3 worth of Adam by 1 %.
        golden_model.assert_close(moved, factor * update, 1e-2, path)
        assert np.any(moved != 0) == ("unused" not in path), path
    assert int(after.step) == 1
    golden_model.assert_close(metrics.loss, loss.total, 1e-6)
    golden_model.assert_close(metrics.loss_tal, sum(x.tal for x in loss.branches), 1e-6)
    golden_model.assert_close(metrics.loss_cid, sum(x.cid + x.id for x in loss.branches), 1e-6)
    norm = np.sqrt(
        sum(
            np.square(g.astype(np.float64)).sum()
            for g in map(np.asarray, jax.tree.leaves(gradients))
        )
    )
    golden_model.assert_close(metrics.grad_norm, norm, 1e-5)
    assert float(metrics.learning_rate) == pytest.approx(0.46 * 1e-2, rel=1e-6)
    for path, value in golden_model.flat(loss.batch_stats).items():
        np.testing.assert_allclose(golden_model.flat(after.batch_stats)[path], value, rtol=1e-5)


def test_the_total_is_the_plain_sum_of_all_terms(start, loss_of):
    _, loss = evaluate(loss_of, start, batch())
    assert len(loss.branches) == 2
    terms = [float(term) for branch in loss.branches for term in branch]
    assert float(loss.total) == pytest.approx(sum(terms), rel=1e-6)
    assert min(terms) > 0


def test_training_lowers_the_loss_and_one_trace_serves_all_of_ats(training, start, traced):
    """Eight patches: k = int(8 · .65 (.5/.65)^(s/4)) = 4, 4, 4, 4 and for ten words
    6, 5, 5, 5; the horizon is 4 steps, and later steps keep its k."""
    jitted, traces = traced
    state, seen, rates, totals = start, [], [], []
    for i in range(6):
        state, metrics = jitted(state, batch(epoch=1 + i // 3))
        seen.append((int(metrics.bank_image), int(metrics.bank_text)))
        rates.append(float(metrics.learning_rate))
        totals.append(float(metrics.loss))
    expected = [
        tuple(int(n * 0.65 * (0.5 / 0.65) ** (min(s, 4) / 4)) for n in (8, 10)) for s in range(1, 7)
    ]
    assert seen == expected
    assert len(set(seen)) > 1, "k must change for this test to mean anything"
    np.testing.assert_allclose(rates, [1e-3] * 3 + [2.8e-3] * 3, rtol=1e-6)
    assert len(traces) == 1
    assert totals[-1] < totals[0]
    assert int(state.step) == 6


def test_a_step_moves_nothing_between_host_and_device(start, traced):
    jitted, _ = traced
    placed = jax.device_put((start, batch()))
    jax.block_until_ready(jitted(*placed))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(jitted(*placed))
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
            jitted(placed[0], batch())


def test_the_factor_of_every_epoch_is_the_schedules(training):
    """Inside the step the float64 table is read in float32."""
    factors = jnp.asarray(training.rate_factors, jnp.float32)
    read = jax.jit(lambda epoch: factors[epoch])
    for epoch in range(1, CONFIG.num_epochs + 1):
        assert float(read(epoch)) == pytest.approx(training.rate_factors[epoch], rel=1e-6)


def test_initialisation_is_a_function_of_the_seed_alone(init, start):
    again, other = init(0), init(1)
    for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = ("image_encoder", "patch_embedding", "kernel")
    ours, theirs = start.params, other.params
    for key in kernel:
        ours, theirs = ours[key], theirs[key]
    assert np.abs(np.asarray(ours - theirs)).min() > 0
    assert int(start.step) == 0


def test_classifiers_start_at_a_deviation_of_a_thousandth(start):
    for name in ("global_heads", "local_heads"):
        kernels = [
            start.params[name][c]["kernel"] for c in ("pair_classifier", "identity_classifier")
        ]
        for kernel in kernels:
            assert float(kernel.std()) == pytest.approx(1e-3, rel=0.3)
        mlp = start.params[name]["pair_mlp"]
        bound = 1 / np.sqrt(mlp["kernel"].shape[0])
        assert 0.9 * bound < float(jnp.abs(mlp["kernel"]).max()) <= bound
        assert 0.5 * bound < float(jnp.abs(mlp["bias"]).max()) <= bound
        assert (start.params[name]["identity_classifier"]["bias"] == 0).all()


# --- banks -----------------------------------------------------------------------------------


def test_rows_beyond_k_change_nothing_in_the_whole_step(start, loss_of):
    """k_max > k equals k_max == k, in loss, gradients and statistics."""
    k = (4, 5)
    wide_limits = itself.bank_limits(MODEL, CONFIG.local, True)
    assert wide_limits[0] > k[0] and wide_limits[1] > k[1]
    images = step.prepare_images(jnp.asarray(batch().images), jnp.asarray(batch().erase))
    model = make().model

    def run(variables):
        return step.encode(model, variables, images, jnp.asarray(batch().captions), k_of(*k))

    variables = {"params": start.params, "batch_stats": start.batch_stats}
    wide = jax.jit(lambda v: run(v))(variables)  # its own function: jit caches by identity
    with mock.patch.object(itself, "bank_limits", lambda *_: itself.BankLimits(*k)):
        exact = jax.jit(lambda v: run(v))(variables)
    for a, b in zip(wide[:2], exact[:2], strict=True):
        assert a.bank.indices.shape != b.bank.indices.shape
        golden_model.assert_close(a.embedding.local, b.embedding.local, 1e-6)
        golden_model.assert_close(a.embedding.global_, b.embedding.global_, 1e-6)
    for a, b in zip(jax.tree.leaves(wide[2]), jax.tree.leaves(exact[2]), strict=True):
        golden_model.assert_close(a, b, 1e-6)


@pytest.mark.parametrize("source", ("mars", "last", "layer:0", "mean", "min_std"))
def test_training_selects_with_the_configured_source(start, source):
    """The bank of a training pass is the top-k of that source over the encoder's own maps."""
    local = dataclasses.replace(CONFIG.local, saliency=source, inference_saliency="layer:0")
    model = itself.ITSELF(MODEL, local, 5)
    images = step.prepare_images(jnp.asarray(batch().images))

    @jax.jit
    def run(variables):
        encoded, _ = model.apply(
            variables, images, jnp.int32(4), method="encode_image", mutable=["batch_stats"]
        )
        out = model.apply(
            variables, images, method=lambda m, x: m.image_encoder(x, map_layers=(0, 1))
        )
        return encoded.bank.indices, out.attention

    indices, attention = run({"params": start.params, "batch_stats": start.batch_stats})
    first, last = (np.asarray(attention[layer][:, 0], np.float64) for layer in (0, 1))
    # Depth 2: MARS reads layers 0 and 1, of which int(81 · .25) = 20 entries are discarded.
    scores = {
        "last": last,
        "layer:0": first,
        "mean": (first + last) / 2,
        "min_std": -np.abs(first - last) / 2,
    }
    if source == "mars":
        maps = []
        for layer in (0, 1):
            flat = np.asarray(attention[layer]).reshape(8, -1).astype(np.float64)
            cls = flat[:, 0].copy()
            np.put_along_axis(flat, np.argsort(flat, axis=1, kind="stable")[:, :20], 0, axis=1)
            flat[:, 0] = cls
            mixed = flat.reshape(8, 9, 9) + np.eye(9)
            maps.append(mixed / mixed.sum(axis=-1, keepdims=True))
        scores["mars"] = np.einsum("bm,bmn->bn", maps[1][:, 0], maps[0])
    expected = np.argsort(-scores[source][:, 1:], axis=1, kind="stable")[:, :4] + 1
    np.testing.assert_array_equal(np.sort(indices[:, :4], axis=1), np.sort(expected, axis=1))


def test_horizon_in_epochs_ends_with_the_last_step_of_that_epoch():
    """Epochs of 3, 4, 5 steps: 2 epochs are 7 steps; 5 epochs add two of the mean, 4, to 12."""
    assert step.horizon_steps(1450, (3, 4, 5)) == 1450
    assert step.horizon_steps("7", (3, 4, 5)) == 7
    assert step.horizon_steps("2ep", (3, 4, 5)) == 7
    assert step.horizon_steps("5ep", (3, 4, 5)) == 20
    config = dataclasses.replace(CONFIG, local=config_lib.Local(ats_horizon_steps="2ep"))
    table = step.bank_schedule(config, (3, 4, 5))
    assert table.shape == (8, 2)
    np.testing.assert_array_equal(table[0], table[1])  # step 0 counts as step 1
    assert tuple(table[7]) == (int(8 * 0.65 * (0.5 / 0.65)), 5)


def test_schedule_per_epoch_is_indexed_by_the_epoch():
    """Horizon "4ep" of 10-step epochs: k = int(75 · .65 (.5/.65)^(e/4)): 45, 42, 40, 37."""
    model = dataclasses.replace(MODEL, text_length=77)
    local = dataclasses.replace(CONFIG.local, ats_per_epoch=True, ats_horizon_steps="4ep")
    config = dataclasses.replace(CONFIG, model=model, local=local)
    training = step.make(config, num_identities=5, steps_per_epoch=(10,) * 8)
    read = jax.jit(training.bank_limits)
    k = [int(read(jnp.int32(1000), jnp.int32(epoch)).text) for epoch in (1, 2, 3, 4, 5, 8)]
    assert k == [45, 42, 40, 37, 37, 37]


def test_without_ats_k_is_constant():
    local = dataclasses.replace(CONFIG.local, ats=False)
    training = make(dataclasses.replace(CONFIG, local=local))
    for s in (1, 100, 5000):
        assert tuple(map(int, training.bank_limits(jnp.int32(s), jnp.int32(1)))) == (3, 4)


# --- odd batches -----------------------------------------------------------------------------


def test_a_caption_without_words_harms_no_other_row(training, start, loss_of):
    b = batch()
    b.captions[2] = 0
    b.captions[2, :2] = (30, 31)
    gradients, loss = evaluate(loss_of, start, b)
    assert np.isfinite(float(loss.total))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    encode = jax.jit(training.encode_captions)
    variables = {"params": start.params, "batch_stats": start.batch_stats}
    ours = encode(variables, jnp.asarray(b.captions)).local
    plain = encode(variables, jnp.asarray(batch().captions)).local
    others = [0, 1, 3, 4, 5, 6, 7]
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[np.array(others)], plain[np.array(others)], rtol=1e-6)


def test_a_batch_of_one_identity_trains(start, loss_of):
    b = batch()._replace(pids=np.full(8, 3, np.int32))
    gradients, loss = evaluate(loss_of, start, b)
    assert np.isfinite(float(loss.total))
    assert [float(branch.tal) for branch in loss.branches] == [0.0, 0.0]
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_mismatch_rules_change_the_loss_when_the_largest_identity_is_absent(training, start):
    pids = jnp.asarray(np.where(batch().pids == 4, 3, batch().pids))

    @jax.jit
    def cid(variables, biased):
        heads = jax.tree.map(lambda x: x, variables["params"])
        bias = jnp.zeros(6).at[5].set(biased)
        for name in ("global_heads", "local_heads"):
            heads[name]["pair_classifier"]["bias"] = bias
        state = {"params": heads, "batch_stats": variables["batch_stats"]}
        images = step.prepare_images(jnp.asarray(batch().images))
        ids = jnp.asarray(batch().captions)
        return [
            golden_model.compute_loss(
                training.model, config_lib.Loss(mismatch_label=rule), state, images, ids, pids, k
            )
            .branches[0]
            .cid
            for rule in ("batch_max", "extra_class")
        ]

    k = k_of(4, 5)
    variables = {"params": start.params, "batch_stats": start.batch_stats}
    # A classifier that always says "class 5": two thirds of the pairs are right under one rule.
    batch_max, extra = cid(variables, 10.0)
    assert float(batch_max) == pytest.approx(10.0, abs=0.2)
    assert float(extra) == pytest.approx(10.0 / 3, abs=0.2)


# --- number types ----------------------------------------------------------------------------


def test_bfloat16_compute_is_close_and_keeps_state_and_losses_in_float32(training, start, loss_of):
    half = make(dataclasses.replace(CONFIG, precision="bfloat16"))
    images = step.prepare_images(jnp.asarray(batch().images))
    ids = jnp.asarray(batch().captions)
    variables = {"params": start.params, "batch_stats": start.batch_stats}

    def encode(model):
        # The same tokens are chosen in both: saliencies that nearly tie may swap in bfloat16.
        return jax.jit(lambda v: step.encode(model, v, images, ids, k_of(5, 6)))(variables)

    for ours, exact in zip(encode(half.model)[:2], encode(training.model)[:2], strict=True):
        assert ours.embedding.global_.dtype == ours.embedding.local.dtype == jnp.float32
        golden_model.assert_close(ours.embedding.global_, exact.embedding.global_, 5e-2)
        golden_model.assert_close(ours.embedding.local, exact.embedding.local, 5e-2)
        assert not np.array_equal(ours.embedding.global_, exact.embedding.global_)
    state, metrics = jax.eval_shape(half.step, start, batch())
    floats = [x for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


def test_float32_compute_asks_for_the_highest_precision_in_every_product(training, start):
    text = str(jax.make_jaxpr(training.step)(start, jax.tree.map(jnp.asarray, batch())))
    products = text.count("dot_general[") + text.count("conv_general_dilated[")
    assert products > 50
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_precision_follows_the_backend_unless_it_is_said():
    assert step.compute_dtype(None) == jnp.float32  # the tests run on CPU
    assert step.compute_dtype("bfloat16") == jnp.bfloat16
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        assert step.compute_dtype(None) == jnp.bfloat16
        assert step.compute_dtype("float32") == jnp.float32


@pytest.mark.parametrize(
    "capability, dtype, kernel",
    [
        ("9.0", "bfloat16", "cudnn"),
        ("8.0", "bfloat16", "cudnn"),
        ("7.5", "bfloat16", "plain"),
        ("9.0", "float32", "plain"),
        (None, "bfloat16", "plain"),  # a CPU or a TPU
        ("gfx90a", "bfloat16", "plain"),  # a card that is not NVIDIA's
    ],
)
def test_cudnns_attention_is_chosen_where_it_works(monkeypatch, capability, dtype, kernel):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(step.jax, "local_devices", lambda: [device])
    assert step.attention_kernel(None, jnp.dtype(dtype)) == kernel
    assert step.attention_kernel("plain", jnp.dtype(dtype)) == "plain"


def test_cudnns_attention_in_float32_is_refused():
    with pytest.raises(config_lib.ConfigError, match="attention=cudnn computes in bfloat16, but"):
        step.attention_kernel("cudnn", jnp.dtype("float32"))


@pytest.mark.parametrize(
    "platform, parameters, memory_first",
    [("cpu", 60_000_000, True), ("cpu", 5_000_000, False), ("tpu", 60_000_000, False)],
)
def test_large_steps_on_a_cpu_are_scheduled_for_memory(platform, parameters, memory_first):
    params = {"kernel": jax.ShapeDtypeStruct((parameters // 2, 2), jnp.float32)}
    assert (step._compiler_options(params, platform) is not None) == memory_first


def compiled(**changes) -> jax.stages.Compiled:
    """The step of one CPU, as a run compiles it."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    training = make(config_lib.replace(CONFIG, {"mesh.data": 1, **changes}))
    mesh = sharding.make_mesh(training.config)
    return step.compile_step(training, step.state_template(training, mesh), mesh)


def test_a_cpu_updates_kernels_where_they_are_without_a_copy(monkeypatch):
    monkeypatch.setattr(step, "_LARGE", 0)
    text = compiled().as_text()
    assert "opt-barrier" in text
    kernels = re.findall(r"%(state_params_\w+?kernel\w*)(?:\.\d+)? = \S+ parameter", text)
    copied = re.findall(r"copy\(%(state_params_\w+?kernel\w*)", text)
    assert len(kernels) > 20
    assert [name for name in copied if "patch_embedding" not in name] == []


def test_blocks_that_are_computed_again_are_not_in_memory_together(monkeypatch):
    monkeypatch.setattr(step, "_LARGE", 0)

    def planned(remat):
        deep = {"model__vision_depth": 5, "model__patch_size": 4, "model__image_size": (64, 32)}
        deep |= {"model__text_depth": 1, "local__enabled": False}
        return compiled(remat=remat, **deep).memory_analysis().temp_size_in_bytes

    assert planned("block") < 0.5 * planned("none")


def test_the_option_of_large_steps_lets_independent_branches_share_their_memory(monkeypatch):
    monkeypatch.setattr(step, "_LARGE", 0)
    options = step._compiler_options({"x": jnp.zeros(3)}, "cpu")

    def branches(x, w):
        return sum((jnp.sin(x @ (w + i)) ** 2).sum() for i in range(8))

    lowered = jax.jit(branches).lower(jnp.ones((512, 64)), jnp.ones((64, 512)))
    needed = [
        lowered.compile(compiler_options=x).memory_analysis().temp_size_in_bytes
        for x in (options, None)
    ]
    assert needed[0] <= needed[1]
    assert needed[0] < 2 * 4 * 512 * 512  # of the eight results, which have 1 MB each


# --- only what is read ------------------------------------------------------------------------


def costly(text: str, n: int) -> list[str]:
    """Of StableHLO: sorts of a whole map of n² entries, and products of two n x n maps."""
    found = []
    # The types of an operation with a body stand behind the body.
    for line in re.sub(
        r"(stablehlo\.sort[^\n]*)\n.*?\n *(\}\)[^\n]*)", r"\1 \2", text, flags=re.DOTALL
    ).splitlines():
        shapes = [tuple(map(int, x.split("x"))) for x in re.findall(r"tensor<([\dx]+)x[a-z]", line)]
        if re.search(r"@\w*sort|stablehlo\.sort|chlo\.top_k", line):
            found += [line for shape in shapes if max(shape) >= n * n]
        if "stablehlo.dot_general" in line:
            found += [line] if [x[-2:] for x in shapes[:2]] == [(n, n), (n, n)] else []
    return found


def test_a_step_neither_sorts_a_whole_map_nor_multiplies_two(training, start):
    """N² entries would be 37,249 at full size, and N³ 7 M for each picture (method section 3)."""
    text = jax.jit(training.step).lower(start, batch()).as_text()
    assert "chlo.top_k" in text or "stablehlo.sort" in text
    assert "stablehlo.dot_general" in text
    for n in (9, 12):  # tokens of a picture and of a caption
        assert costly(text, n) == []


def test_the_search_for_costly_operations_finds_them():
    maps = {layer: jnp.full((2, 9, 9), 1 / 9) for layer in (0, 1)}
    whole = jax.jit(lambda maps: saliency.rollout(maps, (0, 1), 0.25)).lower(maps).as_text()
    assert costly(whole, 9)
    flat = maps[0].reshape(2, 81)
    assert costly(jax.jit(lambda x: jnp.sort(x, axis=1)).lower(flat).as_text(), 9)
    assert costly(jax.jit(jax.lax.sort).lower(flat).as_text(), 9)
    assert costly(jax.jit(lambda x: jax.lax.top_k(x, 5)).lower(flat).as_text(), 9)
