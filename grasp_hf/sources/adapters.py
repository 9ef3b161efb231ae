"""PEFT adapters as sources: the checks of their configuration, and their merge into the base model."""

import copy
from collections.abc import Collection, Iterator
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
    lora_rank,
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
        model: The merged model. The weights that the adapter changed are mapped from a file; the others stay in place.
        touched: Runtime names of the modules that the adapter changed or replaced.
        whole: Runtime names of the modules that the adapter replaced (`modules_to_save`).
        ranks: Rank of the difference to the base, for each tensor that LoRA changed.
    """

    model: PreTrainedModel
    touched: set[str]
    whole: set[str]
    ranks: dict[str, int]


def load_adapter_config(source: Source) -> PeftConfig:
    """Return the configuration of an adapter.

    Raises:
        IncompatibleSourceError: The configuration cannot be read, or PEFT does not know the type of the adapter.
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
    """List the problems in an adapter's config that keep it from being applied to `base`.

    Args:
        config: The adapter's configuration.
        adapter: The adapter's files.
        base: The base of the target; `None` if it is unknown.
        accepted_bases: Names (`org/name` or `org/name@revision`) that the user declares to be the model `base`.
        token: Hub token, to look up the commit of a revision.
    """
    problems = []
    if config.is_prompt_learning or not _can_merge(PeftType(config.peft_type)):
        problems.append(type_problem(config))
    named = config.base_model_name_or_path or ""
    if base is None:
        problems.append(
            f"it is an adapter of '{named}', but the base of the target is unknown; load the target with "
            "GraspMerger.from_pretrained"
        )
    elif {named, f"{named}@{config.revision}"} & set(accepted_bases):
        pass
    elif named != base.ref.name and not _names_folder(named, adapter, base):
        problems.append(
            f"it is an adapter of '{named}', expected an adapter of '{base.ref.name}'; if both are the same model, "
            f"accept it by name: accepted_bases=['{named}']"
        )
    elif config.revision and base.sha and not _names_commit(named, config.revision, base, token):
        revised = f"{named}@{config.revision}"
        problems.append(
            f"it is an adapter of '{named}' at revision '{config.revision}', expected '{base.ref}'; if both are the "
            f"same model, accept it by name: accepted_bases=['{revised}']"
        )
    return problems


def type_problem(config: PeftConfig) -> str:
    """Return the problem of an adapter of a type that PEFT cannot merge."""
    kind = PeftType(config.peft_type).value
    return f"an adapter of type {kind} cannot be merged into weights; expected LoRA or a similar type"


def _can_merge(kind: PeftType) -> bool:
    """Whether PEFT can merge adapters of this type into weights: whether one of its layers has a `merge` method."""
    layers = [*filter(None, [merging_layer(kind)])]
    for layer in layers:
        layers += layer.__subclasses__()
    return any(layer.merge is not BaseTunerLayer.merge for layer in layers)


def _names_folder(name: str, adapter: Source, base: Source) -> bool:
    """Whether `name` is the folder of `base`, relative to the working directory or to the adapter's folder."""
    paths = (Path(name), adapter.folder / name)
    return bool(name) and any(path.is_dir() and path.samefile(base.folder) for path in paths)


def _names_commit(name: str, revision: str, base: Source, token: str | None) -> bool:
    """Whether `revision` (a branch, a tag, a sha) of the repository `name` is the commit of `base`."""
    if revision in (base.sha, base.ref.revision):
        return True
    return commit_of(SourceRef(name, revision), token=token) == base.sha


def count_saved_classes(adapter: Source, class_tensors: Collection[str]) -> int | None:
    """Return the number of classes of the head in an adapter's file; `None` if the file holds no head.

    `class_tensors` are the names of the model's tensors that have a row per class.
    """
    weights = load_peft_weights(str(adapter.folder), device="cpu")
    rows = [len(weights[PREFIX + name]) for name in class_tensors if PREFIX + name in weights]
    return rows[0] if rows else None


def apply_adapter_(base: PreTrainedModel, adapter: Source, directory: Path) -> AppliedAdapter:
    """Change `base` in place by merging an adapter into its weights.

    The result is that of PEFT's `merge_and_unload()`. The changed weights are written to a file in `directory`, module
    by module: private memory holds the weights of one module, not of the model.

    Raises:
        IncompatibleSourceError: The adapter's file lacks weights, or holds weights that belong to no module or have
            other shapes.
        ValueError, RuntimeError, OSError: PEFT cannot read the adapter or apply it to this model.
    """
    folder = use_runtime_names(base, adapter, directory)
    adapted = PeftModel.from_pretrained(base, str(folder))
    expected = {*checked_weights(adapted, folder, adapter)}
    touched, whole = _touched_modules(adapted, expected)
    ranks = _ranks(adapted)
    _merge_into_file(adapted, directory / "adapted")
    model = adapted.merge_and_unload()
    by_name = {name: ranks[id(p)] for name, p in model.named_parameters() if id(p) in ranks}
    return AppliedAdapter(model, touched, whole, by_name)


