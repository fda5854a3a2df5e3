"""gs:// paths are read, examined and packed to as local ones are, in a bucket kept in memory."""

import io
import json
import pathlib
import pickle
import sys
import tempfile

import miniature
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations import memory

from itself_jax import prepare
from itself_jax.data import datasets, doctor, packed, packing, records

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


def test_without_gcsfs_the_message_says_what_to_install(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    for dataset in datasets.DATASETS:
        with pytest.raises(ImportError, match="install gcsfs"):
            datasets.read(dataset, ROOT, "train")
