"""The loop in this process: order, resume to the bit, faults, and what a run leaves behind."""

import collections
import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from tensorboardX.proto import event_pb2

from itself_jax import (
    assessment,
    checkpoint,
    evaluate,
    interrupt,
    meter,
    retrieval,
    sharding,
    splits,
    step,
    train,
    weight_files,
    workdir,
)
from itself_jax import config as config_lib
from itself_jax.data import batch as batch_lib
from itself_jax.data import pipeline, records

# Checks for a signal in one uninterrupted run: 1 before the first step, 1 a step, and 1 for each
# of the three batches of a validation or of the test.
CHECKS = 1 + 16 + 3 * 3 + 3


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tiny.shared(tmp_path_factory)


@pytest.fixture(scope="module")
def data(shared):
    return shared / "data"


@pytest.fixture
def fast(monkeypatch):
    tiny.compile_once(monkeypatch)


@pytest.fixture(scope="module")
def reference(data, shared):
    """An uninterrupted run."""
    return tiny.run(tiny.settings(data), shared / "reference")


@pytest.fixture
def copy(reference, tmp_path):
    """The reference run as it was before its last epoch's end was judged."""
    path = tmp_path / "copy"
    shutil.copytree(reference, path)
    (path / "finished.json").unlink()
    return path


def stop(config, path, nth):
    with pytest.raises(interrupt.Interrupted):
        train.run(config, path, tiny.StopAt(nth))


def contents(path):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in path.rglob("*") if p.is_file()}


# --- what a run leaves behind ---------------------------------------------------------------------


def test_metrics_hold_each_step_and_each_validation_once(reference):
    lines = tiny.metrics(reference)
    steps = [line["step"] for line in lines if "split" not in line]
    assert steps == list(range(1, 17))
    for line in lines:
        if "split" in line:
            assert line.keys() == {"step", "epoch", "split", "alpha", *evaluate.METRICS}
            assert line["split"] == "val"
        else:
            assert line.keys() == tiny.TRAIN_KEYS
            assert all(math.isfinite(value) for value in line.values())
            assert line["loss"] == pytest.approx(line["loss_tal"] + line["loss_cid"], rel=1e-6)
    assert [line["step"] for line in lines if "split" in line] == list(tiny.EPOCH_ENDS)
    # A validation's line comes after those of its epoch, before the next epoch's.
    assert [line["epoch"] for line in lines] == [1] * 6 + [2] * 7 + [3] * 6


def test_the_learning_rate_warms_up_from_a_tenth_and_then_follows_a_cosine(reference):
    rates = {line["epoch"]: line["learning_rate"] for line in tiny.train_lines(reference)}
    assert rates[1] == pytest.approx(1e-4)
    assert rates[2] == pytest.approx(1e-3)
    assert rates[3] == pytest.approx(5e-4)


def test_results_follow_the_contract_and_name_the_oracle(reference):
    found = tiny.results(reference)
    assert found.keys() == {
        *("dataset", "split", "queries", "gallery", "protocol", "chosen_alpha", "rows"),
        *("skipped_queries", "captions", "oracle_R1", "chance_R1", "weights"),
    }
    best = json.loads((reference / "finished.json").read_text())["best_epoch"]
    (step,) = (x["step"] for x in tiny.metrics(reference) if "split" in x and x["epoch"] == best)
    assert found["weights"] == {"source": None, "step": step}
    assert (found["dataset"], found["split"], found["protocol"]) == ("synthetic", "test", "val")
    assert (found["queries"], found["gallery"]) == (24, 12)
    assert 0 < found["oracle_R1"] <= 100
    names = ["global", "local", *(f"fused@{a:g}" for a in retrieval.FUSION_ALPHAS)]
    for direction in ("t2i", "i2t"):
        rows = [row for row in found["rows"] if row["direction"] == direction]
        assert [row["similarity"] for row in rows] == names
        assert all(set(evaluate.METRICS) < row.keys() for row in rows)


