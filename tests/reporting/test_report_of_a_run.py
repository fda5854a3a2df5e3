"""The report of a run: what it shows is what the run's own results say."""

import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from itself_jax import assessment, interrupt, retrieval, splits, watching
from itself_jax import config as config_lib
from itself_jax.data import records
from itself_jax.reporting import drawing, history
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    config = tiny.settings(data, eval__watch=2, eval__dump_embeddings=True)
    return tiny.run(config, tmp_path_factory.mktemp("runs") / "run")


def page(run, name="index.html"):
    return (run / "report" / name).read_text(encoding="utf-8")


def test_a_run_writes_its_report_at_its_end(run):
    text = page(run)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:7] == [
        *("Summary", "What it learned", "Text → image", "Image → text", "Where it looks"),
        *("How its look changed", "Global and local together"),
    ]
    assert headings[7:] == ["Saliency, measured"]  # and no note: nothing is missing
    assert "finished" in text and len(text) < 8e6
    assert not re.search(r"(src|href)=[\"']?https?:", text)
    chosen = tiny.results(run)["chosen_alpha"]
    name = retrieval.similarity_name(chosen)
    for direction in retrieval.DIRECTIONS:
        (row,) = [
            row
            for row in tiny.results(run)["rows"]
            if (row["direction"], row["similarity"]) == (direction, name)
        ]
        assert f"{row['R1']:.2f}" in text


def test_measures_are_in_the_metrics_of_each_validation(run):
    lines = [line for line in tiny.metrics(run) if "split" in line]
    assert len(lines) == 3
    for line in lines:
        for name in ("patches_on_person", "patches_on_named", "pointing", "words_on_named"):
            for source in ("mars", "last", "layer:0", "mean", "std", "chance"):
                assert 0 <= line[f"saliency/{name}/{source}"] <= 1
    assert sorted(p.name for p in (run / "saliency").iterdir()) == [
        f"epoch-00{epoch}.npz" for epoch in (1, 2, 3)
    ]


def test_ranks_in_the_report_are_those_of_the_embeddings(run):
    with np.load(run / "embeddings-synthetic-test.npz") as saved:
        arrays = dict(saved)
    alpha = tiny.results(run)["chosen_alpha"]

    def cosine(a, b):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return a @ b.T

    similarity = alpha * cosine(arrays["text_global"], arrays["image_global"]) + (
        1 - alpha
    ) * cosine(arrays["text_local"], arrays["image_local"])
    order = np.argsort(-similarity, axis=1, kind="stable")
    right = arrays["text_ids"][:, None] == arrays["image_ids"][order]
    worst = int((1 + right.argmax(axis=1)).max())
    text = " ".join(re.sub(r"<[^>]+>", " ", page(run, "failures.html")).split())
    assert f"first right answer at rank {worst} of 12" in text
    chance = tiny.results(run)["chance_R1"]
    # 6 people with 2 pictures and 4 captions each: 2 of 12, 4 of 24.
    assert chance == pytest.approx({"t2i": 100 / 6, "i2t": 100 / 6})


