"""The weights of a full source, mapped from its files, under the names of the target's tensors in memory."""

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
from ..internals import collect_, convert, ignored_patterns, in_loading_order, runtime_name, weight_conversions
from ..tensors.mapped import MappedTensors
from ..tensors.units import movable_tensors, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, WeightConverter


def file_tensors(source: Source) -> dict[str, Tensor]:
    """Return the tensors in the files of `source` by their names there; they are mapped, and nothing is read yet.

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
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return the tensors `raw` of a file under the names of `movable_tensors(target)`.

    The names are changed as `from_pretrained` changes them, but without a second model: only page cache is used.
    transformers fuses some tensors when it loads them, such as the experts of a Mixtral. They are fused into a file in
    `directory`, or left on the meta device if the target is there.

    Returns:
        The tensors, a list of problems (tensors inside the target's base model that the target does not have, and
        different tensors that are tied in the target), and notes on other tensors that are left out.

    Raises:
        IncompatibleSourceError: A tensor that must be fused with others is missing or has another shape.
    """
    renamings, converters = weight_conversions(target)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = target.state_dict()
    found: dict[str, Tensor] = {}
    fused: dict[str, WeightConverter] = {}
    without_place: dict[str, Tensor] = {}
    for key in in_loading_order(raw):
        name, pattern = runtime_name(key, renamings, converters, target.base_model_prefix, expected)
        if name not in expected:
            without_place[name] = raw[key]
        elif pattern is None:
            found[name] = raw[key]
        else:
            collect_(fused.setdefault(name, deepcopy(by_pattern[pattern])), name, key, pattern, raw[key])
    found |= _fuse(fused, target, expected, directory)
    problems, notes = _without_place(without_place, target)
    problems += drop_tied_(found, target)
    return {name: found[name] for name in movable_tensors(target) if name in found}, problems, notes


def drop_tied_(tensors: dict[str, Tensor], target: PreTrainedModel) -> list[str]:
    """Leave each tensor that is tied in the target only under its main name, and return the problems.

    Two tensors that are one in the target must be equal. The rounding of PEFT, which merges each of them, may differ.
    """
    problems = []
    for alias, name in tied_names(target).items():
        other = tensors.pop(alias, None)
        if other is None:
            continue
        one = tensors.setdefault(name, other)
        if not (one.is_meta or torch.equal(one, other) or _equal_but_for_rounding(one, other)):
            problems.append(
                f"{alias} and {name} differ, but they are tied in the target, so they cannot hold two values; "
                "let each have its own with untie: true"
            )
    return problems


def _equal_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    same_kind = one.shape == other.shape and one.dtype == other.dtype == torch.float32
    return same_kind and torch.allclose(one, other, rtol=1e-6, atol=1e-7 * float(other.abs().max()))


def fill_tied_(tensors: dict[str, Tensor], source: PreTrainedModel, names: Collection[str]) -> None:
    """Add the tied tensors of a source under those of `names` that its files leave out.

    They are two tensors in a target that is not tied.

    Args:
        tensors: The source's tensors, by runtime name.
        source: The source's model, which may be without weights.
        names: Runtime names of the target's tensors.
    """
    for alias, name in tied_names(source).items():
        held = tensors.get(name, tensors.get(alias))
        if held is not None:
            tensors |= {key: held for key in (name, alias) if key in names and key not in tensors}


@torch.no_grad()
def _fuse(
    converters: Mapping[str, WeightConverter], target: PreTrainedModel, like: Mapping[str, Tensor], directory: Path
) -> dict[str, Tensor]:
    """Run sequentially the conversions of several tensors into one, and write the results to a file."""
    if not converters:
        return {}
    planned = any(like[name].is_meta for name in converters)
    buffer = {} if planned else dict(MappedTensors(directory / "fused", {name: like[name] for name in converters}))
    for first, converter in converters.items():
        try:
            values = convert(converter, first, target)
        except (ValueError, RuntimeError) as error:
            problem = "cannot be made from the tensors in the files: one is missing or has another shape"
            raise IncompatibleSourceError(f"{first} {problem}: {error}") from error
        for name, value in values.items():
            buffer[name] = value if planned else buffer[name].copy_(value)
    return buffer


def _without_place(tensors: Mapping[str, Tensor], target: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return a problem and a note that list the tensors of a source that the target has no place for.

    A tensor inside the target's base model, such as a bias or one more layer, is a problem, because the source computes
    something with it that the target cannot. Other tensors belong to another task, such as another head, and are left
    out. Tensors that the model computes itself, and those that transformers ignores, are not listed.

    Args:
        tensors: The tensors, by runtime name.
        target: The target.
    """
    ignored = [re.compile(pattern) for pattern in ignored_patterns(target)]
    modules = {name for name, _ in target.named_modules()}
    prefix = f"{target.base_model_prefix}." if target.base_model is not target else ""
    inside: list[str] = []
    outside: list[str] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or any(pattern.search(name) for pattern in ignored):
            continue
        # The files of a model without a head lack the prefix.
        full = name if name.startswith(prefix) else prefix + name
        module = full.rpartition(".")[0]
        while module not in modules:
            module = module.rpartition(".")[0]
        within = f"{module}.".startswith(prefix) and module != prefix.removesuffix(".")
        (inside if within else outside).append(full if within else name)
    problems = [f"{len(inside)} tensors of the source are not in the target: {first_few(inside)}"] if inside else []
    notes = [f"{len(outside)} tensors have no place in the target and are left out: {first_few(outside)}"]
    return problems, notes if outside else []
