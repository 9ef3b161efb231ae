"""Which tensors of two models belong together, in which units they move, and what stands in the way."""

from collections.abc import Collection, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from .errors import shortened


def tie_problems(target: PreTrainedModel, source: PreTrainedModel) -> list[str]:
    """Say where weights are tied in one of two models only."""
    ties, others = (model.get_expanded_tied_weights_keys(all_submodels=True) for model in (target, source))
    pairs = sorted(f"{a} = {b}" for a, b in set(ties.items()) ^ set(others.items()))
    return [f"weights are tied in one model and not in the other: {shortened(pairs)}"] if pairs else []


def tensor_problems(
    target: Mapping[str, Tensor], source: Mapping[str, Tensor], ignored: Collection[str] = ()
) -> list[str]:
    """List what keeps the tensors of a source from taking the place of the target's: names and shapes.

    `ignored` names tensors of the target that stay whatever the source holds.
    """
    problems = []
    missing = [name for name in target if name not in source and name not in ignored]
    extra = [name for name in source if name not in target]
    if missing:
        problems.append(f"{len(missing)} tensors of the target are not in the source: {shortened(missing)}")
    if extra:
        problems.append(f"{len(extra)} tensors of the source are not in the target: {shortened(extra)}")
    problems += [
        f"{name}: got shape {tuple(source[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in source and name not in ignored and source[name].shape != tensor.shape
    ]
    return problems
