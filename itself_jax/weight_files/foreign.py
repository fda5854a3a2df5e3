"""What a file is that holds no weights we can read: every sentence says what to do instead."""

from __future__ import annotations

from typing import NoReturn

from itself_jax.weight_files import source as source_lib

_CONVERT = "load it with its own program and save its weights with safetensors"
_UNPACK = "unpack it and give the file inside"
_BEGINNINGS = (
    (b"\x1f\x8b", "is packed with gzip", _UNPACK),
    (b"BZh", "is packed with bzip2", _UNPACK),
    (b"\xfd7zXZ\x00", "is packed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "is packed with zstd", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", _UNPACK),
    (b"Rar!", "is a RAR archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes it", _CONVERT),
    (b"GGUF", "is a GGUF file", _CONVERT),
    (
        b"\x93NUMPY",
        "is a single array without a name (.npy)",
        "save named arrays with numpy.savez",
    ),
    (b"model_checkpoint_path:", "is the index of a TensorFlow checkpoint", _CONVERT),
)
_TF_INDEX_END = (0xDB4775248B80FB57).to_bytes(8, "little")
_EMPTY_ZIP = b"PK\x05\x06"


def refuse(source: source_lib.Source, head: bytes) -> NoReturn:
    """Raises WeightFileError with what the file that begins with `head` seems to be."""
    if not head:
        source.refuse("is empty")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        source.refuse(
            "is a pointer of Git LFS and not the file itself",
            "run `git lfs pull` in its repository",
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        source.refuse(
            "is a web page and not a file of weights",
            "download the file itself: the page may say that you must log in, or why it failed",
        )
    if head[257:262] == b"ustar":
        if head.removeprefix(b"./").startswith(b"sys_info\0"):
            source.refuse(
                "is a tar file of torch before 0.2", "load it with torch and save it anew"
            )
        source.refuse("is a tar file", _UNPACK)
    for beginning, what, advice in _BEGINNINGS:
        if head.startswith(beginning):
            source.refuse(what, advice)
    if head.startswith(_EMPTY_ZIP):
        source.refuse("is a zip file without entries")
    if source.read(source.size - 8, 8) == _TF_INDEX_END:
        source.refuse("is the index of a TensorFlow checkpoint", _CONVERT)
    if ".data-0" in source.path.name and "-of-0" in source.path.name:
        source.refuse("is a part of a TensorFlow checkpoint", _CONVERT)
    if source.path.suffix == ".onnx" or (head[0] == 8 and b"onnx" in head[:4096]):
        source.refuse("is an ONNX model", _CONVERT)
    if not any(head):
        source.refuse("begins with nothing but zeros: it was not written to the end")
    if source.path.suffix == ".safetensors":
        source.refuse("is no safetensors file: no header follows its first eight bytes")
    source.refuse(
        f"is no file of weights: it begins with {source_lib.show(head[:8])}",
        "give what torch.save, TorchScript, safetensors or numpy.savez has written",
    )
