"""The weights are not finite, out of all proportion, or no floats; the plan reads no weight."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.hostile.kit import Damage, main

SAYS = "bert.encoder.layer.0.output.dense.weight holds NaN or infinite weights"
ERROR = r"weights are quantized|dense\.weight(: its largest weight is| holds NaN or infinite weights|: got weights of dtype)|has the dtype"
ONLY_MERGE = True
NAME = "bert.encoder.layer.0.output.dense.weight"


def changed(change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[NAME] = change(tensors[NAME]).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def one(value: float) -> Damage:
    def change(tensor: Tensor) -> Tensor:
        tensor[3, 5] = value
        return tensor

    return changed(change)


def flip(tensor: Tensor) -> Tensor:
    tensor.view(torch.int32)[3, 5] ^= 1 << 30
    return tensor


INPUTS = {
    "NaN": one(float("nan")),
    "infinity": one(float("inf")),
    "minus infinity": one(-float("inf")),
    "1e37": one(1.9e37),
    "10,000": one(-10_000.0),
    "a flipped bit of an exponent": changed(flip),
    "all weights times 1e6": changed(lambda tensor: tensor * 1e6),
    "integers": changed(lambda tensor: tensor.to(torch.int32)),
    "bytes": changed(lambda tensor: tensor.to(torch.int8)),
    "booleans": changed(lambda tensor: tensor.to(torch.bool)),
    "complex numbers": changed(lambda tensor: tensor.to(torch.complex64)),
    "8 bits": changed(lambda tensor: tensor.to(torch.float8_e4m3fn)),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
