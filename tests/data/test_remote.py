"""gs:// paths are read, examined and packed to as local ones are, in a bucket kept in memory."""

import concurrent.futures
import contextlib
import io
import json
import pathlib
import pickle
import resource
import subprocess
import sys
import tempfile
import threading

import miniature
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations import memory

from itself_jax import prepare
from itself_jax.data import (
    datasets,
    doctor,
    packed,
    packing,
    pipeline,
    records,
    remote,
    tokenizer,
)

SIZE = (24, 12)
ROOT = "gs://bucket/data sets"


class Bucket(memory.MemoryFileSystem):
    """Behaves as gcsfs: objects appear when closed, and folders are only parts of their names."""

    protocol = ("gs", "gcs")
    cachable = False

    def __init__(self):
        super().__init__()
        self.store = {}
        self.pseudo_dirs = [""]
        self.written = []  # names, in order
        self.opened = []  # to be read, likewise

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def _open(self, path, mode="rb", **kwargs):
        path = self._strip_protocol(path)
        if mode == "rb":
            if path not in self.store:
                raise FileNotFoundError(path)
            self.opened.append(path)
            return io.BytesIO(self.store[path].getvalue())  # threads read at places of their own
        assert mode == "wb"
        return _Upload(self, path)


class _Upload(io.BytesIO):
    def __init__(self, bucket, path):
        super().__init__()
        self._bucket, self._path = bucket, path

    def close(self):
        if not self.closed:
            self._bucket.written.append(self._path)
            self._bucket.store[self._path] = memory.MemoryFile(data=self.getvalue())
        super().close()


@pytest.fixture(autouse=True)
def bucket(monkeypatch, tmp_path_factory):
    made = Bucket()
    usual = backend.fsspec_backend._get_filesystem

    def get(self, name):
        del self
        return made if name in ("gs", "gcs") else usual(name)

    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", get)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)  # it would go before fsspec
    # The lock of a remote set lies there; test runs beside this one have the same bucket.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return made


def _upload(folder, root=ROOT):
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            (epath.Path(root) / name).write_bytes(path.read_bytes())


def _pixels(pictures):
    return [pictures.load(index, SIZE) for index in range(len(pictures))]


def _quiet(line):
    del line


@pytest.fixture(params=miniature.DATASETS)
def dataset(request, tmp_path):
    """A data set's name; its files lie in tmp_path and in the bucket."""
    miniature.write(tmp_path, request.param)
    _upload(tmp_path)
    return "jsonl" if request.param == "csv" else request.param


@pytest.mark.parametrize("split", records.SPLITS)
def test_reads_what_the_local_files_hold(dataset, split, tmp_path):
    local = datasets.read(dataset, tmp_path, split, image_size=SIZE)
    remote = datasets.read(dataset, ROOT, split, image_size=SIZE)
    for field in ("dataset", "split", "image_paths", "captions", "original_ids"):
        assert getattr(remote, field) == getattr(local, field)
    for field in ("image_ids", "caption_ids", "caption_images"):
        np.testing.assert_array_equal(getattr(remote, field), getattr(local, field))
    assert remote.images.name(0).startswith(f"{ROOT}/")
    np.testing.assert_array_equal(_pixels(remote.images), _pixels(local.images))
    in_a_worker = pickle.loads(pickle.dumps(remote.images))
    assert in_a_worker.content(0) == local.images.content(0)


def test_data_root_may_be_the_file_or_the_benchmarks_own_folder(tmp_path):
    miniature.write(tmp_path / "own", "jsonl")
    miniature.write(tmp_path, "cuhk_pedes")
    _upload(tmp_path)
    assert datasets.read("jsonl", f"{ROOT}/own/pictures.jsonl", "test").image_paths
    assert datasets.read("cuhk_pedes", f"{ROOT}/CUHK-PEDES", "test").image_paths


def test_a_missing_picture_is_named(dataset):
    path = datasets.read(dataset, ROOT, "train").image_paths[1]
    (epath.Path(datasets.files(dataset, ROOT).image_folder) / path).unlink()
    with pytest.raises(records.DataError, match="1 of .* images of split 'train'") as caught:
        datasets.read(dataset, ROOT, "train")
    assert repr(path) in str(caught.value) and ROOT in str(caught.value)


