"""The Fisher information of a model's parameters, and a mean of models that is weighted by it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..models.batches import IGNORED, Batch, batch_loss, class_terms, labelled_terms, predicts_next
from ..models.gradients import gradient_pass, preserved_state
from ..tensors.mixing import Mix, split_rows
from ..tensors.placing import placed
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 1024  # rows of logits for which labels are drawn at once
LEAST_FISHER = 1e-30  # far below any Fisher information that counts, far above the smallest float32


def fisher_(
    buffer: Mapping[str, Tensor],
    model: PreTrainedModel,
    batches: Sequence[Batch],
    names: Collection[str],
    *,
    seed: int,
) -> None:
    """Change `buffer`: write the diagonal Fisher information of `model` in eval mode, at the inputs of `batches`.

    The Fisher information of a parameter is the expected square of `d log p(y | x)`, with `y` drawn from the model's own
    predictions `p`. True labels would favour a model that fits them worse. The gradients of single terms are independent
    and have the mean 0. So the square of the summed gradient of a batch estimates the sum of their squares, without a pass
    per sample. The estimate is right on average, but noisy: it says little about a single element, and two equal models
    do not get equal weights there. A tensor without a gradient has a Fisher information of 0.

    Args:
        buffer: One tensor per name, of the shape of that parameter.
        model: The model; comes back unchanged.
        batches: Labelled batches. The labels only say which terms are ignored.
        names: Tensors to measure; a tensor that is not a parameter has no gradient.
        seed: Seeds the labels that are drawn.

    Raises:
        DataError: The labels are not classes.
        NonFiniteError: A loss, or the Fisher information of a parameter, is NaN or infinite.
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

            gradient_pass(model, _draw_labels(model, batch), square)
    for name in names:
        if not torch.isfinite(buffer[name]).all():
            raise NonFiniteError(f"the Fisher information of {name} is NaN or infinite; expected finite numbers")


@torch.no_grad()
def _draw_labels(model: Any, batch: Batch) -> Batch:
    """Return `batch` with each label drawn from the predictions of `model`; ignored labels stay ignored."""
    _, output = batch_loss(model, batch)
    logits, _ = class_terms(model, output.get("logits"), batch.get("labels"))
    labels = batch["labels"].clone()
    drawn_for = labels[:, 1:] if predicts_next(model) else labels
    # A few rows at a time because vocabularies are large, and on the CPU so that every device draws the same labels.
    drawn = [torch.multinomial(rows.softmax(-1).cpu(), 1) for rows in logits.split(ROWS)]
    drawn_for.copy_(
        torch.where(drawn_for == IGNORED, drawn_for, torch.cat(drawn).view_as(drawn_for).to(labels.device))
    )
    drawn_batch = {**batch, "labels": labels}
    if model.can_generate() and model.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        # The labels were drawn for the prefix of the true labels. From the drawn ones, the model would make another.
        drawn_batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return drawn_batch


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


class RunningFisher:
    """A Fisher-weighted mean of models that come one at a time (arXiv:2111.09832).

    Each parameter of the mean moves by the fraction `F_S / (F + F_S)` of the way to the next model `S`, and then `F`
    becomes `F + F_S`. Here `F_S` is the Fisher information of `S`, and `F` the sum over the models in the mean, so only
    this sum is kept. If `F` is not known, the Fisher information of the mean itself, times the number of its models, takes
    its place.

    Args:
        total: Buffer for `F`, one tensor per parameter, in a type with the range of float32.
        own: Buffer for `F_S`, likewise.
    """

    def __init__(self, total: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self._total, self._own = total, own
        self._known: set[str] = set()  # tensors whose `F` is in `total`
        self._average: dict[str, float] = {}  # of each weight that `measure` saw last, its fraction in a plain mean

    def measure(
        self,
        model: PreTrainedModel,
        source_values: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        units: Sequence[Unit],
        average: Mapping[str, float],
        batches: Sequence[Batch],
        *,
        seed: int,
    ) -> dict[str, Mix]:
        """Measure the next model, and return its mix with the mean by unit: the mean of `fractions` over the elements.

        A unit that holds statistics only gets the mix of a plain mean.

        Args:
            model: The mean so far; comes back unchanged.
            source_values: The weights of the next model by name.
            start: The weights of `model` by name.
            units: The units that may move.
            average: How much of the next model a plain mean takes, by unit: `1 / k` for the k-th.
            batches: Labelled batches, as for `fisher_`.
            seed: Seeds the labels that are drawn.
        """
        tensors = movable_tensors(model)
        average_of = {name: average[unit.name] for unit in units for name in unit.tensors}
        self._average = {name: value for name, value in average_of.items() if _is_weight(tensors[name])}
        self._measure_total(model, batches, seed)
        with placed(tensors, source_values, start):
            fisher_(self._own, model, batches, self._average, seed=seed)
        return {unit.name: Mix.on_line(self._mean_fraction(unit, average[unit.name])) for unit in units}

    def fractions(self, name: str) -> Iterator[Tensor] | None:
        """Return `F_S / (F + F_S)` for each element of a parameter, a few rows at a time; `None` for a statistic."""
        return self._weight_fractions(name) if name in self._average else None

    def add(self) -> None:
        """Add the Fisher information of the model that was measured last to the sum, because that model was merged."""
        for name in self._average:
            self._total[name].add_(self._own[name])
        self._known.update(self._average)

    def _measure_total(self, model: PreTrainedModel, batches: Sequence[Batch], seed: int) -> None:
        """Measure `F` where it is not known; it is 0 if the mean holds no model yet."""
        unknown = [name for name in self._average if name not in self._known]
        for name in unknown:
            self._total[name].zero_()
        measured = [name for name in unknown if self._average[name] < 1]
        if not measured:
            return
        fisher_(self._total, model, batches, measured, seed=seed)
        for name in measured:
            self._total[name].mul_(1 / self._average[name] - 1)
        self._known.update(measured)

    def _weight_fractions(self, name: str) -> Iterator[Tensor]:
        for own, total in zip(split_rows(self._own[name]), split_rows(self._total[name]), strict=True):
            own = own.float() + LEAST_FISHER  # without any Fisher information, the fraction is that of a plain mean
            yield own.div_((own + total).add_(LEAST_FISHER * (1 / self._average[name] - 1)))

    def _mean_fraction(self, unit: Unit, average: float) -> float:
        """Return the mean fraction over the weights of a unit; `average` if it has none."""
        weights = [name for name in unit.tensors if name in self._average]
        if not weights:
            return average
        total = sum(float(rows.sum()) for name in weights for rows in self._weight_fractions(name))
        return total / sum(self._own[name].numel() for name in weights)


def running_fisher(scratch: Scratch) -> RunningFisher:
    """Return the running mean of the present merge; it begins anew after `scratch.make_room`."""
    if "fisher" not in scratch.kept:
        total, own = ({name: _widen_range(tensor) for name, tensor in buffer.items()} for buffer in scratch.line)
        scratch.kept["fisher"] = RunningFisher(total, own)
    found: RunningFisher = scratch.kept["fisher"]
    return found


def _widen_range(tensor: Tensor) -> Tensor:
    """Return `tensor`, in the same memory, as bfloat16 if it is float16, because squares need the range of float32."""
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.float16 else tensor