def resolved(config):
    """As `config.json` holds it: with the activation that is meant."""
    return config_lib.to_dict(config_lib.replace(config, {"model.activation": "quick_gelu"}))


def test_config_json_holds_settings_versions_device_and_revision(reference, data):
    saved = json.loads((reference / "config.json").read_text())
    assert saved["config"] == resolved(tiny.settings(data))
    assert {"jax", "flax", "orbax-checkpoint", "numpy", "python"} <= saved["versions"].keys()
    assert saved["device"] == f"8 x {jax.devices()[0].device_kind}"
    assert re.fullmatch(r"[0-9a-f]{40}", saved["git_revision"])


def test_tensorboard_events_hold_every_logged_number(reference):
    found = {}
    for file in (reference / "tensorboard").glob("events.out.tfevents.*"):
        content = file.read_bytes()
        while content:  # length, its checksum, event, its checksum
            size = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    for line in tiny.metrics(reference):
        prefix = line.get("split", "train")
        for name in line.keys() - {"step", "epoch", "split"}:
            assert found.pop((f"{prefix}/{name}", line["step"])) == pytest.approx(line[name])
    assert not found


def test_the_best_epoch_and_the_last_two_checkpoints_are_kept(reference):
    scores = {line["step"]: line["R1"] for line in tiny.metrics(reference) if "split" in line}
    best = max(scores, key=lambda at: (scores[at], -at))
    kept = {int(p.name) for p in (reference / "checkpoints").iterdir()}
    assert kept == {best, 11, 16}
    assert json.loads((reference / "finished.json").read_text())["best_epoch"] == (
        tiny.EPOCH_ENDS.index(best) + 1
    )


def test_a_finished_run_says_so_and_stays_as_it_is(fast, reference, data, capsys, monkeypatch):
    before = contents(reference)
    monkeypatch.setattr(step, "compile_step", None)  # it must not come that far
    tiny.run(tiny.settings(data), reference)
    assert "is finished (best epoch" in capsys.readouterr().out
    tiny.run(tiny.settings(data, log_every=5), reference)
    assert contents(reference) == before


def test_the_loss_falls_when_the_same_pairs_come_again(fast, data, tmp_path, monkeypatch):
    order = pipeline.epoch_order
    monkeypatch.setattr(
        pipeline, "epoch_order", lambda *args, **kwargs: np.tile(order(*args, **kwargs), 8)
    )
    config = tiny.settings(data, augment__image=False, augment__text=False)
    losses = [line["loss"] for line in tiny.train_lines(tiny.run(config, tmp_path / "run"))]
    assert len(losses) == 8 * 16
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]), losses


# --- one compilation, no hidden transfer, no hidden wait ------------------------------------------


def test_one_compilation_of_step_and_encoders_serves_a_run_with_ats(data, tmp_path, monkeypatch):
    traces = collections.Counter()

    def counting(name):
        traced = getattr(step.Training, name)

        @functools.wraps(traced)  # the name is part of the key under which programs are kept
        def wrapper(self, *args):
            traces[name] += 1
            return traced(self, *args)

        monkeypatch.setattr(step.Training, name, wrapper)

    for name in ("step", "encode_images", "encode_captions"):
        counting(name)
    path = tiny.run(tiny.settings(data), tmp_path / "run")
    # Captions have two lengths.
    assert traces == {"step": 1, "encode_images": 1, "encode_captions": 2}
    assert len({line["bank_image"] for line in tiny.train_lines(path)}) > 1
    assert len({line["bank_text"] for line in tiny.train_lines(path)}) > 1


