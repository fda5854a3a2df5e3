"""What a run looks at: followed pairs, and measures of a split with masks."""

import dataclasses

import jax
import numpy as np
import pytest

from itself_jax import assessment, sharding, splits, step, watching, workdir
from itself_jax.data import tokenizer
from itself_jax.models import itself, saliency
from tests import tiny

SOURCES = ("mars", "last", "layer:0", "layer:1", "mean", "std")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def config(data):
    return tiny.settings(data, eval__watch=2, eval__batch_size=8)


@pytest.fixture(scope="module")
def model(config):
    """Training, its mesh and untrained variables."""
    training = step.make(config, num_identities=5, steps_per_epoch=(1, 1, 1))
    mesh = sharding.make_mesh(config)
    template = step.state_template(training, mesh)
    state = step.init_state(training, template, 3)
    return training, mesh, {"params": state.params, "batch_stats": state.batch_stats}


@pytest.fixture(scope="module")
def split(config):
    return splits.read(config, "synthetic", "val", lambda line: None)


@pytest.fixture(scope="module")
def looked(config, model, split):
    training, mesh, variables = model
    words = tokenizer.Tokenizer(config.model.text_length)
    truth = splits.masks_of(config, split, lambda line: None)
    with_masks = watching.Watcher(training, variables, mesh, split, words, truth=truth, pairs=2)
    without = watching.Watcher(training, variables, mesh, split, words, pairs=2)
    return with_masks.look(variables), without.look(variables), words


