"""Means, errors and differences that can be checked by hand."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from itself_jax.experimenting import plans, summary
from tests.experimenting import record_samples

EXPERIMENT = plans.Experiment(
    "variants",
    "What each part adds",
    "Table 9",
    (plans.Arm("baseline", {"local.enabled": False}, 61.3), plans.Arm("itself", {})),
    "baseline",
)
RECORDS = {
    "baseline": {seed: record_samples.record(x) for seed, x in enumerate((10.0, 20.0, 30.0))},
    "itself": {seed: record_samples.record(x) for seed, x in enumerate((13.0, 24.0, 35.0))},
}


def test_a_mean_has_the_standard_error_over_seeds():
    found = summary.mean([10.0, 20.0, 30.0])
    assert found == (20.0, pytest.approx(10 / math.sqrt(3)), 3)
    assert summary.mean([7.0]) == (7.0, None, 1)
    with pytest.raises(ValueError, match="no seed"):
        summary.mean([])


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (summary.Mean(3.14, 0.5, 5), False, "3.1 ± 0.5"),
        (summary.Mean(3.14, 0.5, 5), True, "+3.1 ± 0.5"),
        (summary.Mean(-3.14, 0.5, 5), True, "−3.1 ± 0.5"),
        (summary.Mean(-3.14, None, 1), False, "−3.1"),
        (summary.Mean(-0.01, 0.5, 5), True, "0.0 ± 0.5"),
    ],
)
def test_a_mean_in_words(value, signed, text):
    assert value.told(signed=signed) == text


def test_differences_are_paired_over_seeds():
    found = summary.summarise(EXPERIMENT, RECORDS)
    baseline, itself = found["rows"]
    assert baseline["R1"]["mean"] == 20.0 and "difference" not in baseline
    # 3, 4 and 5 points, seed by seed: far less spread than either row has.
    assert itself["difference"] == {
        "mean": 4.0,
        "error": pytest.approx(1 / math.sqrt(3)),
        "seeds": 3,
    }
    assert itself["mAP"]["mean"] == 12.0
    assert itself["by_seed"]["R1"] == {"0": 13.0, "1": 24.0, "2": 35.0}
    assert (baseline["paper"], itself["paper"]) == (61.3, None)
    assert itself["difference_mAP"]["mean"] == 2.0
    assert found["seeds"] == [0, 1, 2]


def test_another_test_set_has_other_people_with_all_their_queries():
    # One of two people is always found, the other never. Drawn twice with replacement, R@1 is
    # 0, 50 or 100 with 1/4, 1/2, 1/4: a standard deviation of 35.4 points.
    first, second = ({"found": found, "queries": [2, 2]} for found in ([2, 0], [0, 2]))
    assert summary.test_set_error([first]) == pytest.approx(35.4, abs=1.5)
    # Seeds that find other people even out, and so do rows that find the same.
    assert summary.test_set_error([first, second]) == 0
    assert summary.test_set_error([first], [first]) == 0
    # With the other row's people it is -100, 0 or 100.
    assert summary.test_set_error([first], [second]) == pytest.approx(70.7, abs=3)


def test_the_test_set_s_error_stands_beside_that_over_seeds():
    records = {
        "baseline": {0: record_samples.record(50.0, found=(2, 0))},
        "itself": {0: record_samples.record(50.0, found=(0, 2))},
    }
    found = summary.summarise(EXPERIMENT, records)
    assert found["error_of_test_set"] == pytest.approx(35.4, abs=1.5)
    error = found["rows"][1]["difference_error_of_test_set"]
    assert error == pytest.approx(70.7, abs=3)
    assert f"| 0.0 ({error:.1f}) |" in summary.markdown(found)


def test_the_similarity_that_was_chosen_on_val_counts():
    assert summary.chosen(record_samples.record(12.5, alpha=0.7)) == 12.5
    record = record_samples.record(12.5, alpha=0.7)
    assert summary.chosen({**record, "chosen_alpha": 1.0}) == 1.0


def test_the_table_says_what_stands_in_it():
    text = summary.markdown(summary.summarise(EXPERIMENT, RECORDS))
    assert "seeds 0, 1, 2" in text and "Table 9" in text
    assert "| R@1 | mAP | R@1 less that of “baseline” | mAP less that" in text
    assert "| baseline | 20.0 ± 5.8 | 10.0 ± 2.9 |  |  | 61.30 |" in text
    assert "| itself | 24.0 ± 6.4 | 12.0 ± 3.2 | +4.0 ± 0.6 (0.0) | +2.0 ± 0.3 |  |" in text
    assert "Chance has R@1 0.5, the oracle 83.0" in text


def test_what_either_embedding_finds_alone_has_a_column_where_there_are_two():
    records = {
        "baseline": {0: record_samples.record(10.0)},
        "itself": {0: record_samples.record(13.0)},
    }
    records["itself"][0]["test"]["t2i local"] = {"R1": 7.0, "mAP": 5.0}
    text = summary.markdown(summary.summarise(EXPERIMENT, records))
    assert "over 1 seed, in percent" in text
    assert "| R@1 | mAP | R@1, global alone | R@1, local alone | R@1 less that of “base" in text
    assert "| baseline | 10.0 | 5.0 |  |  |  |  | 61.30 |" in text
    assert "| itself | 13.0 | 6.5 | 1.0 | 7.0 | +3.0 (0.0) | +1.5 |  |" in text


def test_answers_are_compared_within_their_arm():
    experiment = plans.EXPERIMENTS["protocol"]
    records = {
        arm.name: {
            seed: record_samples.record(
                0.0,
                answers={
                    "protocol": {"both on val": {"R1": first}, "both on test": {"R1": second}}
                },
            )
            for seed, (first, second) in enumerate(values)
        }
        for arm, values in zip(
            experiment.arms,
            [((10.0, 11.0), (20.0, 23.0)), ((40.0, 40.0), (50.0, 52.0))],
            strict=True,
        )
    }
    rows = {row["row"]: row for row in summary.summarise(experiment, records)["rows"]}
    assert list(rows) == [
        *("baseline, both on val", "baseline, both on test"),
        *("itself, both on val", "itself, both on test"),
    ]
    assert rows["baseline, both on test"]["difference"]["mean"] == 2.0
    assert rows["itself, both on test"]["difference"]["mean"] == 1.0


def test_answers_by_epoch_become_curves():
    experiment = plans.EXPERIMENTS["early_evidence"]
    answer = {
        "early_evidence": {
            "1": {"R@1": {"whole": 10.0}, "entropy of attention (image)": {"layer 0": 2.0}},
            "2": {"R@1": {"whole": 20.0}, "entropy of attention (image)": {"layer 0": 3.456}},
        }
    }
    records = {
        arm.name: {seed: record_samples.record(0.0, answers=answer) for seed in (0, 1)}
        for arm in experiment.arms
    }
    found = summary.summarise(experiment, records)
    assert found["rows"] == []
    assert found["curves"]["R@1, itself"]["whole"]["2"] == {"mean": 20.0, "error": 0.0, "seeds": 2}
    text = summary.markdown(found)
    assert "| R@1, baseline | epoch 1 | epoch 2 |" in text
    assert "| layer 0 | 2.00 ± 0.00 | 3.46 ± 0.00 |" in text
    picture = Image.open(io.BytesIO(summary.figure(found)))
    assert np.asarray(picture.convert("L")).std() > 5


def test_three_files_are_written_as_a_whole(tmp_path):
    folder = tmp_path / "new" / "folder"
    found = summary.summarise(EXPERIMENT, RECORDS)
    summary.write(folder, found)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("variants.json", "variants.md", "variants.png"),
    ]
    assert json.loads((folder / "variants.json").read_text()) == found
    with Image.open(folder / "variants.png") as picture:
        assert picture.size[0] > 400
