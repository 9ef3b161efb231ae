"""The tensors of a model, and the units in which they move."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from ..internals import is_persistent

NUMBERED = re.compile(r".*?\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Unit:
    """Tensors that move together.

    Attributes:
        name: Name of the unit's module in `named_modules()`, or of its parameter in `named_parameters()`.
        tensors: Names of the unit's parameters and persistent buffers.
    """

    name: str
    tensors: tuple[str, ...]


def movable_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer of `model` by its runtime name; tied weights appear once.

    Runtime names are the names in `named_parameters()`. The names in a checkpoint file can differ, because
    transformers renames some tensors when it loads them. Non-persistent buffers, such as position ids, are not part
    of a checkpoint and never move.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            if is_persistent(module, name.removeprefix(f"{prefix}.")):
                tensors[name] = buffer
    return tensors


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """Return the name in `movable_tensors` of each tied weight: `{"lm_head.weight": "transformer.wte.weight"}`.

    A config can call weights tied whose values differ in the files; transformers then loads two parameters, which are
    not tied.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[id(p)] for name, p in every if names[id(p)] != name}


def partition(model: torch.nn.Module, unit: str) -> list[Unit]:
    """Divide the movable tensors of `model` into units.

    `unit` is one of

    - `"layer"`: one unit per transformer block or stage: all tensors with the same name up to its first number
      (`bert.encoder.layer.3`). Tensors outside of blocks are divided as with `"module"`.
    - `"module"`: one unit per module that owns tensors directly; a tensor of the model itself is a unit.
    - `"tensor"`: one unit per parameter; a module with statistics is one unit.
    - `"parameter"`: one unit per parameter; statistics are in no unit.
    """
    parameters = dict(model.named_parameters())
    groups: dict[str, list[str]] = {}
    for name in movable_tensors(model):
        module = name.rpartition(".")[0]
        numbered = NUMBERED.match(module) if unit == "layer" else None
        groups.setdefault(numbered[0] if numbered else module, []).append(name)
    units = []
    for group, names in groups.items():
        has_statistics = any(name not in parameters for name in names)
        if group and (unit in ("layer", "module") or (unit == "tensor" and has_statistics)):
            units.append(Unit(group, tuple(names)))
        else:
            units += [Unit(name, (name,)) for name in names if name in parameters or unit != "parameter"]
    return units


def units_within(units: Sequence[Unit], candidates: Collection[str]) -> list[Unit]:
    """Return the units with only those of their tensors that are `candidates`; units without any are left out."""
    cut = [Unit(unit.name, tuple(name for name in unit.tensors if name in candidates)) for unit in units]
    return [unit for unit in cut if unit.tensors]


def head_tensors(model: PreTrainedModel) -> set[str]:
    """Return the names of the tensors of the task's head; empty if the head cannot be distinguished.

    The head consists of the tensors outside the base model. In a classifier that is its own base model (CLIP, SigLIP),
    the head is the last child module.
    """
    names = list(movable_tensors(model))
    if model.base_model is not model:
        return {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}
    children = list(dict.fromkeys(name.partition(".")[0] for name in names))
    if model.can_generate() or len(children) < 2:
        return set()
    return {name for name in names if name.startswith(f"{children[-1]}.")}
