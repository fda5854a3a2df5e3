"""The main job on miniatures of the three benchmarks and of own data, as its users start it."""

import json

import miniature
import numpy as np
import pytest
import tiny

from itself_jax import assessment, interrupt, splits, weight_files, workdir
from itself_jax import config as config_lib
from itself_jax.data import records

PEOPLE = (24, 4, 6)
CONFIGS = {"cuhk_pedes": "cuhk", "icfg_pedes": "icfg", "rstp_reid": "rstp"}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    tiny.compile_once(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All data sets below one `data_root`, as in a user's folder of benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    for dataset in CONFIGS:
        miniature.write(root, dataset, identities=PEOPLE)
    miniature.write(root / "own", "jsonl", identities=PEOPLE)
    return root


def settings(root, dataset, **changes):
    """The tests' smallest model on one of the data sets, two epochs."""
    changes = {"num_epochs": 2, "batch_size": 8, **changes}
    config = tiny.settings(root, dataset=dataset, **changes)
    return config


def validations(path):
    return [line for line in tiny.metrics(path) if "split" in line]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["val", "paper"])
@pytest.mark.parametrize("dataset", CONFIGS)
def test_the_command_of_each_config_trains_two_epochs_and_writes_results(
    root, tmp_path, dataset, protocol
):
    done = tiny.call(
        f"--config.data_root={root}",
        f"--config.eval.protocol={protocol}",
        f"--workdir={tmp_path / 'run'}",
        config=f"configs/{CONFIGS[dataset]}.py:tiny",
    )
    assert done.returncode == 0, done.stderr
    found = tiny.results(tmp_path / "run", f"{dataset}-test")
    assert (found["queries"], found["gallery"]) == (24, 12)
    assert found["protocol"] == protocol
    assert len(found["rows"]) == 26
    assert [line["split"] for line in validations(tmp_path / "run")] == [
        "val" if protocol == "val" else "test"
    ] * 2
    assert "WARNING: config.init_from is not set" in done.stdout
    assert ("chosen on the test split itself" in done.stdout) == (protocol == "paper")


@pytest.mark.parametrize(
    "dataset",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS),
        "jsonl",
    ],
)
def test_each_data_set_runs_and_tests_on_the_others(root, tmp_path, dataset):
    others = tuple(name for name in CONFIGS if name != dataset)
    place = root / "own" if dataset == "jsonl" else root
    config = settings(place, dataset, eval_datasets=() if dataset == "jsonl" else others)
    path = tiny.run(config, tmp_path / "run")
    names = {p.stem for p in (path / "results").iterdir()}
    assert names == {f"{name}-test" for name in (dataset, *config.eval_datasets)}
    chosen = {tiny.results(path, name)["chosen_alpha"] for name in names}
    assert len(chosen) == 1  # the weight of the run's own validation, everywhere


@pytest.mark.slow
def test_another_data_set_is_tested_without_the_identities_of_training(root, tmp_path):
    path = tiny.run(settings(root, "rstp_reid", num_epochs=2), tmp_path / "run")
    config = settings(root, "cuhk_pedes", init_from=str(path))
    assessment.evaluate_only(config, tmp_path / "other", interrupt.Interrupts())
    assert tiny.results(tmp_path / "other", "cuhk_pedes-test")["gallery"] == 12


@pytest.mark.slow
def test_training_goes_on_from_a_run_on_other_people(root, tmp_path, capsys):
    miniature.write(tmp_path, "rstp_reid", identities=(20, 4, 6))
    first = tiny.run(settings(root, "cuhk_pedes"), tmp_path / "first")
    config = settings(tmp_path, "rstp_reid", init_from=str(first), model__text_length=12)
    capsys.readouterr()
    tiny.run(config, tmp_path / "second")
    out = capsys.readouterr().out
    assert "was trained with 16: its text positions were cut." in out
    assert "knows 24 identities, this run has others: the classifiers start anew." in out
    assert "WARNING: config.init_from is not set" not in out


@pytest.mark.slow
def test_single_captions_are_the_first_of_each_test_picture_and_training_uses_all(root, tmp_path):
    config = settings(root, "rstp_reid", eval__captions="single", eval__dump_embeddings=True)
    path = tiny.run(config, tmp_path / "run")
    found = tiny.results(path, "rstp_reid-test")
    assert (found["queries"], found["gallery"], found["captions"]) == (12, 12, "single")
    everyone = splits.read(settings(root, "rstp_reid"), "rstp_reid", "test", print)
    single = splits.read(config, "rstp_reid", "test", print)
    assert single.captions == everyone.captions[::2]
    assert len(splits.read(config, "rstp_reid", "train", print).captions) == 96


