"""The model with a source mixed into it, by one candidate and then by another."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..methods.candidates import Candidate, Mixes
from ..sources.load import LoadedSource
from ..tensors.mixing import blend_
from ..tensors.placing import overwrite_
from ..tensors.units import Unit, units_within
from ..validation.labels import Labels
from ..validation.losses import SampleLosses


class MixedModel:
    """The model with a source mixed into it. The candidates are put into the model one at a time.

    Args:
        tensors: The tensors of the model by name; changed in place.
        loaded: The source.
        units: The units that may move.
        labels: Caches the losses of the model; `put` and `undo` tell it of each change.
        start: The tensors of the model before the step; `None` if no copy is kept, so that only one candidate can be put.
        base: The weights that the merge began with; `None` for a method that does not need them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        loaded: LoadedSource,
        units: Sequence[Unit],
        labels: Labels,
        *,
        start: Mapping[str, Tensor] | None,
        base: Mapping[str, Tensor] | None,
    ) -> None:
        self._tensors, self._source, self._units, self._labels = tensors, loaded, units, labels
        self._start = tensors if start is None else start
        self._base = base
        self._now: Mixes | None = None
        self._moved: dict[str, Unit] = {}

    def put(self, candidate: Candidate, mixes: Mixes | None = None) -> None:
        """Change the model: mix the source in by the mixes of `candidate`, or by other `mixes` that it is validated with."""
        mixes = candidate.mixes if mixes is None else mixes
        if mixes is self._now:
            return
        self._labels.changed()
        moving = {unit.name: unit for unit in self._units if mixes[unit.name].moves} | self._moved
        for values in self._source.shards:
            units = units_within([*moving.values()], values)
            blend_(self._tensors, self._start, values, units, mixes, self._base)
        self._now, self._moved = mixes, moving

    def undo(self, losses: SampleLosses | None = None) -> None:
        """Change the model back to its weights before the source; `losses` are the losses with those weights, if known."""
        overwrite_(self._tensors, {name: self._start[name] for unit in self._moved.values() for name in unit.tensors})
        self._labels.changed(losses)