def test_nothing_compiles_once_the_steps_of_an_epoch_have_begun(
    fast, data, tmp_path, monkeypatch, caplog
):
    compilations = []
    epoch_starts = {0, *tiny.EPOCH_ENDS}
    record = meter.Meter.record

    def counting(self, metrics):
        found = [r for r in caplog.records if "Compiling" in r.getMessage()]
        if self.step not in epoch_starts:
            compilations.extend(r.getMessage()[:100] for r in found)
        record(self, metrics)
        caplog.clear()

    monkeypatch.setattr(meter.Meter, "record", counting)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        jax.jit(lambda x: x + 1)(np.float32(1))
        assert any("Compiling" in r.getMessage() for r in caplog.records)
        caplog.clear()
        tiny.run(tiny.settings(data, eval__chunk_mb=63), tmp_path / "run")
    assert compilations == []


@pytest.mark.parametrize("planted", ["batch", "argument"])
def test_an_implicit_transfer_into_the_step_is_an_error(fast, data, tmp_path, monkeypatch, planted):
    if planted == "batch":
        shard = sharding.shard_batch

        def forgetful(mesh, batch):
            placed = shard(mesh, batch)
            if not isinstance(batch, batch_lib.Batch):
                return placed
            return placed._replace(pids=np.asarray(batch.pids))

        monkeypatch.setattr(sharding, "shard_batch", forgetful)
    else:
        record = meter.Meter.record

        def computing(self, metrics):
            record(self, metrics._replace(loss=metrics.loss * 2))  # 2 is moved to the device

        monkeypatch.setattr(meter.Meter, "record", computing)
    with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
        tiny.run(tiny.settings(data), tmp_path / "run")


@pytest.mark.parametrize(
    "log_every", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 100))]
)
def test_the_host_reads_results_only_for_log_lines_and_at_epoch_ends(
    fast, data, tmp_path, monkeypatch, log_every
):
    reads = []
    read = meter.read_metrics
    get = jax.device_get
    inside = []

    def counting(metrics):
        reads.append(len(metrics))
        inside.append(True)
        try:
            return read(metrics)
        finally:
            inside.pop()

    def guarded(tree):
        leaves = jax.tree.leaves(tree)
        # An evaluation reads arrays; the results of a step are scalars.
        assert inside or all(leaf.ndim for leaf in leaves)
        return get(tree)

    monkeypatch.setattr(meter, "read_metrics", counting)
    monkeypatch.setattr(jax, "device_get", guarded)
    path = tiny.run(tiny.settings(data, log_every=log_every), tmp_path / "run")
    assert sum(reads) == 16
    assert len(reads) <= 16 // log_every + len(tiny.EPOCH_ENDS)
    logged = [line["step"] for line in tiny.train_lines(path)]
    assert logged == list(range(log_every, 17, log_every))


def test_a_log_line_leaves_the_newest_step_unread(fast, data, tmp_path, monkeypatch):
    """Else the device would have nothing to do while the host writes."""
    record = meter.Meter.record
    unread = []

    def watching(self, metrics):
        record(self, metrics)
        unread.append(len(self._pending))

    monkeypatch.setattr(meter.Meter, "record", watching)
    tiny.run(tiny.settings(data, log_every=2), tmp_path / "run")
    assert min(unread) >= 1


# --- resume ---------------------------------------------------------------------------------------


def test_a_run_stopped_in_every_phase_ends_as_if_never_stopped(
    fast, reference, data, tmp_path, capsys
):
    config, path = tiny.settings(data), tmp_path / "run"
    stop(config, path, 4)  # after step 2, in the first epoch
    assert int(tiny.newest(path).name) == 2
    assert "Stopped by a signal at step 2, saved" in capsys.readouterr().out
    assert [line["step"] for line in tiny.metrics(path)] == [1, 2]
    stop(config, path, 1 + 3 + 2)  # steps 3 to 5, then the second batch of the validation
    assert tiny.document(tiny.newest(path))["meta"]["validated"] is False
    stop(config, path, 1 + 3 + 6 + 3)  # validation, epoch 2, the last batch of its validation
    assert int(tiny.newest(path).name) == 11
    stop(config, path, 1 + 3 + 1)  # right after that validation: step 11 is saved a second time
    assert tiny.document(tiny.newest(path))["meta"]["validated"] is True
    stop(config, path, 1 + 5 + 3 + 2)  # the second batch of the test
    assert not (path / "results").exists()
    tiny.run(config, path)
    assert "Going on at step 16, after epoch 3." in capsys.readouterr().out
    tiny.assert_same_run(path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(1, CHECKS + 1))