def test_with_and_without_masks_the_same_pairs_look_the_same(looked):
    (pairs, measured), (alone, nothing), _ = looked
    assert nothing == {} and measured
    assert pairs.sources == alone.sources == SOURCES
    for name, value in pairs._asdict().items():
        if name.endswith("entropy"):
            assert value == pytest.approx(getattr(alone, name), rel=1e-5), name
        elif name.endswith("saliency"):
            np.testing.assert_allclose(value, getattr(alone, name), rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(value, getattr(alone, name), name)


def test_the_bank_is_that_of_the_model(config, model, split, looked):
    """What a watcher says is kept is what the model keeps at inference."""
    training, _, variables = model
    (pairs, _), _, words = looked
    chosen = split.pairs(pairs.captions)
    pixels = np.stack([chosen.images.load(i, config.model.image_size) for i in range(2)])
    images = step.prepare_images(jax.numpy.asarray(pixels))
    encoded = training.model.apply(variables, images, method="encode_image")
    at = pairs.sources.index(config.local.inference_saliency)
    np.testing.assert_array_equal(pairs.image_indices[at], encoded.bank.indices)
    ids = jax.numpy.asarray(words.encode_batch(chosen.captions))
    encoded = training.model.apply(variables, ids, method="encode_text")
    np.testing.assert_array_equal(pairs.text_indices[at], encoded.bank.indices)
    np.testing.assert_array_equal(pairs.text_valid[at], encoded.bank.valid)


def test_entropy_is_that_of_the_pooled_row(config, model, split, looked):
    training, _, variables = model
    (pairs, _), _, _ = looked
    chosen = split.pairs(pairs.captions)
    pixels = np.stack([chosen.images.load(i, config.model.image_size) for i in range(2)])
    images = step.prepare_images(jax.numpy.asarray(pixels))
    out = training.model.apply(
        variables, images, method=lambda m, x: m.image_encoder(x, map_layers=(0, 1))
    )
    rows = np.stack([np.asarray(out.attention[layer])[:, 0] for layer in (0, 1)])
    expected = -(rows * np.log(rows)).sum(-1).mean(-1)
    np.testing.assert_allclose(pairs.image_entropy, expected, rtol=1e-5)
    assert (pairs.image_entropy <= np.log(rows.shape[-1]) + 1e-6).all()


def test_entropy_knows_its_ends():
    rows = np.asarray([[1.0, 0, 0, 0], [0.25] * 4], np.float32)
    np.testing.assert_allclose(saliency.entropy(jax.numpy.asarray(rows)), [0, np.log(4)], atol=1e-6)


def test_measures_are_shares_and_the_same_every_time(looked):
    (_, measured), _, _ = looked
    names = {key.split("/")[1] for key in measured}
    assert {"patches_on_person", "patches_on_named", "pointing", "words_on_named"} <= names
    for name in names:
        of = {key.split("/")[2]: x for key, x in measured.items() if key.split("/")[1] == name}
        assert set(of) == {*SOURCES, "chance"}
        assert all(0 <= value <= 1 for value in of.values())


def test_the_batch_size_changes_nothing(config, model, split, looked):
    training, mesh, variables = model
    (pairs, measured), _, words = looked
    small = tiny.settings(config.data_root, eval__watch=2, eval__batch_size=5)
    other = step.make(small, num_identities=5, steps_per_epoch=(1, 1, 1))
    truth = splits.masks_of(config, split, lambda line: None)
    watcher = watching.Watcher(other, variables, mesh, split, words, truth=truth, pairs=2)
    again, same = watcher.look(variables)
    np.testing.assert_array_equal(again.image_indices, pairs.image_indices)
    assert same == pytest.approx(measured)


def test_a_baseline_is_measured_too(data, split):
    """Nothing is selected without a local branch; the encoders look at something all the same."""
    config = tiny.settings(data, local__enabled=False, eval__batch_size=8)
    training = step.make(config, num_identities=5, steps_per_epoch=(1, 1, 1))
    mesh = sharding.make_mesh(config)
    template = step.state_template(training, mesh)
    variables = assessment.encoder_variables(step.init_state(training, template, 3))
    assert not any("grab" in name for name in variables["params"])
    words = tokenizer.Tokenizer(config.model.text_length)
    truth = splits.masks_of(config, split, lambda line: None)
    watcher = watching.Watcher(training, variables, mesh, split, words, truth=truth, pairs=2)
    pairs, measured = watcher.look(variables)
    # At the ratio of inference: int(0.4 * 8) patches, int(0.4 * 14) words.
    assert pairs.image_indices.shape == (6, 2, 3) and pairs.text_indices.shape == (6, 2, 5)
    assert 0 < measured["saliency/patches_on_person/mars"] <= 1


def test_a_source_of_the_run_that_is_no_usual_one_is_looked_at(data):
    config = tiny.settings(data, local__saliency="min_mean", local__mars_layers=(0,))
    sources = itself.attention_sources(config.model, config.local)
    assert tuple(sources) == (*SOURCES, "min_mean")
    assert sources["mars"][0].layers == (0,)


def test_what_was_seen_is_kept_whole_and_read_back(tmp_path, looked):
    (pairs, _), _, _ = looked
    directory = workdir.Workdir(tmp_path / "run")
    watching.save(directory, 3, pairs)
    watching.save(directory, 12, pairs)
    folder = tmp_path / "run" / "saliency"
    whole = (folder / "epoch-003.npz").read_bytes()
    for number, damaged in enumerate((whole[:-100], whole[:50], b"", b"half a fi"), start=20):
        (folder / f"epoch-0{number}.npz").write_bytes(damaged)
    (folder / "notes.txt").write_text("mine")
    found = watching.saved(tmp_path / "run")
    assert list(found) == [3, 12]
    for name, value in found[12]._asdict().items():
        np.testing.assert_array_equal(value, getattr(pairs, name))
    assert watching.saved(tmp_path / "nothing") == {}
    watching.save(workdir.Workdir(tmp_path / "run", writes=False), 5, pairs)
    assert list(watching.saved(tmp_path / "run")) == [3, 12]


def test_pairs_know_whose_they_are(config, split, looked):
    (pairs, _), _, _ = looked
    assert pairs.are_of(split, config.model)
    others = split.pairs(np.arange(len(split.captions))[::-1])
    assert not pairs.are_of(others, config.model)
    assert not pairs.are_of(split.single_caption().pairs([0]), config.model)
    for size in ({"image_size": (48, 16)}, {"text_length": 20}):
        assert not pairs.are_of(split, dataclasses.replace(config.model, **size))


def test_the_first_caption_of_each_of_the_first_people_is_followed(split):
    found = watching.followed(split, 3)
    assert len(set(split.caption_ids[found].tolist())) == 3
    assert (np.diff(found) > 0).all() and found[0] == 0
    assert len(watching.followed(split, 10_000)) == split.num_identities
