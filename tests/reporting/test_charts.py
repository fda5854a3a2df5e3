"""Charts say what the numbers are, and their bytes depend on nothing else."""

import functools
import io

import matplotlib
import numpy as np
import PIL.Image
import pytest
import report_samples

from itself_jax.reporting import charts
from itself_jax.reporting import history as history_lib


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(report_samples.make_run, tmp_path / "run")


def series(at, value):
    return history_lib.Series(np.asarray(at), np.asarray(value, np.float64))


def named(found):
    return {chart.name: chart for chart in found}


def test_each_curve_has_a_chart_that_tells_first_last_and_best(make_run):
    found = named(charts.curves(history_lib.read(make_run())))
    assert list(found) == [
        *("validation-val", "loss", "learning_rate", "grad_norm", "bank", "pairs_per_second"),
    ]
    assert found["validation-val"].alt == (
        "Text to image on val in percent: R@1 from 10 at epoch 1 to 30 at epoch 3, highest 40 at "
        "epoch 2; mAP from 5 at epoch 1 to 15 at epoch 3, highest 20 at epoch 2; epoch 2 is chosen."
    )
    assert "all from 80 at step 10 to 30 at step 60, lowest 30 at step 60; TAL 60 throughout" in (
        found["loss"].alt
    )
    assert found["learning_rate"].alt == "Learning rate of the encoders 1e-05 throughout."
    assert "patches of a picture from 39 at step 10 to 37 at step 60" in found["bank"].alt


def test_a_running_run_has_a_best_epoch_so_far(make_run):
    found = named(charts.curves(history_lib.read(make_run(finished=False))))
    assert found["validation-val"].alt.endswith("epoch 2 is the best so far.")


def test_further_numbers_of_a_run_are_drawn_under_their_own_name(make_run):
    history = history_lib.read(make_run())
    further = {"new/thing (x)": series([1, 2], [3, 4]), "other": series([], [])}
    further |= {"$\\cost$": series([1], [2])}  # no formula
    history = history._replace(training=history.training | further)
    found = named(charts.curves(history))
    assert found["new-thing-x"].alt == "new/thing (x) from 3 at step 1 to 4 at step 2."
    assert "other" not in found


def test_without_a_local_branch_nothing_is_kept_or_weighed(make_run):
    history = history_lib.read(make_run())
    baseline = history._replace(
        config=history.config | {"local": {"enabled": False}},
        results=tuple(
            result._replace(rows=tuple(row for row in result.rows if row.alpha == 1))
            for result in history.results
        ),
    )
    assert "bank" not in named(charts.curves(baseline))
    assert charts.fusion(baseline) == ()


def test_one_point_is_a_chart_and_none_is_no_chart(make_run):
    history = history_lib.read(make_run())
    once = history._replace(
        training={"loss": series([10], [5.0])}, validation={"val": {"R1": series([1], [2.0])}}
    )
    found = named(charts.curves(once))
    assert found["loss"].alt == "Loss and its terms 5 at step 10."
    assert "R@1 2 at epoch 1" in found["validation-val"].alt
    # The point is seen: the picture is not that of empty axes.
    colours = np.asarray(PIL.Image.open(io.BytesIO(found["loss"].png)).convert("RGB"))
    assert (colours == (0x00, 0x72, 0xB2)).all(-1).sum() > 20
    assert charts.curves(history._replace(training={}, validation={})) == ()
    assert charts.measured(history._replace(measured={})) == ()
    assert charts.fusion(history._replace(results=())) == ()


def test_the_fusion_chart_tells_both_ends_the_best_chance_and_oracle(make_run):
    (chart,) = charts.fusion(history_lib.read(make_run()))
    assert chart.name == "fusion-synthetic-test"
    assert chart.alt == (
        "R@1 on synthetic test in percent over α: text → image 20 at α = 0, 10 at α = 1, highest "
        "30 at α = 0.68; oracle 83.25; chance 0.75; image → text 10 at α = 0, 5 at α = 1, highest "
        "15 at α = 0.68; α = 0.68 is chosen."
    )


def test_measured_saliency_has_a_line_for_each_source_and_the_best_layer(make_run):
    (chart,) = charts.measured(history_lib.read(make_run()))
    assert chart.name == "measured-patches_on_person"
    assert chart.alt == (
        "Kept patches that touch the person, as a share by epoch: mars from 0.25 at epoch 1 to "
        "0.75 at epoch 3, highest 0.75 at epoch 3; layer:10, the best layer 0.5 throughout; "
        "chance 0.3 throughout."
    )


def test_the_pointing_game_of_attributes_is_one_chart_and_comes_last(make_run):
    history = history_lib.read(make_run())
    table = {"mars": series([1, 3], [0.5, 0.75]), "chance": series([1, 3], [0.25, 0.25])}
    names = ("pointing_hat", "another", "pointing", "pointing_shoes", "words_on_named")
    measured = dict.fromkeys(names, table)
    measured["pointing_hat"] = {**table, "chance": series([1, 3], [0.125, 0.125])}
    found = charts.measured(history._replace(measured=measured, best_epoch=1))
    assert [chart.title for chart in found] == [
        "Kept words that name an attribute",
        "Pointing game: the most salient patch touches the attribute",
        "another",
        "The pointing game by attribute, after epoch 1",
    ]
    assert found[-1].alt == (
        "Share of the pictures in which the most salient patch touches it: mars hat 0.50, shoes "
        "0.50; chance hat 0.12, shoes 0.25."
    )


def test_similarities_are_shares_of_their_own_sum():
    # Matched: one at 0 to 0.5 and three at 0.5 to 1, mean (0.25 + 3 * 0.75) / 4 = 0.625.
    edges = np.asarray([-0.5, 0.0, 0.5, 1.0])
    chart = charts.similarities(edges, np.asarray([0, 1, 3]), np.asarray([1000, 1000, 0]))
    assert chart.alt == (
        "Shares of pairs over their similarity: 4 matched pairs have a mean similarity of 0.625, "
        "2,000 unmatched pairs have a mean similarity of 0."
    )
    few = charts.similarities(edges, np.zeros(3, int), np.asarray([1, 1, 0]))
    assert "there are no matched pairs" in few.alt


def test_the_same_numbers_give_the_same_bytes_whatever_the_users_style(make_run):
    history = history_lib.read(make_run())
    first = charts.curves(history) + charts.fusion(history)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        second = charts.curves(history) + charts.fusion(history)
        assert matplotlib.rcParams["font.size"] == 30
    assert first == second
    assert all(b"matplotlib" not in chart.png.lower() for chart in first)


def test_charts_are_small_pictures(make_run):
    history = history_lib.read(make_run())
    for chart in charts.curves(history) + charts.fusion(history) + charts.measured(history):
        assert PIL.Image.open(io.BytesIO(chart.png)).size == (704, 464)
        assert len(chart.png) < 80_000
