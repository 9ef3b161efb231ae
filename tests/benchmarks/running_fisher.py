"""A Fisher-weighted mean of models that come one at a time, for the trials of means."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp_hf.comparison.fisher import LEAST_FISHER, fisher_
from grasp_hf.models.batches import Batch
from grasp_hf.tensors.mixing import Mix, mix_
from grasp_hf.tensors.placing import placed
from grasp_hf.tensors.units import Unit, movable_tensors

PIECE = 2**20  # elements per view of `split_rows`


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def split_rows(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of a few rows of `tensor` each, so that no arithmetic needs a copy of all rows."""
    tensor = torch.atleast_1d(tensor)
    return tensor.split(max(1, PIECE * len(tensor) // max(1, tensor.numel())))


@torch.no_grad()
def interpolate_elements_(tensor: Tensor, start: Tensor, end: Tensor, fractions: Iterable[Tensor]) -> None:
    """Change `tensor` in place to `start + fraction * (end - start)`, element by element.

    `fractions` holds the fraction of each element, in pieces as `split_rows` makes them.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    pieces = zip(*map(split_rows, (tensor.data, start, end)), fractions, strict=True)
    for out, *operands in pieces:
        out.copy_(torch.lerp(*(operand.to(tensor.device, dtype) for operand in operands)))


class RunningFisher:
    """A Fisher-weighted mean of models that come one at a time (arXiv:2111.09832).

    Each parameter of the mean moves by the fraction `F_S / (F + F_S)` of the way to the next model `S`, and then `F`
    becomes `F + F_S`. Here `F_S` is the Fisher information of `S`, and `F` the sum over the models in the mean, so only
    this sum is kept. If `F` is not known, the Fisher information of the mean itself, times the number of its models, takes
    its place.

    Args:
        total: Buffer for `F`, one tensor per parameter, in a type with the range of float32.
        own: Buffer for `F_S`, of the same form.
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
        """Measure `F` for the tensors for which it is not known; it is 0 if the mean holds no model yet."""
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

    def put_(
        self,
        tensors: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        source_values: Mapping[str, Tensor],
        units: Sequence[Unit],
        mixes: Mapping[str, Mix],
    ) -> None:
        """Change `tensors` to the mean of `start` and the model that was measured last, element by element."""
        for unit in units:
            for name in unit.tensors:
                own = self.fractions(name)
                if own is None:
                    mix_(tensors[name], start[name], source_values[name], None, mixes[unit.name])
                else:
                    interpolate_elements_(tensors[name], start[name], source_values[name], own)