def test_a_run_stopped_anywhere_ends_as_if_never_stopped(fast, reference, data, tmp_path, nth):
    config, path = tiny.settings(data), tmp_path / "run"
    stop(config, path, nth)
    tiny.run(config, path)
    tiny.assert_same_run(path, reference)


@pytest.mark.slow
def test_an_uninterrupted_run_checks_for_signals_as_often_as_assumed(fast, data, tmp_path):
    config = tiny.settings(data)
    stop(config, tmp_path / "run", CHECKS)
    train.run(config, tmp_path / "run", tiny.StopAt(1 + 3 + 1))  # only the test was left


def test_an_interrupted_epoch_gets_no_score_of_an_earlier_one(fast, data, tmp_path):
    """Else a half-trained epoch with the older epoch's score could become the best checkpoint."""
    config, path = tiny.settings(data), tmp_path / "run"
    stop(config, path, 1 + 5 + 3 + 2 + 1)
    meta = tiny.document(tiny.newest(path))["meta"]
    assert int(tiny.newest(path).name) == 7
    assert (meta["epoch"], meta["score"]) == (1, None)
    assert meta["best_score"] is not None and meta["best_epoch"] == 1


def test_a_damaged_newest_checkpoint_is_named_and_the_older_one_used(
    fast, reference, data, copy, capsys
):
    damage(tiny.newest(copy))
    tiny.run(tiny.settings(data), copy)
    out = capsys.readouterr().out
    assert re.search(r"checkpoints/16 \(step 16\) is damaged, skipped", out)
    assert "restored step 11 instead" in out
    assert "Going on at step 11, after epoch 2." in out
    tiny.assert_same_run(copy, reference)


def test_when_all_checkpoints_are_damaged_the_run_stops_and_renames_none(fast, data, copy):
    for folder in (copy / "checkpoints").iterdir():
        damage(folder)
    before = sorted(p.name for p in (copy / "checkpoints").iterdir())
    with pytest.raises(checkpoint.CheckpointError, match="all [23] checkpoints .* are damaged"):
        tiny.run(tiny.settings(data), copy)
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == before


def damage(folder):
    """Flips one bit of the largest array file, which Orbax alone would restore silently."""
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def test_lines_beyond_the_restored_step_and_half_a_line_are_cut(fast, reference, data, tmp_path):
    config, path = tiny.settings(data), tmp_path / "run"
    stop(config, path, 9)
    with (path / "metrics.jsonl").open("a") as file:
        for at in (5, 6, 7):
            file.write(json.dumps({"step": at, "epoch": 1, "loss": -1.0}) + "\n")
        file.write(json.dumps({"step": 5, "epoch": 1, "split": "val", "R1": -1.0}) + "\n")
        file.write('{"step": 8, "epo')
    # Saved at step 5, before its validation: its own line stays, the rest goes.
    (path / "metrics.jsonl").write_text(
        (path / "metrics.jsonl").read_text().replace('{"step": 5, "epoch": 1, "loss": -1.0}\n', "")
    )
    tiny.run(config, path)
    tiny.assert_same_run(path, reference)


@pytest.mark.slow
def test_two_workers_feed_the_same_run_as_none(fast, reference, data, tmp_path):
    path = tiny.run(tiny.settings(data, num_workers=2), tmp_path / "run")
    tiny.assert_same_run(path, reference)


# --- faults ---------------------------------------------------------------------------------------