def test_a_picture_of_another_case_is_suggested(tmp_path):
    miniature.write(tmp_path, "rstp_reid")
    _upload(tmp_path)
    folder = epath.Path(ROOT) / "RSTPReid" / "imgs"
    (folder / "0000_c1_0000.jpg").rename(folder / "0000_C1_0000.JPG")
    with pytest.raises(records.DataError, match=r"\(there is '0000_C1_0000.JPG'\)"):
        datasets.read("rstp_reid", ROOT, "train")


def test_a_picture_that_goes_away_later_is_named(tmp_path):
    miniature.write(tmp_path, "rstp_reid")
    _upload(tmp_path)
    pictures = datasets.read("rstp_reid", ROOT, "train").images
    epath.Path(pictures.name(2)).unlink()
    with pytest.raises(records.DataError, match="cannot be read as an image") as caught:
        pictures.load(2, SIZE)
    assert str(caught.value).startswith(pictures.name(2))


def test_an_empty_root_is_named():
    for dataset in datasets.DATASETS:
        with pytest.raises(records.MissingError, match=ROOT):
            datasets.read(dataset, ROOT, "train")


def test_the_doctor_examines_a_bucket(dataset, tmp_path):
    epath.Path(datasets.files(dataset, ROOT).images.name(0)).unlink()
    pathlib.Path(datasets.files(dataset, tmp_path).images.name(0)).unlink()
    reports = [
        doctor.examine(datasets.files(dataset, root), log=_quiet) for root in (ROOT, tmp_path)
    ]
    assert reports[0].check("missing images").count == 1
    assert reports[0].checks == reports[1].checks and reports[0].splits == reports[1].splits
    assert reports[0].source.startswith(ROOT)


def test_prepare_writes_its_report_into_the_bucket(dataset, bucket, tmp_path):
    prepare.prepare(dataset, ROOT, check_only=True)
    prepare.prepare(dataset, ROOT, check_only=True)  # and in the place of the first one
    report = json.loads((epath.Path(ROOT) / "doctor.json").read_text())
    prepare.prepare(dataset, tmp_path, check_only=True)
    local = json.loads((tmp_path / "doctor.json").read_text())
    assert report["checks"] == local["checks"] and report["splits"] == local["splits"]
    assert not [name for name in bucket.store if name.endswith(".tmp")]


def _names(bucket):
    return {name.rpartition("/")[2] for name in bucket.store if "/packed/" in name}


@pytest.mark.parametrize("resize", [None, SIZE], ids=["original", "resized"])
def test_a_set_packed_into_a_bucket_is_the_local_one(resize, bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "_RECORDS_PER_SHARD", 5)
    miniature.write(tmp_path, "rstp_reid")
    corpus = datasets.files("rstp_reid", tmp_path)
    local = packing.pack(corpus, tmp_path, resize=resize, log=_quiet)
    remote = packing.pack(corpus, ROOT, resize=resize, log=_quiet)
    assert bucket.written[-1].endswith(f"/{packed.MANIFEST}")
    assert packed.find(ROOT, "rstp_reid", resize) == remote
    assert _names(bucket) == {path.name for path in local.iterdir()}
    packed.verify(remote)
    for path in local.glob("*.array_record*"):
        assert (remote / path.name).read_bytes() == path.read_bytes()
    lines = []
    packing.pack(corpus, ROOT, resize=resize, log=lines.append)
    assert len(lines) == 1 and "is packed already" in lines[0]


def test_packing_from_one_bucket_into_another(tmp_path):
    miniature.write(tmp_path, "rstp_reid")
    _upload(tmp_path)
    prepare.prepare("rstp_reid", ROOT, out="gs://other")
    folder = epath.Path("gs://other/packed/rstp_reid-original") / packed.VERSION
    packed.verify(folder)
    assert (epath.Path("gs://other") / "doctor.json").exists()


