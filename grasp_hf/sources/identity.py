"""The identity check: the merge that takes a source whole computes what the source computes in its own library."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import IncompatibleSourceError, first_line
from ..hub.reference import Source
from ..models.batches import Batch
from ..models.probe import first_tensor, in_float32, probe, probe_batch
from ..tensors.units import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of the largest output
SEEDS = (0, 1)

logger = logging.getLogger(__name__)


def check_identity(
    source: Source,
    reference: Callable[[], nn.Module],
    tensors: Mapping[str, Tensor],
    target: PreTrainedModel,
    data: Callable[[], Batch] | None = None,
) -> list[str]:
    """Send a batch through a source as its own library runs it, and through the target with the tensors of the source.

    A difference by chance, such as another choice of experts after a rounding, shows in one batch only. So an error needs
    two batches. A source without a head, or without some other tensors outside the body, is compared below the head.

    Args:
        source: The source.
        reference: Loads the source with its own library; called once.
        tensors: The tensors of the source by the names of the target, as they are merged.
        target: The model that the source is merged into; it is not changed.
        data: Returns a batch of the user's data, for a model that random inputs do not fit.

    Returns:
        Remarks for the report.

    Raises:
        IncompatibleSourceError: The outputs differ. The error names the layer where the difference begins.
    """
    start = time.perf_counter()
    path = "" if dict(target.named_parameters()).keys() <= tensors.keys() else target.base_model_prefix
    if path and not hasattr(target, path):
        return ["not compared with its own library, because it has no head, and the body cannot be run alone"]
    merged = with_tensors(target, tensors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEEDS[1])  # whatever is drawn is drawn differently, and shows as a difference
        theirs: Any = reference()
    inner = theirs.get_base_model() if hasattr(theirs, "get_base_model") else theirs
    batches: list[Callable[[], Batch]] = [lambda seed=seed: probe_batch(inner, seed) for seed in SEEDS]  # type: ignore[misc]
    problem = ""
    for make in [*batches, *filter(None, [data])]:
        try:
            batch = make()
            expected = probe(inner, batch, path)
        except Exception as error:  # the batch does not fit the model, which a model shows by any error
            logger.debug("'%s' cannot be run on a batch: %s", source.ref, error)
            continue
        problem = _difference(inner, merged, batch, path, expected)
        if not problem:
            logger.debug("'%s' computes the same when merged (%.1f s)", source.ref, time.perf_counter() - start)
            return []
    if problem:
        raise IncompatibleSourceError(
            f"'{source.ref}' computes something else when merged: {problem}; the merge would not be this source. Leave "
            "the source out, or skip this check with check: false (--no-check)"
        )
    return ["not compared with its own library, which runs it on other inputs than one random batch"]


def fits_twice(source: Source) -> bool:
    """Whether the memory of this machine holds the weights of a source twice."""
    return 2 * source.num_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def with_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return a copy of a model on the CPU that shares no module with it, with the values of `tensors`; nothing is copied."""
    own, ties = [*model.parameters(), *model.buffers()], tied_names(model)
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in own})
    for prefix, module in twin.named_modules():
        for name, tensor in [*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, False)]:
            value = tensors.get(ties.get(name, name), tensor.detach()).cpu()
            key = name.rpartition(".")[2]
            setattr(module, key, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)
    return twin


def _difference(theirs: nn.Module, merged: nn.Module, batch: Batch, path: str, expected: Tensor) -> str:
    """Return how the outputs of two models differ, and where that begins; empty if they do not."""
    try:
        got = probe(merged, batch, path)
    except Exception as error:  # a model shows any mistake in its weights by any error
        return f"the merge cannot be run: {first_line(error)}"
    if got.shape != expected.shape:
        return f"the shape of the output is {tuple(got.shape)} instead of {tuple(expected.shape)}"
    if _equal(got, expected):
        return ""
    off, scale = float((got - expected).abs().max()), float(expected.abs().max())
    layer = _first_difference(theirs, merged, batch)
    return f"an output is off by {off:.2g}, where the largest is {scale:.2g}; the difference begins in {layer}"


def _equal(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or not expected.numel():
        return got.shape == expected.shape
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())  # a number that is not finite is no scale
    return torch.allclose(got, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def _first_difference(theirs: nn.Module, merged: nn.Module, batch: Batch) -> str:
    """Return the name of the first module whose output differs; a module inside another one ends before it."""
    outputs = [_outputs(model, batch) for model in (theirs, merged)]
    names = (name for name, got in outputs[1].items() if name in outputs[0] and not _equal(got, outputs[0][name]))
    return next(names, "") or "the output layer"


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the first output of each module of a model by name, in the order in which they end."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found.setdefault(name, first_tensor(output))

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        with in_float32(model):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
