"""Identity-balanced sampling, the training stream's determinism, padded evaluation batches."""

import collections
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from itself_jax.data import pipeline, records, tokenizer, transforms

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


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """9 identities with 3 images of noise, two captions each: 27 images, 54 pairs."""
    root = tmp_path_factory.mktemp("noise")
    (root / "imgs").mkdir()
    rng = np.random.default_rng(0)
    content = []
    for n in range(27):
        name = f"{n}.png"
        Image.fromarray(rng.integers(0, 255, (24, 10, 3), np.uint8)).save(root / "imgs" / name)
        captions = [f"the man number {n} wears a red coat", f"person {n} with a blue bag and a hat"]
        content.append({"id": n // 3, "img_path": name, "captions": captions, "split": "train"})
    (root / "data_captions.json").write_text(json.dumps(content))
    return records.read("synthetic", root, "train")


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
    assert isinstance(batch, pipeline.Batch)
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
            path = split.image_root / split.image_paths[split.caption_images[pair]]
            assert paths[row] == str(path)
            np.testing.assert_array_equal(batch.images[row], transforms.load_image(path, SIZE))
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
        dict(num_workers=2),
    ],
    ids=str,
)
def test_threads_workers_and_cache_do_not_change_the_stream(split, clip, changes):
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


def test_resuming_with_workers_continues_the_stream_exactly(split, clip):
    whole = _take(_stream(split, clip))
    _assert_equal(_take(_stream(split, clip, num_workers=1), 7), whole[7:])


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


@pytest.fixture
def damaged(tmp_path):
    (tmp_path / "imgs").mkdir()
    content = []
    for n in range(4):
        (tmp_path / "imgs" / f"bad{n}.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
        content.append({"id": n, "img_path": f"bad{n}.jpg", "captions": "a man", "split": "train"})
    (tmp_path / "data_captions.json").write_text(json.dumps(content))
    return records.read("synthetic", tmp_path, "train")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_image_is_named_in_training(damaged, clip, num_workers):
    stream = _stream(damaged, clip, num_workers=num_workers)
    with pytest.raises(records.DataError, match=r"imgs/bad\d\.jpg cannot be read as an image"):
        _take(stream)


def test_damaged_image_is_named_in_evaluation(damaged):
    with pytest.raises(records.DataError, match=r"imgs/bad0\.jpg cannot be read as an image"):
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
    rows = np.concatenate([images[:count] for images, count in batches])
    wanted = [transforms.load_image(split.image_root / p, SIZE) for p in split.image_paths]
    np.testing.assert_array_equal(rows, wanted)
    last, count = batches[-1]
    assert count == 27 - batch_size * (len(batches) - 1)
    assert (last[count:] == last[0]).all() and last.dtype == np.uint8


def test_image_batches_may_be_left_early(split):
    batches = pipeline.image_batches(split, image_size=SIZE, batch_size=2)
    next(batches)
    batches.close()
    assert list(batches) == []


@pytest.mark.parametrize("batch_size", [8, 27, 100])
def test_caption_batches_cover_the_queries_in_order(split, clip, batch_size):
    batches = list(pipeline.caption_batches(split, clip, batch_size=batch_size))
    assert [ids.shape for ids, _ in batches] == [(batch_size, 20)] * len(batches)
    rows = np.concatenate([ids[:count] for ids, count in batches])
    np.testing.assert_array_equal(rows, clip.encode_batch(split.captions))
    last, count = batches[-1]
    assert count == 54 - batch_size * (len(batches) - 1)
    assert (last[count:] == last[0]).all() and last.dtype == np.int32
