"""What is found in a file or a work directory, and what it says of its model."""

import json
import pathlib
import shutil

import numpy as np
import published
import pytest

from itself_jax import checkpoint, dialects, weight_files, weights
from itself_jax import config as config_lib

GOLDEN = pathlib.Path(__file__).parent / "golden"


def opened(path, log=None):
    return weights.open_(path, (lambda line: None) if log is None else log.append)


def state_of(path):
    """The arrays of a published file as nested dicts, as a run would save them."""
    tree = {"params": {}, "batch_stats": {}}
    for name, array in opened(path).arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        values = array.read()
        node[leaf] = values.astype(np.int32 if leaf.endswith("batches") else np.float32)
    return tree


def save(folder, tree, step=3, **meta):
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(step, {"step": np.int32(step), **tree}, meta)


SIZES = {
    "model.patch_size": 8,
    "model.vision_width": 64,
    "model.vision_depth": 2,
    "model.vision_heads": 1,
    "model.text_width": 64,
    "model.text_depth": 2,
    "model.text_heads": 1,
    "model.vocab_size": 64,
    "model.embed_dim": 16,
    "model.activation": "quick_gelu",
    "local.dim": 24,
}


def test_a_published_file_says_its_sizes(tmp_path):
    found = opened(published.write(tmp_path / "best.pth"))
    assert found.sizes == SIZES and found.sizes.keys() == set(weights.SIZES)
    assert found.kind == "torch.save (zip), ITSELF" and found.dialect is dialects.ITSELF
    assert (found.num_identities, found.has_local, found.text_length) == (5, True, 16)
    assert found.meta["epoch"] == 3 and found.meta["iteration"] == 12
    assert found.config is None and found.protocol is None
    assert found.dropped == {} and len(found.names) == len(published.shapes(published.TINY))


def test_a_published_file_without_local_branch(tmp_path):
    found = opened(published.write(tmp_path / "best.pth", local=False))
    assert not found.has_local and found.sizes["local.dim"] is None
    assert found.num_identities == 5


@pytest.mark.parametrize(
    "folder, activation, heads", [("hugging_face", "quick_gelu", 4), ("open_clip", "gelu", 4)]
)
def test_folders_of_other_libraries_say_heads_and_activation(folder, activation, heads):
    log = []
    found = opened(GOLDEN / folder, log)
    assert found.sizes["model.activation"] == activation
    assert found.sizes["model.vision_heads"] == found.sizes["model.text_heads"] == heads
    assert found.sizes["model.vision_width"] == 48 and found.sizes["model.vision_depth"] == 3
    assert (found.num_identities, found.has_local) == (None, False)
    assert set(found.dropped) == {"logit_scale"}
    assert not [line for line in found.notes if "WARNING" in line]


@pytest.mark.parametrize(
    "folder, file, activation",
    [
        ("open_clip", "open_clip_pytorch_model.bin", "quick_gelu"),
        ("hugging_face", "model.safetensors", "quick_gelu"),
    ],
)
def test_a_bare_clip_file_leaves_its_activation_open_and_says_so(
    folder, file, activation, tmp_path
):
    lone = tmp_path / "weights.bin"
    lone.write_bytes((GOLDEN / folder / file).read_bytes())
    found = opened(lone)
    assert found.sizes["model.activation"] == activation
    assert found.sizes["model.vision_heads"] is None  # 48 is no multiple of 64
    (warning,) = [note for note in found.notes if "WARNING" in note]
    assert "model.activation" in warning and "-quickgelu" in warning


def custom_text(path):
    """The golden model of open_clip as a CustomTextCLIP has its names."""
    tensors = weight_files.read(GOLDEN / "open_clip").tensors
    named = {
        name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": tensor
        for name, tensor in tensors.items()
    }
    weight_files.write_torch(path, named, wrap=None)
    return path


def settings_of(folder, **model):
    name = {"open_clip": "open_clip_config.json", "hugging_face": "config.json"}[folder]
    content = json.loads((GOLDEN / folder / name).read_text())
    if folder == "open_clip":
        content["model_cfg"] |= model
    return name, json.dumps(content)


