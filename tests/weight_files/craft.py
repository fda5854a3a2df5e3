"""Weight files made byte by byte, without torch: also such as torch would never write."""

import io
import json
import pathlib
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np

FILES = pathlib.Path(__file__).parent / "files"
MARK, STOP, REDUCE = b"(", b".", b"R"
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
PROTOCOL = b"\x80\x02"


def expected(group: str) -> dict[str, np.ndarray]:
    """What torch says the arrays of a fixture are."""
    with np.load(FILES / "expected.npz") as file:
        arrays = {n.removeprefix(group): file[n] for n in file.files if n.startswith(group)}
    return {n: a.view(ml_dtypes.bfloat16) if "bfloat16" in n else a for n, a in arrays.items()}


# Pieces of pickles.


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def numbers(values) -> bytes:
    return tuple_of(*map(number, values))


def dict_of(items: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def list_of(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + tuple_of(*arguments) + REDUCE


def storage(kind="FloatStorage", key="0", count=4, *, tail=b"", module="torch") -> bytes:
    """A persistent id; `tail` is the view metadata of an old file."""
    parts = (text("storage"), name(module, kind), text(key), text("cpu"), number(count), tail)
    return tuple_of(*parts) + b"Q"


def tensor(where=None, *, offset=0, shape=(4,), strides=(1,)) -> bytes:
    arguments = (
        *(storage() if where is None else where, number(offset), numbers(shape)),
        *(numbers(strides), b"\x89", ORDERED_DICT),
    )
    return call("torch._utils", "_rebuild_tensor_v2", *arguments)


def pickle(value: bytes) -> bytes:
    return PROTOCOL + value + STOP


# Whole files.


def four_floats() -> bytes:
    return np.arange(4, dtype="<f4").tobytes()


def zip_file(entries) -> bytes:
    """A zip file as the standard library writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(zipfile.ZipInfo(entry), content)
    return buffer.getvalue()


def torch_zip(value: bytes, *, storages=None, prefix="archive/", more=None) -> bytes:
    """What torch.save writes for a pickled value."""
    storages = {"0": four_floats()} if storages is None else storages
    entries = {f"{prefix}data.pkl": pickle(value)}
    entries |= {f"{prefix}data/{key}": content for key, content in storages.items()}
    return zip_file(entries | {f"{prefix}version": b"3\n"} | (more or {}))


def script_zip(value: bytes, *, constants=b")", more=None) -> bytes:
    """A TorchScript archive of a pickled module."""
    more = {"archive/constants.pkl": pickle(constants), **(more or {})}
    return torch_zip(value, more=more)


def module(kind: str, attributes: dict[str, bytes]) -> bytes:
    return name("__torch__", kind) + b")\x81" + dict_of(attributes) + b"b"


def legacy(
    value: bytes, *, storages=None, keys=None, little=True, version=1001, views=False
) -> bytes:
    """What torch.save wrote before 1.6; storages are (count, bytes).

    Its persistent ids say of which storage they are a view; without `views`, of none.
    """
    value = value if views else value.replace(b"tQ", b"NtQ")
    storages = {"0": (4, four_floats())} if storages is None else storages
    order = b"\x88" if little else b"\x89"
    system = dict_of({"protocol_version": number(1001), "little_endian": order})
    out = pickle(number(0x1950A86A20F9469CFC6C)) + pickle(number(version)) + pickle(system)
    out += pickle(value) + pickle(list_of(*map(text, keys if keys is not None else storages)))
    for count, content in storages.values():
        out += struct.pack("<q", count) + content
    return out


def safetensors(header, data=b"") -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def field(dtype="F32", shape=(4,), place=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def npy(header: str | None = None, data=b"", array=None) -> bytes:
    """A .npy file with a header of one's own, or as NumPy writes it."""
    if array is not None:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array)
        return buffer.getvalue()
    content = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content + data


# Not `ru_maxrss`, which a process inherits from the one that started it.
PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
"""

_READ = f"""{PEAK}
import json, sys, time
from itself_jax import weight_files
before = peak()
start = time.perf_counter()
message = None
try:
    for tensor in weight_files.read(sys.argv[1]).tensors.values():
        tensor.read()
except weight_files.WeightFileError as error:
    message = str(error)
seconds = time.perf_counter() - start
print(json.dumps([message, seconds, peak() - before]))
"""


def read_in_a_fresh_process(path) -> tuple[str | None, float, int]:
    """The message of the refusal, seconds, and bytes of memory beyond those of the imports.

    Here every call is checked by jaxtyping and beartype, which makes it a hundred times slower.
    """
    command = [sys.executable, "-c", _READ, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def change(content: bytes, before: bytes, after: bytes, *, last=False) -> bytes:
    """Replaces one occurrence of bytes that must be there."""
    at = content.rfind(before) if last else content.find(before)
    assert at >= 0
    return content[:at] + after + content[at + len(before) :]