def test_an_interrupted_packing_goes_on_and_has_no_manifest_before(bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "_RECORDS_PER_SHARD", 5)
    miniature.write(tmp_path, "rstp_reid")
    corpus = datasets.files("rstp_reid", tmp_path)
    picture = pathlib.Path(corpus.images.name(packed.file_order(corpus.records)[-1]))
    content = picture.read_bytes()
    picture.unlink()
    with pytest.raises(records.DataError, match="cannot be read as an image"):
        packing.pack(corpus, ROOT, log=_quiet)
    assert packed.MANIFEST not in _names(bucket)
    assert packed.find(ROOT, "rstp_reid", None) is None
    before = {name for name in bucket.store if "array_record" in name}
    assert before
    picture.write_bytes(content)
    bucket.written.clear()
    folder = packing.pack(corpus, ROOT, log=_quiet)
    assert not before & set(bucket.written)
    packed.verify(folder)


def test_other_annotations_replace_a_packed_set(bucket, tmp_path):
    for seed in (0, 1):
        miniature.write(tmp_path / str(seed), "rstp_reid", seed=seed)
        corpus = datasets.files("rstp_reid", tmp_path / str(seed))
        bucket.written.clear()
        folder = packing.pack(corpus, ROOT, log=_quiet)
        assert bucket.written[-1].endswith(f"/{packed.MANIFEST}")
    packed.verify(folder)
    rows = json.loads((folder / packed.ANNOTATIONS).read_text())["records"]
    assert [tuple(row[2]) for row in rows] == [record.captions for record in corpus.records]


FORMS = pytest.mark.parametrize("resize", [None, SIZE], ids=["original", "resized"])


@pytest.fixture
def pack(monkeypatch, tmp_path):
    """Packs a miniature below tmp_path and into the bucket, in files of a few pictures."""
    monkeypatch.setattr(remote, "_BLOCK", 50_000)  # the files are larger
    miniature.write(tmp_path / "files", "rstp_reid")
    corpus = datasets.files("rstp_reid", tmp_path / "files")

    def pack(resize=None, pictures=5):
        monkeypatch.setattr(packing, "_RECORDS_PER_SHARD", pictures)
        packing.pack(corpus, tmp_path, resize=resize, log=_quiet)
        return packing.pack(corpus, ROOT, resize=resize, log=_quiet)

    return pack


def _read(split="train", root=ROOT):
    return datasets.read("rstp_reid", root, split, image_size=SIZE)


def _train(split):
    return pipeline.TrainStream(
        split,
        tokenizer.Tokenizer(16),
        image_size=SIZE,
        batch_size=4,
        num_instances=2,
        num_epochs=2,
        seed=0,
        augment_image=True,
        augment_caption=True,
    )


def _batches(stream):
    with contextlib.closing(stream.batches()) as batches:
        return list(batches)


def _copied(bucket):
    """The files of pictures that were read in the bucket, in order."""
    names = (name.rpartition("/")[2] for name in bucket.opened)
    return [name for name in names if "array_record" in name]


def _cached():
    folder = remote.place("any").parent
    return sorted(folder.iterdir()) if folder.exists() else []


def _damage(path, at=200):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@FORMS
def test_a_packed_set_in_a_bucket_reads_and_trains_as_the_local_one(resize, pack, tmp_path):
    folder = pack(resize)
    for name in records.SPLITS:
        local = _read(name, tmp_path)
        pixels = _pixels(local.images)
        found = _read(name)
        assert found.images.name(0) == f"{found.image_paths[0]} in {folder / _first(name)}"
        for field in ("dataset", "split", "image_paths", "captions", "original_ids"):
            assert getattr(found, field) == getattr(local, field)
        for field in ("image_ids", "caption_ids", "caption_images"):
            np.testing.assert_array_equal(getattr(found, field), getattr(local, field))
        in_a_worker = pickle.loads(pickle.dumps(found.images))
        np.testing.assert_array_equal(_pixels(in_a_worker), pixels)
        np.testing.assert_array_equal(_pixels(found.images), pixels)
        np.testing.assert_array_equal(_pixels(found.images.subset([2, 0])), [pixels[2], pixels[0]])
    trained = [_batches(_train(_read(root=root))) for root in (ROOT, tmp_path)]
    assert len(trained[1]) > 4
    for got, wanted in zip(*trained, strict=True):
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def _first(split):
    count = {"train": 3, "val": 1, "test": 2}[split]
    return f"packed-{split}.array_record-00000-of-{count:05}"