def test_the_command_writes_the_same_report_again(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = {name: page(copy, name) for name in ("index.html", "failures.html")}
    shutil.rmtree(copy / "report")
    done = subprocess.run(
        [sys.executable, "-m", "itself_jax.report", str(copy)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Report: {copy / 'report' / 'index.html'}"
    # Facts such as the directory apart, all of it is the same: ranks, similarities, saliency.
    for name in ("index.html", "failures.html"):
        facts = re.compile(r"<div[^>]*><dt>.*?</dd>", re.DOTALL)
        assert facts.sub("", page(copy, name)) == facts.sub("", before[name])


def test_a_run_that_goes_on_shows_its_validation_and_lacks_nothing_else(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "report")
    shutil.rmtree(copy / "results")
    (copy / "finished.json").unlink()
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "lo')
    assessment.report_only(copy, lambda line: None)
    text = page(copy)
    assert "epoch 3 of 3" in text and "half-written" in text
    for section in ("text-to-image", "image-to-text", "saliency", "evolution", "measured"):
        assert f'<section id="{section}">' in text
    assert "Synthetic val, α = " in text and "Synthetic test" not in text


def test_a_damaged_picture_costs_its_own_places_alone_and_a_missing_one_is_named(
    run, data, tmp_path
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copytree(data, tmp_path / "data")
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["data_root"] = str(tmp_path / "data")
    (copy / "config.json").write_text(json.dumps(saved))
    config = config_lib.from_dict(saved["config"])
    shown, followed = (splits.read(config, "synthetic", x, print) for x in ("test", "val"))
    at = int(followed.caption_images[watching.followed(followed, 2)[0]])
    for lost in (shown.images.name(3), followed.images.name(at)):
        pathlib.Path(lost).write_bytes(b"")
    assessment.report_only(copy, lambda line: None)
    text = page(copy)
    for section in ("text-to-image", "image-to-text", "saliency", "evolution"):
        assert f'<section id="{section}">' in text
    assert "1 of 12 pictures of synthetic test cannot be read" in text
    assert f"nor are their captions: {shown.image_paths[3]}. Restore" in text
    assert "of 11<" in text and "of 12<" not in text  # queries and answers are of the others
    assert f": picture {followed.image_paths[at]} could not be read" in text
    assert shown.image_paths[3] not in text.split("<h2>Notes</h2>")[0]
    for index in range(len(shown.images)):
        pathlib.Path(shown.images.name(index)).write_bytes(b"")
    assessment.report_only(copy, lambda line: None)
    assert re.search("No queries, answers and saliency are shown: .* cannot be read", page(copy))
    # Who reads a data set asks for all of its files.
    pathlib.Path(shown.images.name(3)).unlink()
    assessment.report_only(copy, lambda line: None)
    name = pathlib.Path(shown.images.name(3)).name
    assert re.search(f"No queries, answers and saliency are shown: .*{name}.*complete", page(copy))


def test_without_weights_the_page_says_so(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints")
    assessment.report_only(copy, lambda line: None)
    assert "No queries, answers and saliency are shown" in page(copy)


def test_a_finished_run_without_its_report_names_the_command(run, data, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tiny.run(tiny.settings(data, eval__watch=2, eval__dump_embeddings=True), copy)
    assert "itself_jax.report" not in capsys.readouterr().out
    shutil.rmtree(copy / "report")
    tiny.run(tiny.settings(data, eval__watch=2, eval__dump_embeddings=True), copy)
    assert f"python -m itself_jax.report {copy}" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_of_the_run_writes_its_report_anew(run, data, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "report")
    assessment.evaluate_only(
        tiny.settings(data, eval__watch=2, eval__alpha=0.5), copy, interrupt.Interrupts()
    )
    text = page(copy)
    assert "Synthetic test, α = 0.5" in text and '<section id="evolution">' in text
    # With pictures of another size what was kept in training is of other patches, and not shown.
    changes = {"eval__watch": 2, "model__image_size": (48, 16)}
    assessment.evaluate_only(tiny.settings(data, **changes), copy, interrupt.Interrupts())
    text = page(copy)
    assert '<section id="evolution">' not in text and "another size of the model" in text


@pytest.mark.slow
def test_weights_of_another_run_are_not_taken_for_the_directory_s_own(run, data, tmp_path):
    config = tiny.settings(data, eval__watch=2, init_from=str(run))
    for name in ("empty", "run"):
        path = tmp_path / name
        if name == "run":
            shutil.copytree(run, path)
        assessment.evaluate_only(config, path, interrupt.Interrupts())
        text = page(path)
        assert "evaluated only" in text and '<section id="text-to-image">' in text
        assert '<section id="learning">' not in text and '<section id="evolution">' not in text
    # The run's own report does not show them as what it reached.
    assert "<caption>" in text
    assessment.report_only(path, lambda line: None)
    text = page(path)
    assert f"results/synthetic-test.json is of the weights {run} and left out" in text
    assert "Tested epoch" in text and "R@1, synthetic test" not in text


def test_a_directory_without_its_metrics_is_evaluated_without_a_report(run, data, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "report")
    (copy / "metrics.jsonl").unlink()
    assessment.evaluate_only(tiny.settings(data, eval__watch=2), copy, interrupt.Interrupts())
    assert "No report: " in capsys.readouterr().out and not (copy / "report").exists()


def test_without_a_library_that_draws_there_is_no_report(run, data, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "report")
    monkeypatch.setitem(sys.modules, "itself_jax.reporting.writing", None)
    monkeypatch.delattr("itself_jax.reporting.writing")
    assessment.evaluate_only(tiny.settings(data, eval__watch=2), copy, interrupt.Interrupts())
    out = capsys.readouterr().out
    assert "No report (" in out and "requirements.txt" in out


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(history.ReportError, match=r"config\.json does not exist"):
        assessment.report_only(tmp_path, lambda line: None)
    done = subprocess.run(
        [sys.executable, "-m", "itself_jax.report"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "give one work directory" in done.stderr


def test_a_missing_picture_leaves_a_gap(run):
    config = config_lib.from_dict(json.loads((run / "config.json").read_text())["config"])
    split = splits.read(config, "synthetic", "test", lambda line: None)

    class Gone:
        def __len__(self):
            return len(split.images)

        def load(self, index, size):
            raise records.DataError("gone")

    gone = dataclasses.replace(split, images=Gone())
    assert drawing.crop(gone, 0, config.model) == (split.image_paths[0], None)


def test_pictures_that_were_packed_in_one_size_are_shown(run):
    config = config_lib.from_dict(json.loads((run / "config.json").read_text())["config"])
    split = splits.read(config, "synthetic", "test", lambda line: None)

    class Resized:
        def load(self, index, size):
            if tuple(size) != config.model.image_size:
                raise records.DataError("other pixels are wanted")
            return split.images.load(index, size)

    packed = dataclasses.replace(split, images=Resized())
    shown = drawing.crop(packed, 0, config.model).jpeg
    assert Image.open(io.BytesIO(shown)).size == (72, 144)


def test_heat_colours_and_outlines_what_is_kept_and_fades_the_rest():
    model = tiny.settings("x").model  # 4 x 2 patches
    picture = Image.new("RGB", (120, 240), (100, 100, 100))
    saliency = np.asarray([0.0, 0, 0, 1, 0, 0, 0, 0], np.float32)
    drawn = Image.open(io.BytesIO(drawing.heat(picture, saliency, np.asarray([3, 4]), model)))
    pixels = np.asarray(drawn.convert("RGB")).astype(int)
    # Patch 3 is row 1, column 1: x 60..120, y 60..120. Its left side is a white line on black.
    assert (pixels[90, 59:62] > 240).all(axis=1).any()
    assert (pixels[90, 57:64] < 40).all(axis=1).any()
    # Inside it is the brightest colour of the map, a yellow; in patch 4, below on the left, the
    # darkest, a blue: each two fifths of a pixel.
    assert pixels[90, 90] == pytest.approx([156, 159, 73], abs=4)
    assert pixels[150, 30] == pytest.approx([65, 63, 113], abs=4)
    # Elsewhere the picture's grey is mixed with white, and nothing is outlined.
    assert pixels[30, 30] == pytest.approx([208, 208, 208], abs=4)
    assert pixels[210, 90] == pytest.approx([208, 208, 208], abs=4)
    assert not (pixels[57:64, 30] < 40).all(axis=1).any()
