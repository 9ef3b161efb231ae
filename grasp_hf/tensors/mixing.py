"""The arithmetic of a merge: how much of the target and of a source each tensor takes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .units import Unit

PIECE = 2**20  # elements that are worked on at once


class Mix(NamedTuple):
    """How much of two models goes into one: `base + keep * (target - base) + take * (source - base)`.

    With a sum of 1 the base drops out, and it is the point `take` of the line from the target to the source.
    """

    keep: float
    take: float

    @classmethod
    def on_line(cls, take: float) -> "Mix":
        """Return that point of the line from the target (0) to the source (1)."""
        return cls(1.0 - take, take)

    @classmethod
    def mean(cls, mixes: Sequence["Mix"]) -> "Mix":
        """Return what makes the mean of the models that `mixes` make; of statistics, which have proportions, nearly so."""
        return cls(fmean(mix.keep for mix in mixes), fmean(mix.take for mix in mixes))

    @property
    def moves(self) -> bool:
        """Whether anything but the target comes out."""
        return self != (1.0, 0.0)


@torch.no_grad()
def interpolate_(tensor: Tensor, start: Tensor, end: Tensor, coefficient: float) -> None:
    """Change `tensor` in place to `start + coefficient * (end - start)`, exactly an end for 0 and for 1.

    Integer tensors (such as the batch count of a BatchNorm) have no point in between: they are `end` for a coefficient
    of at least one half.
    """
    if coefficient == 0 or (coefficient < 0.5 and not tensor.is_floating_point()):
        tensor.data.copy_(start)
    elif coefficient == 1 or not tensor.is_floating_point():
        tensor.data.copy_(end)
    else:
        device = tensor.device
        dtype = torch.promote_types(tensor.dtype, torch.float32)  # half precision has no room for the difference
        out = tensor.data if tensor.dtype == dtype else None
        mixed = torch.lerp(start.to(device, dtype), end.to(device, dtype), coefficient, out=out)
        if out is None:
            tensor.data.copy_(mixed)


@torch.no_grad()
def mix_(tensor: Tensor, start: Tensor, end: Tensor, base: Tensor | None, mix: Mix) -> None:
    """Change `tensor` in place to the mix of `start` (the target), `end` (the source) and `base`.

    Statistics, which are no parameters, have a mean but no direction: of those comes the point of the line between the
    two that has the same proportions. `base` may be `None` where the mix has a sum of 1.
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


def in_rows(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of `tensor`, each a few of its rows, so that no arithmetic needs room for the whole."""
    tensor = torch.atleast_1d(tensor)
    return tensor.split(max(1, PIECE * len(tensor) // max(1, tensor.numel())))


@torch.no_grad()
def weigh_(tensor: Tensor, start: Tensor, end: Tensor, shares: Iterable[Tensor]) -> None:
    """Change `tensor` in place to `start + share * (end - start)`, element by element; `shares` come as `in_rows` does."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for rows, share in zip(zip(*map(in_rows, (tensor.data, start, end)), strict=True), shares, strict=True):
        place, *ends = rows
        place.copy_(torch.lerp(*(each.to(tensor.device, dtype) for each in (*ends, share))))


def blend_(
    tensors: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    mixes: Mapping[str, Mix],
    base: Mapping[str, Tensor] | None = None,
    fractions: Callable[[str], Iterable[Tensor] | None] | None = None,
) -> None:
    """Change the tensors of `units` in place to the mix of `start` and the source that `mixes` names for each unit.

    Where `fractions` returns how much of the source each element of a tensor takes, that replaces the mix.
    """
    for unit in units:
        for name in unit.tensors:
            own = fractions(name) if fractions else None
            if own is not None:
                weigh_(tensors[name], start[name], source_values[name], own)
            else:
                origin = None if base is None else base[name]
                mix_(tensors[name], start[name], source_values[name], origin, mixes[unit.name])
