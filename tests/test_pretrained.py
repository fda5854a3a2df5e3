"""The main job with weights of other programs: start from them, evaluate them, go on, go back."""

import json
import pathlib

import numpy as np
import published
import pytest
import tiny

from itself_jax import (
    assessment,
    checkpoint,
    converting,
    evaluate,
    interrupt,
    retrieval,
    splits,
    train,
    weights,
    workdir,
)

# The pictures of tests/tiny.py: 32x16, patches of 8. All other sizes are the weights' own.
SIZES = published.TINY._replace(vocab=49408)


def quiet(line):
    del line


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    tiny.compile_once(monkeypatch)
    monkeypatch.setattr(converting, "_probe", lambda source: [])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.shared(tmp_path_factory) / "data"


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("published") / "best.pth", SIZES)


def settings(data, source, **changes):
    return tiny.settings(data, init_from=str(source), **changes)


def state(path, step):
    """Parameters and statistics of a checkpoint under the names of weights."""
    with checkpoint.Checkpoints(path / "checkpoints", log=quiet) as checkpoints:
        found = checkpoints.restore_best(("params", "batch_stats"))
    assert found.step == step
    return weights.flat(found.state)


def test_training_starts_from_a_published_file(data, best, tmp_path, capsys):
    """After an epoch every weight is still near what the file holds."""
    config = settings(data, best, last_epoch=1)
    path = tiny.run(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "knows 5 identities, this run has others: the classifiers start anew." in out
    saved = json.loads((path / "config.json").read_text())["config"]
    assert saved["model"]["vision_width"] == 64 and saved["model"]["embed_dim"] == 16
    assert saved["local"]["dim"] == 24 and saved["model"]["activation"] == "quick_gelu"
    found, after = weights.open_(best, quiet), state(path, tiny.EPOCH_ENDS[0])
    assert after.keys() == found.arrays.keys()
    for name, array in after.items():
        if "_classifier/" in name or name.startswith("batch_stats/"):
            continue
        # Five steps at rates of 1e-3, twice that for biases; the file's values spread by 0.1.
        np.testing.assert_allclose(array, found.arrays[name].read(), atol=0.02, err_msg=name)
    norm = "batch_stats/image_grab/norm"
    assert after[f"{norm}/batches"] == 7 + tiny.EPOCH_ENDS[0]
    assert np.abs(after[f"{norm}/mean"] - found.arrays[f"{norm}/mean"].read()).max() > 1e-3
    unused = "batch_stats/text_grab/unused_norm_mean"
    np.testing.assert_array_equal(after[unused], found.arrays[unused].read())
    # Evaluating the same command's directory means the run, not what it started from.
    results = tiny.results(path)
    assessment.evaluate_only(config, path, interrupt.Interrupts())
    out = capsys.readouterr().out
    epoch = json.loads((path / "finished.json").read_text())["best_epoch"]
    assert f"Testing epoch {epoch} of {path}." in out and tiny.results(path) == results


@pytest.mark.slow
def test_a_run_goes_on_without_the_file_it_started_from(data, best, tmp_path):
    lent = tmp_path / "lent.pth"
    lent.write_bytes(best.read_bytes())
    config = settings(data, lent)
    reference = tiny.run(config, tmp_path / "reference")
    with pytest.raises(interrupt.Interrupted):
        train.run(config, tmp_path / "run", tiny.StopAt(9))
    lent.unlink()
    tiny.run(config, tmp_path / "run")
    tiny.assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_changed_source_is_another_run(data, best, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(interrupt.Interrupted):
        train.run(settings(data, best), path, tiny.StopAt(9))
    other = published.write(tmp_path / "other.pth", SIZES, seed=1)
    with pytest.raises(Exception, match="init_from was"):
        tiny.run(settings(data, other), path)


def goes_on_as(config, directory, log):
    """What `train.run` compares with the saved configuration."""
    start = train.start_from(config, directory, log.append)
    directory.claim(start.config, "float32", log.append)
    return start


@pytest.fixture
def started(data, tmp_path):
    """The directory of a run that has just begun, from given weights and with changes."""

    def start(source, **changes):
        directory = workdir.Workdir(tmp_path / "run")
        begun = goes_on_as(settings(data, source, **changes), directory, [])
        directory.describe(begun.config, "float32", begun.sizes_from_weights)
        return directory, begun

    return start


def test_a_run_that_goes_on_keeps_the_sizes_that_came_from_the_weights(started, data, best):
    directory, begun = started(best)
    assert set(begun.sizes_from_weights) == set(weights.SIZES)
    log = []
    other = settings(data, best, local__dim=48, model__vision_heads=4, model__text_depth=1)
    assert goes_on_as(other, directory, log).config == begun.config
    (line,) = log
    assert "local.dim=24 (was 48)" in line and "model.vision_heads=1 (was 4)" in line


def test_a_size_that_was_the_runs_own_is_refused_when_it_changes(started, data, tmp_path):
    source = published.write(tmp_path / "global.pth", SIZES, local=False)
    directory, begun = started(source, local__dim=24, model__activation="gelu")
    assert "local.dim" not in begun.sizes_from_weights
    same = settings(data, source, local__dim=24, model__activation="gelu", model__text_heads=4)
    assert goes_on_as(same, directory, []).config == begun.config
    with pytest.raises(workdir.WorkdirError, match=r"local\.dim was 24, now 48"):
        goes_on_as(settings(data, source, local__dim=48, model__activation="gelu"), directory, [])
    with pytest.raises(workdir.WorkdirError, match=r"model\.activation was 'gelu', now None"):
        goes_on_as(settings(data, source, local__dim=24), directory, [])


def test_heads_that_the_weights_did_not_say_are_the_runs_own(started, data, tmp_path):
    """A checkpoint without its `config.json`."""
    found = weights.open_(published.write(tmp_path / "best.pth", SIZES), quiet)
    tree = {}
    for name, array in found.arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = weights.read(found, name, array)
    with checkpoint.Checkpoints(tmp_path / "source", log=quiet) as checkpoints:
        checkpoints.save(1, tree, {"score": 1.0})
    known = {"model__vision_width": 64, "model__text_width": 64, "model__text_heads": 4}
    directory, begun = started(tmp_path / "source", model__vision_heads=2, **known)
    assert begun.config.model.vision_heads == 2
    assert {"model.vision_heads", "model.text_heads"}.isdisjoint(begun.sizes_from_weights)
    with pytest.raises(workdir.WorkdirError, match=r"model\.vision_heads was 2, now 8"):
        other = settings(data, tmp_path / "source", model__vision_heads=8, **known)
        goes_on_as(other, directory, [])


@pytest.mark.slow
def test_the_baseline_starts_from_a_whole_model(data, best, tmp_path, capsys):
    path = tiny.run(settings(data, best, local__enabled=False, last_epoch=1), tmp_path / "run")
    assert "its local branch is left out" in capsys.readouterr().out
    assert not any("grab" in name for name in state(path, tiny.EPOCH_ENDS[0]))


@pytest.mark.slow
def test_training_adds_a_local_branch_to_a_clip(data, tmp_path, capsys):
    source = published.write(tmp_path / "global.pth", SIZES, local=False)
    config = settings(data, source, local__dim=SIZES.local, last_epoch=1)
    path = tiny.run(config, tmp_path / "run")
    assert "start from random numbers: the file has no local branch." in capsys.readouterr().out
    assert any("grab" in name for name in state(path, tiny.EPOCH_ENDS[0]))


def test_evaluation_chooses_alpha_on_val_and_says_whose_epoch_it_is(data, best, tmp_path, capsys):
    config = settings(data, best)
    assessment.evaluate_only(config, tmp_path / "run", interrupt.Interrupts())
    out = capsys.readouterr().out
    found = tiny.results(tmp_path / "run")
    assert f"The fusion weight α = {found['chosen_alpha']:g} is chosen on val." in out
    assert f"Testing epoch 3 of {best} (torch.save (zip), ITSELF; who trained it chose" in out
    assert found["protocol"] == "val" and len(found["rows"]) == 26
    config = settings(data, best, eval__alpha=0.35)
    assessment.evaluate_only(config, tmp_path / "fixed", interrupt.Interrupts())
    fixed = tiny.results(tmp_path / "fixed")
    assert fixed["chosen_alpha"] == 0.35 and "is chosen on" not in capsys.readouterr().out
    assert [r for r in fixed["rows"] if r["similarity"] != "fused@0.35"] == found["rows"]


def test_the_paper_protocol_chooses_alpha_on_test(data, best, tmp_path, capsys):
    config = settings(data, best, eval__protocol="paper")
    assessment.evaluate_only(config, tmp_path / "run", interrupt.Interrupts())
    found = tiny.results(tmp_path / "run")
    rows = [row for row in found["rows"] if row["direction"] == "t2i"]
    chosen = next(
        row for row in rows if row["similarity"] == retrieval.similarity_name(found["chosen_alpha"])
    )
    assert chosen["R1"] == max(row["R1"] for row in rows)
    assert found["protocol"] == "paper" and "is chosen on test." in capsys.readouterr().out


def test_a_clip_is_evaluated_by_its_global_embedding_alone(data, tmp_path, capsys):
    source = published.write(tmp_path / "global.pth", SIZES, local=False)
    assessment.evaluate_only(settings(data, source), tmp_path / "run", interrupt.Interrupts())
    assert "global embedding alone is evaluated" in capsys.readouterr().out
    found = tiny.results(tmp_path / "run")
    assert {row["similarity"] for row in found["rows"]} == {"global"}
    assert found["chosen_alpha"] == 1.0


def test_evaluation_and_the_library_embed_alike(data, best, tmp_path):
    """The dumped embeddings of the command against `load` on the same files and sentences."""
    import itself_jax

    config = settings(data, best, eval__dump_embeddings=True, eval__alpha=0.5)
    assessment.evaluate_only(config, tmp_path / "run", interrupt.Interrupts())
    with np.load(tmp_path / "run" / "embeddings-synthetic-test.npz") as file:
        dumped = dict(file)
    model = itself_jax.load(best, image_size=(32, 16), batch_size=8, log=quiet)
    split = splits.read(config, "synthetic", "test", quiet)
    pictures = [split.images.name(i) for i in range(len(split.image_paths))]
    for side, embedding in (
        ("image", model.encode_image(pictures)),
        ("text", model.encode_text(split.captions)),
    ):
        for part, array in (("global", embedding.global_), ("local", embedding.local)):
            np.testing.assert_allclose(array, dumped[f"{side}_{part}"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_to_the_published_layout_and_back(data, tmp_path):
    """Its best checkpoint as float32 `.pth`: the same table, settings included."""
    config = tiny.settings(data, local__inference_saliency="mars", local__ratio=0.6)
    path = tiny.run(config, tmp_path / "run")
    converting.write(converting.examine(path, quiet), tmp_path / "a.pth", quiet, dtype="float32")
    again = weights.open_(tmp_path / "a.pth", quiet)
    assert again.meta["best_alpha"] == tiny.results(path)["chosen_alpha"]
    assert again.config.local.inference_saliency == "mars"
    # Heads and widths of the file, although the configuration has others.
    other = settings(
        data,
        tmp_path / "a.pth",
        model__vision_heads=1,
        local__inference_saliency="mars",
        local__ratio=0.6,
    )
    assessment.evaluate_only(other, tmp_path / "again", interrupt.Interrupts())
    expected = tiny.results(path)
    for row, wanted in zip(tiny.results(tmp_path / "again")["rows"], expected["rows"], strict=True):
        assert row["similarity"] == wanted["similarity"]
        for name in evaluate.METRICS:
            assert row[name] == pytest.approx(wanted[name], abs=1e-3)


@pytest.mark.parametrize("run", [train.run, assessment.evaluate_only])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.write_text("<!DOCTYPE html><html>sign in</html>"), "web page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git.lfs"),
        (
            lambda path: published.write(path, SIZES, base_model__ln_final__bias=None),
            "ln_final.bias",
        ),
        (lambda path: published.write(path, SIZES._replace(patch=64)), "no patch of 64 pixels"),
        (lambda path: published.write(path, published.TINY), "vocab_size=64"),
    ],
    ids=["html", "lfs", "incomplete", "patch", "vocabulary"],
)
def test_weights_that_cannot_be_used_stop_before_anything_is_written(
    run, make, message, data, tmp_path
):
    path = tmp_path / "best.pth"
    make(path)
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(settings(data, path), tmp_path / "run", interrupt.Interrupts())
    assert not list(pathlib.Path(tmp_path).glob("run/*"))


def test_the_command_evaluates_a_published_file(data, best, tmp_path):
    done = tiny.call(
        f"--config.data_root={data}",
        f"--config.init_from={best}",
        "--config.eval.alpha=0.5",
        f"--workdir={tmp_path / 'run'}",
        "--mode=eval",
    )
    assert done.returncode == 0, done.stderr
    assert tiny.results(tmp_path / "run")["chosen_alpha"] == 0.5
    done = tiny.call(
        f"--config.data_root={data}", f"--config.init_from={tmp_path / 'none'}",
        f"--workdir={tmp_path / 'other'}",
    )  # fmt: skip
    assert done.returncode == 1 and str(tmp_path / "none") in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
