"""Packed sets give back exactly what was packed, and damage, stops and races are said."""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from itself_jax.data import images, packed, packing, records

SIZE = (24, 16)
FORMS = pytest.mark.parametrize("resize", [None, SIZE], ids=["original", "resized"])


def _quiet(line):
    del line


def _files(root, count=30):
    """Pictures of several formats; splits and identities interleaved, as annotation files do."""
    (root / "imgs/a b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for n in range(count):
        name = f"a b/é{n}.{('jpg', 'png', 'webp')[n % 3]}"
        picture = rng.integers(0, 255, (40 + n, 20, 3), np.uint8)
        Image.fromarray(picture).save(root / "imgs" / name)
        captions = tuple(f"caption {k} of “{n}”" for k in range(1 + n % 3))
        rows.append(
            records.Record(name, f"p{n // 4}", captions, ("train", "test", "val")[n % 5 % 3])
        )
    pictures = images.ImageFiles(root / "imgs", [row.image for row in rows])
    return records.Corpus("cuhk_pedes", str(root), tuple(rows), pictures)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return _files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(packing, "_RECORDS_PER_SHARD", 5)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One packed set of each form, not to be altered."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_RECORDS_PER_SHARD", 5)
        for resize in (None, SIZE):
            packing.pack(corpus, out, resize=resize, log=_quiet)
    return out