def test_only_what_is_looked_at_is_copied_and_only_once(bucket, pack):
    pack(SIZE)
    bucket.opened.clear()
    pictures = _read().images
    assert not _copied(bucket) and not _cached()
    pictures.load(1, SIZE)
    pictures.load(2, SIZE)
    assert _copied(bucket) == ["packed-train.array_record-00000-of-00003"]
    pictures.load(11, SIZE)
    pickle.loads(pickle.dumps(pictures)).load(1, SIZE)
    _pixels(_read().images)
    assert sorted(_copied(bucket)) == [
        f"packed-train.array_record-0000{n}-of-00003" for n in range(3)
    ]
    assert [len(path.name) for path in _cached()] == [64] * 3


def test_a_local_set_is_read_where_it_lies(pack, tmp_path):
    pack(SIZE)
    _pixels(_read(root=tmp_path).images)
    assert not _cached()


def test_what_is_packed_anew_is_copied_anew(pack, tmp_path):
    old = pack(SIZE)
    before = _pixels(_read().images)
    miniature.write(tmp_path / "other", "rstp_reid", seed=1)
    corpus = datasets.files("rstp_reid", tmp_path / "other")
    assert packing.pack(corpus, ROOT, resize=SIZE, log=_quiet) == old
    after = _pixels(_read().images)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, _pixels(_read(root=tmp_path / "other").images))


@FORMS
def test_a_flipped_byte_in_the_bucket_is_noticed_and_no_copy_stays(resize, pack):
    folder = pack(resize)
    path = folder / "packed-train.array_record-00001-of-00003"
    good = path.read_bytes()
    pictures = _read().images
    for at in (0, len(good) // 2, len(good) - 1):
        path.write_bytes(good)
        _damage(path, at)
        with pytest.raises(remote.CopyError, match="is damaged: .* checksum .*; try") as caught:
            pictures.load(5, SIZE)
        assert str(caught.value).startswith(f"{path} ")
        assert sum(path.stat().st_size for path in _cached()) == 0
    pictures.load(0, SIZE)  # lies in another file
    path.write_bytes(good)
    pictures.load(5, SIZE)


def test_another_file_of_this_name_and_size_is_noticed(bucket, pack):
    folder = pack(SIZE)
    pictures = _read("test").images
    one, other = (folder / f"packed-test.array_record-0000{n}-of-00002" for n in range(2))
    assert one.stat().length == other.stat().length
    other.write_bytes(one.read_bytes())
    with pytest.raises(remote.CopyError, match="00001-of-00002 is damaged"):
        _pixels(pictures)


def test_training_stops_at_a_file_that_cannot_be_had_rather_than_replacing_its_pictures(pack):
    folder = pack(SIZE, pictures=1)  # so that there is another one of each person
    stream = _train(_read())
    (folder / "packed-train.array_record-00001-of-00012").unlink()
    with pytest.raises(
        remote.CopyError,
        match=r"00001-of-00012 cannot be copied from its bucket \(FileNotFoundError: .*start the "
        "same command again",
    ):
        _batches(stream)
    assert stream.replaced == 0


def test_a_bucket_that_does_not_answer_is_named(monkeypatch, bucket, pack):
    pack(SIZE)
    answers = threading.Event()
    usual = Bucket._open

    def late(self, path, mode="rb", **kwargs):
        if "array_record" in path:
            answers.wait(60)
        return usual(self, path, mode, **kwargs)

    pictures = _read().images
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_PATIENCE", 0.1)
        patch.setattr(Bucket, "_open", late)
        with pytest.raises(remote.CopyError, match=r"its bucket \(no answer for 0\.1 s\); see"):
            pictures.load(0, SIZE)
        answers.set()
    pictures.load(0, SIZE)


@pytest.mark.parametrize("damage", ["cut", "emptied", "deleted"])
def test_a_copy_that_is_not_whole_is_made_anew(damage, pack):
    pack(SIZE)
    wanted = _pixels(_read().images)
    for path in _cached():
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else b"")
    np.testing.assert_array_equal(_pixels(_read().images), wanted)
    assert [len(path.name) for path in _cached()] == [64] * 3


