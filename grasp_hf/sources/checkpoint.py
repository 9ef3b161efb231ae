"""The weights of a full source, mapped from its files, by the names that the target's have in memory."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import IncompatibleSourceError, first_few
from ..hub.reference import Source
from ..internals import collect_, convert, in_loading_order, runtime_name, tied_names, weight_conversions
from ..tensors.mapped import MappedTensors
from ..tensors.units import movable_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, WeightConverter


def file_tensors(source: Source) -> dict[str, Tensor]:
    """Return the tensors in the files of `source` by the names that they have there; mapped, so that none is read yet.

    Raises:
        SafetensorError, OSError, RuntimeError, UnpicklingError: A file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for path in source.weight_files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                tensors |= {name: weights.get_tensor(name) for name in weights.keys()}
        else:
            tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return tensors


def runtime_tensors(
    raw: Mapping[str, Tensor], target: PreTrainedModel, directory: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of files by the names that `movable_tensors(target)` has, in the shapes that they have there.

    The names in files are changed as `from_pretrained` changes them, without building a second model: nothing but page
    cache is used. What transformers fuses when it loads (the experts of a Mixtral) is fused into a file in `directory`,
    unless the tensors are those of a plan, on the meta device.

    Returns:
        The tensors, and the problems: tensors like the target's that the target has no place for, such as those of a
        further layer, and two different tensors where the target has one that is tied.

    Raises:
        IncompatibleSourceError: A part of what is fused is not there.
    """
    renamings, converters = weight_conversions(target)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = target.state_dict()
    found: dict[str, Tensor] = {}
    fused: dict[str, WeightConverter] = {}
    without_place: list[str] = []
    for key in in_loading_order(raw):
        name, pattern = runtime_name(key, renamings, converters, target.base_model_prefix, expected)
        if name not in expected:
            without_place.append(name)
        elif pattern is None:
            found[name] = raw[key]
        else:
            collect_(fused.setdefault(name, deepcopy(by_pattern[pattern])), name, key, pattern, raw[key])
    found |= _fuse(fused, target, expected, directory)
    prefix = f"{target.base_model_prefix}."  # the name of a further layer lacks it where the file's do
    problems = _further([name if name.startswith(prefix) else prefix + name for name in without_place], expected)
    problems = problems or _further(without_place, expected)
    for alias, name in tied_names(target).items():
        other = found.pop(alias, None)
        if other is not None and not (found.setdefault(name, other).is_meta or torch.equal(found[name], other)):
            problems.append(f"{alias} and {name} differ; in the target they are tied")
    return {name: found[name] for name in movable_tensors(target) if name in found}, problems


@torch.no_grad()
def _fuse(
    converters: Mapping[str, WeightConverter], target: PreTrainedModel, like: Mapping[str, Tensor], directory: Path
) -> dict[str, Tensor]:
    """Carry out conversions of several tensors into one, one after the other, into a file."""
    if not converters:
        return {}
    planned = any(like[name].is_meta for name in converters)
    room = {} if planned else dict(MappedTensors(directory / "fused", {name: like[name] for name in converters}))
    for first, converter in converters.items():
        try:
            values = convert(converter, first, target)
        except (ValueError, RuntimeError) as error:
            problem = "cannot be made of what is in the files, where a part is missing or of another shape"
            raise IncompatibleSourceError(f"{first} {problem}: {error}") from error
        for name, value in values.items():
            room[name] = value if planned else room[name].copy_(value)
    return room


def _further(names: Collection[str], expected: Collection[str]) -> list[str]:
    """Say which of `names` are like expected ones but for their numbers: those of further layers."""

    def without_numbers(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)

    kinds = {without_numbers(name) for name in expected}
    further = [name for name in names if re.search(r"\.\d+\.", name) and without_numbers(name) in kinds]
    return [f"{len(further)} tensors of the source are not in the target: {first_few(further)}"] if further else []
