"""Makes `files/` with real torch: `python tests/weight_files/make_fixtures.py` (torch 2.13).

The tests only read what it has made; `expected.npz` holds the values of all arrays as torch has
them, with bfloat16 as its bits.
"""

import argparse
import collections
import pathlib

import numpy as np
import safetensors.torch
import torch

HERE = pathlib.Path(__file__).parent / "files"
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint16),
)


class Block(torch.nn.Module):
    """What CLIP's archive has: half parameters, buffers, a module used twice, plain attributes."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 2)
        self.norm = torch.nn.LayerNorm(4)
        self.again = self.norm
        self.register_buffer("context_length", torch.tensor(77))
        self.scale = torch.nn.Parameter(torch.tensor(4.6052))
        self.small = torch.nn.Parameter(torch.randn(3, 2).half())
        self.plain = torch.ones(3)  # neither a parameter nor a buffer
        self.width = 4
        self.sizes = [1, 2]
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))

    def forward(self, x):
        x = self.again(self.norm(self.conv(x).mean((2, 3))))
        x = self.layers(x) * self.scale * self.context_length
        return x @ self.small.float().T + self.plain


def values():
    """Arrays of every type and layout, in an order that is not the alphabet's."""
    torch.manual_seed(0)
    state = collections.OrderedDict()
    for dtype in DTYPES:
        name = f"type.{str(dtype).removeprefix('torch.')}"
        state[name] = (torch.rand(3, 5) * 7 - 3 * dtype.is_signed).to(dtype)
    base = torch.randn(4, 6)
    state["z.whole"] = base
    state["z.transposed"] = base.T
    state["z.column"] = base[1:, 3]
    state["z.steps"] = base[::2, 1::3]
    state["z.tied"] = base
    state["scalar"] = torch.tensor(2.5)
    state["empty"] = torch.zeros(0, 4)
    state["empty_rows"] = torch.zeros(3, 0, 2, dtype=torch.float16)
    state["one_row"] = torch.arange(7).expand(1, -1)
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 2))
    state["class.é"] = torch.arange(3)
    return state


def main():
    HERE.mkdir(exist_ok=True)
    state = values()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    training = {
        "model": collections.OrderedDict((f"module.{n}", t) for n, t in state.items()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "args": argparse.Namespace(lr=1e-5, folder=pathlib.PurePosixPath("data"), names={"a"}),
        "epoch": 3,
        "num_epoch": 60,
        "iteration": 2**40,
        "best": np.float64(0.7525),
        "name": "ViT-B/16",
        "rng": np.arange(3),
        "done": True,
        "parent": None,
    }
    expected = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        expected[f"state/{name}"] = bits.numpy()
    torch.save(training, HERE / "training.pth")
    torch.save(training, HERE / "training_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(training, HERE / "training_protocol5.pth", pickle_protocol=5)
    torch.save(dict(state), HERE / "plain.pth")
    torch.save(state, HERE / "plain_legacy.pth", _use_new_zipfile_serialization=False)
    from torch.utils.serialization import config

    config.save.compute_crc32 = False
    torch.save({"state_dict": {"a": torch.arange(3)}}, HERE / "without_checksums.pth")
    config.save.compute_crc32 = True
    torch.save(optimizer.state_dict(), HERE / "optimizer.pth")
    torch.save(model, HERE / "whole_model.pth")
    torch.save(model, HERE / "whole_model_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.eye(2).to_sparse()}, HERE / "sparse.pth")
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, HERE / "complex.pth")
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    torch.save({"a": negated}, HERE / "negated.pth")
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    torch.save({"a": quantized}, HERE / "quantized.pth")
    torch.save({"a": torch.ones(2).to(torch.float8_e5m2)}, HERE / "float8.pth")
    torch.save({"a": torch.ones(2, device="meta")}, HERE / "meta.pth")
    block = Block()
    torch.manual_seed(1)
    for name, script in (
        ("scripted", torch.jit.script(block)),
        ("traced", torch.jit.trace(block, torch.ones(1, 3, 4, 4))),
    ):
        torch.jit.save(script, HERE / f"{name}.pt")
        for key, tensor in script.state_dict().items():
            expected[f"{name}/{key}"] = tensor.numpy()
    contiguous = {n: t.detach().clone().contiguous() for n, t in state.items()}
    safetensors.torch.save_file(contiguous, HERE / "library.safetensors", {"format": "pt"})
    np.savez_compressed(HERE / "expected.npz", **expected)


if __name__ == "__main__":
    main()
