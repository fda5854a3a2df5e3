"""One global batch means the same on one device and on any mesh, whole or in parts."""

import re
from typing import NamedTuple

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import aot, optim, sharding, step
from itself_jax import config as config_lib
from itself_jax.data import batch as batch_lib

# Wide enough that some parameters have 64 KiB, and with heads that four devices can share.
MODEL = config_lib.Model(
    patch_size=8,
    image_size=(32, 16),
    vision_width=64,
    vision_depth=2,
    vision_heads=4,
    text_width=64,
    text_depth=2,
    text_heads=4,
    text_length=12,
    vocab_size=320,
    embed_dim=32,
)
CONFIG = config_lib.Config(
    model=MODEL,
    local=config_lib.Local(dim=512, ats_horizon_steps=4),
    mesh=config_lib.Mesh(data=1),
    batch_size=16,
    eval=config_lib.Eval(batch_size=16),
    num_epochs=8,
    precision="float32",
)
IDENTITIES = 5


def changed(**changes) -> config_lib.Config:
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    return config_lib.replace(CONFIG, flat)


def a_batch() -> batch_lib.Batch:
    """Sixteen pairs of five identities; captions of 1 to 10 words (SOT is 318, EOT 319)."""
    random = np.random.default_rng(0)
    captions = np.zeros((16, 12), np.int32)
    for row in range(16):
        words = 1 + row % 10
        captions[row, : words + 2] = [318, *random.integers(1, 318, words), 319]
    erase = np.zeros((16, 4), np.int32)
    erase[3] = (2, 3, 10, 8)
    images = random.integers(0, 256, (16, 32, 16, 3), dtype=np.uint8)
    pids = np.array([2, 2, 0, 0, 4, 4, 1, 1, 3, 3, 0, 0, 2, 2, 1, 1], np.int32)
    return batch_lib.Batch(images, erase, captions, pids, np.array(1, np.int32))


def make(config: config_lib.Config) -> step.Training:
    return step.make(config, num_identities=IDENTITIES, steps_per_epoch=(3,) * config.num_epochs)


class Result(NamedTuple):
    """Of one step, on the host."""

    loss: step.Loss
    gradients: dict[str, np.ndarray]
    text: str  # the compiled program
    temporary_bytes: int


def gradients_of(config: config_lib.Config) -> Result:
    """Loss and gradients of the batch from the same start, compiled as the step is."""
    training, mesh = make(config), sharding.make_mesh(config)
    template = step.state_template(training, mesh)
    state = step.init_state(training, template, 0)
    batch = sharding.shard_batch(mesh, a_batch())

    def run(state, batch):
        k = training.bank_limits(state.step + 1, batch.epoch)
        return training.gradients(state, batch, k)

    places = jax.tree.map(lambda x: x.sharding, template.params)
    with jax.set_mesh(mesh):
        jitted = jax.jit(run, out_shardings=(places, sharding.replicated(mesh)))
        compiled = jitted.lower(state, batch).compile()
        gradients, loss = jax.device_get(compiled(state, batch))
    memory = compiled.memory_analysis()
    return Result(loss, golden_model.flat(gradients), compiled.as_text(), memory.temp_size_in_bytes)


@pytest.fixture(scope="module")
def one() -> Result:
    return gradients_of(CONFIG)


