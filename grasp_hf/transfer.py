"""Moving weights into a model and taking them back. Pure tensor work: knows nothing of models or files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def place_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Change `tensors` in place to hold the storage of `values`, and return what they held.

    Nothing is copied where device and dtype agree: only pointers move, so `place_(tensors, kept)` undoes it bit for
    bit and at no cost.
    """
    kept = {}
    for name, value in values.items():
        tensor = tensors[name]
        kept[name] = tensor.data
        tensor.data = value.detach().to(tensor.device, tensor.dtype)
    return kept


@contextmanager
def placed(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `tensors` hold `values` inside the `with` block and what they held before after it, whatever happens."""
    kept = place_(tensors, values)
    try:
        yield
    finally:
        place_(tensors, kept)


@torch.no_grad()
def overwrite_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Change `tensors` in place to the numbers of `values`, in their own storage, device and dtype."""
    for name, value in values.items():
        tensors[name].data.copy_(value)


def interpolate(start: Tensor, end: Tensor, coefficient: float) -> Tensor:
    """Return `start + coefficient * (end - start)` in the dtype and on the device of `start`.

    A coefficient of 0 returns `start` itself. Integer tensors (such as the batch count of a BatchNorm) have no point
    in between: they are `end` for a coefficient of at least one half.
    """
    if coefficient == 0:
        return start
    if not start.is_floating_point():
        return end.to(start.device, start.dtype) if coefficient >= 0.5 else start
    return torch.lerp(start, end.to(start.device, start.dtype), coefficient)