def test_a_diverged_run_names_step_and_pictures_and_keeps_the_last_good_state(
    fast, reference, data, tmp_path, monkeypatch
):
    compile_step = step.compile_step

    def poisoned(training, template, mesh):
        compiled = compile_step(training, template, mesh)

        def stepping(state, batch):
            at = int(jax.device_get(state.step)) + 1
            state, metrics = compiled(state, batch)
            if at == 8:
                nan = jax.device_put(np.float32(np.nan))
                metrics = metrics._replace(loss=nan)
                state = state._replace(params=jax.device_put(poison(state.params)))
            return state, metrics

        return stepping

    def poison(params):
        return jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), params)

    monkeypatch.setattr(step, "compile_step", poisoned)
    config, path = tiny.settings(data, log_every=4), tmp_path / "run"
    with pytest.raises(meter.NonFiniteLossError, match=r"Step 8: the loss is nan .*step-8\.json"):
        tiny.run(config, path)
    written = json.loads((path / "nonfinite-step-8.json").read_text())
    stream = stream_of(config)
    assert written["images"] == stream.paths(7)
    assert (written["step"], written["epoch"], written["loss"]) == (8, 2, "nan")
    assert all(pathlib.Path(image).is_file() for image in written["images"])
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["5"]
    assert max(line["step"] for line in tiny.metrics(path)) < 8
    monkeypatch.setattr(step, "compile_step", compile_step)
    tiny.run(config, path)  # the good state goes on
    assert tiny.results(path) == tiny.results(reference)


def stream_of(config):
    split = splits.read(config, "synthetic", "train", print)
    return pipeline.TrainStream(
        split,
        train.tokenizer.Tokenizer(config.model.text_length),
        image_size=config.model.image_size,
        batch_size=config.batch_size,
        num_instances=config.num_instances,
        num_epochs=config.num_epochs,
        seed=config.seed,
        augment_image=config.augment.image,
        augment_caption=config.augment.text,
        augment_pad=config.augment.pad,
    )


@pytest.mark.slow
def test_a_learning_rate_far_too_large_stops_the_run_before_a_checkpoint(fast, data, tmp_path):
    config = tiny.settings(data, optim__learning_rate=1e30, optim__local_learning_rate=1e30)
    with pytest.raises(meter.NonFiniteLossError, match="lower config.optim.learning_rate"):
        tiny.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_does_not_save_a_diverged_state(fast, data, tmp_path, monkeypatch):
    read = meter.read_metrics
    monkeypatch.setattr(
        meter, "read_metrics", lambda ms: [m._replace(grad_norm=np.inf) for m in read(ms)]
    )
    with pytest.raises(meter.NonFiniteLossError):
        train.run(tiny.settings(data, log_every=100), tmp_path / "run", tiny.StopAt(4))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_corrupt_picture_is_named_in_training_and_in_evaluation(fast, data, tmp_path):
    for split, message in (("train", r"0000_c"), ("val", r"0024_c")):
        root = tmp_path / split
        shutil.copytree(data, root)
        (folder,) = (p for p in root.iterdir() if p.is_dir())
        picture = min(folder.glob(f"imgs/{message}*_0001.jpg"))
        picture.write_bytes(picture.read_bytes()[:200])
        config = tiny.settings(root)
        with pytest.raises(Exception, match=re.escape(str(picture))):
            tiny.run(config, tmp_path / f"run-{split}")


# --- another configuration on an existing directory -----------------------------------------------


def test_a_changed_configuration_is_refused_key_by_key(data, copy):
    before = contents(copy)
    config = tiny.settings(data, seed=3, local__ratio=0.3, log_every=7)
    with pytest.raises(workdir.WorkdirError) as error:
        tiny.run(config, copy)
    assert "seed was 0, now 3" in str(error.value)
    assert "local.ratio was 0.4, now 0.3" in str(error.value)
    assert "log_every" not in str(error.value)
    assert contents(copy) == before