def checked_weights(adapted: PeftModel, folder: Path, adapter: Source) -> dict[str, Tensor]:
    """Return the weights in the file of an adapter by their names in memory, after a check that they fit.

    Args:
        adapted: The base model with the adapter.
        folder: Folder of the adapter's file.
        adapter: The adapter, for messages.

    Raises:
        IncompatibleSourceError: The file lacks weights, or holds weights that belong to no module or have other shapes.
    """
    # To save embedding layers, PEFT would ask the Hub about the base model.
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = adapter_weights_in_runtime_names(adapted, load_peft_weights(str(folder), device="cpu"))
    # An adapter of an embedding or output layer is saved with the base model's weights of that layer.
    expected, found = ({key for key in keys if ".base_layer." not in key} for keys in (state, weights))
    if found != expected:
        first = min(found ^ expected)
        raise IncompatibleSourceError(
            f"'{adapter.ref}' does not fit its own configuration on this model: its file lacks "
            f"{len(expected - found)} weights and holds {len(found - expected)} that belong to no module, starting "
            f"with {first}"
        )
    for key in sorted(expected):
        if weights[key].shape != state[key].shape:
            raise IncompatibleSourceError(
                f"'{adapter.ref}' does not fit this model: {key}: got shape {tuple(weights[key].shape)}, expected "
                f"{tuple(state[key].shape)}"
            )
    return {key: weights[key] for key in sorted(expected)}


def _ranks(adapted: PeftModel) -> dict[int, int]:
    """Return the rank of the change of each weight that plain LoRA adapts, by the `id` of the parameter.

    Variants such as DoRA change a weight by a matrix of full rank.
    """
    modules: Iterator[Any] = adapted.modules()
    layers = {module: rank for module in modules if (rank := lora_rank(module)) is not None}
    return {id(layer.get_base_layer().weight): rank for layer, rank in layers.items()}


@torch.no_grad()
def _merge_into_file(adapted: PeftModel, path: Path) -> None:
    """Let PEFT merge the adapted layers sequentially, and write each result to a file at `path`."""
    modules = dict(adapted.get_base_model().named_modules())
    # `merge_and_unload()` merges the modules that unload themselves, such as embeddings with single trained tokens.
    unloading = tuple(f"{name}." for name, m in modules.items() if unloads_itself(m))
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer) and not f"{name}.".startswith(unloading)
    }

    def parameters(name: str) -> dict[str, Tensor]:
        return {f"{name}.{key}": p for key, p in layers[name].get_base_layer().named_parameters()}

    buffer = MappedTensors(path, {key: p for name in layers for key, p in parameters(name).items()})
    for name, layer in layers.items():
        for key, parameter in parameters(name).items():
            parameter.data = buffer[key].copy_(parameter.data)
        layer.merge()
        for key, parameter in parameters(name).items():
            if parameter.data_ptr() != buffer[key].data_ptr():  # some layers replace their weight
                parameter.data = buffer[key].copy_(parameter.data)


def _touched_modules(adapted: PeftModel, keys: set[str]) -> tuple[set[str], set[str]]:
    """Return the names of the base model's modules that the adapter changes, and of those that it replaces."""
    modules = dict(adapted.get_base_model().named_modules())
    touched: set[str] = set()
    for name, module in modules.items():  # a module comes before those inside it
        inside = name.startswith(tuple(f"{outer}." for outer in touched))
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            touched.add(name)
    whole = {name for name in touched if isinstance(modules[name], ModulesToSaveWrapper)}
    for key in keys:  # for example the bias of a module that is not adapted
        name = _module_of(key, modules)
        if name and not f"{name}.".startswith(tuple(f"{outer}." for outer in touched)):
            touched.add(name)
    return touched, whole


def _module_of(key: str, modules: Collection[str]) -> str:
    """Return the innermost of `modules` that a weight of an adapter belongs to; empty if there is none."""
    name = key.removeprefix(PREFIX)
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def use_runtime_names(base: PreTrainedModel, adapter: Source, directory: Path) -> Path:
    """Return the adapter's folder, or a new folder in `directory` with the modules' names in memory.

    An adapter that was trained under transformers 4 uses the names of that version (`attention.attention.query` of a
    ViT, now `attention.q_proj`). The new folder holds the weights under the names that transformers would give them
    when it loads a checkpoint, and a configuration that lists the full name of each module.
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