def test_custom_text_towers_are_read_with_their_settings_and_warned_of_without(tmp_path):
    found = opened(custom_text(tmp_path / "open_clip_model.pt"))
    assert found.sizes["model.activation"] == "gelu"
    (warning,) = [note for note in found.notes if "WARNING" in note]
    assert "gelu is taken, as in most models of it" in warning
    name, content = settings_of("open_clip", custom_text=True, quick_gelu=True)
    (tmp_path / name).write_text(content)
    for path in (tmp_path, tmp_path / "open_clip_model.pt"):
        found = opened(path)
        assert found.sizes["model.activation"] == "quick_gelu"
        assert found.sizes["model.vision_heads"] == found.sizes["model.text_heads"] == 4
        assert f"settings from {tmp_path / name}" in found.notes
        assert not [note for note in found.notes if "WARNING" in note]


@pytest.mark.parametrize("kind", ["published", "archive", "other library"])
def test_settings_of_another_library_say_nothing_of_a_lone_file(kind, tmp_path):
    """All sizes agree; only heads and activation would differ."""
    path = tmp_path / "best.pth"
    sizes = published.TINY
    if kind == "other library":
        name, content = settings_of("hugging_face")
        path.write_bytes((GOLDEN / "open_clip" / "open_clip_pytorch_model.bin").read_bytes())
    else:
        arrays = published.state(sizes)
        if kind == "archive":  # OpenAI's own constants
            arrays = {
                name.removeprefix("base_model."): array
                for name, array in arrays.items()
                if name.startswith("base_model.")
            } | {"input_resolution": np.array(1, np.int64)}
        weight_files.write_torch(path, arrays, wrap=None)
        vision = {"patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
        text = {"vocab_size": 64, "width": 64, "layers": 2, "heads": 4}
        name = "open_clip_config.json"
        model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        content = json.dumps({"model_cfg": model})
    alone = opened(path)
    (tmp_path / name).write_text(content)
    found = opened(path)
    assert found.sizes == alone.sizes and found.notes == alone.notes


def test_settings_that_contradict_the_arrays_are_of_another_model(tmp_path):
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
    name, content = settings_of("open_clip", vision_cfg=vision, quick_gelu=True)
    path = tmp_path / "open_clip_pytorch_model.bin"
    path.write_bytes((GOLDEN / "open_clip" / path.name).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(
        weights.WeightsError, match=rf"{name} says model.vision_width=64 and the arrays 48: it is"
    ):
        opened(tmp_path)
    found = opened(path)
    assert found.sizes["model.vision_heads"] is None
    (note,) = [note for note in found.notes if "ignored" in note]
    assert "model.vision_width=64 and the arrays 48" in note
    assert any("which activation" in note for note in found.notes)


def test_settings_of_a_model_that_is_no_plain_clip_are_refused(tmp_path):
    name, content = settings_of("open_clip", init_logit_bias=-10)
    path = tmp_path / "open_clip_pytorch_model.bin"
    path.write_bytes((GOLDEN / "open_clip" / path.name).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(weights.WeightsError, match="says model_cfg=.*init_logit_bias.* no plain"):
        opened(path)


def test_openai_constants_settle_the_activation(tmp_path):
    file = weight_files.read(GOLDEN / "open_clip")
    constants = {
        name: np.array(1, np.int64) for name in ("input_resolution", "context_length", "vocab_size")
    }
    path = tmp_path / "ViT.pt"
    weight_files.write_torch(path, {**file.tensors, **constants}, wrap=None)
    found = opened(path)
    assert found.sizes["model.activation"] == "quick_gelu"
    assert not [note for note in found.notes if "WARNING" in note]


def test_a_work_directory_gives_its_best_checkpoint_and_its_settings(tmp_path):
    tree = state_of(published.write(tmp_path / "best.pth"))
    worse = {**tree, "params": {**tree["params"]}}
    folder = tmp_path / "run" / "checkpoints"
    save(folder, tree, 3, score=2.0, epoch=1, best_alpha=0.3, protocol="paper")
    save(folder, worse, 5, score=1.0, epoch=2, best_alpha=0.5, protocol="paper")
    config = config_lib.replace(
        config_lib.Config(),
        {
            **SIZES,
            "model.vision_heads": 2,
            "model.image_size": (32, 16),
            "model.text_length": 16,
            "num_epochs": 9,
        },
    )
    saved = {"config": config_lib.to_dict(config)}
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    for source in (tmp_path / "run", folder):
        found = opened(source)
        assert found.meta["epoch"] == 1 and found.meta["best_alpha"] == 0.3
        assert (found.meta["iteration"], found.meta["num_epoch"]) == (3, 9)
        assert found.protocol == "paper" and found.dialect is dialects.OURS
        assert found.sizes == {**SIZES, "model.vision_heads": 2}
        assert found.config.model == config.model and found.config.local == config.local
        assert found.num_identities == 5


def test_without_its_configuration_a_checkpoint_leaves_heads_and_activation_open(tmp_path):
    """Two heads of 32 have the shapes of one head of 64."""
    save(tmp_path / "checkpoints", state_of(published.write(tmp_path / "a.pth")), score=1.0)
    found = opened(tmp_path)
    assert found.sizes["model.vision_heads"] is None and found.sizes["model.text_heads"] is None
    assert len(found.notes) == 1 and "WARNING: no config.json says its activation" in found.notes[0]


def test_the_first_checkpoints_do_not_say_their_protocol(tmp_path):
    save(tmp_path / "checkpoints", state_of(published.write(tmp_path / "a.pth")), score=1.0)
    assert opened(tmp_path).protocol == "val"


def test_a_run_before_its_first_validation_has_no_weights(tmp_path):
    save(tmp_path / "checkpoints", state_of(published.write(tmp_path / "a.pth")), score=None)
    with pytest.raises(checkpoint.CheckpointError, match="holds no validated checkpoint"):
        opened(tmp_path)


def a_run(tmp_path, **changes):
    """A work directory whose `config.json` has `changes` such as `model__mystery=1`."""
    save(tmp_path / "run" / "checkpoints", state_of(published.write(tmp_path / "a.pth")), score=1.0)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    sizes = {"model.vision_heads": 2, "model.text_heads": 4, "model.activation": "gelu"}
    made_with = config_lib.replace(
        config_lib.Config(), SIZES | sizes | {"model.image_size": (16, 32)}
    )
    settings = config_lib.to_dict(made_with)
    for key, value in changes.items():
        group, name = key.split(".")
        settings[group][name] = value
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": settings}))
    return tmp_path / "run"


def test_keys_of_another_version_are_left_out_of_a_runs_settings(tmp_path):
    found = opened(a_run(tmp_path, model__mystery=1, local__riddle="x"))
    assert found.sizes["model.vision_heads"] == 2 and found.sizes["model.text_heads"] == 4
    assert found.sizes["model.activation"] == "gelu" and found.config.model.grid == (2, 4)
    (note,) = found.notes
    assert "WARNING" in note and "left out: model.mystery, local.riddle" in note


def test_a_value_of_another_version_costs_a_runs_settings_but_not_its_heads(tmp_path):
    found = opened(a_run(tmp_path, local__inference_saliency="oracle"))
    assert found.sizes["model.vision_heads"] == 2 and found.sizes["model.text_heads"] == 4
    assert found.sizes["model.activation"] == "gelu" and found.config is None
    (note,) = found.notes
    assert "'oracle' is no saliency source" in note


@pytest.mark.parametrize("heads", ["two", 0, None, [2]])
def test_heads_that_are_no_number_are_not_taken(heads, tmp_path):
    found = opened(a_run(tmp_path, model__vision_heads=heads))
    assert found.sizes["model.vision_heads"] is None
    assert any("vision_heads" in note for note in found.notes)


def test_a_checkpoint_alone_is_not_what_is_given(tmp_path):
    run = a_run(tmp_path)
    step = run / "checkpoints" / "3"
    with pytest.raises(
        weights.WeightsError, match=rf"{step} is one checkpoint of {step.parent}: give that folder"
    ):
        opened(step)


@pytest.mark.parametrize("name", ["checkpoints", "config.json"])
def test_a_work_directory_without_a_checkpoint_is_called_so(name, tmp_path):
    run = a_run(tmp_path)
    shutil.rmtree(run / "checkpoints")
    if name == "checkpoints":
        (run / "config.json").unlink()
        (run / "checkpoints").mkdir()
    given = [run, run / "checkpoints"] if name == "checkpoints" else [run]
    for path in given:
        with pytest.raises(
            weights.WeightsError, match=rf"{run} is a work directory .* without a checkpoint: train"
        ):
            opened(path)
    published.write(run / "best.pth")  # somebody keeps weights there
    assert opened(run).kind == "torch.save (zip), ITSELF"


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(weight_files.WeightFileError, match=str(tmp_path)):
        opened(tmp_path)
    with pytest.raises(weight_files.WeightFileError, match="missing.pth"):
        opened(tmp_path / "missing.pth")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"base_model__token_embedding__weight": None},
            r"are those of no model|base_model\.token_embedding\.weight is missing",
        ),
        (
            {"base_model__visual__proj": np.zeros(16, np.float32)},
            r"base_model\.visual\.proj has shape \[16\], not 2 axes",
        ),
        (
            {"base_model__visual__conv1__weight": np.zeros((64, 3, 8, 4), np.float32)},
            "patches of 8x4 pixels",
        ),
        (
            {"base_model__visual__extra": np.zeros(3, np.float32)},
            r"base_model\.visual\.extra \[3\]",
        ),
    ],
)
def test_what_the_sizes_are_read_from_must_be_there(tmp_path, change, message):
    path = published.write(tmp_path / "best.pth", **change)
    with pytest.raises(weights.WeightsError, match=message) as caught:
        opened(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_an_error_naming_the_array(tmp_path, value):
    bad = published.state()["classifier_grab.bias"].astype(np.float16)
    bad[2:4] = value
    found = opened(published.write(tmp_path / "best.pth", classifier_grab__bias=bad))
    name = "params/local_heads/pair_classifier/bias"
    with pytest.raises(
        weights.WeightsError, match=r"classifier_grab\.bias holds 2 values that are"
    ):
        weights.read(found, name, found.arrays[name])


def test_whole_numbers_are_no_weights(tmp_path):
    bad = np.zeros(6, np.int64)
    found = opened(published.write(tmp_path / "best.pth", classifier_grab__bias=bad))
    name = "params/local_heads/pair_classifier/bias"
    with pytest.raises(weights.WeightsError, match=r"classifier_grab\.bias holds int64"):
        weights.read(found, name, found.arrays[name])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_every_type_becomes_float32(tmp_path, dtype):
    import ml_dtypes

    stored = published.state()["classifier_grab.bias"].astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    found = opened(published.write(tmp_path / "best.pth", classifier_grab__bias=stored))
    name = "params/local_heads/pair_classifier/bias"
    values = weights.read(found, name, found.arrays[name])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, stored.astype(np.float32))


