"""PEFT adapters as sources: the checks of their configuration, and their merge into the base model."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, load_peft_weights
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from ..errors import IncompatibleSourceError
from ..hub.download import commit_of
from ..hub.parents import float_parent, is_same_repository
from ..hub.reference import Source, SourceRef
from ..internals import (
    adapter_weights_in_runtime_names,
    expert_layers,
    forget_adapter_,
    lora_rank,
    matching_pattern,
    merging_layer,
    parameter_prefix,
    runtime_name,
    unloads_itself,
    weight_conversions,
)
from ..tensors.mapped import MappedTensors
from .adapter_options import for_inference, option_problems, stored_options
from .expert_packing import repack_experts

PREFIX = "base_model.model."
QUANTIZED = "quantized"  # in `accepted_bases`


@dataclass(frozen=True)
class AppliedAdapter:
    """A base model after an adapter was merged into it.

    Attributes:
        model: The merged model. The weights that the adapter changed are mapped from a file; the others stay in place.
        touched: Runtime names of the modules that the adapter changed or replaced.
        whole: Runtime names of the modules that the adapter replaced (`modules_to_save`).
        ranks: Rank of the difference to the base, for each tensor that LoRA changed.
        notes: Warnings of PEFT.
    """

    model: PreTrainedModel
    touched: set[str]
    whole: set[str]
    ranks: dict[str, int]
    notes: list[str] = field(default_factory=list)


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
        accepted_bases: Names (`org/name` or `org/name@revision`) that the user declares to be the model `base`; the word
            `quantized` stands for all models that were quantized from `base`, as their cards say.
        token: Hub token, to look up the commit of a revision.
    """
    problems = []
    if config.is_prompt_learning or not _can_merge(PeftType(config.peft_type)):
        problems.append(type_problem(config))
    problems += option_problems(config, adapter)
    named = config.base_model_name_or_path or ""
    if base is None:
        problems.append(
            f"it is an adapter of '{named}', but the base of the target is unknown; load the target with "
            "GraspMerger.from_pretrained"
        )
    elif {named, f"{named}@{config.revision}"} & set(accepted_bases):
        pass
    elif named != base.ref.name and not _names_folder(named, adapter, base):
        problems += _base_problems(named, base, accepted_bases, token)
    elif config.revision and base.sha and not _names_commit(named, config.revision, base, token):
        revised = f"{named}@{config.revision}"
        problems.append(
            f"it is an adapter of '{named}' at revision '{config.revision}', expected '{base.ref}'; if both are the "
            f"same model, accept it by name: accepted_bases=['{revised}']"
        )
    return problems


def _base_problems(named: str, base: Source, accepted_bases: Collection[str], token: str | None) -> list[str]:
    """Return the problem of an adapter of the model `named`, which is not `base`; the card of `named` may help."""
    parent = float_parent(named, token=token)
    if parent is not None and is_same_repository(parent, base.ref.name, token=token):
        if QUANTIZED in accepted_bases:
            return []
        return [
            f"it is an adapter of '{named}', which was quantized from '{base.ref.name}', as its card says; apply it to the "
            f"float weights with accepted_bases=['{QUANTIZED}']"
        ]
    source = f", which was quantized from '{parent}', as its card says" if parent else ""
    advice = f"start from '{parent}'; or, if" if parent else "if"
    return [
        f"it is an adapter of '{named}'{source}, expected an adapter of '{base.ref.name}'; {advice} both are the same "
        f"model, accept it by name: accepted_bases=['{named}']"
    ]


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

    The weights that the adapter changes are copied into a file in `directory`, in float32 or wider, and merged there:
    they are not rounded to the dtype of a half-precision base, and private memory holds one module, not the model.

    A tied weight that the adapter changes becomes two parameters, because an adapter of an output layer acts on that
    layer alone.

    Raises:
        IncompatibleSourceError: The adapter's file lacks weights, or holds weights that belong to no module or have
            other shapes.
        ValueError, RuntimeError, OSError: PEFT cannot read the adapter or apply it to this model.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        applied = _apply_(base, adapter, directory)
    notes = [f"PEFT: {text}" for warning in caught if (text := str(warning.message)) and not _is_settled(warning)]
    return replace(applied, notes=[*dict.fromkeys(notes)])


def _is_settled(warning: warnings.WarningMessage) -> bool:
    """Whether a warning asks for nothing: a deprecated name, or tied weights, which `apply_adapter_` takes apart."""
    deprecated = issubclass(warning.category, FutureWarning | DeprecationWarning | PendingDeprecationWarning)
    return deprecated or "tie_word_embeddings=True" in str(warning.message)


