"""The arithmetic of a merge: the mix of the target and a source in each tensor."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .units import Unit


class Mix(NamedTuple):
    """The coefficients of `base + keep * (target - base) + take * (source - base)`.

    If they sum to 1, the base cancels out, and the mix is the point `take` of the line from the target to the source.

    Attributes:
        keep: Coefficient of the target.
        take: Coefficient of the source.
    """

    keep: float
    take: float

    @classmethod
    def on_line(cls, take: float) -> "Mix":
        """Return the mix at the point `take` of the line from the target (0) to the source (1)."""
        return cls(1.0 - take, take)

    @classmethod
    def mean(cls, mixes: Sequence["Mix"]) -> "Mix":
        """Return the mix whose model is the mean of the models of `mixes`; for statistics the mean is approximate."""
        return cls(fmean(mix.keep for mix in mixes), fmean(mix.take for mix in mixes))

    @property
    def moves(self) -> bool:
        """Whether the mix differs from the target."""
        return self != (1.0, 0.0)


@torch.no_grad()
def interpolate_(tensor: Tensor, start: Tensor, end: Tensor, coefficient: float) -> None:
    """Change `tensor` in place to `start + coefficient * (end - start)`, exact for the coefficients 0 and 1.

    An integer tensor, such as the batch count of a BatchNorm, has no values in between. It becomes `end` for a
    coefficient of at least 0.5, otherwise `start`.
    """
    if coefficient == 0 or (coefficient < 0.5 and not tensor.is_floating_point()):
        tensor.data.copy_(start)
    elif coefficient == 1 or not tensor.is_floating_point():
        tensor.data.copy_(end)
    else:
        device = tensor.device
        dtype = torch.promote_types(tensor.dtype, torch.float32)  # half precision would round the difference
        out = tensor.data if tensor.dtype == dtype else None
        mixed = torch.lerp(start.to(device, dtype), end.to(device, dtype), coefficient, out=out)
        if out is None:
            tensor.data.copy_(mixed)


@torch.no_grad()
def mix_(tensor: Tensor, start: Tensor, end: Tensor, base: Tensor | None, mix: Mix) -> None:
    """Change `tensor` in place to the mix of `start` (the target), `end` (the source) and `base`.

    Statistics, the tensors that are not parameters, are only averaged: if the mix does not sum to 1, they become the
    average of `start` and `end` with the weights `keep` and `take`. `base` may be `None` if the mix sums to 1.
    """
    total = mix.keep + mix.take
    if base is None or math.isclose(total, 1.0, abs_tol=1e-9):
        interpolate_(tensor, start, end, mix.take)
    elif not isinstance(tensor, nn.Parameter):
        interpolate_(tensor, start, end, mix.take / total if total else 0.0)
    else:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        in_place = tensor.dtype == dtype
        mixed = tensor.data if in_place else torch.empty_like(tensor, dtype=dtype)
        torch.mul(start.to(tensor.device, dtype), mix.keep, out=mixed)
        mixed.add_(end.to(tensor.device, dtype), alpha=mix.take)
        mixed.add_(base.to(tensor.device, dtype), alpha=1.0 - total)
        if not in_place:
            tensor.data.copy_(mixed)


def blend_(
    tensors: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    mixes: Mapping[str, Mix],
    base: Mapping[str, Tensor] | None = None,
) -> None:
    """Change the tensors of `units` in place to mixes of the target and a source.

    Args:
        tensors: The tensors to change, by name.
        start: The target's values.
        source_values: The source's values.
        units: The units to change.
        mixes: The mix by name of unit.
        base: The base's values; `None` if all mixes sum to 1.
    """
    for unit in units:
        for name in unit.tensors:
            origin = None if base is None else base[name]
            mix_(tensors[name], start[name], source_values[name], origin, mixes[unit.name])
