"""The method `copy`: units whose gradients agree."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config.grasp import GraspConfig
from ..errors import IncompatibleSourceError
from ..files import workspace
from ..models.batches import Batch, Collator, check_dataset, keeping_model_columns, sample_batches
from ..models.gradients import gradient_pass, mean_gradient, preserved_state
from ..sources.fit import tensor_problems, tie_problems
from ..tensors.mixing import Mix
from ..tensors.placing import overwrite_, placed
from ..tensors.products import PAPER_EPSILON, Scores, UnitProducts, cosine, mean_defined
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors, partition
from .candidates import Candidate, Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unit_cosines(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    *,
    scratch: Scratch,
    seed: int,
    paper: bool = False,
) -> Scores:
    """Return the gradient cosine of target and source per unit, the mean over `batches`; `None` where undefined.

    For each batch the target's gradient is stored in a file (one set, no private memory), the source's values take the
    place of the target's, and each of the source's gradients meets the stored one and is freed. The mean of the cosines
    of single batches needs no second gradient set, and is 1 for a model compared with itself. It is not the cosine of
    the summed gradients: the noise of a batch is shared by both models and pulls it up. `summed_cosines` computes that.

    With `paper` the target is in train mode, its dropout drawn from `seed`, and its batch statistics change; the
    denominator has 1e-8 added.
    """
    tensors = movable_tensors(target)
    scores: dict[str, list[float | None]] = {unit.name: [] for unit in units}
    epsilon = PAPER_EPSILON if paper else 0.0
    with preserved_state(target), torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            stored: set[str] = set()
            products = UnitProducts(units)

            def store(name: str, gradient: Tensor, stored: set[str] = stored) -> None:
                scratch.gradients[name].copy_(gradient)
                stored.add(name)

            def meet(name: str, gradient: Tensor, products: UnitProducts = products, stored: set = stored) -> None:
                if name in stored and name in products:
                    products.add(name, gradient, scratch.gradients[name].to(gradient.device))

            target.train(paper)
            gradient_pass(target, batch, store)
            target.eval()
            with placed(tensors, source_values, scratch.start):
                gradient_pass(target, batch, meet)
            for name, sums in products.sums().items():
                scores[name].append(None if sums is None else cosine(*sums, epsilon=epsilon))
    return {name: mean_defined(values) for name, values in scores.items()}


def summed_cosines(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    *,
    scratch: Scratch,
) -> Scores:
    """Return the cosine of the gradients over all `batches` together, per unit; `None` where undefined.

    This is the cosine of one large batch, exactly. It needs a second set of gradients (in a file), because norms do not
    add up over batches as inner products do.
    """
    batches = list(batches)
    products = UnitProducts(units)
    with preserved_state(target):
        target.eval()
        stored, _ = mean_gradient(target, batches, scratch.gradients)
        with placed(movable_tensors(target), source_values, scratch.start):
            met, _ = mean_gradient(target, batches, scratch.source_gradients)
        for name in stored & met:
            if name in products:
                products.add(name, scratch.source_gradients[name], scratch.gradients[name])
    return {name: cosine(*sums) if sums else None for name, sums in products.sums().items()}


def configured_cosines(
    target: PreTrainedModel,
    source_values: Mapping[str, Tensor],
    units: Sequence[Unit],
    batches: Iterable[Batch],
    config: GraspConfig,
    *,
    scratch: Scratch,
    seed: int,
) -> Scores:
    """Return the gradient cosine of target and source per unit, over single batches or all together, as `config` says."""
    if config.accumulate_gradients:
        return summed_cosines(target, source_values, units, batches, scratch=scratch)
    return unit_cosines(target, source_values, units, batches, scratch=scratch, seed=seed, paper=config.published)


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return the units whose cosine is above `config.threshold` as copies of the source, the others as they are."""
    config, batches = inputs.config, inputs.batches(inputs.labels.samples.train)
    scores = configured_cosines(
        inputs.model, inputs.source, inputs.units, batches, config, scratch=inputs.scratch, seed=inputs.seed
    )
    copied = {unit: score is not None and score > config.threshold for unit, score in scores.items()}
    mixes = {unit: Mix.on_line(1.0 if is_copied else 0.0) for unit, is_copied in copied.items()}
    return {"copy": inputs.candidate(mixes, scores)}


def gradient_alignment(
    source: PreTrainedModel,
    target: PreTrainedModel,
    dataset: Any,
    *,
    config: GraspConfig | None = None,
    data_collator: Collator | None = None,
) -> Scores:
    """Return the cosine between the gradients of two models on the same data, per unit; nothing is changed.

    Args:
        source: One model.
        target: Another of the same class and shapes.
        dataset: Labelled samples, as for `transformers.Trainer`.
        config: Says unit, number and size of batches, and seed; `GraspConfig.paper()` measures as published.
        data_collator: Makes batches from samples; `transformers.default_data_collator` where left out.

    Returns:
        Unit name -> cosine in [-1, 1], the mean over batches; `None` where a gradient is missing or zero, so that
        the cosine is undefined.

    Raises:
        IncompatibleSourceError: The models differ in tensors or shapes; all differences are listed.
        DataError, NonFiniteError: The data set is empty or has no labels; a loss or a gradient is not finite.

    Example:
        >>> gradient_alignment(model, model, dataset)["classifier"]  # doctest: +SKIP
        1.0
    """
    config = config or GraspConfig()
    check_dataset(dataset, "dataset")
    problems = tie_problems(target, source) + tensor_problems(movable_tensors(target), movable_tensors(source))
    if problems:
        raise IncompatibleSourceError("the two models cannot be compared", problems=problems)
    accelerator = Accelerator()
    collator = keeping_model_columns(target, data_collator)
    batches = sample_batches(dataset, collator, accelerator, config, seed=config.seed)
    with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as directory, preserved_state(target):
        target.to(accelerator.device)
        tensors = movable_tensors(target)
        scratch = Scratch(directory, tensors)
        scratch.start.copy_(tensors)
        values, units = movable_tensors(source), partition(target, config.unit)
        try:
            return configured_cosines(target, values, units, batches, config, scratch=scratch, seed=config.seed)
        finally:
            statistics = {name for name, tensor in tensors.items() if not isinstance(tensor, torch.nn.Parameter)}
            overwrite_(tensors, {name: scratch.start[name] for name in statistics})
