"""The Fisher information of a model's parameters, and a mean of models that weighs each parameter by it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..models.batches import IGNORED, Batch, batch_loss, class_terms, labelled_terms, predicts_next
from ..models.gradients import gradient_pass, preserved_state
from ..tensors.mixing import Mix, in_rows
from ..tensors.placing import placed
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 1024  # of logits that labels are drawn for at once
LEAST_FISHER = 1e-30  # far below any Fisher that counts, far above the smallest float32


def fisher_(
    buffer: Mapping[str, Tensor],
    model: PreTrainedModel,
    batches: Sequence[Batch],
    names: Collection[str],
    *,
    seed: int,
) -> None:
    """Write the diagonal Fisher information of `model`, in eval mode, at the inputs of `batches` to `buffer`.

    Labels are drawn from the model's own predictions as the definition says (true labels would favour a model that fits
    them worse). Gradients of single terms are then independent with mean 0, so the square of a whole batch's summed
    gradient estimates the sum of their squares, without a pass per sample. That is right in the mean but noisier than a
    sum over single samples: so few squares tell little of a single element, and two equal models do not get equal
    weights there. What has no gradient has a Fisher of 0.

    Args:
        buffer: One tensor per name, of its shape.
        model: Comes back unchanged.
        batches: Labelled samples; of the labels it only counts which are ignored.
        names: Tensors to look at; one that is no parameter has no gradient.
        seed: Of the labels that are drawn.

    Raises:
        DataError: The labels are no classes.
        NonFiniteError: A loss or the Fisher of a parameter is not finite.
    """
    for name in names:
        buffer[name].zero_()
    with preserved_state(model), torch.random.fork_rng():
        model.eval()
        torch.manual_seed(seed)
        for batch in batches:
            weight = labelled_terms(model, batch)

            def square(name: str, gradient: Tensor, weight: int = weight) -> None:
                if name in names:
                    gradient = gradient.to(buffer[name].device, buffer[name].dtype)
                    buffer[name].addcmul_(gradient, gradient, value=float(weight) ** 2)

            gradient_pass(model, _with_drawn_labels(model, batch), square)
    for name in names:
        if not torch.isfinite(buffer[name]).all():
            raise NonFiniteError(f"the Fisher information of {name} is NaN or infinite")


@torch.no_grad()
def _with_drawn_labels(model: Any, batch: Batch) -> Batch:
    """Return `batch` with each label drawn from what `model` predicts; ignored labels stay ignored."""
    _, output = batch_loss(model, batch)
    logits, _ = class_terms(model, output.get("logits"), batch.get("labels"))
    labels = batch["labels"].clone()
    drawn_for = labels[:, 1:] if predicts_next(model) else labels
    # A few rows at a time, for vocabularies are large, and on the CPU, so that every device draws the same.
    drawn = [torch.multinomial(rows.softmax(-1).cpu(), 1) for rows in logits.split(ROWS)]
    drawn_for.copy_(
        torch.where(drawn_for == IGNORED, drawn_for, torch.cat(drawn).view_as(drawn_for).to(labels.device))
    )
    drawn_batch = {**batch, "labels": labels}
    if model.can_generate() and model.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        # Of the drawn labels the model would make another prefix than the one that they are drawn for.
        drawn_batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return drawn_batch


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


class RunningFisher:
    """How much of the next model a Fisher-weighted mean takes (arXiv:2111.09832), for models that come one at a time.

    A mean weighs each parameter of each model by its Fisher there, so that its sum over the models in the mean is all that
    must be kept of them. Where it is not known, the Fisher of the mean itself counts in its place, times their number.

    Args:
        total: Room for the sum, a tensor for each parameter; in a type that has the range of float32.
        own: Room for the Fisher of the next model.
    """

    def __init__(self, total: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self._total, self._own = total, own
        self._known: set[str] = set()
        self._plain: dict[str, float] = {}

    def measure(
        self,
        model: PreTrainedModel,
        source_values: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        units: Sequence[Unit],
        shares: Mapping[str, float],
        batches: Sequence[Batch],
        *,
        seed: int,
    ) -> dict[str, Mix]:
        """Return what goes in, by unit: the mean of `fractions`; the plain share where there are statistics only.

        Args:
            model: The mean so far; comes back unchanged.
            source_values: The next model.
            start: What `model` holds.
            units: Tensors that may move.
            shares: How much the plain mean takes.
            batches: See `fisher_`, as the next one.
            seed: See there.
        """
        tensors = movable_tensors(model)
        plain = {name: shares[unit.name] for unit in units for name in unit.tensors}
        self._plain = {name: share for name, share in plain.items() if _is_weight(tensors[name])}
        unknown = [name for name in self._plain if name not in self._known]
        counted = [name for name in unknown if self._plain[name] < 1]
        for name in unknown:
            self._total[name].zero_()
        if counted:
            fisher_(self._total, model, batches, counted, seed=seed)
            for name in counted:
                self._total[name].mul_(1 / self._plain[name] - 1)
        self._known.update(counted)
        with placed(tensors, source_values, start):
            fisher_(self._own, model, batches, self._plain, seed=seed)
        return {unit.name: Mix.on_line(self._mean(unit, shares[unit.name])) for unit in units}

    def fractions(self, name: str) -> Iterator[Tensor] | None:
        """Return how much of each element of a parameter goes in, in [0, 1], as `in_rows` does; `None` for a statistic."""
        return self._fractions(name) if name in self._plain else None

    def _fractions(self, name: str) -> Iterator[Tensor]:
        for own, total in zip(in_rows(self._own[name]), in_rows(self._total[name]), strict=True):
            own = own.float() + LEAST_FISHER  # so that what has no Fisher goes in as in a plain mean
            yield own.div_((own + total).add_(LEAST_FISHER * (1 / self._plain[name] - 1)))

    def take(self) -> None:
        """Count the model that was measured last as one of the mean."""
        for name in self._plain:
            self._total[name].add_(self._own[name])
        self._known.update(self._plain)

    def _mean(self, unit: Unit, plain: float) -> float:
        weights = [name for name in unit.tensors if name in self._plain]
        total = sum(float(share.sum()) for name in weights for share in self._fractions(name))
        return total / sum(self._own[name].numel() for name in weights) if weights else plain


def running_fisher(scratch: Scratch) -> RunningFisher:
    """Return the Fisher information of the sources merged so far, which stays until `scratch.make_room`."""
    if "fisher" not in scratch.kept:
        total, own = ({name: _wide_range(tensor) for name, tensor in buffer.items()} for buffer in scratch.line)
        scratch.kept["fisher"] = RunningFisher(total, own)
    found: RunningFisher = scratch.kept["fisher"]
    return found


def _wide_range(tensor: Tensor) -> Tensor:
    """Return `tensor`, in the same memory, as a type with the range of float32 if its own is float16."""
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.float16 else tensor