def test_classifiers_must_agree_on_the_classes(tmp_path):
    bad = np.zeros((9, 24), np.float32)
    path = published.write(tmp_path / "best.pth", classifier_grab__weight=bad)
    with pytest.raises(weights.WeightsError, match="disagree on the number of classes, 6, 9"):
        opened(path)


@pytest.mark.parametrize("value", [7.5, np.nan, -1.0, 2.0**40])
def test_counts_are_whole_numbers_in_range(tmp_path, value):
    name = "visul_emb_layer__mlp__bns__0__num_batches_tracked"
    found = opened(published.write(tmp_path / "best.pth", **{name: np.array(value)}))
    path = "batch_stats/image_grab/norm/batches"
    with pytest.raises(weights.WeightsError, match="not a number of batches"):
        weights.read(found, path, found.arrays[path])


def test_the_protocol_of_a_run_travels_and_of_others_is_not_made_up(tmp_path):
    found = opened(published.write(tmp_path / "best.pth"))
    assert found.protocol is None
    described = weights.describe(
        found._replace(meta={**found.meta, "protocol": "paper"}), config_lib.Config()
    )
    path = tmp_path / "again.npz"
    weight_files.write_npz(path, published.state(), metadata={"itself_jax": json.dumps(described)})
    assert opened(path).protocol == "paper"


def test_a_broken_description_is_named(tmp_path):
    path = tmp_path / "best.pth"
    weight_files.write_torch(path, published.state(), extra={"itself_jax": "{heads"})
    with pytest.raises(weights.WeightsError, match="field 'itself_jax' is '{heads'"):
        opened(path)


def test_what_a_layout_cannot_say_is_described_beside_it(tmp_path):
    found = opened(published.write(tmp_path / "best.pth"))
    config = config_lib.replace(
        config_lib.Config(),
        {
            **SIZES,
            "model.vision_heads": 4,
            "model.activation": "gelu",
            "model.image_size": (32, 16),
            "local.inference_saliency": "mars",
        },
    )
    described = weights.describe(found._replace(config=config), config)
    path = tmp_path / "again.safetensors"
    note = {weights.DESCRIPTION: json.dumps(described)}
    weight_files.write_safetensors(path, published.state(), metadata=note)
    again = opened(path)
    assert again.sizes["model.vision_heads"] == 4 and again.sizes["model.activation"] == "gelu"
    assert again.config.model.image_size == (32, 16)
    assert again.config.local.inference_saliency == "mars"
    assert again.meta["epoch"] == 3
