"""The embedded data set (`dataset="synthetic"`): drawn pedestrians in RSTPReid's on-disk form.

    folder = synthetic.ensure(pathlib.Path("data"))
    folder/data_captions.json   [{"id", "img_path", "captions": [c1, c2], "split"}, ...]
    folder/imgs/NAME.jpg        192 x 80 (height x width)
    folder/masks/NAME.png       label map: where each attribute is seen (0: nowhere)
    folder/masks.json           {"labels": {label: attribute}, "regions": {attribute: [label]},
                                 "images": {NAME: {label: share of the picture's pixels}}}
    folder/attributes.json      each identity's attributes; what each caption names, in which words

It is a function of (seed, version, sizes) alone, and known down to each attribute, so that
`oracle_rank1` can say how well a perfect reader would do. Needs numpy and Pillow, never jax.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from itself_jax.data import (
    synthetic_brush,
    synthetic_captions,
    synthetic_draw,
    synthetic_people,
)

VERSION = 1  # raise it with every change that alters a byte of what is written
SPLITS = ("train", "val", "test")
_CAPTIONS_PER_IMAGE = 2
_JPEG_QUALITY = 92
# First number of a random stream's name, so that no two purposes share one.
_FAMILY, _PICTURE, _CAPTION, _PAINT = range(4)


class World(NamedTuple):
    """All but the pixels: RSTPReid's records, and what is true of identities and captions."""

    records: list[dict[str, Any]]
    attributes: dict[str, Any]


def folder_name(
    seed: int,
    identities: tuple[int, int, int],
    images_per_identity: int,
    named: tuple[int, int] = synthetic_captions.NAMED,
) -> str:
    """The cache folder's name: generator version, seed, sizes, and captions of another length."""
    sizes = "-".join(str(count) for count in identities)
    name = f"synthetic-v{VERSION}-seed{seed}-{sizes}-x{images_per_identity}"
    return name if named == synthetic_captions.NAMED else f"{name}-names{named[0]}-{named[1]}"