def _apply_(base: PreTrainedModel, adapter: Source, directory: Path) -> AppliedAdapter:
    config, weights = _in_runtime_names(base, for_inference(load_adapter_config(adapter)), adapter)
    mark = f".{parameter_prefix(config.peft_type)}"
    changed = _changed_modules(base, weights, mark)
    buffer = dict(_copy_into_file_(base, changed, directory / "adapted"))
    adapted = adapted_model(base, config, weights, adapter)
    if others := _layers(adapted, outside=changed):  # the files of some types name no module
        base = adapted.unload()
        forget_adapter_(base)
        buffer |= _copy_into_file_(base, others, directory / "adapted-others")
        adapted = adapted_model(base, config, weights, adapter)
    held = {key for key in adapter_weights_in_runtime_names(adapted, weights) if ".base_layer." not in key}
    touched, whole = _touched_modules(adapted, held)
    ranks = _ranks(adapted)
    _merge_layers_(adapted, buffer)
    model = adapted.merge_and_unload()
    by_name = {name: ranks[id(p)] for name, p in model.named_parameters() if id(p) in ranks}
    return AppliedAdapter(model, touched, whole, by_name)


def adapted_model(base: PreTrainedModel, config: Any, weights: Mapping[str, Tensor], adapter: Source) -> PeftModel:
    """Return `base` with an adapter around its layers, in eval mode; PEFT changes `base` in place.

    Args:
        base: The base model.
        config: The adapter's configuration.
        weights: The weights in the adapter's file, under the names of the modules of `base`.
        adapter: The adapter, for errors.

    Raises:
        IncompatibleSourceError: The weights are not those that the configuration asks for on this model.
    """
    config.base_model_name_or_path = base.name_or_path  # PEFT warns of another name
    adapted = get_peft_model(base, config)
    weights = repack_experts(weights, expert_layers(adapted), stored_options(adapter))
    # To save embedding layers, PEFT would ask the Hub about the base model.
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = adapter_weights_in_runtime_names(adapted, weights)
    # A file may also hold weights of the base model, such as those of resized embeddings; PEFT loads them.
    of_base = {key: value for key, value in adapted.state_dict().items() if key in found.keys() - expected.keys()}
    lacking, foreign = expected.keys() - found.keys(), found.keys() - expected.keys() - of_base.keys()
    if lacking or foreign:
        raise IncompatibleSourceError(
            f"'{adapter.ref}' does not fit its own configuration on this model: its file lacks {len(lacking)} weights "
            f"and holds {len(foreign)} that belong to no module, starting with {min(lacking | foreign)}"
        )
    sized = config.peft_type != PeftType.ADALORA  # PEFT gives its layers their ranks when it loads them
    for key, wanted in sorted((expected | of_base).items()):
        got = found[key]
        if sized and got.shape != wanted.shape:
            raise IncompatibleSourceError(
                f"'{adapter.ref}' does not fit this model: {key}: got shape {tuple(got.shape)}, expected "
                f"{tuple(wanted.shape)}"
            )
        if got.is_floating_point() != wanted.is_floating_point():
            raise IncompatibleSourceError(
                f"'{adapter.ref}' does not fit this model: {key}: got {got.dtype}, expected {wanted.dtype}"
            )
    set_peft_model_state_dict(adapted, weights)
    return adapted.eval()


