"""PEFT adapters as sources: what they say of themselves, and what they make of their base model."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import IncompatibleSourceError
from ..hub.download import commit_of
from ..hub.reference import Source, SourceRef
from ..internals import (
    adapter_weights_in_runtime_names,
    matching_pattern,
    merging_layer,
    parameter_prefix,
    runtime_name,
    unloads_itself,
    weight_conversions,
)
from ..tensors.mapped import MappedTensors

PREFIX = "base_model.model."


@dataclass(frozen=True)
class AppliedAdapter:
    """A base model after an adapter was merged into it.

    Attributes:
        model: The model; what the adapter changed lies in a file, the rest where it was.
        touched: Runtime names of the modules that the adapter changed or brought along.
        whole: Runtime names of the modules that it brought along whole (`modules_to_save`).
    """

    model: PreTrainedModel
    touched: set[str]
    whole: set[str]


def load_adapter_config(source: Source) -> PeftConfig:
    """Return the configuration of an adapter.

    Raises:
        IncompatibleSourceError: It cannot be read, or is of a type that PEFT does not know.
    """
    try:
        return PeftConfig.from_pretrained(str(source.folder))
    except (ValueError, KeyError, TypeError, OSError, JSONDecodeError) as error:
        message = f"its adapter_config.json cannot be used: {type(error).__name__}: {error}"
        raise IncompatibleSourceError(message, subject=source.ref) from error


def adapter_problems(
    config: PeftConfig,
    adapter: Source,
    base: Source | None,
    accepted_bases: Collection[str] = (),
    *,
    token: str | None = None,
) -> list[str]:
    """List what an adapter's config alone says against applying it to `base`.

    `accepted_bases` are names (`org/name` or `org/name@revision`) that the user declares to be the same model as `base`;
    `token` lets the Hub be asked about it.
    """
    problems = []
    kind = PeftType(config.peft_type)
    if config.is_prompt_learning or not _merges(kind):
        problems.append(f"an adapter of type {kind.value} cannot be merged into weights; expected LoRA or alike")
    named = config.base_model_name_or_path or ""
    if base is None:
        problems.append(
            f"it is an adapter of '{named}', but where the target started is not known; load the target with "
            "GraspMerger.from_pretrained"
        )
    elif {named, f"{named}@{config.revision}"} & set(accepted_bases):
        pass
    elif named != base.ref.name and not _is_folder(named, adapter, base):
        problems.append(
            f"it is an adapter of '{named}', expected an adapter of '{base.ref.name}'; if they are the same, accept it "
            f"by name: accepted_bases=['{named}']"
        )
    elif config.revision and base.sha and not _is_commit(named, config.revision, base, token):
        revised = f"{named}@{config.revision}"
        problems.append(
            f"it is an adapter of '{named}' at revision '{config.revision}', expected '{base.ref}'; if they are the same, "
            f"accept it by name: accepted_bases=['{revised}']"
        )
    return problems


def _merges(kind: PeftType) -> bool:
    """Whether PEFT can merge adapters of this type into weights: whether some layer of its kind says how."""
    layers = [*filter(None, [merging_layer(kind)])]
    for layer in layers:
        layers += layer.__subclasses__()
    return any(layer.merge is not BaseTunerLayer.merge for layer in layers)


def _is_folder(name: str, adapter: Source, base: Source) -> bool:
    """Whether `name` is the folder of `base`, seen from here or from the adapter's own folder."""
    paths = (Path(name), adapter.folder / name)
    return bool(name) and any(path.is_dir() and path.samefile(base.folder) for path in paths)


def _is_commit(name: str, revision: str, base: Source, token: str | None) -> bool:
    """Whether `revision` (a branch, a tag, a sha) is the commit that `base` was taken from."""
    if revision in (base.sha, base.ref.revision):
        return True
    return commit_of(SourceRef(name, revision), token=token) == base.sha


def saved_classes(adapter: Source, class_tensors: Collection[str]) -> int | None:
    """Return the number of classes of a head that the adapter brings along whole; `None` where it brings none.

    `class_tensors` are the names of the model's tensors that have a row per class.
    """
    weights = load_peft_weights(str(adapter.folder), device="cpu")
    rows = [len(weights[PREFIX + name]) for name in class_tensors if PREFIX + name in weights]
    return rows[0] if rows else None


