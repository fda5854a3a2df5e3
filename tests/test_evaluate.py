import json
import os
import resource
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import evaluate, retrieval

SPLIT = SimpleNamespace(
    dataset="synthetic",
    split="test",
    image_ids=np.array([4, 5, 6, 7, 8]),
    caption_ids=np.array([4, 4, 5, 6, 7, 8, 8]),
    image_paths=[f"imgs/{i}.png" for i in range(5)],
)
IMAGES = np.arange(5 * 4 * 2 * 3, dtype=np.uint8).reshape(5, 4, 2, 3)
CAPTIONS = np.arange(7 * 6, dtype=np.int32).reshape(7, 6)


class Encoded(NamedTuple):
    global_: Any
    local: Any


@jax.jit
def encode(x):
    flat = x.reshape(x.shape[0], -1).astype(jnp.float32)
    return Encoded(flat[:, :3], 2 * flat[:, 1:6])


@jax.jit
def encode_global(x):
    return Encoded(encode(x).global_, None)


def batches(array, size):
    for begin in range(0, len(array), size):
        rows = array[begin : begin + size]
        # Padding that would show: no real row is all 99.
        batch = np.full((size, *array.shape[1:]), 99, array.dtype)
        batch[: len(rows)] = rows
        yield batch, np.arange(begin, begin + len(rows))


def encoded(images=encode, texts=encode, size=3, split=SPLIT, **kwargs):
    return evaluate.encode_corpus(
        images, texts, batches(IMAGES, size), batches(CAPTIONS, size), split=split, **kwargs
    )


# --- encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5, 7, 16])
def test_padding_rows_are_dropped_whatever_the_batch_size(size):
    result = encoded(size=size)
    images = IMAGES.reshape(5, -1).astype(np.float32)
    np.testing.assert_array_equal(result.image_global, images[:, :3])
    np.testing.assert_array_equal(result.image_local, 2 * images[:, 1:6])
    np.testing.assert_array_equal(result.text_global, CAPTIONS[:, :3])
    np.testing.assert_array_equal(result.text_local, 2 * CAPTIONS[:, 1:6])
    np.testing.assert_array_equal(result.text_ids, SPLIT.caption_ids)
    np.testing.assert_array_equal(result.image_ids, SPLIT.image_ids)
    assert {x.dtype for x in result[:4]} == {np.dtype(np.float32)}


def test_an_encoder_without_a_local_part_gives_none():
    result = encoded(encode_global, encode_global)
    assert result.image_local is None and result.text_local is None
    assert len(retrieval.rank(result)) == 2


def test_bfloat16_encoders_give_float32_embeddings():
    def low(x):
        return jax.tree.map(lambda y: y.astype(jnp.bfloat16), encode(x))

    result = encoded(low, low)
    assert result.text_global.dtype == np.float32
    np.testing.assert_array_equal(result.text_global, CAPTIONS[:, :3])  # exact: below 256


def test_each_encoder_compiles_once():
    traces = []

    @jax.jit
    def counted(x):
        traces.append(x.shape)
        return encode(x)

    encoded(counted, counted, size=2)
    assert traces == [(2, 4, 2, 3), (2, 6)]


def test_the_next_batch_is_decoded_before_the_previous_result_is_fetched(monkeypatch):
    events = []
    fetch = jax.device_get

    def images():
        for i, batch in enumerate(batches(IMAGES, 2)):
            events.append(f"decode {i}")
            yield batch

    def fetched(x):
        events.append("fetch")
        return fetch(x)

    monkeypatch.setattr(jax, "device_get", fetched)
    evaluate.encode_corpus(encode, encode, images(), batches(CAPTIONS, 7), split=SPLIT)
    image_events = events[: events.index("fetch") + 4]
    assert image_events == ["decode 0", "decode 1", "fetch", "decode 2", "fetch", "fetch"]


def test_every_transfer_is_explicit():
    with jax.transfer_guard("disallow"):
        encoded()


def test_batches_are_placed_where_the_caller_says():
    device = jax.devices()[-1]
    seen = []

    def spy(x):
        seen.append(x.devices())
        return encode(x)

    encoded(spy, spy, place=lambda x: jax.device_put(x, device))
    assert seen and all(d == {device} for d in seen)