def test_what_does_not_change_the_result_may_change_with_one_line_each(
    fast, reference, data, tmp_path, capsys
):
    path = tmp_path / "run"
    stop(tiny.settings(data), path, 1 + 7)
    elsewhere = tmp_path / "moved"
    shutil.copytree(data, elsewhere)
    capsys.readouterr()
    config = tiny.settings(elsewhere, log_every=2, eval__chunk_mb=8, eval__dump_embeddings=True)
    tiny.run(config, path)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Going on with")]
    assert lines == [
        f"Going on with config.data_root = '{elsewhere}' (was '{data}').",
        "Going on with config.eval.dump_embeddings = True (was False).",
        "Going on with config.eval.chunk_mb = 8 (was 64).",
        "Going on with config.log_every = 2 (was 1).",
    ]
    final, expected = tiny.arrays(tiny.newest(path)), tiny.arrays(tiny.newest(reference))
    assert all(final[name].tobytes() == expected[name].tobytes() for name in expected)
    saved = json.loads((path / "config.json").read_text())["config"]
    assert saved == resolved(config)


def test_a_start_that_failed_leaves_the_directory_free_for_another_configuration(
    fast, data, tmp_path
):
    path = tmp_path / "run"
    with pytest.raises(records.DataError, match="needs 32 identities per batch.* has 24"):
        tiny.run(tiny.settings(data, batch_size=64), path)
    stop(tiny.settings(data), path, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"notes.txt": "mine"}, r"holds no config\.json \(found 'notes\.txt'\)"),
        ({"config.json": "{}"}, r"config\.json is not a configuration of itself_jax"),
        ({"config.json": "no"}, r"config\.json is not a configuration of itself_jax"),
    ],
)
def test_a_foreign_directory_is_refused_and_left_alone(data, tmp_path, content, message):
    path = tmp_path / "run"
    path.mkdir()
    for name, text in content.items():
        (path / name).write_text(text)
    before = contents(path)
    with pytest.raises(workdir.WorkdirError, match=message):
        tiny.run(tiny.settings(data), path)
    assert contents(path) == before