def load_adapted(base: PreTrainedModel, adapter: Source, directory: Path) -> PeftModel:
    """Return `base` with an adapter around its layers, which are not merged; `base` is changed in place.

    Weights in half precision that the adapter changes are copied into a file in `directory`, in float32.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply_adapter_` returns them
        config, weights = _in_runtime_names(base, for_inference(load_adapter_config(adapter)), adapter)
        if any(parameter.dtype.itemsize < 4 for parameter in base.parameters()):
            changed = _changed_modules(base, weights, f".{parameter_prefix(config.peft_type)}")
            _copy_into_file_(base, changed, directory / "reference")
            (directory / "reference").unlink()  # the disk space is free as soon as nothing maps the file
        return adapted_model(base, config, weights, adapter)


def _changed_modules(base: PreTrainedModel, weights: Collection[str], mark: str) -> set[str]:
    """Return the names of the modules of `base` that the file of an adapter names.

    Args:
        base: The base model.
        weights: Names of the adapter's weights.
        mark: Start of the part of such a name that follows the module's name, such as `.lora_`.
    """
    modules = {name for name, _ in base.named_modules()}
    renamings, converters = weight_conversions(base)
    names = set()
    for key in weights:
        name = f"{key.removeprefix(PREFIX).partition(mark)[0]}.weight" if mark in key else key.removeprefix(PREFIX)
        names.add(_module_of(runtime_name(name, renamings, converters)[0], modules))  # experts may be fused
    return names - {""}


def _copy_into_file_(base: PreTrainedModel, modules: Collection[str], path: Path) -> MappedTensors:
    """Change `base` so that the weights of `modules` lie in a file at `path`, in float32 or wider, and are not tied."""
    inside = tuple(f"{module}." for module in modules)
    every = {
        name: parameter
        for prefix, module in base.named_modules()
        for name, parameter in module.named_parameters(prefix, recurse=False)
    }
    changed = {id(parameter) for name, parameter in every.items() if name.startswith(inside)}
    own = {name: parameter for name, parameter in every.items() if id(parameter) in changed}
    wide = {name: p.to("meta", torch.promote_types(p.dtype, torch.float32)) for name, p in own.items()}
    buffer = MappedTensors(path, wide)
    buffer.copy_(own)
    for name, parameter in own.items():
        module, _, key = name.rpartition(".")
        setattr(base.get_submodule(module), key, Parameter(buffer[name], requires_grad=parameter.requires_grad))
    return buffer


def _layers(adapted: PeftModel, *, outside: Collection[str]) -> set[str]:
    """Return the names of the adapted layers that do not lie in the modules `outside`."""
    inside = tuple(f"{module}." for module in outside)
    modules = adapted.get_base_model().named_modules()
    return {n for n, module in modules if isinstance(module, BaseTunerLayer) and not f"{n}.".startswith(inside)}


def _ranks(adapted: PeftModel) -> dict[int, int]:
    """Return the rank of the change of each weight that plain LoRA adapts, by the `id` of the parameter.

    Variants such as DoRA change a weight by a matrix of full rank.
    """
    modules: Iterator[Any] = adapted.modules()
    layers = {module: rank for module in modules if (rank := lora_rank(module)) is not None}
    return {id(layer.get_base_layer().weight): rank for layer, rank in layers.items()}


@torch.no_grad()
def _merge_layers_(adapted: PeftModel, buffer: Mapping[str, Tensor]) -> None:
    """Let PEFT merge the adapted layers sequentially, and copy each result into `buffer`."""
    modules = dict(adapted.get_base_model().named_modules())
    # `merge_and_unload()` merges the modules that unload themselves, such as embeddings with single trained tokens.
    unloading = tuple(f"{name}." for name, m in modules.items() if unloads_itself(m))
    layers: dict[str, Any] = {name: m for name, m in modules.items() if isinstance(m, BaseTunerLayer)}
    for name, module in layers.items():
        if f"{name}.".startswith(unloading):
            continue
        module.merge()
        module.merge = _leave_merged  # `merge_and_unload()` would merge some layers again
        for key, parameter in module.get_base_layer().named_parameters():
            place = buffer.get(f"{name}.{key}")
            if place is not None and parameter.data_ptr() != place.data_ptr():  # some layers replace their weight
                parameter.data = place.copy_(parameter.data)


def _leave_merged(*args: Any, **kwargs: Any) -> None:
    """Stand in for the `merge` of a layer that is merged."""


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


def _in_runtime_names(base: PreTrainedModel, config: Any, adapter: Source) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration and the weights of an adapter, with the modules' names in memory.

    An adapter that was trained under transformers 4 uses the names of that version (`attention.attention.query` of a
    ViT, now `attention.q_proj`). Its weights get the names that transformers would give them when it loads a checkpoint,
    and its configuration, which is changed in place, lists the full name of each module.
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
        return config, weights
    mark = f".{parameter_prefix(config.peft_type)}"
    old_names = {}
    for key, new in renamed.items():
        if mark in key:
            old_names[new.partition(mark)[0].removeprefix(PREFIX)] = key.partition(mark)[0].removeprefix(PREFIX)

    def by_old_name(patterns: dict[str, int]) -> dict[str, int]:
        keys = {new: matching_pattern(patterns, old) for new, old in old_names.items()}
        return {new: patterns[key] for new, key in keys.items() if key in patterns}

    config.target_modules = sorted(old_names)
    for option in ("rank_pattern", "alpha_pattern"):
        if getattr(config, option, None):
            setattr(config, option, by_old_name(getattr(config, option)))
    if getattr(config, "feedforward_modules", None):
        ends = tuple(config.feedforward_modules)
        config.feedforward_modules = [new for new, old in old_names.items() if old.endswith(ends)]
    for option in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(config, option):
            setattr(config, option, None)
    return config, {renamed[key]: weight for key, weight in weights.items()}
