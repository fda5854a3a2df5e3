"""Identity-balanced sampling, the training stream's determinism, padded evaluation batches."""

import collections
import json
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

from itself_jax.data import batch as batch_lib
from itself_jax.data import images, packed, packing, pipeline, records, tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SIZE = (12, 8)


def _check_balanced(order, pids, per_batch, num_instances):
    """Raises unless every batch holds `per_batch` identities, `num_instances` pairs each."""
    counts = np.bincount(pids)
    batches = np.asarray(order).reshape(-1, per_batch, num_instances)
    for batch in pids[batches]:
        assert (batch == batch[:, :1]).all()  # groups are of one identity
        assert len(set(batch[:, 0])) == per_batch
    used = collections.Counter(np.asarray(order).tolist())
    for pair, times in used.items():
        if counts[pids[pair]] >= num_instances:
            assert times == 1  # without replacement
    groups = collections.Counter(pids[batches[:, :, 0]].reshape(-1).tolist())
    for pid, times in groups.items():
        assert times <= max(1, counts[pid] // num_instances)
    # The epoch ends only when fewer than `per_batch` identities have groups left.
    left = sum(groups[pid] < max(1, n // num_instances) for pid, n in enumerate(counts) if n)
    assert left < per_batch


@pytest.fixture(scope="module")
def golden_sampler():
    return np.load(GOLDEN / "sampler.npz")


@pytest.mark.parametrize(("batch_size", "num_instances"), [(16, 2), (16, 4), (9, 3)])
def test_every_batch_is_identity_balanced(golden_sampler, batch_size, num_instances):
    pids = golden_sampler["small/pids"]
    for epoch in range(1, 6):
        order = pipeline.epoch_order(
            pids, batch_size=batch_size, num_instances=num_instances, seed=3, epoch=epoch
        )
        assert order.dtype == np.int32 and len(order) % batch_size == 0
        _check_balanced(order, pids, batch_size // num_instances, num_instances)


@pytest.mark.parametrize(("batch_size", "num_instances"), [(16, 2), (16, 4)])
def test_epoch_lengths_are_the_reference_s(golden_sampler, batch_size, num_instances):
    pids = golden_sampler["small/pids"]
    golden = json.loads((GOLDEN / "sampler_properties.json").read_text())
    golden = golden[f"small(40 ids,193 captions) bs{batch_size} ni{num_instances}"]
    lengths = []
    for epoch in range(1, 201):
        order = pipeline.epoch_order(
            pids, batch_size=batch_size, num_instances=num_instances, seed=0, epoch=epoch
        )
        lengths.append(len(order))
    assert min(lengths) <= golden["actual_len_min"] and golden["actual_len_max"] <= max(lengths)
    assert max(lengths) <= golden["reported_len"]
    # The reference's mean is over few epochs: within half a batch.
    assert abs(np.mean(lengths) - golden["actual_len_mean"]) < batch_size / 2
    for seed in range(3):  # the reference's own lists pass the same check as ours
        reference = golden_sampler[f"small/bs{batch_size}_ni{num_instances}/seed{seed}"]
        _check_balanced(reference, pids, batch_size // num_instances, num_instances)


def test_rstp_reid_has_144_steps_of_256():
    golden = json.loads((GOLDEN / "sampler_properties.json").read_text())
    golden = golden["RSTPReid-like (3701 ids x 5 images x 2 captions) bs256 ni2"]
    pids = np.repeat(np.arange(3701), 10)
    images = np.arange(37010) // 2
    order = pipeline.epoch_order(pids, batch_size=256, num_instances=2, seed=0, epoch=1)
    assert len(order) // 256 == golden["actual_steps"][0] == 144
    assert len(set(order.tolist())) == golden["unique_captions_seen"][0]
    # The other caption of one's own image is one of 9 possible partners: 1/9 = 0.111.
    first, second = images[order].reshape(-1, 2).T
    assert abs(np.mean(first == second) - golden["share_of_pairs_from_the_same_image"][0]) < 0.015


def test_identities_with_few_pairs_are_drawn_with_replacement():
    # Identity 5 has one pair (index 0), identity 9 has three: groups of four repeat them.
    pids = np.asarray([5, 9, 9, 9])
    seen = set()
    for epoch in range(1, 30):
        order = pipeline.epoch_order(pids, batch_size=8, num_instances=4, seed=0, epoch=epoch)
        assert len(order) == 8
        groups = {int(pids[group[0]]): group.tolist() for group in order.reshape(2, 4)}
        assert groups[5] == [0, 0, 0, 0]
        assert set(groups[9]) <= {1, 2, 3}
        seen.update(groups[9])
    assert seen == {1, 2, 3}


def test_remainders_change_between_epochs():
    # Three pairs in groups of two: one is left out, each time another one.
    left_out = set()
    for epoch in range(1, 20):
        order = pipeline.epoch_order(
            np.zeros(3, np.int32), batch_size=2, num_instances=2, seed=0, epoch=epoch
        )
        left_out |= {0, 1, 2} - set(order.tolist())
    assert left_out == {0, 1, 2}


def test_epoch_order_is_a_function_of_seed_and_epoch(golden_sampler):
    def order(seed, epoch):
        return pipeline.epoch_order(
            golden_sampler["small/pids"], batch_size=8, num_instances=2, seed=seed, epoch=epoch
        ).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(1, 2) != order(2, 1)


def test_batch_size_must_be_a_multiple_of_num_instances():
    with pytest.raises(ValueError, match="batch_size=15 must be a positive multiple of .*=2"):
        pipeline.epoch_order(np.arange(99), batch_size=15, num_instances=2, seed=0, epoch=1)


def test_too_few_identities_are_counted():
    with pytest.raises(
        records.DataError, match="batch_size=16 with num_instances=2 needs 8 .* data has 7; lower"
    ):
        pipeline.epoch_order(
            np.repeat(np.arange(7), 9), batch_size=16, num_instances=2, seed=0, epoch=1
        )


def _corpus(root, count, per_identity, split="train"):
    """Pictures of noise, two captions each; a whole number of them per identity."""
    (root / "imgs").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (24, 10, 3), np.uint8)).save(root / f"imgs/{n}.png")
        captions = (f"the man number {n} wears a red coat", f"person {n} with a blue bag and a hat")
        rows.append(records.Record(f"{n}.png", str(n // per_identity), captions, split))
    files = images.ImageFiles(root / "imgs", [row.image for row in rows])
    return records.Corpus("synthetic", str(root), tuple(rows), files)


def _split(corpus):
    """All of a corpus as one training split."""
    ids = np.asarray([int(row.identity) for row in corpus.records], np.int32)
    caption_images = np.repeat(np.arange(len(ids), dtype=np.int32), 2)
    return records.Split(
        dataset=corpus.dataset,
        split=corpus.records[0].split,
        images=corpus.images,
        image_paths=tuple(row.image for row in corpus.records),
        image_ids=ids,
        captions=tuple(caption for row in corpus.records for caption in row.captions),
        caption_ids=ids[caption_images],
        caption_images=caption_images,
        original_ids=tuple(range(ids.max() + 1)),
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return _corpus(tmp_path_factory.mktemp("noise"), 27, 3)


@pytest.fixture(scope="module")
def split(corpus):
    """9 identities with 3 images of noise, two captions each: 27 images, 54 pairs."""
    return _split(corpus)


@pytest.fixture(scope="module")
def clip():
    return tokenizer.Tokenizer(text_length=20)


def _stream(split, clip, **changes):
    settings = dict(image_size=SIZE, batch_size=8, num_instances=2, num_epochs=3, seed=5)
    settings |= dict(augment_image=True, augment_caption=True)
    return pipeline.TrainStream(split, clip, **settings | changes)


def _take(stream, start_step=0):
    iterator = stream.batches(start_step)
    try:
        return list(iterator)
    finally:
        iterator.close()


def _assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for name, value, wanted in zip(batch._fields, batch, other, strict=True):
            np.testing.assert_array_equal(value, wanted, err_msg=name)


def test_batches_have_the_promised_shapes_and_types(split, clip):
    batch = _take(_stream(split, clip, num_epochs=1))[0]
    assert isinstance(batch, batch_lib.Batch)
    found = {name: (value.shape, value.dtype.name) for name, value in batch._asdict().items()}
    assert found == {
        "images": ((8, 12, 8, 3), "uint8"),
        "erase": ((8, 4), "int32"),
        "captions": ((8, 20), "int32"),
        "pids": ((8,), "int32"),
        "epoch": ((), "int32"),
    }


def test_steps_and_epochs_agree_with_the_sampler(split, clip):
    stream = _stream(split, clip)
    orders = [
        pipeline.epoch_order(split.caption_ids, batch_size=8, num_instances=2, seed=5, epoch=epoch)
        for epoch in (1, 2, 3)
    ]
    assert stream.steps_per_epoch == tuple(len(order) // 8 for order in orders)
    assert stream.total_steps == sum(stream.steps_per_epoch)
    rows = np.concatenate(orders).reshape(-1, 8)
    batches = _take(stream)
    epochs = np.repeat([1, 2, 3], stream.steps_per_epoch)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(stream.pairs(step), rows[step])
        np.testing.assert_array_equal(batch.pids, split.caption_ids[rows[step]])
        assert batch.epoch == stream.epoch_of(step) == epochs[step]
    assert len(batches) == stream.total_steps


def test_without_augmentation_batches_are_the_decoded_pairs(split, clip):
    stream = _stream(split, clip, augment_image=False, augment_caption=False)
    for step, batch in enumerate(_take(stream)):
        assert not batch.erase.any()
        paths = stream.paths(step)
        for row, pair in enumerate(stream.pairs(step)):
            image = int(split.caption_images[pair])
            assert paths[row] == split.images.name(image)
            assert paths[row].endswith(f"imgs/{split.image_paths[image]}")
            np.testing.assert_array_equal(batch.images[row], split.images.load(image, SIZE))
            np.testing.assert_array_equal(batch.captions[row], clip.encode(split.captions[pair]))


def test_augmentations_are_switched_separately(split, clip):
    plain = _take(_stream(split, clip, augment_image=False, augment_caption=False))
    image = _take(_stream(split, clip, augment_caption=False))
    caption = _take(_stream(split, clip, augment_image=False))
    for name in ("captions", "pids", "epoch"):
        for one, other in zip(plain, image, strict=True):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("images", "erase", "pids", "epoch"):
        for one, other in zip(plain, caption, strict=True):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert any(np.any(batch.erase) for batch in image)
    assert any(np.any(a.images != b.images) for a, b in zip(plain, image, strict=True))
    assert any(np.any(a.captions != b.captions) for a, b in zip(plain, caption, strict=True))


def test_without_room_to_shift_pictures_are_only_mirrored(split, clip):
    stream = _stream(split, clip, augment_pad=0)
    mirrored = []
    for step, batch in enumerate(_take(stream)):
        for row, image in enumerate(split.caption_images[stream.pairs(step)].tolist()):
            plain = split.images.load(image, SIZE)
            mirrored.append(bool(np.any(batch.images[row] != plain)))
            wanted = plain[:, ::-1] if mirrored[-1] else plain
            np.testing.assert_array_equal(batch.images[row], wanted)
    assert 0.3 < np.mean(mirrored) < 0.7


def test_every_visit_of_a_pair_is_augmented_anew(split, clip):
    # 3 epochs visit most pairs three times; equal pixels would mean a repeated generator.
    stream = _stream(split, clip, augment_caption=False, image_size=(48, 48))
    batches = _take(stream)
    seen = [
        (pair, batch.images[row].tobytes(), batch.erase[row].tobytes())
        for step, batch in enumerate(batches)
        for row, pair in enumerate(stream.pairs(step).tolist())
    ]
    assert len(set(seen)) == len(seen) > 100


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_threads=0),
        dict(num_threads=1),
        dict(num_threads=5),
        dict(cache_bytes=0),
    ],
    ids=str,
)
def test_threads_and_cache_do_not_change_the_stream(split, clip, changes):
    _assert_equal(_take(_stream(split, clip, **changes)), _take(_stream(split, clip)))


def test_reading_twice_gives_the_same_from_the_cache(split, clip):
    stream = _stream(split, clip)
    first = _take(stream)
    assert stream._source._cached.all()  # else the second reading would prove nothing
    _assert_equal(_take(stream), first)


def test_too_small_a_cache_is_not_used(split, clip):
    size = 27 * 12 * 8 * 3
    assert _stream(split, clip, cache_bytes=size - 1)._source._cache is None
    assert _stream(split, clip, cache_bytes=size)._source._cache is not None
    assert _stream(split, clip, num_workers=1)._source._cache is None


@pytest.mark.parametrize("start_step", [1, 7, 11])
def test_resuming_continues_the_stream_exactly(split, clip, start_step):
    whole = _take(_stream(split, clip))
    _assert_equal(_take(_stream(split, clip), start_step), whole[start_step:])


def test_resuming_at_the_end_is_an_empty_stream(split, clip):
    stream = _stream(split, clip)
    assert _take(stream, stream.total_steps) == []


def test_another_seed_is_another_stream(split, clip):
    one, other = _take(_stream(split, clip))[0], _take(_stream(split, clip, seed=6))[0]
    assert np.any(one.captions != other.captions)


def test_steps_out_of_range_are_named(split, clip):
    stream = _stream(split, clip)
    total = stream.total_steps
    with pytest.raises(ValueError, match=rf"start_step={total + 1} is not in 0\.\.{total}"):
        stream.batches(total + 1)
    for method in (stream.epoch_of, stream.pairs, stream.paths):
        with pytest.raises(IndexError, match=rf"step {total} is not in 0\.\.{total - 1}"):
            method(total)
        with pytest.raises(IndexError, match="step -1 is not in"):
            method(-1)


def _form(corpus, form, folder):
    """The same training split from the files or from a packed set."""
    if form == "files":
        return _split(corpus)
    size = SIZE if form == "resized" else None
    packing.pack(corpus, folder, resize=size, log=lambda line: None)
    found = packed.find(folder, corpus.dataset, size)
    return _split(packed.read(found, corpus.dataset))


@pytest.mark.parametrize("form", ["original", "resized"])
def test_packed_pictures_give_identical_batches(corpus, split, clip, form, tmp_path):
    other = _form(corpus, form, tmp_path)
    assert isinstance(other.images, packed.PackedImages)
    _assert_equal(_take(_stream(other, clip)), _take(_stream(split, clip)))
    for (one, n), (two, m) in zip(
        pipeline.image_batches(split, image_size=SIZE, batch_size=8),
        pipeline.image_batches(other, image_size=SIZE, batch_size=8),
        strict=True,
    ):
        np.testing.assert_array_equal(n, m)
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_see_the_global_batches(split, clip, hosts):
    whole = _take(_stream(split, clip))
    parts = [_take(_stream(split, clip, shard=(host, hosts)), 2) for host in range(hosts)]
    assert parts[0][0].images.shape == (8 // hosts, *SIZE, 3)
    joined = [
        batch_lib.Batch(*map(np.concatenate, list(zip(*rows, strict=True))[:4]), rows[0].epoch)
        for rows in zip(*parts, strict=True)
    ]
    _assert_equal(joined, whole[2:])


def test_all_hosts_know_the_global_batches(split, clip):
    one, other = _stream(split, clip), _stream(split, clip, shard=(1, 2))
    assert one.steps_per_epoch == other.steps_per_epoch
    assert one.pairs(3).tolist() == other.pairs(3).tolist() and one.paths(3) == other.paths(3)


def test_batch_size_must_be_divisible_by_the_hosts(split, clip):
    with pytest.raises(
        ValueError, match="batch_size=8 must be divisible by the number of hosts, 3"
    ):
        _stream(split, clip, shard=(0, 3))
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"shard=\(.*index in 0\.\.count-1"):
            _stream(split, clip, shard=shard)


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory):
    """40 identities with 5 pictures each: 200 pictures, so two may be unreadable."""
    return _corpus(tmp_path_factory.mktemp("large"), 200, 5)


class Damaged:
    """Pictures of which some cannot be read, and how often each was tried."""

    def __init__(self, inner, bad):
        self.inner, self.bad = inner, frozenset(bad)
        self.tried = collections.Counter()

    def __len__(self):
        return len(self.inner)

    def name(self, index):
        return self.inner.name(index)

    def load(self, index, size):
        self.tried[index] += 1
        if index in self.bad:
            return images.decode(b"damaged", self.name(index), size)
        return self.inner.load(index, size)


def _damage(corpus, bad):
    return _split(corpus._replace(images=Damaged(corpus.images, bad)))


def test_unreadable_picture_is_replaced_by_one_of_its_identity(large_corpus, clip):
    changes = dict(augment_image=False, augment_caption=False)
    split, damaged = _split(large_corpus), _damage(large_corpus, {7})
    plain = _take(_stream(split, clip, **changes))
    stream = _stream(damaged, clip, **changes)
    batches = _take(stream)
    # Pictures 5..9 are identity 1.
    others = {split.images.load(index, SIZE).tobytes() for index in (5, 6, 8, 9)}
    used = set()
    for step, (batch, wanted) in enumerate(zip(batches, plain, strict=True)):
        bad = split.caption_images[stream.pairs(step)] == 7
        np.testing.assert_array_equal(batch.images[~bad], wanted.images[~bad])
        used |= {row.tobytes() for row in batch.images[bad]}
        for name in ("erase", "captions", "pids", "epoch"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(wanted, name))
    assert used <= others and len(used) > 1  # not always the same one


def test_replacing_leaves_the_augmentation_of_others_alone(large_corpus, clip):
    split, damaged = _split(large_corpus), _damage(large_corpus, {7})
    stream = _stream(damaged, clip)
    for step, (batch, wanted) in enumerate(
        zip(_take(stream), _take(_stream(split, clip)), strict=True)
    ):
        good = split.caption_images[stream.pairs(step)] != 7
        np.testing.assert_array_equal(batch.images[good], wanted.images[good])
        np.testing.assert_array_equal(batch.erase, wanted.erase)


def test_replacing_does_not_depend_on_time_or_hosts(large_corpus, clip):
    def take(start_step=0, **changes):
        stream = _stream(_damage(large_corpus, {7, 8}), clip, num_epochs=1, **changes)
        return _take(stream, start_step)

    expected = take()
    for changes in (dict(num_threads=5, cache_bytes=0), dict(num_threads=0)):
        _assert_equal(take(**changes), expected)
    _assert_equal(take(20), expected[20:])
    for part, whole in zip(take(20, shard=(1, 2)), expected[20:], strict=True):
        np.testing.assert_array_equal(part.images, whole.images[4:])


def _warnings(caplog):
    found = [record for record in caplog.records if record.name == "itself_jax"]
    return sorted(record.getMessage() for record in found)


def test_replaced_rows_are_counted_and_warned_of_once(large_corpus, clip, caplog):
    split = _damage(large_corpus, {7, 150})
    stream = _stream(split, clip)
    wanted = [split.caption_images[stream.pairs(step)] for step in range(stream.total_steps)]
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        _take(stream)
    assert stream.replaced == np.isin(wanted, [7, 150]).sum() > 2
    assert stream.unreadable == (split.images.name(7), split.images.name(150))
    lines = _warnings(caplog)
    assert len(lines) == 2
    for line, name in zip(lines, ("imgs/150.png", "imgs/7.png"), strict=True):
        assert f"{name} cannot be read as an image" in line
        assert line.endswith("Another picture of the person takes its place.")


def test_worker_processes_change_nothing(large_corpus, clip, tmp_path, caplog):
    """From a packed set with an unreadable picture, resumed: as in one process from files."""
    damaged = _corpus(tmp_path, 200, 5)
    (tmp_path / "imgs/7.png").write_bytes(b"damaged")
    packing.pack(damaged, tmp_path, log=lambda line: None)
    corpus = packed.read(packed.find(tmp_path, damaged.dataset, SIZE), damaged.dataset)
    stream = _stream(_split(corpus), clip, num_epochs=1, num_workers=2)
    with caplog.at_level(logging.WARNING, logger="itself_jax"):
        batches = _take(stream, 11)
    # Shared memory that outlives the workers would be reported as leaked.
    assert {type(value) for batch in batches for value in batch} == {np.ndarray}
    (line,) = _warnings(caplog)
    assert line.startswith("7.png in ") and "Another picture of the person" in line
    expected = _take(_stream(_damage(large_corpus, {7}), clip, num_epochs=1), 11)
    _assert_equal(batches, expected)
    shown = [np.arange(400)[stream.pairs(step)] // 2 for step in range(11, stream.total_steps)]
    assert stream.replaced == np.equal(shown, 7).sum() > 0


def test_unreadable_file_is_read_once(large_corpus, clip):
    split = _damage(large_corpus, {7})
    stream = _stream(split, clip, num_threads=0, cache_bytes=0, num_epochs=2)
    _take(stream)
    assert stream.replaced > 1 and split.images.tried[7] == 1


def test_more_than_one_percent_unreadable_stops_with_the_list(large_corpus, clip):
    bad = set(range(0, 200, 10))
    stream = _stream(_damage(large_corpus, bad), clip)
    with pytest.raises(
        records.DataError,
        match=r"^\d+ of 200 pictures of synthetic train cannot be read, more than 1%: "
        r".*/imgs/\d+\.png, .*/imgs/\d+\.png, .*; restore them or remove their records",
    ):
        _take(stream)
    assert 3 <= len(stream.unreadable) <= 8  # it stopped at once


def test_at_most_ten_of_the_unreadable_are_listed(large_corpus, clip):
    # All but one picture of every identity: the first batch of 40 meets far more than ten.
    split = _damage(large_corpus, {n for n in range(200) if n % 5})
    with pytest.raises(records.DataError) as caught:
        _take(_stream(split, clip, batch_size=40))
    assert str(caught.value).count(".png") == 10 and ", ...; restore" in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_identity_without_a_readable_picture_stops_with_its_error(large_corpus, clip, num_workers):
    split = _damage(large_corpus, range(5, 10))
    stream = _stream(split, clip, num_workers=num_workers)
    with pytest.raises(records.DataError, match=r"imgs/[5-9]\.png cannot be read as an image"):
        _take(stream)


@pytest.fixture
def damaged(tmp_path):
    corpus = _corpus(tmp_path, 4, 1, split="test")
    for n in (1, 2):
        (tmp_path / "imgs" / f"{n}.png").write_bytes(b"\xff\xd8\xff\xe0 cut")
    return _split(corpus)


def test_evaluation_never_replaces_and_names_the_file(damaged):
    with pytest.raises(records.DataError, match=r"imgs/1\.png cannot be read as an image"):
        list(pipeline.image_batches(damaged, image_size=SIZE, batch_size=3))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("batch_size", [4, 9, 40])
def test_image_batches_cover_the_gallery_in_order(split, batch_size, num_threads):
    batches = list(
        pipeline.image_batches(
            split, image_size=SIZE, batch_size=batch_size, num_threads=num_threads
        )
    )
    assert [images.shape for images, _ in batches] == [(batch_size, *SIZE, 3)] * len(batches)
    rows = np.concatenate([images[: len(indices)] for images, indices in batches])
    wanted = [split.images.load(index, SIZE) for index in range(27)]
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_array_equal(np.concatenate([x for _, x in batches]), range(27))
    last, indices = batches[-1]
    assert len(indices) == 27 - batch_size * (len(batches) - 1)
    assert (last[len(indices) :] == last[0]).all() and last.dtype == np.uint8


def test_image_batches_may_be_left_early(split):
    batches = pipeline.image_batches(split, image_size=SIZE, batch_size=2)
    next(batches)
    batches.close()
    assert list(batches) == []


@pytest.mark.parametrize("batch_size", [8, 27, 100])
def test_caption_batches_cover_the_queries_in_order(split, clip, batch_size):
    batches = list(pipeline.caption_batches(split, clip, batch_size=batch_size))
    assert [ids.shape for ids, _ in batches] == [(batch_size, 20)] * len(batches)
    rows = np.concatenate([ids[: len(indices)] for ids, indices in batches])
    np.testing.assert_array_equal(rows, clip.encode_batch(split.captions))
    np.testing.assert_array_equal(np.concatenate([x for _, x in batches]), range(54))
    last, indices = batches[-1]
    assert len(indices) == 54 - batch_size * (len(batches) - 1)
    assert (last[len(indices) :] == last[0]).all() and last.dtype == np.int32


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("lengths", [(10, 20), (5, 10, 11, 20), (20,)])
def test_short_captions_come_in_full_batches_of_their_own(split, clip, lengths, hosts):
    ids = clip.encode_batch(split.captions)
    needed = (ids == ids.max()).argmax(axis=1) + 1
    assert [(needed <= n).sum() for n in (5, 10, 11, 12)] == [0, 10, 37, 54]
    shards = [
        list(
            pipeline.caption_batches(
                split, clip, batch_size=4, lengths=lengths, shard=(host, hosts)
            )
        )
        for host in range(hosts)
    ]
    found = np.zeros_like(ids)
    for parts in zip(*shards, strict=True):
        batch = np.concatenate([rows for rows, _ in parts])
        indices = parts[0][1]
        assert all(np.array_equal(other, indices) for _, other in parts)
        assert batch.shape[1] in lengths and (needed[indices] <= batch.shape[1]).all()
        assert len(indices) == 4 or batch.shape[1] == max(lengths)
        found[indices, : batch.shape[1]] += batch[: len(indices)]
    np.testing.assert_array_equal(found, ids)
    assert len(shards[0]) == -(-54 // 4)