def _rng(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Own stream per thing drawn: workers may share the work in any way."""
    return np.random.default_rng([VERSION, seed, purpose, *numbers])


def imagine(
    seed: int,
    identities: tuple[int, int, int],
    images_per_identity: int,
    named: tuple[int, int] = synthetic_captions.NAMED,
) -> World:
    """People, views and captions of the whole data set, without drawing anything."""
    records, people, pictures = [], [], {}
    family = 0
    for split, count in zip(SPLITS, identities, strict=True):
        members: list[synthetic_people.Person] = []
        while len(members) < count:  # families never straddle splits; the last one may be cut
            members += synthetic_people.family(_rng(seed, _FAMILY, family), family)
            family += 1
        for person in members[:count]:
            number = len(people)
            people.append(
                {
                    "id": number,
                    "split": split,
                    "family": person.family,
                    "details": list(person.details),
                    "attributes": person.attributes,
                }
            )
            for image in range(images_per_identity):
                rng = _rng(seed, _PICTURE, number, image)
                view = synthetic_people.view(rng, person, image)
                path = f"{number:04d}_c{int(rng.integers(1, 15))}_{image + 1:04d}.jpg"
                written = [
                    synthetic_captions.caption(
                        _rng(seed, _CAPTION, number, image, i), person, view, named
                    )
                    for i in range(_CAPTIONS_PER_IMAGE)
                ]
                captions = [text for text, _ in written]
                records.append(
                    {"id": number, "img_path": path, "captions": captions, "split": split}
                )
                pictures[path] = {
                    "id": number,
                    "image": image,
                    "view": view,
                    "named": [named for _, named in written],
                }
    about = {"version": VERSION, "seed": seed, "identities": people, "pictures": pictures}
    return World(records, about)


# -------------------------------------------------------------------------------------- writing


def ensure(
    root: pathlib.Path,
    *,
    seed: int = 0,
    identities: tuple[int, int, int] = (400, 50, 150),
    images_per_identity: int = 4,
    named: tuple[int, int] = synthetic_captions.NAMED,
    workers: int | None = None,
    log: Callable[[str], None] = print,
) -> pathlib.Path:
    """The data set's folder under `root`; draws it there when it is absent.

    `identities` are those of train, val and test, `named` the fewest and the most attributes that a
    caption names. Builders exclude each other by a lock file, and
    the folder appears by one rename, so it is complete whenever it exists. `workers`: processes
    [one per usable core]; they do not change a byte. Raises OSError if `root` cannot be written.
    """
    if len(identities) != 3 or min(identities) < 0 or sum(identities) == 0:
        raise ValueError(f"identities must be three counts (train, val, test), not {identities}")
    if seed < 0 or images_per_identity < 1 or (workers is not None and workers < 1):
        raise ValueError(
            f"seed must be >= 0, images_per_identity and workers >= 1; got {seed=}, "
            f"{images_per_identity=}, {workers=}"
        )
    root = pathlib.Path(root)
    name = folder_name(seed, identities, images_per_identity, named)
    folder = root / name
    if folder.is_dir():
        return folder
    workers = workers or len(os.sched_getaffinity(0))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{name}.lock", log):
            if folder.is_dir():  # another process drew it while this one waited
                return folder
            for left in root.glob(f".{name}.*.tmp"):  # of a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = pathlib.Path(tempfile.mkdtemp(".tmp", f".{name}.", root))
            try:
                start = time.monotonic()
                world = imagine(seed, identities, images_per_identity, named)
                log(f"drawing {len(world.records)} pictures into {folder} ...")
                _write(temporary, world, workers)
                temporary.chmod(0o755)  # mkdtemp makes it private
                temporary.rename(folder)
                log(f"drew {len(world.records)} pictures in {time.monotonic() - start:.1f} s")
            finally:  # also after an interrupt
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the synthetic data set to {folder} ({error.strerror or error}); "
            "make the folder writable and leave it 40 MB, or choose another data root",
        ) from error
    return folder


@contextlib.contextmanager
def _lock(path: pathlib.Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the system frees it if this process dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for the process that holds {path} ...")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _dump(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write(folder: pathlib.Path, world: World, workers: int) -> None:
    (folder / "imgs").mkdir()
    (folder / "masks").mkdir()
    _dump(folder / "data_captions.json", world.records)
    _dump(folder / "attributes.json", world.attributes)
    workers = min(workers, len(world.records))
    if workers == 1:
        shares = _draw(folder, world.attributes, 0, 1)
    else:
        shares = _draw_in_processes(folder, workers)
    _dump(
        folder / "masks.json",
        {
            "labels": {str(label): name for label, name in synthetic_brush.LABELS.items()},
            "regions": {name: list(labels) for name, labels in synthetic_brush.REGIONS.items()},
            "images": {record["img_path"]: shares[record["img_path"]] for record in world.records},
        },
    )


def _draw(folder: pathlib.Path, about: dict, worker: int, workers: int) -> dict[str, dict]:
    """Draws every `workers`-th picture → each one's {label: share of the pixels}."""
    parent, shares = os.getppid(), {}
    for path in list(about["pictures"])[worker::workers]:
        if os.getppid() != parent:
            sys.exit("the building process is gone")
        picture = about["pictures"][path]
        number = picture["id"]
        who = about["identities"][number]["attributes"]
        skin = about["identities"][number]["family"]  # near-twins share it; no caption names it
        rng = _rng(about["seed"], _PAINT, number, picture["image"])
        painting = synthetic_draw.paint(who, picture["view"], skin, rng)
        painting.picture.save(folder / "imgs" / path, quality=_JPEG_QUALITY)
        painting.labels.save(folder / "masks" / f"{path.removesuffix('.jpg')}.png")
        pixels = np.bincount(np.asarray(painting.labels).ravel())
        shares[path] = {
            str(label): round(int(n) / int(pixels.sum()), 5)
            for label, n in enumerate(pixels)
            if label and n
        }
    return shares


def _draw_in_processes(folder: pathlib.Path, workers: int) -> dict[str, dict]:
    # Plain child processes and not a spawn pool: a pool's workers import the parent's `__main__`
    # again, and with it jax.
    package_root = str(pathlib.Path(__file__).resolve().parents[2])
    paths = [package_root, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    code = "from itself_jax.data import synthetic; synthetic._work()"
    children = []
    try:
        for worker in range(workers):
            children.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, str(folder), str(worker), str(workers)],
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for child in children:
            complaint = child.communicate()[1]
            if child.returncode:
                last = complaint.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
                raise OSError(f"a drawing process failed: {last[0]}")
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stderr.close()
    shares: dict[str, dict] = {}
    for worker in range(workers):
        part = folder / f"shares-{worker}.json"
        shares.update(json.loads(part.read_text(encoding="utf-8")))
        part.unlink()
    return shares


def _work() -> None:
    """A child process of `_draw_in_processes`: draws its part."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    folder, worker, workers = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    about = json.loads((folder / "attributes.json").read_text(encoding="utf-8"))
    _dump(folder / f"shares-{worker}.json", _draw(folder, about, worker, workers))


# --------------------------------------------------------------------------------------- oracle


def oracle_rank1(folder: pathlib.Path, split: str) -> float:
    """Text→image R@1 in percent of a reader who knows every attribute and nothing else."""
    path = pathlib.Path(folder) / "attributes.json"
    return expected_rank1(json.loads(path.read_text(encoding="utf-8")), split)


def expected_rank1(about: dict[str, Any], split: str) -> float:
    """`oracle_rank1` of the content of `attributes.json`.

    Each caption ranks the split's pictures by how many of the attributes that it names are true of
    the picture's identity. With m pictures tied at the top, p of them right, a random order of
    ties is right with probability p/m: that is averaged over an identity's captions, then over
    identities.
    """
    people = {p["id"]: p["attributes"] for p in about["identities"] if p["split"] == split}
    if not people:
        raise ValueError(f"no identity is in split {split!r}; there are {', '.join(SPLITS)}")
    pictures = [p for p in about["pictures"].values() if p["id"] in people]
    owners = np.asarray([p["id"] for p in pictures])
    names = sorted({name for attributes in people.values() for name in attributes})
    values = np.asarray([[people[i][name] for name in names] for i in owners])
    scores: dict[int, list[float]] = {number: [] for number in people}
    for picture in pictures:
        who = people[picture["id"]]
        for named in picture["named"]:
            columns = [names.index(name) for name in named]
            true = (values[:, columns] == [who[names[c]] for c in columns]).sum(1)
            best = owners[true == true.max()]
            scores[picture["id"]].append(float(np.mean(best == picture["id"])))
    return 100 * float(np.mean([np.mean(s) for s in scores.values()]))