def apply_adapter_(base: PreTrainedModel, adapter: Source, directory: Path) -> AppliedAdapter:
    """Change `base` in place to what the adapter makes of it.

    The result is that of PEFT's `merge_and_unload()`, but the changed weights are written to a file in `directory`,
    module by module, so that one module and not one model is held in private memory.

    Raises:
        IncompatibleSourceError: The adapter's file lacks weights, or holds some that belong nowhere or have other shapes.
        ValueError, RuntimeError, OSError: PEFT cannot read it or apply it to this model.
    """
    folder = _in_runtime_names(base, adapter, directory)
    adapted = PeftModel.from_pretrained(base, str(folder))
    # Saving embedding layers is left out because PEFT would ask the Hub about the base model.
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = adapter_weights_in_runtime_names(adapted, load_peft_weights(str(folder), device="cpu"))
    # The weights below an adapted embedding or output layer are saved along, although they are the base model's.
    expected, found = ({key for key in keys if ".base_layer." not in key} for keys in (state, weights))
    if found != expected:
        some = sorted(found ^ expected)
        raise IncompatibleSourceError(
            f"'{adapter.ref}' does not fit its own configuration on this model: {len(expected - found)} weights are not "
            f"in its file and {len(found - expected)} belong nowhere, starting with {some[0]}"
        )
    for key in sorted(expected):
        if weights[key].shape != state[key].shape:
            raise IncompatibleSourceError(
                f"'{adapter.ref}' does not fit this model: {key} has shape {tuple(weights[key].shape)}, expected "
                f"{tuple(state[key].shape)}"
            )
    touched, whole = _touched_modules(adapted, expected)
    _merge_into_file(adapted, directory / "adapted")
    return AppliedAdapter(adapted.merge_and_unload(), touched, whole)


@torch.no_grad()
def _merge_into_file(adapted: PeftModel, path: Path) -> None:
    """Let PEFT merge one adapted layer after the other, and put the result of each in a file at `path`."""
    modules = dict(adapted.get_base_model().named_modules())
    # What PEFT unwraps in a way of its own, such as single trained tokens, is one embedding: it is left to PEFT.
    own_way = tuple(f"{name}." for name, m in modules.items() if unloads_itself(m))
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer) and not f"{name}.".startswith(own_way)
    }

    def parameters(name: str) -> dict[str, Tensor]:
        return {f"{name}.{key}": p for key, p in layers[name].get_base_layer().named_parameters()}

    room = MappedTensors(path, {key: p for name in layers for key, p in parameters(name).items()})
    for name, layer in layers.items():
        for key, parameter in parameters(name).items():
            parameter.data = room[key].copy_(parameter.data)
        layer.merge()
        for key, parameter in parameters(name).items():
            if parameter.data_ptr() != room[key].data_ptr():
                parameter.data = room[key].copy_(parameter.data)


def _touched_modules(adapted: PeftModel, keys: set[str]) -> tuple[set[str], set[str]]:
    """Return the names of the base model's modules that the adapter changes, and of those that it brings along whole."""
    modules = dict(adapted.get_base_model().named_modules())
    touched: set[str] = set()
    for name, module in modules.items():  # from the outside in
        inside = name.startswith(tuple(f"{outer}." for outer in touched))
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            touched.add(name)
    whole = {name for name in touched if isinstance(modules[name], ModulesToSaveWrapper)}
    for key in keys:  # such as the bias of a module that is not adapted
        name = _module_of(key, modules)
        if name and not f"{name}.".startswith(tuple(f"{outer}." for outer in touched)):
            touched.add(name)
    return touched, whole


def _module_of(key: str, modules: Collection[str]) -> str:
    """Return the innermost of `modules` that a weight of an adapter belongs to; empty where it is none."""
    name = key.removeprefix(PREFIX)
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _in_runtime_names(base: PreTrainedModel, adapter: Source, directory: Path) -> Path:
    """Return a folder with the adapter in the names that modules have in memory: its own, or a new one in `directory`.

    An adapter that was made under transformers 4 names modules as they were called then (`attention.attention.query` of
    a ViT, now `attention.q_proj`). Its weights are renamed as transformers renames those of a checkpoint, and its
    configuration names each module in full.
    """
    renamings, _ = weight_conversions(base)
    weights = load_peft_weights(str(adapter.folder), device="cpu")
    renamed = {
        key: PREFIX + runtime_name(key.removeprefix(PREFIX), renamings)[0] if key.startswith(PREFIX) else key
        for key in weights
    }
    modules = {name for name, _ in base.named_modules()}
    moved = [key for key, new in renamed.items() if key != new and _module_of(new, modules)]
    if not moved:
        return adapter.folder
    config: Any = copy.deepcopy(load_adapter_config(adapter))
    mark = f".{parameter_prefix(config.peft_type)}"
    old_names = {}
    for key, new in renamed.items():
        if mark in key:
            old_names[new.partition(mark)[0].removeprefix(PREFIX)] = key.partition(mark)[0].removeprefix(PREFIX)

    def by_old_name(patterns: dict[str, int]) -> dict[str, int]:
        keys = {new: matching_pattern(patterns, old) for new, old in old_names.items()}
        return {new: patterns[key] for new, key in keys.items() if key in patterns}

    config.target_modules = sorted(old_names)
    for field in ("rank_pattern", "alpha_pattern"):
        if getattr(config, field, None):
            setattr(config, field, by_old_name(getattr(config, field)))
    if getattr(config, "feedforward_modules", None):
        ends = tuple(config.feedforward_modules)
        config.feedforward_modules = [new for new, old in old_names.items() if old.endswith(ends)]
    for field in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(config, field):
            setattr(config, field, None)
    folder = directory / "renamed"
    folder.mkdir(exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(
        {renamed[key]: weight.contiguous() for key, weight in weights.items()}, folder / "adapter_model.safetensors"
    )
    return folder
