"""What a method of a comparison works with: the model, the sources as they come, and the labels."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, IncompatibleSourceError, NonFiniteError
from ..models.batches import Batch
from ..tensors.units import movable_tensors


class FineTune(Protocol):
    """Trains an adapter with these arguments of `LoraConfig` for so many epochs, and merges it into the model."""

    def __call__(self, epochs: float, seed: int, lora: dict[str, Any], learning_rate: float) -> None:
        """Change the model, which may be left in train mode."""


@dataclass
class MethodInputs:
    """What one method may use: the model at the base, the sources, and the labels.

    Attributes:
        model: Holds the base's weights, in eval mode; a method leaves its result in it.
        start: The base's tensors by runtime name, mapped from a file.
        stream: Every source once, one at a time; each call starts anew.
        together: All sources at once, mapped from their files.
        batches: So many shuffled batches of labelled samples, epoch after epoch.
        epoch: Batches in one pass over the labels that choices are made by.
        loss: Mean loss of `model` as it is now over those.
        room: A scratch file of that name with room for each tensor of `wide_like(start)`; contents undefined. No method
            asks twice for one name.
        finetune: Trains an adapter of `model`, and merges it.
        seed: Seed of everything that a method draws.
    """

    model: PreTrainedModel
    start: Mapping[str, Tensor]
    stream: Callable[[], Iterator[Mapping[str, Tensor]]]
    together: Callable[[], AbstractContextManager[Sequence[Mapping[str, Tensor]]]]
    batches: Callable[[int], Iterable[Batch]]
    epoch: int
    loss: Callable[[], float]
    room: Callable[[str], Mapping[str, Tensor]]
    finetune: FineTune
    seed: int


def wide_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without storage of the same names and shapes, in float32 where `tensors` are shorter floats.

    Sums over sources are kept in these: a half precision sum loses what the tenth source adds.
    """
    return {name: torch.empty(t.shape, dtype=wide_dtype(t), device="meta") for name, t in tensors.items()}


def each_source(inputs: MethodInputs) -> Iterator[Mapping[str, Tensor]]:
    """Yield every source, one at a time; raise where there is none, or one that brings nothing."""
    number = 0
    for number, values in enumerate(inputs.stream(), start=1):
        _check_source(inputs, values, number)
        yield values
    if number == 0:
        raise ConfigError("got no sources, expected at least one")


@contextmanager
def all_sources(inputs: MethodInputs) -> Iterator[Sequence[Mapping[str, Tensor]]]:
    """Map all sources inside the block; raise where there is none, or one that brings nothing."""
    with inputs.together() as sources:
        if not sources:
            raise ConfigError("got no sources, expected at least one")
        for number, values in enumerate(sources, start=1):
            _check_source(inputs, values, number)
        yield sources


def _check_source(inputs: MethodInputs, values: Mapping[str, Tensor], number: int) -> None:
    if not any(name in inputs.start for name in values):
        raise IncompatibleSourceError(
            f"source {number} brings none of the {len(inputs.start)} tensors of the target ({len(values)} others)"
        )


def finite_loss(inputs: MethodInputs) -> float:
    """Return the loss of the model as it is; infinite where it is not finite, so that it is never chosen."""
    try:
        loss = inputs.loss()
    except NonFiniteError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def weight_names_of(inputs: MethodInputs) -> set[str]:
    """Return the names of parameters; all other tensors are statistics."""
    return {name for name, tensor in movable_tensors(inputs.model).items() if isinstance(tensor, nn.Parameter)}


def moving(inputs: MethodInputs, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a source that have a direction."""
    for name, value in values.items():
        if inputs.start[name].is_floating_point():
            yield name, value


def difference(value: Tensor, start: Tensor) -> Tensor:
    """Return `value - start`, in float32 or better."""
    return value.to(wide_dtype(start)) - start.to(wide_dtype(start))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type that sums of such tensors are kept in: float32 or better."""
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