def assert_same(result: Result, one: Result) -> None:
    golden_model.assert_close(result.loss.total, one.loss.total, 2e-6, "loss")
    for ours, expected in zip(result.loss.branches, one.loss.branches, strict=True):
        for name, a, b in zip(ours._fields, ours, expected, strict=True):
            golden_model.assert_close(a, b, 2e-6, name)
    ours = golden_model.flat(result.loss.batch_stats)
    for name, value in golden_model.flat(one.loss.batch_stats).items():
        golden_model.assert_close(ours[name], value, 2e-6, name)
    assert result.gradients.keys() == one.gradients.keys()
    for name, value in one.gradients.items():
        if name.endswith("grab/mlp_in/bias"):  # before a BatchNorm: a true zero
            assert np.abs(result.gradients[name]).max() < 1e-5, name
        else:
            golden_model.assert_close(result.gradients[name], value, 1e-5, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh__data": 8},
        {"mesh__data": 4, "mesh__model": 2, "sharding": "fsdp"},
        pytest.param({"mesh__data": 2, "mesh__model": 4}, marks=pytest.mark.slow),
        pytest.param({"micro_batches": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"micro_batches": 2, "mesh__data": 2, "mesh__model": 2, "remat": "block"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"mesh__data": 4, "mesh__model": 2}, marks=pytest.mark.slow),
        pytest.param({"mesh__data": 8, "sharding": "fsdp"}, marks=pytest.mark.slow),
        pytest.param({"mesh__data": 2, "micro_batches": 8}, marks=pytest.mark.slow),
        pytest.param({"micro_batches": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"mesh__data": 8, "sharding": "fsdp", "micro_batches": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"mesh__data": 4, "mesh__model": 2, "sharding": "fsdp", "micro_batches": 2}
            | {"remat": "dots"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"remat": "block"}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_every_way_to_spread_or_cut_a_batch_gives_the_gradients_of_one_device(one, changes):
    config = changed(**changes)
    result = gradients_of(config)
    assert_same(result, one)
    if config.micro_batches > 1 and config.mesh.model == 1 and config.sharding != "fsdp":
        # Encoders' gradients cross the links once a step, not once a micro-batch.
        loops = [c.source for c in aot.collectives(result.text, 8) if c.times > 1]
        assert not [source for source in loops if "_encoder" in source]


# --- settings that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh__data": 16}, "config.mesh.data=16 x config.mesh.model=1 is 16 devices, but 8 are"),
        ({"mesh__data": -1, "mesh__model": 3}, "config.mesh.model=3 does not divide the 8 devices"),
        ({"mesh__data": -1, "batch_size": 12}, "batch_size=12 is not divisible by the 8 devices"),
        (
            {"mesh__data": 4, "micro_batches": 8},
            "batch_size=16 is not divisible by the 4 devices of config.mesh.data x "
            "config.micro_batches=8; use a multiple of 32",
        ),
        ({"mesh__data": 1, "mesh__model": 8}, "config.mesh.model=8 does not divide model.vision_h"),
        (
            {"mesh__data": 1, "mesh__model": 4, "local__dim": 36},
            "config.mesh.model=4 does not divide half of local.dim=18",
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(config_lib.ConfigError, match=re.escape(message)):
        sharding.make_mesh(changed(**changes))


def test_evaluation_batches_are_padded_to_the_devices():
    config = changed(mesh__data=8, eval__batch_size=12)
    assert sharding.eval_batch_size(config, sharding.make_mesh(config)) == 16
    assert sharding.eval_batch_size(CONFIG, sharding.make_mesh(CONFIG)) == 16
    assert sharding.eval_batch_size(changed(eval__batch_size=3), sharding.make_mesh(CONFIG)) == 3


def test_a_parameter_or_axis_without_a_rule_is_an_error():
    mesh = sharding.make_mesh(CONFIG)
    tree = {"params": {"image_encoder": {"new": jax.ShapeDtypeStruct((4, 4), np.float32)}}}
    with pytest.raises(sharding.ShardingError, match=r"image_encoder/new \[4, 4\]: add it"):
        sharding.place(mesh, tree, "replicated")
    with jax.set_mesh(mesh), pytest.raises(sharding.ShardingError, match="'chanels' is unknown"):
        sharding.constrain(jnp.zeros((2, 2)), "batch", "chanels")


# --- where the state lives --------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> step.TrainState:
    """Shapes of the state of ViT-B/16 on CUHK-PEDES."""
    config = config_lib.Config()
    training = step.make(config, num_identities=11003, steps_per_epoch=(3,) * config.num_epochs)
    return jax.eval_shape(lambda: training.init(0))


@pytest.mark.parametrize("mesh", [(8, 1), (4, 2), (2, 4)])
def test_fsdp_spreads_parameters_and_moments_of_vit_b16_over_all_devices(full_size, mesh):
    """Bytes per device fall to at most 1.1/n; what stays whole is named with its reason."""
    config, shapes = config_lib.Config(mesh=config_lib.Mesh(*mesh)), full_size
    places = sharding.place(sharding.make_mesh(config), shapes, "fsdp")
    each = total = 0
    for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places.stored), strict=True):
        total += leaf.size * leaf.dtype.itemsize
        each += np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    assert total > 3.5e9  # parameters and two moments
    assert each <= 1.1 * total / 8
    whole = {name for names in places.whole.values() for name in names}
    assert "params/global_heads/identity_classifier/bias" in whole  # 44 KB
    report = "\n".join(sharding.describe(places, shapes))
    assert f"of the {total / 1e6:.1f} MB" in report and "less than 64 KiB" in report


def test_rows_are_cut_on_their_device_and_come_back_in_order():
    mesh = sharding.make_mesh(changed(mesh__data=4))
    x = np.arange(48, dtype=np.int32).reshape(16, 3)

    def there_and_back(x):
        parts = sharding.split_rows(x, 2)
        return parts, sharding.join_rows(parts)

    rows = sharding.shard_batch(mesh, x)
    with jax.set_mesh(mesh):
        compiled = jax.jit(there_and_back).lower(rows).compile()
    parts, back = compiled(rows)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(np.asarray(parts)[0, :, 0] // 3, [0, 1, 4, 5, 8, 9, 12, 13])
    assert not re.search("all-|permute|scatter", compiled.as_text())
    assert back.sharding.spec == jax.sharding.PartitionSpec("data")
    assert parts.sharding.spec == jax.sharding.PartitionSpec(None, "data")


# --- the reference's weights --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh__data": 8},
        {"mesh__data": 4, "mesh__model": 2, "sharding": "fsdp"},
        {"micro_batches": 2},
        {"mesh__data": 2, "micro_batches": 4},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_the_references_numbers_hold_on_every_mesh(monkeypatch, changes):
    """Its weights, batch, losses, selected gradients and BatchNorm statistics, MARS at step 1."""
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config = config_lib.replace(
        config_lib.Config(
            model=golden_model.MODEL,
            local=config_lib.Local(dim=128),
            mesh=config_lib.Mesh(data=1),
            batch_size=8,
            precision="float32",
        ),
        flat,
    )
    # The recorded pictures are normalised already.
    monkeypatch.setattr(step, "prepare_images", lambda images, erase=None: images)
    training = step.make(
        config, num_identities=golden_model.NUM_IDENTITIES, steps_per_epoch=(3,) * 60
    )
    mesh = sharding.make_mesh(config)
    template = step.state_template(training, mesh)
    variables = golden_model.variables()
    state = jax.tree.map(lambda x: sharding.put(np.zeros(x.shape, x.dtype), x.sharding), template)
    placed = {
        part: jax.tree.map(lambda v, t: sharding.put(v, t.sharding), variables[part], place)
        for part, place in (("params", template.params), ("batch_stats", template.batch_stats))
    }
    state = state._replace(**placed)
    data = golden_model.batch()
    batch = batch_lib.Batch(
        data["images"], np.zeros((8, 4), np.int32), data["ids"], data["pids"], np.array(1, np.int32)
    )

    def run(state, batch):
        k = training.bank_limits(state.step + 1, batch.epoch)
        return training.gradients(state, batch, k)

    with jax.set_mesh(mesh):
        gradients, loss = jax.device_get(jax.jit(run)(state, sharding.shard_batch(mesh, batch)))
    golden = golden_model.load("golden_f32_mixed_s16.npz")
    prefix = "stable/custom_s1/"
    golden_model.assert_close(loss.total, golden[f"{prefix}total_loss"], 5e-6)
    ours = golden_model.flat(gradients)
    names = [key for key in golden if key.startswith(f"{prefix}grad/full/")]
    assert len(names) == 13
    for key in names:
        name = key.removeprefix(f"{prefix}grad/full/")
        expected = golden_model.our_array(name, golden[key])
        golden_model.assert_close(ours[golden_model.our_name(name)], expected, 1e-4, name)
    after = golden_model.flat(loss.batch_stats)
    for key in [key for key in golden if key.startswith(f"{prefix}bn_after/")]:
        path = golden_model.our_name(key.removeprefix(f"{prefix}bn_after/"))
        golden_model.assert_close(after[path], golden[key], 1e-5, path)


# --- frozen layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", (1, pytest.param(-1, marks=pytest.mark.slow)))
def test_frozen_parts_have_no_gradient_and_the_others_the_same(one, freeze):
    result = gradients_of(changed(freeze_layers=freeze))
    golden_model.assert_close(result.loss.total, one.loss.total, 2e-6)
    for name, value in one.gradients.items():
        encoder = re.fullmatch(r"(image|text)_encoder/(.*)", name)
        below = encoder and not encoder[2].startswith(
            ("transformer/layer_1", "ln_post", "ln_final", "projection")
        )
        if encoder and (freeze == -1 or below):
            assert not result.gradients[name].any(), name
        elif not name.endswith("grab/mlp_in/bias"):
            golden_model.assert_close(result.gradients[name], value, 1e-5, name)
    groups = make(changed(freeze_layers=freeze)).trained
    frozen = [name for name, trained in golden_model.flat(groups).items() if not trained]
    assert len(frozen) > 20


def test_a_whole_step_leaves_frozen_parameters_as_they_are_and_has_no_moments_of_them():
    """Bit for bit, over two steps, of which the second has moments; all others move."""
    config = changed(freeze_layers=1, local__enabled=False)  # it compiles in half the time
    training, mesh = make(config), sharding.make_mesh(config)
    template = step.state_template(training, mesh)
    state = step.init_state(training, template, 0)
    before = golden_model.flat(jax.device_get(state.params))
    train_step = step.compile_step(training, template, mesh)
    for _ in range(2):
        state, _ = train_step(state, sharding.shard_batch(mesh, a_batch()))
    after = golden_model.flat(jax.device_get(state.params))
    moments = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    trained = golden_model.flat(training.trained)
    frozen = [name for name in trained if optim.is_frozen(name, 1)]
    assert {name.split("/")[0] for name in frozen} == {"image_encoder", "text_encoder"}
    for name, value in before.items():
        kept = [moment for moment in moments if moment.endswith(f"/{name}")]
        if trained[name]:
            assert after[name].tobytes() != value.tobytes(), name
            assert len(kept) == 2, kept  # mu and nu
        else:
            assert after[name].tobytes() == value.tobytes(), name
            assert not kept
    assert all(not trained[name] for name in frozen)
