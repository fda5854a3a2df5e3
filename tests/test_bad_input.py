"""What a run does with a package or a data set that is not whole, by command where it can occur."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from itself_jax import assessment, interrupt, sharding, splits, workdir
from itself_jax.data import records, tokenizer

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.shared(tmp_path_factory) / "data"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package, for tests that break it."""
    root = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(tiny.ROOT / "itself_jax", root / "itself_jax", ignore=ignored)
    return root


def call(root: pathlib.Path, *arguments: object) -> subprocess.CompletedProcess:
    """The command as the package under `root` runs it."""
    return subprocess.run(
        tiny.command(*arguments, config=tiny.ROOT / "tests" / "tiny.py"),
        cwd=root,
        env=tiny.environment(None) | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_failed(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stdout + done.stderr


# --- CLIP's vocabulary ----------------------------------------------------------------------------


def removed(path: pathlib.Path) -> None:
    path.unlink()


def with_one_bit_changed(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change, message",
    (
        (removed, r"cannot be read \(No such file or directory\)"),
        (with_one_bit_changed, r"is not CLIP's vocabulary: its sha256 is [0-9a-f]{64}, expected"),
    ),
)
def test_a_broken_vocabulary_exits_with_1_and_names_the_file(
    package, data, tmp_path, change: Callable[[pathlib.Path], None], message
):
    file = package / "itself_jax" / "data" / VOCABULARY
    try:
        change(file)
        done = call(package, f"--workdir={tmp_path / 'run'}", f"--config.data_root={data}")
    finally:
        shutil.copy2(tiny.ROOT / "itself_jax" / "data" / VOCABULARY, file)
    assert_failed(done, f"^itself_jax: {re.escape(str(file))} {message}")
    assert "reinstall itself_jax" in done.stderr
    assert list((tmp_path / "run").iterdir()) == []


# --- captions -------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_a_fact_like_every_letter(people):
    """JSON can express it, and the tokenizer takes it."""
    halves = [
        dataclasses.replace(people, captions=(f"a man {letter}", *people.captions[1:]))
        for letter in ("\ud83d", "\ud83c", "\ud83d")
    ]
    first, other, again = (splits.facts([split], None) for split in halves)
    assert first == again != other


# --- queries without a positive -------------------------------------------------------------------


def test_a_caption_without_a_picture_is_refused_by_command(tmp_path):
    """A query without a positive cannot come out of a reader: every caption comes with its picture.
    Own data is the one form that could name a caption alone."""
    folder = tmp_path / "own"
    folder.mkdir()
    lines = []
    for split in ("train", "val", "test"):
        for person in range(2):
            name = f"{split}{person}.jpg"
            Image.new("RGB", (16, 32), (90 * person, 20, 30)).save(folder / name)
            for caption in ("a man", "a woman"):
                row = {"image": name, "caption": caption, "id": name[:-4], "split": split}
                lines.append(json.dumps(row))
    lines.append(json.dumps({"image": "", "caption": "nobody", "id": "ghost", "split": "test"}))
    (folder / "people.jsonl").write_text("\n".join(lines) + "\n")
    done = call(
        tiny.ROOT,
        f"--workdir={tmp_path / 'run'}",
        "--config.dataset=jsonl",
        f"--config.data_root={folder}",
    )
    assert_failed(done, r"people\.jsonl: line 13: .*'ghost' never occurs in the gallery")
    assert list((tmp_path / "run").iterdir()) == []


class Encoded(NamedTuple):
    global_: jax.Array
    local: jax.Array


def untrained(variables: Any, rows: jax.Array) -> Encoded:
    """Embeddings that tell rows apart, for either side; no model is needed to rank."""
    flat = rows.reshape(len(rows), -1).astype(jnp.float32)
    wave = jnp.sin(jnp.arange(1.0, 1.0 + 8 * flat.shape[1]).reshape(flat.shape[1], 8))
    embedding = flat @ wave
    return Encoded(embedding, jnp.tanh(embedding))


@pytest.fixture
def people(data):
    """Of `tiny`: 6 people with two pictures each and two captions of each picture."""
    log: list[str] = []
    return splits.read(tiny.settings(data), "synthetic", "test", log.append)


def ranked_and_written(
    data: pathlib.Path, split: records.Split, path: pathlib.Path
) -> tuple[dict, str]:
    """What a run writes and prints when it tests on a split."""
    config, log = tiny.settings(data), []
    this = assessment.Run(
        config=config,
        workdir=workdir.Workdir(path),
        mesh=sharding.make_mesh(config),
        training=None,
        tokenizer=tokenizer.Tokenizer(config.model.text_length),
        encoders=(jax.jit(untrained), jax.jit(untrained)),
        watcher=None,
        interrupts=interrupt.Interrupts(),
        ours=assessment.ALONE,
        log=log.append,
    )
    assessment.test(this, {}, 0.5, [split], "val", {})
    return tiny.results(path), log[-1]


def test_a_query_without_a_positive_is_skipped_and_counted(data, people, tmp_path):
    """Three captions of an identity that no picture shows. Both captions of the first picture are
    among them, but its identity keeps two others: that picture, a query too, has positives."""
    stranger = int(people.image_ids.max()) + 1
    caption_ids = people.caption_ids.copy()
    caption_ids[[0, 1, 4]] = stranger
    changed = dataclasses.replace(people, caption_ids=caption_ids)
    found, table = ranked_and_written(data, changed, tmp_path / "run")
    assert (found["queries"], found["gallery"]) == (24, 12)
    assert found["skipped_queries"] == {"t2i": 3, "i2t": 0}
    assert "text to image (3 queries without a positive skipped)" in table
    assert "image to text\n" in table
    assert all(np.isfinite(row["rSum"]) for row in found["rows"])

    # The other queries are ranked as in the data set without those three captions.
    keep = np.setdiff1d(np.arange(24), [0, 1, 4])
    without = dataclasses.replace(
        people,
        captions=tuple(people.captions[i] for i in keep),
        caption_ids=people.caption_ids[keep],
        caption_images=people.caption_images[keep],
    )
    expected, table = ranked_and_written(data, without, tmp_path / "without")
    assert expected["skipped_queries"] == {"t2i": 0, "i2t": 0}
    assert "skipped" not in table
    rows = [row for row in found["rows"] if row["direction"] == "t2i"]
    assert rows == [row for row in expected["rows"] if row["direction"] == "t2i"]
    assert len(rows) == 13


def test_a_picture_whose_identity_no_caption_names_is_skipped_and_counted(data, people, tmp_path):
    """All four captions of the first identity go astray: its two pictures have no positive."""
    caption_ids = people.caption_ids.copy()
    mine = caption_ids == people.image_ids[0]
    assert mine.sum() == 4
    caption_ids[mine] = -1
    found, table = ranked_and_written(
        data, dataclasses.replace(people, caption_ids=caption_ids), tmp_path / "run"
    )
    assert found["skipped_queries"] == {"t2i": 4, "i2t": 2}
    assert "text to image (4 queries without a positive skipped)" in table
    assert "image to text (2 queries without a positive skipped)" in table


def test_no_query_with_a_positive_is_one_sentence_and_no_results(data, people, tmp_path):
    changed = dataclasses.replace(people, caption_ids=people.caption_ids + 1000)
    with pytest.raises(ValueError, match="none of the 24 queries has a positive among the 12"):
        ranked_and_written(data, changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()