def test_a_flipped_byte_of_a_copy_is_noticed_and_the_message_says_to_delete_it(pack):
    folder = pack(SIZE)
    pictures = _read("val").images
    wanted = pictures.load(0, SIZE)
    (copy,) = _cached()
    _damage(copy, copy.read_bytes().index(wanted.tobytes()[:100]))
    again = pickle.loads(pickle.dumps(pictures))
    with pytest.raises(records.DataError) as caught:
        again.load(0, SIZE)
    assert str(caught.value).startswith(f"{copy} is damaged: the picture ")
    assert f"; delete it, and it is copied anew from {folder / _first('val')}." in str(caught.value)
    copy.unlink()
    again = pickle.loads(pickle.dumps(pictures))
    np.testing.assert_array_equal(again.load(0, SIZE), wanted)


def test_threads_and_copies_of_the_pictures_share_one_copying(monkeypatch, bucket, pack):
    pack(SIZE)
    pictures = _read("val").images
    bucket.opened.clear()
    started, usual = threading.Barrier(6), Bucket._open
    copies = [pictures, pictures, *(pickle.loads(pickle.dumps(pictures)) for _ in range(4))]

    def slow(self, path, mode="rb", **kwargs):
        threading.Event().wait(0.2)  # for the others to come
        return usual(self, path, mode, **kwargs)

    def load(one):
        started.wait(10)
        return one.load(0, SIZE)

    monkeypatch.setattr(Bucket, "_open", slow)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(load, copies))
    for pixels in loaded[1:]:
        np.testing.assert_array_equal(pixels, loaded[0])
    assert _copied(bucket) == [_first("val")]
    assert len(_cached()) == 1


def test_what_a_killed_process_left_is_no_part_of_a_copy(pack):
    pack(SIZE)
    wanted = _pixels(_read("val").images)
    (copy,) = _cached()
    content = copy.read_bytes()
    copy.with_name(f"{copy.name}.part").write_bytes(content[:70_000])
    copy.unlink()
    np.testing.assert_array_equal(_pixels(_read("val").images), wanted)
    assert _cached() == [copy] and copy.read_bytes() == content


def test_a_full_disk_is_said_and_nothing_is_left_on_it(pack):
    folder = pack(SIZE)
    pictures = _read("val").images
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(remote.CopyError) as caught:
            pictures.load(0, SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert message.startswith(f"{folder / _first('val')} (0 MB) cannot be copied to ")
    assert "File too large" in message and "set XDG_CACHE_HOME to another folder" in message
    assert sum(path.stat().st_size for path in _cached()) == 0
    pictures.load(0, SIZE)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, pack, tmp_path):
    pack(SIZE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(remote.CopyError, match=f"copied to {tmp_path}/file/itself_jax/packed "):
        _read().images.load(0, SIZE)


def test_a_packed_set_in_a_bucket_is_verified_and_packed_resized(pack, tmp_path):
    pack(None)
    prepare.prepare("rstp_reid", ROOT, out=tmp_path / "out", resize=SIZE)
    wanted = _pixels(_read(root=tmp_path / "files").images)
    np.testing.assert_array_equal(_pixels(_read(root=tmp_path / "out").images), wanted)


@pytest.mark.parametrize("dataset", datasets.DATASETS)
def test_an_address_that_is_no_path_is_refused(dataset):
    for read in (lambda root: datasets.read(dataset, root, "train"), remote.path):
        with pytest.raises(records.DataError) as caught:
            read("https://host/data")
        assert str(caught.value) == (
            "https://host/data is no path of a data set: https:// cannot be read; use a local "
            "path or a bucket's, such as gs://BUCKET/FOLDER."
        )


_WITHOUT_GCSFS = f"""
import sys
sys.modules["gcsfs"] = None  # as if it were not installed
from itself_jax.data import datasets
for dataset in datasets.DATASETS:
    try:
        datasets.read(dataset, {ROOT!r}, "train")
    except ImportError as error:
        assert "install gcsfs" in str(error).lower(), error
    else:
        raise AssertionError(dataset)
"""


def test_without_gcsfs_the_message_says_what_to_install():
    """In a process of its own: once imported, fsspec keeps it."""
    command = [sys.executable, "-c", _WITHOUT_GCSFS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