def test_a_directory_below_a_file_cannot_be_used(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(workdir.WorkdirError, match=r"cannot be written \(Not a directory\)"):
        tiny.run(tiny.settings(data), tmp_path / "file" / "run")


# --- evaluation -----------------------------------------------------------------------------------


def test_evaluating_a_finished_run_gives_its_own_results_to_the_bit(fast, data, copy):
    expected = tiny.results(copy)
    shutil.rmtree(copy / "results")
    assessment.evaluate_only(tiny.settings(data), copy, interrupt.Interrupts())
    assert tiny.results(copy) == expected


def test_evaluation_accepts_a_changed_configuration_and_an_explicit_source(
    fast, reference, data, tmp_path, capsys
):
    config = tiny.settings(data, seed=5, batch_size=8, init_from=str(reference))
    best = json.loads((reference / "finished.json").read_text())["best_epoch"]
    assessment.evaluate_only(config, tmp_path / "other", interrupt.Interrupts())
    assert f"Testing epoch {best} of {reference}." in capsys.readouterr().out
    expected = tiny.results(reference)
    expected["weights"]["source"] = str(reference)
    assert tiny.results(tmp_path / "other") == expected
    third = tmp_path / "third"
    shutil.copytree(reference, third)
    shutil.rmtree(third / "checkpoints" / str(tiny.EPOCH_ENDS[best - 1]))
    assessment.evaluate_only(config, third, interrupt.Interrupts())
    assert tiny.results(third) == expected
    own = dataclasses.replace(config, init_from=None)
    assessment.evaluate_only(own, third, interrupt.Interrupts())
    found = tiny.results(third)
    assert found["rows"] != expected["rows"]
    assert found["weights"]["source"] is None
    assert found["weights"]["step"] != expected["weights"]["step"]


@pytest.mark.parametrize("kind", ["absent", "file", "folder", "unvalidated"])
def test_evaluation_without_a_checkpoint_says_what_to_give(fast, data, tmp_path, kind):
    source = tmp_path / "source"
    if kind == "file":
        source.write_bytes(b"weights")
    elif kind == "folder":
        source.mkdir()
    elif kind == "unvalidated":
        stop(tiny.settings(data), source, 3)
    error, message = weight_files.WeightFileError, ""
    if kind == "unvalidated":
        error, message = checkpoint.CheckpointError, ".*no validated checkpoint"
    config = tiny.settings(data, init_from=str(source))
    with pytest.raises(error, match=f"{source}{message}"):
        assessment.evaluate_only(config, tmp_path / "run", interrupt.Interrupts())
    assert not (tmp_path / "run").exists()


def test_dumped_embeddings_rank_to_the_reported_table(fast, data, copy):
    config = tiny.settings(data, eval__dump_embeddings=True)
    assessment.evaluate_only(config, copy, interrupt.Interrupts())
    with np.load(copy / "embeddings-synthetic-test.npz") as file:
        dumped = dict(file)
    shapes = {name: array.shape for name, array in dumped.items()}
    assert shapes == {
        **{"text_global": (24, 32), "text_local": (24, 32), "text_ids": (24,)},
        **{"image_global": (12, 32), "image_local": (12, 32), "image_ids": (12,)},
        "image_paths": (12,),
    }
    split = splits.read(config, "synthetic", "test", print)
    assert dumped.pop("image_paths").tolist() == list(split.image_paths)
    np.testing.assert_array_equal(dumped["text_ids"], split.caption_ids)
    rows = retrieval.rank(retrieval.Embeddings(**dumped))
    for row, reported in zip(rows, tiny.results(copy)["rows"], strict=True):
        assert (row.direction, row.similarity) == (reported["direction"], reported["similarity"])
        for name in evaluate.METRICS:
            assert getattr(row.metrics, name) == reported[name]


def test_a_fixed_fusion_weight_is_used_and_reported(fast, data, tmp_path):
    path = tiny.run(tiny.settings(data, eval__alpha=0.55), tmp_path / "run")
    found = tiny.results(path)
    assert found["chosen_alpha"] == 0.55
    assert "fused@0.55" in {row["similarity"] for row in found["rows"]}
    assert {line["alpha"] for line in tiny.metrics(path) if "split" in line} == {0.55}


def test_the_test_split_is_encoded_once_and_only_after_training(fast, data, tmp_path, monkeypatch):
    events = []
    encode, record = assessment.encode_and_rank, meter.Meter.record

    def encoding(this, variables, split, alpha):
        events.append(split.split)
        return encode(this, variables, split, alpha)

    def recording(self, metrics):
        events.append(self.step + 1)
        record(self, metrics)

    monkeypatch.setattr(assessment, "encode_and_rank", encoding)
    monkeypatch.setattr(meter.Meter, "record", recording)
    tiny.run(tiny.settings(data), tmp_path / "run")
    epochs = [[*range(1, 6), "val"], [*range(6, 12), "val"], [*range(12, 17), "val"]]
    assert events == [*sum(epochs, []), "test"]


def test_a_broken_test_set_is_noticed_before_training(fast, data, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "compile_step", None)  # it must not come that far
    config = tiny.settings(data, eval_datasets=("rstp_reid",))
    with pytest.raises(records.DataError, match="RSTPReid"):
        tiny.run(config, tmp_path / "run")


def plant_scores(monkeypatch, *scores):
    """The n-th ranking of the test gives R@1 `scores[n]` = (weight, R@1) at this weight only."""
    rank, left = retrieval.rank, list(scores)

    def planted(embeddings, **kwargs):
        rows = rank(embeddings, **kwargs)
        if not left:
            return rows
        weight, score = left.pop(0)
        return [
            row._replace(metrics=row.metrics._replace(R1=score if row.alpha == weight else 1.0))
            for row in rows
        ]

    monkeypatch.setattr(retrieval, "rank", planted)


def test_epoch_and_weight_are_those_of_the_first_best_validation(fast, data, tmp_path, monkeypatch):
    plant_scores(monkeypatch, (0.7, 50.0), (0.3, 60.0), (0.9, 60.0))
    path = tiny.run(tiny.settings(data), tmp_path / "run")
    assert tiny.results(path)["chosen_alpha"] == 0.3
    assert json.loads((path / "finished.json").read_text())["best_epoch"] == 2
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"11", "16"}
    meta = tiny.document(path / "checkpoints" / "11")["meta"]
    assert (meta["score"], meta["best_score"], meta["best_alpha"]) == (60.0, 60.0, 0.3)