@pytest.fixture
def altered(finished, tmp_path):
    """A copy of the packed sets that a test may damage."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def _folder(root, resize):
    return pathlib.Path(packed.find(root, "cuhk_pedes", resize))


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


class Watched:
    """Pictures that note what is read and raise an error from the given one on."""

    def __init__(self, inner, fail_at=None, error=KeyboardInterrupt):
        self.inner, self.fail_at, self.error = inner, fail_at, error
        self.read = collections.Counter()

    def __len__(self):
        return len(self.inner)

    def name(self, index):
        return self.inner.name(index)

    def load(self, index, size):
        return images.decode(self.content(index), self.name(index), size)

    def content(self, index):
        if index == self.fail_at:
            raise self.error
        self.read[index] += 1
        return self.inner.content(index)


def _same(corpus, read):
    assert read.records == corpus.records and read.dataset == corpus.dataset
    assert len(read.images) == len(corpus.images)
    for index in range(len(corpus.images)):
        pixels = read.images.load(index, SIZE)
        assert pixels.dtype == np.uint8 and pixels.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(pixels, corpus.images.load(index, SIZE))


@FORMS
def test_records_and_pixels_come_back_in_annotation_order(corpus, finished, resize):
    read = packed.read(packed.find(finished, "cuhk_pedes", resize), "cuhk_pedes")
    assert read.source == str(_folder(finished, resize))
    _same(corpus, read)


def test_original_bytes_come_back_and_decode_at_any_size(corpus, finished):
    read = packed.read(_folder(finished, None), "cuhk_pedes")
    for index in range(len(corpus.images)):
        assert read.images.content(index) == corpus.images.content(index)
    np.testing.assert_array_equal(read.images.load(3, (9, 9)), corpus.images.load(3, (9, 9)))


@FORMS
def test_packing_from_the_packed_form_is_the_same(corpus, finished, resize, tmp_path):
    original = packed.read(_folder(finished, None), "cuhk_pedes")
    packing.pack(original, tmp_path, resize=resize, log=_quiet)
    _same(corpus, packed.read(_folder(tmp_path, resize), "cuhk_pedes"))


@FORMS
def test_pictures_are_named_with_their_file(corpus, finished, resize):
    read = packed.read(_folder(finished, resize), "cuhk_pedes")
    for index, record in enumerate(corpus.records):
        name = read.images.name(index)
        assert name.startswith(f"{record.image} in {_folder(finished, resize)}/packed-")
        assert f"packed-{record.split}.array_record-" in name


@FORMS
def test_subset_and_pickled_copy_and_threads_read_the_same(corpus, finished, resize):
    read = packed.read(_folder(finished, resize), "cuhk_pedes").images
    read.load(0, SIZE)  # an open file must not hinder pickling
    chosen = [7, 0, 29, 7]
    copy = pickle.loads(pickle.dumps(read.subset(chosen)))
    assert [copy.name(i) for i in range(len(copy))] == [read.name(i) for i in chosen]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pixels = list(pool.map(lambda n: copy.load(n % 4, SIZE), range(40)))
    for n, found in enumerate(pixels):
        np.testing.assert_array_equal(found, corpus.images.load(chosen[n % 4], SIZE))


@FORMS
def test_it_is_a_tfds_data_set(corpus, finished, resize):
    sources = tfds.builder_from_directory(_folder(finished, resize)).as_data_source()
    seen = set()
    for split, source in sources.items():
        indices = []
        for example in source:
            index = int(example["index"])
            indices.append(index)
            record = corpus.records[index]
            assert record.split == split == example["split"].decode()
            assert record.image == example["image_path"].decode()
            assert record.identity == example["id"].decode()
            assert record.captions == tuple(caption.decode() for caption in example["captions"])
            wanted = corpus.images.load(index, resize or (40 + index, 20))
            np.testing.assert_array_equal(example["image"], wanted)
        assert indices == sorted(indices)
        seen |= set(indices)
    assert seen == set(range(30))
    assert "tensorflow" not in sys.modules


def test_tfds_s_own_writer_makes_the_same_examples(corpus, finished, tmp_path, capsys):
    builder = packing.Packed(corpus, SIZE, data_dir=str(tmp_path))
    builder.download_and_prepare()
    ours = tfds.builder_from_directory(_folder(finished, SIZE)).as_data_source()
    for split, source in builder.as_data_source().items():
        for example, wanted in zip(source, ours[split], strict=True):
            assert example["index"] == wanted["index"]
            np.testing.assert_array_equal(example["image"], wanted["image"])
    capsys.readouterr()


def test_a_set_without_splits_and_with_half_a_character(corpus, tmp_path):
    rows = tuple(
        records.Record(row.image, row.identity, ("half \ud83d", ""), "") for row in corpus.records
    )
    corpus = corpus._replace(records=rows)
    packing.pack(corpus, tmp_path, log=_quiet)
    _same(corpus, packed.read(_folder(tmp_path, None), "cuhk_pedes"))
    source = tfds.builder_from_directory(_folder(tmp_path, None)).as_data_source("unsplit")
    assert source[0]["captions"] == [b"half ?", b""] and source[0]["split"] == b""


def test_the_wanted_size_goes_before_the_original(finished):
    assert _folder(finished, SIZE).parent.name == "cuhk_pedes-24x16"
    assert _folder(finished, (9, 9)).parent.name == "cuhk_pedes-original"
    assert _folder(finished, None).parent.name == "cuhk_pedes-original"


def test_nothing_is_found_where_nothing_is(finished, tmp_path):
    assert packed.find(tmp_path, "cuhk_pedes", SIZE) is None
    assert packed.find(tmp_path / "absent", "cuhk_pedes", None) is None
    assert packed.find(finished, "cuhk", SIZE) is None
    assert packed.find(finished, "icfg_pedes", None) is None


def test_only_other_sizes_are_named(altered):
    shutil.rmtree(altered / "packed/cuhk_pedes-original")
    shutil.copytree(altered / "packed/cuhk_pedes-24x16", altered / "packed/cuhk_pedes-8x4")
    assert packed.find(altered, "cuhk_pedes", None) is None  # the files may be there
    with pytest.raises(
        records.DataError, match="holds cuhk_pedes resized to 24x16, 8x4, but image_size is 9x9; "
    ):
        packed.find(altered, "cuhk_pedes", (9, 9))


@FORMS
def test_another_version_is_said(altered, resize):
    for form in {resize, None}:
        folder = _folder(altered, form)
        folder.rename(folder.with_name("2.0.0"))
    with pytest.raises(
        records.DataError, match=r"was packed in version 2\.0\.0 .* reads version 1\.0\.0; pack"
    ):
        packed.find(altered, "cuhk_pedes", resize)


def test_another_version_of_one_form_is_passed_over_for_the_other(altered):
    folder = _folder(altered, SIZE)
    folder.rename(folder.with_name("2.0.0"))
    assert packed.find(altered, "cuhk_pedes", SIZE) == _folder(altered, None)


def _edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(version="0.9.0"), r"'version' is '0\.9\.0', but this program reads version 1\.0\.0"),
        (dict(resize=[24, 8]), r"manifest\.json is not what was written there .*pack again"),
        (dict(version=None), r"manifest\.json is not what was written there"),
    ],
)
def test_manifest_of_another_version_or_altered_is_refused(altered, changes, message):
    folder = _folder(altered, SIZE)
    _edit_manifest(folder, **changes)
    for check in (lambda: packed.read(folder, "cuhk_pedes"), lambda: packed.verify(folder)):
        with pytest.raises(records.DataError, match=message):
            check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_manifest_that_is_none_is_refused(altered, content):
    folder = _folder(altered, SIZE)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(records.DataError, match=r"manifest\.json is not what was written there"):
        packed.read(folder, "cuhk_pedes")


def test_manifest_that_cannot_be_read_is_not_called_altered(altered):
    path = _folder(altered, SIZE) / "manifest.json"
    path.unlink()
    path.mkdir()
    with pytest.raises(records.DataError, match=r"manifest\.json cannot be read \(IsADirectory"):
        packed.read(path.parent, "cuhk_pedes")


def test_another_data_set_is_refused(finished):
    with pytest.raises(
        records.DataError, match="'dataset' is 'cuhk_pedes', but 'rstp_reid' is wanted"
    ):
        packed.read(_folder(finished, None), "rstp_reid")


def test_folder_without_a_manifest_is_not_finished(altered):
    folder = _folder(altered, SIZE)
    (folder / "manifest.json").unlink()
    with pytest.raises(records.DataError, match="is no finished packed data set"):
        packed.read(folder, "cuhk_pedes")
    assert _folder(altered, SIZE).parent.name == "cuhk_pedes-original"


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_file_that_is_missing_or_cut_is_named_at_once(altered, damage):
    folder = _folder(altered, SIZE)
    path = folder / "packed-train.array_record-00001-of-00003"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    reason = "does not exist" if damage == "missing" else r"has \d+ bytes, but manifest\.json"
    with pytest.raises(records.DataError, match=rf"train\.array_record-00001-of-00003 {reason}"):
        packed.read(folder, "cuhk_pedes")
    with pytest.raises(records.DataError, match="train.array_record-00001-of-00003; copy"):
        packed.verify(folder)


@FORMS
def test_flipped_byte_in_any_file_is_found(finished, altered, resize):
    folder = _folder(altered, resize)
    packed.verify(folder)
    files = sorted(path for path in folder.iterdir())
    assert len(files) == 4 + 3 + 3 + 2
    for path in files:
        good = path.read_bytes()
        for at in (len(good) // 3, len(good) - 1):
            _flip(path, at)
            with pytest.raises(records.DataError, match=f"{path.name}"):
                packed.verify(folder)
        path.write_bytes(good)
    packed.verify(folder)


def test_all_damaged_files_are_named(altered):
    folder = _folder(altered, None)
    for name in ("features.json", "packed-val.array_record-00000-of-00002"):
        _flip(folder / name, 50)
    with pytest.raises(
        records.DataError, match=r"2 of 11 files .*: features\.json, packed-val\.array_record-00000"
    ):
        packed.verify(folder)


def test_flipped_byte_in_annotations_is_found_when_reading(altered):
    folder = _folder(altered, None)
    _flip(folder / "annotations.json", 100)
    with pytest.raises(records.DataError, match=r"annotations\.json is not what was written"):
        packed.read(folder, "cuhk_pedes")


@FORMS
def test_flipped_byte_in_a_picture_names_its_file_and_spares_the_others(corpus, altered, resize):
    folder = _folder(altered, resize)
    path = folder / "packed-train.array_record-00001-of-00003"
    content = path.read_bytes()
    train = [n for n, row in enumerate(corpus.records) if row.split == "train"]
    # Three files of 12 train pictures: the second one begins at the fifth of them.
    picture = corpus.images.load(train[5], SIZE).tobytes() if resize else None
    _flip(path, content.index((picture or corpus.images.content(train[5]))[:500]) + 400)
    read = packed.read(folder, "cuhk_pedes").images
    broken = []
    for index in range(30):
        try:
            pixels = read.load(index, SIZE)
        except records.DataError as error:
            broken.append(index)
            assert f"{path} is damaged: the picture {corpus.records[index].image} " in str(error)
            assert "copy the file anew" in str(error)
        else:
            np.testing.assert_array_equal(pixels, corpus.images.load(index, SIZE))
    assert broken == [train[5]]


def test_damaged_footer_names_the_file(corpus, altered):
    folder = _folder(altered, SIZE)
    path = folder / "packed-val.array_record-00001-of-00002"
    content = path.read_bytes()
    read = packed.read(folder, "cuhk_pedes").images
    val = [n for n, row in enumerate(corpus.records) if row.split == "val"]
    for footer in (bytes(65536), b"\x10" + content[-65535:], content[-65535:] + b"\x10"):
        path.write_bytes(content[:-65536] + footer)
        fresh = pickle.loads(pickle.dumps(read))
        fresh.load(val[0], SIZE)
        with pytest.raises(records.DataError, match=r"-00001-of-00002 is damaged: the picture"):
            fresh.load(val[-1], SIZE)


def test_record_that_is_no_example_is_an_error_and_never_pixels(corpus):
    builder = packing.Packed(corpus, SIZE, data_dir="unused")
    (record,) = builder.serialized([0])
    pixels = corpus.images.load(0, SIZE).tobytes()
    assert record[packed._find_bytes(record, b"image")] == pixels
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(record[: int(rng.integers(1, len(record)))])
        damaged[int(rng.integers(0, min(len(damaged), 60)))] ^= int(rng.integers(1, 256))
        with contextlib.suppress(ValueError, IndexError):
            place = packed._find_bytes(bytes(damaged), b"image")
            assert 0 <= place.start <= place.stop <= len(damaged)


def test_other_size_than_packed_is_an_error(finished):
    read = packed.read(_folder(finished, SIZE), "cuhk_pedes").images
    with pytest.raises(
        records.DataError, match="holds pictures of 24x16 pixels, but 9x9 are wanted; change"
    ):
        read.load(0, (9, 9))
    with pytest.raises(records.DataError, match="pixels resized to 24x16, not the original"):
        read.content(0)


@FORMS
@pytest.mark.parametrize(("fail_at", "kept"), [(1, 0), (29, 2), (13, 4)])
def test_interrupted_packing_goes_on_after_its_finished_files(
    corpus, tmp_path, resize, fail_at, kept
):
    # Three files of four test pictures (29 is in the last one), then three of train pictures.
    stopped = Watched(corpus.images, fail_at)
    with pytest.raises(KeyboardInterrupt):
        packing.pack(corpus._replace(images=stopped), tmp_path, resize=resize, log=_quiet)
    assert packed.find(tmp_path, "cuhk_pedes", resize) is None
    work = tmp_path / "packed" / f"cuhk_pedes-{packed.form_of(resize)}" / ".1.0.0.incomplete"
    assert not list(work.glob(".*.part"))
    assert len(list(work.glob("packed-*"))) == kept
    again, lines = Watched(corpus.images), []
    folder = packing.pack(corpus._replace(images=again), tmp_path, resize=resize, log=lines.append)
    packed.verify(folder)
    _same(corpus, packed.read(folder, "cuhk_pedes"))
    order = packed.file_order(corpus.records)
    sizes = [shard.records for shard in packing._plan(corpus)]
    assert sorted(again.read) == sorted(order[sum(sizes[:kept]) :])
    assert set(again.read.values()) == {1}
    assert any("going on after" in line for line in lines) == (kept > 0)
    assert sorted(path.name for path in pathlib.Path(folder).parent.iterdir()) == [".lock", "1.0.0"]


def test_killed_packer_leaves_no_lock_and_its_finished_files(corpus, tmp_path):
    code = f"""
        import os, pickle, sys
        from itself_jax.data import packing
        packing._RECORDS_PER_SHARD = 5
        corpus = pickle.loads(open({str(tmp_path / "corpus")!r}, "rb").read())
        class Pictures:
            def content(self, index):
                if index == 28:
                    os.kill(os.getpid(), 9)
                return inner.content(index)
        inner = corpus.images
        corpus = corpus._replace(images=Pictures())
        packing.pack(corpus, {str(tmp_path)!r}, log=print, num_threads=1)
    """
    (tmp_path / "corpus").write_bytes(pickle.dumps(corpus))
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert killed.returncode == -9 and packed.find(tmp_path, "cuhk_pedes", None) is None
    again = Watched(corpus.images)
    folder = packing.pack(corpus._replace(images=again), tmp_path, log=_quiet)
    packed.verify(folder)
    _same(corpus, packed.read(folder, "cuhk_pedes"))
    assert 0 < len(again.read) < 30


def test_finished_file_that_was_cut_is_written_again(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped = corpus._replace(images=Watched(corpus.images, 29))
        packing.pack(stopped, tmp_path, log=_quiet)
    work = tmp_path / "packed/cuhk_pedes-original/.1.0.0.incomplete"
    path = min(work.glob("packed-*"))
    path.write_bytes(path.read_bytes()[:-1])
    packed.verify(packing.pack(corpus, tmp_path, log=_quiet))


def test_other_annotations_keep_nothing_of_an_interrupted_packing(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped = corpus._replace(images=Watched(corpus.images, 29))
        packing.pack(stopped, tmp_path, log=_quiet)
    rows = (corpus.records[1], corpus.records[0], *corpus.records[2:])
    order = [1, 0, *range(2, 30)]
    watched = Watched(corpus.images.subset(order))
    other = corpus._replace(records=rows, images=watched)
    folder = packing.pack(other, tmp_path, log=_quiet)
    assert len(watched.read) == 30
    packed.verify(folder)
    _same(other, packed.read(folder, "cuhk_pedes"))


def test_finished_set_is_left_alone_or_replaced_when_annotations_change(corpus, altered):
    lines, watched = [], Watched(corpus.images)
    before = _folder(altered, SIZE).stat().st_mtime_ns
    packing.pack(corpus._replace(images=watched), altered, resize=SIZE, log=lines.append)
    assert not watched.read and "is packed already" in lines[0]
    assert _folder(altered, SIZE).stat().st_mtime_ns == before
    other = corpus._replace(records=corpus.records[:9], images=corpus.images.subset(range(9)))
    packing.pack(other, altered, resize=SIZE, log=lines.append)
    assert "holds other annotations; packing anew" in lines[1]
    packed.verify(_folder(altered, SIZE))
    _same(other, packed.read(_folder(altered, SIZE), "cuhk_pedes"))


def _full_disk(monkeypatch, after):
    """ArrayRecord files from number `after` on are written to a device that is always full."""
    real = packing.array_record_module.ArrayRecordWriter
    opened = []

    def writer(path, options):
        opened.append(path)
        return real(path if len(opened) <= after else "/dev/full", options)

    monkeypatch.setattr(packing.array_record_module, "ArrayRecordWriter", writer)


@FORMS
def test_full_disk_is_said_and_leaves_nothing_that_looks_finished(
    corpus, tmp_path, monkeypatch, resize
):
    with monkeypatch.context() as patch:
        _full_disk(patch, after=2)
        with pytest.raises(
            records.DataError,
            match=r"packed-test\.array_record-00002-of-00003 cannot be written \(.*No space left "
            r"on device.*\); make room .*finished files are kept",
        ):
            packing.pack(corpus, tmp_path, resize=resize, log=_quiet)
    assert packed.find(tmp_path, "cuhk_pedes", resize) is None
    work = tmp_path / "packed" / f"cuhk_pedes-{packed.form_of(resize)}" / ".1.0.0.incomplete"
    names = sorted(path.name for path in work.iterdir())
    assert len(names) == 3 and names[0].startswith("packed-") and names[-1] == "progress.json"
    lines = []
    packed.verify(packing.pack(corpus, tmp_path, resize=resize, log=lines.append))
    assert "going on after" in lines[0]


def test_disk_full_at_the_manifest_leaves_the_set_unfinished(corpus, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_manifest", full)
        with pytest.raises(records.DataError, match="cannot be written .*No space left on device"):
            packing.pack(corpus, tmp_path, log=_quiet)
    assert packed.find(tmp_path, "cuhk_pedes", None) is None
    packed.verify(packing.pack(corpus, tmp_path, log=_quiet))


def test_too_small_a_disk_is_said_before_anything_is_written(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=30 * 24 * 16 * 3 - 1)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(records.DataError, match=r"packing needs 0\.0 GB more, but its disk has on"):
        packing.pack(corpus, tmp_path, resize=SIZE, log=_quiet)
    assert not list(tmp_path.rglob("packed-*"))
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda p: usage._replace(free=30 * 24 * 48))
    packing.pack(corpus, tmp_path, resize=SIZE, log=_quiet)


def test_folder_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "packed").write_text("a file, not a folder")
    with pytest.raises(records.DataError, match=r"cuhk_pedes-original cannot be written \("):
        packing.pack(corpus, tmp_path, log=_quiet)


def test_second_packer_is_refused_while_the_first_one_works(corpus, tmp_path):
    refused = []

    class Pictures(Watched):
        def content(self, index):
            if index == 3:
                with pytest.raises(records.DataError) as caught:
                    packing.pack(corpus, tmp_path, log=_quiet)
                refused.append(str(caught.value))
            return super().content(index)

    folder = packing.pack(corpus._replace(images=Pictures(corpus.images)), tmp_path, log=_quiet)
    assert len(refused) == 1
    assert "cuhk_pedes-original is being packed by another process" in refused[0]
    assert f"(process {os.getpid()} on " in refused[0] and "wait until" in refused[0]
    packed.verify(folder)
    packing.pack(corpus, tmp_path, resize=SIZE, log=_quiet)  # the lock is free again


def test_unreadable_picture_stops_packing_and_is_named(corpus, tmp_path):
    class Pictures(Watched):
        def content(self, index):
            return b"damaged" if index == 4 else super().content(index)

    broken = corpus._replace(images=Pictures(corpus.images))
    with pytest.raises(records.DataError, match=r"imgs/a b/é4\.png cannot be read as an image"):
        packing.pack(broken, tmp_path, resize=SIZE, log=_quiet)
    assert packed.find(tmp_path, "cuhk_pedes", SIZE) is None
    packing.pack(broken, tmp_path, log=_quiet)  # bytes are bytes: reading will say so
    read = packed.read(_folder(tmp_path, None), "cuhk_pedes").images
    with pytest.raises(records.DataError, match=r"a b/é4\.png in .*cannot be read as an image"):
        read.load(4, SIZE)


def test_where_folders_cannot_be_renamed_the_manifest_comes_last(corpus, tmp_path, monkeypatch):
    """As in an object store: no working folder, and files arrive whole."""
    monkeypatch.setattr(packing.remote, "is_local", lambda path: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        stopped = corpus._replace(images=Watched(corpus.images, 29))
        packing.pack(stopped, tmp_path, log=_quiet)
    folder = tmp_path / "packed/cuhk_pedes-original/1.0.0"
    assert list(folder.glob("packed-*")) and not (folder / "manifest.json").exists()
    assert packed.find(tmp_path, "cuhk_pedes", None) is None
    again = Watched(corpus.images)
    packing.pack(corpus._replace(images=again), tmp_path, log=_quiet)
    assert 0 < len(again.read) < 30
    packed.verify(folder)
    _same(corpus, packed.read(folder, "cuhk_pedes"))
    # While it is packed anew, the old files are not taken for a finished set.
    rows = tuple(records.Record(r.image, r.identity, ("new",), r.split) for r in corpus.records)
    stopped = corpus._replace(images=Watched(corpus.images, 29), records=rows)
    with pytest.raises(KeyboardInterrupt):
        packing.pack(stopped, tmp_path, log=_quiet)
    assert packed.find(tmp_path, "cuhk_pedes", None) is None


def test_progress_is_told(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_LOG_SECONDS", 0)
    lines = []
    folder = packing.pack(corpus, tmp_path, log=lines.append)
    counts = [int(line.split()[1]) for line in lines if line.startswith("packed ")]
    assert counts == list(range(1, 31))
    assert lines[29].startswith("packed 30 of 30 pictures, ") and lines[29].endswith("0 s left")
    assert lines[-1] == f"{folder}: 30 pictures in 8 files."


def test_manifest_says_what_is_there(corpus, finished):
    folder = _folder(finished, SIZE)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == "1.0.0" and manifest["resize"] == [24, 16]
    assert manifest["dataset"] == "cuhk_pedes"
    assert {s: c["pictures"] for s, c in manifest["splits"].items()} == dict(
        collections.Counter(row.split for row in corpus.records)
    )
    captions = sum(len(row.captions) for row in corpus.records)
    assert sum(counts["captions"] for counts in manifest["splits"].values()) == captions
    others = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == others and not any(name.startswith(".") for name in others)
    for name, file in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_reading_needs_no_tfds(finished):
    """Worker processes start half a second sooner."""
    code = f"""
        import sys
        sys.modules["tensorflow_datasets"] = None
        from itself_jax.data import packed
        read = packed.read({str(_folder(finished, SIZE))!r}, "cuhk_pedes")
        assert read.images.load(0, {SIZE}).shape == {(*SIZE, 3)}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=True)
