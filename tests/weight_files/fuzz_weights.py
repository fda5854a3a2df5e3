"""Reads a thousand damaged files: `python fuzz_weights.py FOLDER COUNT SEED` in a fresh process.

Every file either gives arrays or is refused with WeightFileError. The memory is limited to 2 GB and
each file to some seconds. What this process prints last is a summary in JSON.
"""

import collections
import io
import json
import pathlib
import random
import resource
import struct
import sys
import time
import traceback
import zipfile

import craft

from itself_jax import weight_files

SECONDS = 10
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
)


def seeds() -> list[tuple[str, bytes]]:
    """The fixtures, and small files of our own whose every byte matters."""
    found = [(path.name, path.read_bytes()) for path in sorted(craft.FILES.iterdir())]
    model = craft.dict_of({"a": craft.tensor(), "b": craft.tensor(shape=(2, 2), strides=(1, 2))})
    header = {"a": craft.field(), "b": craft.field("I64", (2,), (16, 32))}
    floats = "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2)}"
    return found + [
        ("zip", craft.torch_zip(craft.dict_of({"model": model, "epoch": b"K\x03"}))),
        ("legacy", craft.legacy(model)),
        ("script", craft.script_zip(craft.module("Net", {"a": craft.tensor()}))),
        ("safetensors", craft.safetensors(header, bytes(32))),
        ("npz", craft.zip_file({"a.npy": craft.npy(floats, craft.four_floats())})),
    ]


def flip(rng: random.Random, content: bytearray, _) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, content: bytearray, _) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.choice((1, 7, 64, len(content)))]


def insert(rng: random.Random, content: bytearray, _) -> None:
    at = rng.randrange(len(content))
    content[at:at] = rng.randbytes(rng.choice((1, 8, 100)))


def splice(rng: random.Random, content: bytearray, others: list[bytes]) -> None:
    """A piece of another file, or of this one, over or between what is here."""
    other = rng.choice([bytes(content), *others])
    start, size = rng.randrange(len(other)), rng.choice((4, 16, 64, 512, len(other)))
    piece = other[start : start + size]
    at = rng.randrange(len(content))
    content[at : at + rng.choice((0, len(piece)))] = piece


def number(rng: random.Random, content: bytearray, _) -> None:
    """A length or an offset, wherever one may be."""
    layout = rng.choice(("<B", "<H", "<I", "<Q"))
    size = struct.calcsize(layout)
    marks = [content.find(mark) for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"{")]
    near = rng.choice([0, *(mark for mark in marks if mark >= 0)])
    at = rng.choice((near + rng.randrange(64), rng.randrange(len(content))))
    if at + size <= len(content):
        struct.pack_into(layout, content, at, rng.choice(NUMBERS) & ((1 << 8 * size) - 1))


def digits(rng: random.Random, content: bytearray, _) -> None:
    """A number that is written in digits: of JSON, or of a shape."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if places:
        at = rng.choice(places)
        content[at : at + 1] = str(rng.choice((-1, *NUMBERS))).encode()


def inside(rng: random.Random, content: bytearray, others: list[bytes]) -> None:
    """Damages an entry of a zip file and packs it anew, so that all checksums are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:
        return flip(rng, content, others)
    names = [n for n, entry in entries.items() if entry and n.endswith((".pkl", ".npy", ".py"))]
    if names:
        name = rng.choice(names)
        entry = bytearray(entries[name])
        for _ in range(rng.choice((1, 1, 3))):
            rng.choice((flip, cut, insert, splice, number, opcode))(rng, entry, others)
            if not entry:
                break
        entries[name] = bytes(entry)
    content[:] = craft.zip_file(entries)


def opcode(rng: random.Random, content: bytearray, _) -> None:
    content[rng.randrange(len(content))] = rng.choice(
        b"(.0123KJM\x8a\x8bNRbcdehijloq}]tu)Q\x80\x81\x85\x93\x94"
    )


WAYS = (flip, cut, insert, splice, number, digits, opcode, inside, inside, inside)


def main(folder: str, count: int, seed: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    rng = random.Random(seed)
    files = seeds()
    contents = [content for _, content in files]
    path = pathlib.Path(folder) / "mutated"
    outcomes: collections.Counter[str] = collections.Counter()
    refusals, slowest, bad = set(), 0.0, []
    for i in range(count):
        name, content = files[i % len(files)]
        way = rng.choice(WAYS)
        changed = bytearray(content)
        way(rng, changed, contents)
        path.write_bytes(changed)
        start = time.perf_counter()
        try:
            for tensor in weight_files.read(path).tensors.values():
                array = tensor.read()
                assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)
            outcome = "same" if bytes(changed) == content else "arrays"
        except weight_files.WeightFileError as error:
            outcome = "refused"
            message = str(error).removeprefix(str(path))
            refusals.add(" ".join(message.split()[:6]))
            if len(message) > 700 or not message.isprintable():
                bad.append((i, name, way.__name__, f"a message of {len(message)}: {message[:300]}"))
        except BaseException:
            outcome = "crashed"
            bad.append((i, name, way.__name__, traceback.format_exc()[-1500:]))
        outcomes[outcome] += 1
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        if seconds > SECONDS:
            bad.append((i, name, way.__name__, f"{seconds} s"))
    measure: dict = {}
    exec(craft.PEAK, measure)
    memory = measure["peak"]()
    print(
        json.dumps(
            {
                "outcomes": outcomes,
                "kinds": len(refusals),
                "slowest": slowest,
                "memory": memory,
                "bad": bad,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