@pytest.mark.slow
def test_a_schedule_may_end_early_and_is_the_longer_one_up_to_there(root, tmp_path):
    full = tiny.run(settings(root, "rstp_reid"), tmp_path / "full")
    short = tiny.run(settings(root, "rstp_reid", last_epoch=1), tmp_path / "short")

    def lines(path):
        return [
            {k: v for k, v in line.items() if k != "pairs_per_second"}
            for line in tiny.metrics(path)
            if line["epoch"] == 1
        ]

    assert lines(short) == lines(full)
    assert max(line["epoch"] for line in tiny.metrics(short)) == 1
    assert max(line["epoch"] for line in tiny.metrics(full)) == 2


def test_training_on_all_identities_includes_the_held_out_and_tests_the_last_epoch(
    root, tmp_path, capsys
):
    held = settings(root, "icfg_pedes")
    everyone = settings(root, "icfg_pedes", train_on_all=True, eval__alpha=0.3)
    identities = {
        name: set(splits.read(config, "icfg_pedes", split, print).original_ids)
        for name, config, split in (
            ("train", held, "train"),
            ("val", held, "val"),
            ("all", everyone, "train"),
        )
    }
    assert len(identities["val"]) == 2 and len(identities["train"]) == 22
    assert identities["train"] | identities["val"] == identities["all"]
    assert not identities["train"] & identities["val"]
    path = tiny.run(everyone, tmp_path / "run")
    assert json.loads((path / "finished.json").read_text())["best_epoch"] == 2
    assert tiny.results(path, "icfg_pedes-test")["chosen_alpha"] == 0.3
    assert "Testing epoch 2, the last one: nothing was left" in capsys.readouterr().out


@pytest.mark.slow
def test_the_paper_protocol_trains_on_everybody_and_its_label_stays(root, tmp_path):
    paper = settings(root, "icfg_pedes", eval__protocol="paper")
    assert splits.read(paper, "icfg_pedes", "train", print).num_identities == 24
    path = tiny.run(paper, tmp_path / "run")
    results = tiny.results(path, "icfg_pedes-test")
    assert results["protocol"] == "paper"
    assessment.evaluate_only(settings(root, "icfg_pedes"), path, interrupt.Interrupts())
    assert tiny.results(path, "icfg_pedes-test") == results
    (path / "finished.json").unlink()
    with pytest.raises(workdir.WorkdirError, match="eval.protocol was 'paper', now 'val'"):
        tiny.run(settings(root, "icfg_pedes"), path)


def test_a_misspelt_source_of_weights_leaves_the_directory_free(root, tmp_path):
    wrong = settings(root, "rstp_reid", init_from=str(tmp_path / "typo"))
    with pytest.raises(weight_files.WeightFileError, match="typo"):
        tiny.run(wrong, tmp_path / "run")
    tiny.run(settings(root, "rstp_reid"), tmp_path / "run")


@pytest.mark.slow
def test_a_weight_given_in_training_has_its_row_whenever_it_is_evaluated(root, tmp_path):
    path = tiny.run(settings(root, "rstp_reid", eval__alpha=0.35), tmp_path / "run")
    assessment.evaluate_only(settings(root, "rstp_reid"), path, interrupt.Interrupts())
    found = tiny.results(path, "rstp_reid-test")
    assert found["chosen_alpha"] == 0.35
    assert "fused@0.35" in {row["similarity"] for row in found["rows"]}


def test_a_missing_data_root_says_which_folder_is_wanted(tmp_path):
    config = config_lib.from_dict({"dataset": "cuhk_pedes"})
    with pytest.raises(config_lib.ConfigError, match="config.data_root is not set"):
        tiny.run(config, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_dumped_ids_are_those_of_the_annotation_file(root, tmp_path):
    config = settings(root, "cuhk_pedes", eval__dump_embeddings=True)
    path = tiny.run(config, tmp_path / "run")
    annotation = json.loads((root / "CUHK-PEDES" / "reid_raw.json").read_text())
    test = [record for record in annotation if record["split"] == "test"]
    with np.load(path / "embeddings-cuhk_pedes-test.npz") as dumped:
        assert dumped["image_ids"].tolist() == [record["id"] for record in test]
        assert dumped["image_paths"].tolist() == [record["file_path"] for record in test]


def test_a_folder_without_the_data_set_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(records.DataError, match="CUHK-PEDES"):
        tiny.run(settings(tmp_path / "nothing", "cuhk_pedes"), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