def test_should_stop_is_asked_before_each_batch_and_may_abandon():
    asked = []

    def stop():
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(size=2, should_stop=stop)
    asked.clear()
    encoded(size=4, should_stop=lambda: asked.append(1))
    assert len(asked) == 2 + 2


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(6), r"expected each of 6 images of synthetic test .* lack 1 and repeat 0"),
        (np.arange(4), r"expected 4 images of synthetic test, but the batches hold more"),
        (np.arange(0), r"expected 0 images of synthetic test"),
    ],
)
def test_batches_must_hold_exactly_the_split(ids, message):
    with pytest.raises(ValueError, match=message):
        encoded(split=SimpleNamespace(**{**vars(SPLIT), "image_ids": ids}))


def test_batches_may_come_in_any_order_but_hold_a_row_once():
    parts = list(batches(CAPTIONS, 3))
    images = list(batches(IMAGES, 3))
    turned = evaluate.encode_corpus(encode, encode, images, parts[::-1], split=SPLIT)
    np.testing.assert_array_equal(turned.text_global, CAPTIONS[:, :3])
    with pytest.raises(ValueError, match=r"7 captions of synthetic test .* lack 3 and repeat 3"):
        evaluate.encode_corpus(encode, encode, images, [parts[0], *parts[::2]], split=SPLIT)
    twice = [(parts[0][0], np.array([0, 0, 1])), (parts[1][0], np.arange(2, 5)), parts[2]]
    with pytest.raises(ValueError, match=r"7 captions of .* lack 1 and repeat 1"):
        evaluate.encode_corpus(encode, encode, images, twice, split=SPLIT)
    with pytest.raises(ValueError, match="7 captions of .* hold more"):
        before = [(parts[0][0], np.array([-1, 0, 1])), *parts[1:]]
        evaluate.encode_corpus(encode, encode, images, before, split=SPLIT)


# --- results -------------------------------------------------------------------------------------


def summary(alpha=0.68, local=True, **kwargs):
    encoder = encode if local else encode_global
    rows = retrieval.rank(encoded(encoder, encoder))
    return evaluate.results(
        rows,
        dataset="synthetic",
        split="test",
        queries=7,
        gallery=5,
        protocol="val",
        chosen_alpha=alpha,
        **kwargs,
    )


def test_results_have_the_documented_layout(tmp_path):
    path = evaluate.write_results(tmp_path, summary(extra={"oracle_R1": 12.5}))
    assert path == tmp_path / "results" / "synthetic-test.json"
    content = json.loads(path.read_text())
    rows = content.pop("rows")
    assert content == {
        "dataset": "synthetic",
        "split": "test",
        "queries": 7,
        "gallery": 5,
        "protocol": "val",
        "chosen_alpha": 0.68,
        "skipped_queries": {"t2i": 0, "i2t": 0},
        "oracle_R1": 12.5,
    }
    fused = (*(f"fused@0.{i}" for i in range(1, 10)), "fused@0.68", "fused@0.32")
    expected = [(d, s) for d in ("t2i", "i2t") for s in ("global", "local", *fused)]
    assert [(row["direction"], row["similarity"]) for row in rows] == expected
    keys = ["direction", "similarity", "R1", "R5", "R10", "mAP", "mINP", "rSum"]
    assert all(list(row) == keys for row in rows)
    for row in rows:
        assert 0 <= row["R1"] <= row["R5"] <= row["R10"] <= 100
        assert row["rSum"] == pytest.approx(row["R1"] + row["R5"] + row["R10"])


def test_results_without_a_local_part_have_the_global_rows_only():
    rows = summary(alpha=1.0, local=False)["rows"]
    assert [row["similarity"] for row in rows] == ["global", "global"]


def test_extra_results_may_not_replace_a_documented_key():
    with pytest.raises(ValueError, match=r"may not replace the keys \['rows'\]"):
        summary(extra={"rows": []})


def test_skipped_queries_are_reported_per_direction():
    embeddings = encoded()._replace(text_ids=np.array([4, 4, 5, 6, 7, 8, 99]))
    result = evaluate.results(
        retrieval.rank(embeddings._replace(image_ids=np.array([4, 5, 6, 98, 97]))),
        dataset="d",
        split="s",
        queries=7,
        gallery=5,
        protocol="val",
        chosen_alpha=1.0,
    )
    assert result["skipped_queries"] == {"t2i": 3, "i2t": 2}
    assert "text to image (3 queries without a positive skipped)" in evaluate.format_table(result)