def test_the_best_epoch_survives_an_interruption(fast, data, tmp_path, monkeypatch):
    plant_scores(monkeypatch, (0.7, 50.0), (0.3, 20.0), (0.9, 30.0))
    config, path = tiny.settings(data), tmp_path / "run"
    stop(config, path, 1 + 5 + 3 + 2)  # in the second epoch
    tiny.run(config, path)
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"5", "11", "16"}
    meta = tiny.document(path / "checkpoints" / "16")["meta"]
    assert (meta["score"], meta["best_score"]) == (30.0, 50.0)
    assert (meta["best_epoch"], meta["best_alpha"]) == (1, 0.7)
    assert tiny.results(path)["chosen_alpha"] == 0.7
    assert json.loads((path / "finished.json").read_text())["best_epoch"] == 1


def test_the_paper_protocol_validates_on_test_and_says_so(fast, data, tmp_path):
    path = tiny.run(tiny.settings(data, eval__protocol="paper"), tmp_path / "run")
    assert {line["split"] for line in tiny.metrics(path) if "split" in line} == {"test"}
    found = tiny.results(path)
    assert found["protocol"] == "paper"
    chosen = retrieval.similarity_name(found["chosen_alpha"])
    row = next(r for r in found["rows"] if (r["direction"], r["similarity"]) == ("t2i", chosen))
    assert row["R1"] == max(line["R1"] for line in tiny.metrics(path) if "split" in line)


# --- variants and devices -------------------------------------------------------------------------

VARIANTS = {
    "baseline": {"local__enabled": False},
    "sl": {"local__saliency": "layer:0", "local__ats": False},
    "mars": {"local__ats": False},
    "sl_ats": {"local__saliency": "layer:0"},
}


@pytest.mark.parametrize(
    "name", ["baseline", *(pytest.param(n, marks=pytest.mark.slow) for n in list(VARIANTS)[1:])]
)
def test_every_variant_runs_from_the_one_code_path(fast, data, tmp_path, name):
    config = tiny.settings(data, eval__dump_embeddings=True, **VARIANTS[name])
    path = tiny.run(config, tmp_path / "run")
    rows = [row["similarity"] for row in tiny.results(path)["rows"]]
    with np.load(path / "embeddings-synthetic-test.npz") as dumped:
        local = {"text_local", "image_local"} & set(dumped)
    banks = {line["bank_image"] for line in tiny.train_lines(path)}
    if name == "baseline":
        assert rows == ["global", "global"] and not local
        assert tiny.results(path)["chosen_alpha"] == 1.0
    else:
        assert len(rows) == 26 and len(local) == 2
        assert (len(banks) > 1) == name.endswith("_ats")


@pytest.mark.parametrize("variant", ["baseline", pytest.param("itself", marks=pytest.mark.slow)])
def test_eight_devices_train_as_one_does_and_one_may_go_on(fast, data, tmp_path, capsys, variant):
    changes = VARIANTS.get(variant, {})
    alone, path = tmp_path / "alone", tmp_path / "run"
    stop(tiny.settings(data, **changes), alone, 6)
    stop(tiny.settings(data, mesh__data=8, **changes), path, 5)
    assert len(tiny.train_lines(path)) == 3
    capsys.readouterr()
    stop(tiny.settings(data, **changes), path, 3)
    assert "Going on with config.mesh.data = 1 (was 8)." in capsys.readouterr().out
    for line, other in zip(tiny.train_lines(path), tiny.train_lines(alone), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["bank_image"] == other["bank_image"]
