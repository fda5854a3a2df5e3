"""The results under docs/experiments follow from the records there, and the page shows them."""

import json

import pytest

from itself_jax import config as config_lib
from itself_jax.experimenting import plans, runs, summary
from tests import tiny

FOLDER = tiny.ROOT / "docs" / "experiments"


@pytest.fixture(scope="module")
def base():
    return config_lib.from_dict(tiny.configs("synthetic").get_config())


@pytest.mark.parametrize("name", plans.EXPERIMENTS)
def test_a_table_is_what_the_records_say(name, base):
    experiment = plans.EXPERIMENTS[name]
    published = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    records = {
        arm.name: {
            seed: runs.read(runs.plan(base, arm, seed, FOLDER)) for seed in published["seeds"]
        }
        for arm in experiment.arms
    }
    assert all(record for by_seed in records.values() for record in by_seed.values())
    found = summary.summarise(experiment, records)
    table = summary.markdown(found)
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == table
    assert dict(leaves(found)) == pytest.approx(dict(leaves(published)))


def leaves(tree, path=""):
    """(path, number) of each number of a summary; a text is part of its path."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, int | float):
        yield path, tree
    else:
        yield f"{path}={tree}", 0


@pytest.mark.parametrize("name", plans.EXPERIMENTS)
def test_the_page_has_each_table_and_figure(name):
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    table = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    for line in table.splitlines():
        if line and not line.startswith("#"):
            assert line in page, line
    assert f"({name}.png)" in page and (FOLDER / f"{name}.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        *((name, 5) for name in ("variants", "inference_saliency", "mismatch_label")),
        *((name, 5) for name in ("protocol", "early_evidence")),
        *((name, 3) for name in ("untrained", "layers", "discard", "ats")),
    ],
)
def test_there_are_enough_seeds(name, seeds):
    published = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert len(published["seeds"]) >= seeds