def test_the_table_shows_both_directions_and_marks_the_chosen_rows():
    result = summary()
    lines = evaluate.format_table(result).splitlines()
    assert lines[0] == ("synthetic test: 7 captions, 5 images, protocol val, chosen: fused@0.68")
    assert [line for line in lines if " to " in line] == ["text to image", "image to text"]
    marked = [line for line in lines if line.startswith(">")]
    rows = [row for row in result["rows"] if row["similarity"] == "fused@0.68"]
    assert len(marked) == len(rows) == 2
    for line, row in zip(marked, rows, strict=True):
        cells = [f"{row[name]:.2f}" for name in ("R1", "R5", "R10", "mAP", "mINP", "rSum")]
        assert line.split() == [">", "fused@0.68", *cells]


@pytest.mark.parametrize(("alpha", "name"), [(1.0, "global"), (0.0, "local"), (0.1, "fused@0.1")])
def test_the_chosen_row_is_found_for_every_weight(alpha, name):
    lines = evaluate.format_table(summary(alpha=alpha)).splitlines()
    assert [line.split()[1] for line in lines if line.startswith(">")] == [name, name]


# --- files ---------------------------------------------------------------------------------------


def test_dumped_embeddings_load_without_pickle(tmp_path):
    embeddings = encoded()
    path = evaluate.dump_embeddings(tmp_path / "new" / "folder", SPLIT, embeddings)
    assert path.name == "embeddings-synthetic-test.npz"
    with np.load(path, allow_pickle=False) as content:
        assert sorted(content.files) == sorted([*embeddings._fields, "image_paths"])
        for name, array in embeddings._asdict().items():
            np.testing.assert_array_equal(content[name], array)
            assert content[name].dtype == array.dtype
        assert content["image_paths"].tolist() == SPLIT.image_paths


def test_a_dump_without_a_local_part_has_no_local_arrays(tmp_path):
    path = evaluate.dump_embeddings(tmp_path, SPLIT, encoded(encode_global, encode_global))
    with np.load(path) as content:
        assert sorted(content.files) == [
            "image_global",
            "image_ids",
            "image_paths",
            "text_global",
            "text_ids",
        ]


def _write_results(workdir):
    return evaluate.write_results(workdir, {"dataset": "d", "split": "s", "rows": ["x" * 9999]})


def _dump_embeddings(workdir):
    return evaluate.dump_embeddings(workdir, SPLIT, encoded())


def _dump_large_embeddings(workdir):
    large = np.ones((7, 4096), np.float32)
    return evaluate.dump_embeddings(workdir, SPLIT, encoded()._replace(text_local=large))


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("write", [_write_results, _dump_embeddings])
def test_writing_again_replaces_the_file_and_leaves_no_other(tmp_path, write):
    path = write(tmp_path)
    path.write_text("old")
    assert write(tmp_path) == path
    assert path.read_bytes() != b"old"
    assert _files(tmp_path) == [path]


@pytest.mark.parametrize("write", [_write_results, _dump_embeddings, _dump_large_embeddings])
def test_a_disk_that_fills_up_keeps_the_old_file_and_leaves_no_other(tmp_path, write):
    path = write(tmp_path)
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writes past 1000 bytes fail
    try:
        with pytest.raises(OSError) as caught:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"cannot write {path}: File too large; free space there or choose another --workdir"
    )
    assert path.read_text() == "old"
    assert _files(tmp_path) == [path]


@pytest.mark.parametrize("write", [_write_results, _dump_embeddings])
def test_a_rename_that_fails_leaves_no_file(tmp_path, write, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}.*: Permission denied; "):
        write(tmp_path)
    assert _files(tmp_path) == []


def test_a_workdir_that_is_a_file_is_an_error_naming_the_path(tmp_path):
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/results/d-s.json: "):
        _write_results(tmp_path)


def test_an_interrupt_while_writing_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _dump_embeddings(tmp_path)
    assert _files(tmp_path) == []
