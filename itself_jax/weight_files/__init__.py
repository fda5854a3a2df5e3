"""Named arrays in files, whoever wrote them: reading and writing without torch, safely.

`read` takes what torch.save (of any version), TorchScript, safetensors and numpy.savez have
written, in one file or in shards. It never executes anything: the pickles in torch's files are
interpreted by a small machine that knows arrays and plain containers, and refuses the rest by name.
Arrays stay in the file until they are asked for. The writers go array by array, too.
"""

from itself_jax.weight_files.reading import TensorFile, read
from itself_jax.weight_files.source import Tensor, WeightFileError
from itself_jax.weight_files.writing import write_npz, write_safetensors, write_torch

__all__ = [
    "Tensor",
    "TensorFile",
    "WeightFileError",
    "read",
    "write_npz",
    "write_safetensors",
    "write_torch",
]
