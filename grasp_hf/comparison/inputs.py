"""The inputs of an existing method: the model, the sources as the target would hold them, and the labels.

The docstrings of the methods give their needs in P, the size of the model's weights in bytes, and K, the number of
sources.
"""

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
    """Trains a LoRA adapter and merges it into the model."""

    def __call__(self, epochs: float, seed: int, lora: dict[str, Any], learning_rate: float) -> None:
        """Change the model, and possibly leave it in train mode.

        Args:
            epochs: Passes over the training samples.
            seed: Seeds the adapter's initial weights and the order of the samples.
            lora: Arguments of `peft.LoraConfig`.
            learning_rate: Peak learning rate.
        """


@dataclass
class MethodInputs:
    """The model, the sources and the labels that one method may use.

    Attributes:
        model: Holds the base's weights, in eval mode. A method leaves its result in it.
        base: The base's tensors by runtime name, mapped from a file.
        stream_sources: Yields the tensors of every source, one source at a time. Each call begins anew.
        open_sources: Maps the tensors of all sources at once inside its block.
        batches: Returns the given number of shuffled batches of training samples, over as many epochs as that takes.
        batches_per_epoch: Number of batches in one pass over the labels by which methods choose.
        loss: Returns the mean loss of `model`, with its present weights, on the labels by which methods choose.
        buffer: Returns a scratch file of the given name that holds a tensor for each tensor of `wide_like(base)`. The
            contents are undefined. No method asks for one name twice.
        finetune: Trains a LoRA adapter of `model` and merges it.
        seed: Seeds all random draws of a method.
    """

    model: PreTrainedModel
    base: Mapping[str, Tensor]
    stream_sources: Callable[[], Iterator[Mapping[str, Tensor]]]
    open_sources: Callable[[], AbstractContextManager[Sequence[Mapping[str, Tensor]]]]
    batches: Callable[[int], Iterable[Batch]]
    batches_per_epoch: int
    loss: Callable[[], float]
    buffer: Callable[[str], Mapping[str, Tensor]]
    finetune: FineTune
    seed: int


def wide_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without storage, of the same names and shapes and of the types of `wide_dtype`."""
    return {name: torch.empty(t.shape, dtype=wide_dtype(t), device="meta") for name, t in tensors.items()}


def stream_checked_sources(inputs: MethodInputs) -> Iterator[Mapping[str, Tensor]]:
    """Yield the tensors of every source, one source at a time.

    Raises:
        ConfigError: There is no source.
        IncompatibleSourceError: A source has no tensor of the base.
    """
    number = 0
    for number, values in enumerate(inputs.stream_sources(), start=1):
        _check_source(inputs, values, number)
        yield values
    if number == 0:
        raise ConfigError("got no sources, expected at least one")


@contextmanager
def open_checked_sources(inputs: MethodInputs) -> Iterator[Sequence[Mapping[str, Tensor]]]:
    """Map the tensors of all sources inside the block; raises as `stream_checked_sources`."""
    with inputs.open_sources() as sources:
        if not sources:
            raise ConfigError("got no sources, expected at least one")
        for number, values in enumerate(sources, start=1):
            _check_source(inputs, values, number)
        yield sources


def _check_source(inputs: MethodInputs, values: Mapping[str, Tensor], number: int) -> None:
    if not any(name in inputs.base for name in values):
        raise IncompatibleSourceError(
            f"source {number} has none of the {len(inputs.base)} tensors of the target; got {len(values)} other ones"
        )


def finite_loss(inputs: MethodInputs) -> float:
    """Return the loss of the model with its present weights; infinity if it is NaN, so that no method chooses it."""
    try:
        loss = inputs.loss()
    except NonFiniteError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def parameter_names(inputs: MethodInputs) -> set[str]:
    """Return the names of the parameters; all other tensors are statistics, such as the mean of a BatchNorm."""
    return {name for name, tensor in movable_tensors(inputs.model).items() if isinstance(tensor, nn.Parameter)}


def float_tensors(inputs: MethodInputs, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a source that are floats in the base; only these have a task vector."""
    for name, value in values.items():
        if inputs.base[name].is_floating_point():
            yield name, value


def task_vector(value: Tensor, base: Tensor) -> Tensor:
    """Return `value - base` in the type of `wide_dtype`."""
    return value.to(wide_dtype(base)) - base.to(wide_dtype(base))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type in which such tensors are summed: float32 for shorter floats, otherwise their own.

    A sum in half precision loses what the tenth source adds.
    """
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
