"""From the files of a source to tensors as the target would hold them, checked before they are used."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import IncompatibleSourceError, NonFiniteError
from ..hub.pull import ShardedSource
from ..hub.reference import UNREADABLE, Source
from ..internals import tied_names
from ..models.classes import load_config, quiet_transformers
from ..models.target import checkpoint_dtype, load_pretrained
from ..tensors.mapped import MappedTensors
from ..tensors.units import head_tensors, movable_tensors
from .checkpoint import file_tensors, runtime_tensors
from .fit import Fit, SourceFiles, architecture_problems, fit_source
from .headers import header_tensors
from .rows import class_tensors, label_names

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass
class LoadedSource:
    """A source in memory, as the target would hold it.

    Attributes:
        tensors: Values by runtime name, in the target's shapes, on the CPU, mapped from files. What is not the source's
            (a head that it lacks or that does not fit) is not among them; a row without a counterpart is the target's.
            On the meta device where they come shard by shard.
        candidates: Names of the tensors that may move: all of a full model's, those that an adapter touches.
        notes: What a reader of the report should know: how a head and a vocabulary were matched.
        shards: The values, in the order in which they come; each set is emptied when the next one is asked for.
    """

    tensors: dict[str, Tensor]
    candidates: set[str]
    notes: list[str] = field(default_factory=list)
    shards: Iterable[Mapping[str, Tensor]] = ()

    def __post_init__(self) -> None:
        self.shards = self.shards or [self.tensors]


def load_source(
    source: Source,
    target: PreTrainedModel,
    *,
    base: Source | None,
    directory: Path,
    processing_class: Any = None,
    accepted_bases: Collection[str] = (),
    check_finite: bool = True,
    token: str | None = None,
) -> LoadedSource:
    """Load one source as the target would hold it, and check that it fits.

    Args:
        source: Where the files are.
        target: The model that it will be merged into; not changed.
        base: The model that the target started from; an adapter must be an adapter of it.
        directory: Where the weights that an adapter makes, and those whose rows move, are kept as files.
        processing_class: The target's tokenizer; its tokens are matched with the source's by their strings.
        accepted_bases: Names of models that the user declares to be the same as `base`.
        check_finite: Read every weight once to see that it is finite.
        token: Hub token that the base was loaded with.

    Raises:
        IncompatibleSourceError: It does not fit; all of its problems are listed.
        NonFiniteError: A weight is NaN or infinite; of shards that come one by one, when it is its turn.
    """
    if isinstance(source, ShardedSource):
        if loaded := _load_in_shards(source, target, processing_class):
            return loaded
        source.gather()
    with quiet_transformers():
        if source.kind == "adapter":
            read = _read_adapter(source, target, base, directory, accepted_bases, token)
        else:
            read = _read_full(source, target, directory)
    found = _compared(source, read, target, processing_class)
    tensors = found.tensors
    if check_finite:
        _check_finite(source, tensors)
    if found.rows:
        targets = movable_tensors(target)
        held = {name: targets[name].detach() for name in found.rows}
        room = MappedTensors(directory / "rows", held)
        for name, match in found.rows.items():
            match.fill_(room[name], held[name], tensors[name])
        tensors |= room
    return LoadedSource(tensors, read.candidates & set(tensors), found.notes)


def _load_in_shards(source: ShardedSource, target: PreTrainedModel, processing_class: Any) -> LoadedSource | None:
    """Check by its headers that a source fits, and return what reads its shards one by one.

    `None` where one shard alone does not say what the target would hold: tensors that are fused, rows that are matched
    by name; or where there is more to check: tied tensors that are there twice, tensors that the target has no place
    for, an unusual dtype.
    """
    headers = header_tensors(source, source.listing, token=source.token) or {}
    with quiet_transformers():
        read = _read_full(source, target, Path(), headers)
    runtime_names = {id(tensor): name for name, tensor in read.tensors.items()}
    one_to_one = set(runtime_names) == set(map(id, headers.values()))
    if not one_to_one or any(tensor.dtype == torch.uint8 for tensor in headers.values()):
        return None
    names = {key: runtime_names[id(tensor)] for key, tensor in headers.items()}
    found = _compared(source, read, target, processing_class)
    if found.rows:
        return None
    return LoadedSource(
        found.tensors, set(found.tensors), found.notes, _values_in_shards(source, names, found.tensors)
    )


def _values_in_shards(
    source: ShardedSource, names: Mapping[str, str], like: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yield what is in each shard by the runtime names that `names` has for those in the files."""
    for path in source.shards():
        try:
            with safe_open(path, "pt") as weights:
                values = {names[key]: weights.get_tensor(key) for key in weights.keys() if names[key] in like}
        except UNREADABLE as error:
            raise IncompatibleSourceError(f"{path.name} cannot be read: {error}", subject=source.ref) from error
        _check_finite(source, values)
        yield values
        values.clear()  # a file's room is free when it is removed and nothing maps it any more


def _compared(source: Source, read: SourceFiles, target: PreTrainedModel, processing_class: Any) -> Fit:
    found = fit_source(source, read, target, processing_class)
    if found.problems:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=found.problems)
    return found


def _check_finite(source: Source, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise NonFiniteError(f"{name} holds NaN or infinite weights; expected finite ones", subject=source.ref)


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; a finite sum says so in one pass without a mask."""
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor).all())


def _read_full(
    source: Source, target: PreTrainedModel, directory: Path, headers: Mapping[str, Tensor] | None = None
) -> SourceFiles:
    config = load_config(source)
    architecture = architecture_problems(config, target)
    if config.model_type != target.config.model_type:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=architecture)
    source.float_dtypes()
    try:
        raw = file_tensors(source) if headers is None else headers
        tensors, problems = runtime_tensors(raw, target, directory)
    except UNREADABLE as error:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be read: {error}") from error
    return SourceFiles(tensors, set(tensors), label_names(config), problems + architecture)


def _read_adapter(
    source: Source,
    target: PreTrainedModel,
    base: Source | None,
    directory: Path,
    accepted_bases: Collection[str],
    token: str | None,
) -> SourceFiles:
    # Imported here: peft takes seconds, and a merge of full models does not need it.
    from .adapters import adapter_problems, apply_adapter_, load_adapter_config, saved_classes

    config = load_adapter_config(source)
    if problems := adapter_problems(config, source, base, accepted_bases, token=token):
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=problems)
    assert base is not None  # else it were among the problems
    kwargs: dict[str, Any] = {}
    labels: list[str] | None = None
    try:
        if not target.can_generate():
            labels = adapter_labels(source, base)
            tensors = movable_tensors(target)
            head = {name: tensors[name] for name in head_tensors(target)}
            rows = class_tensors(head, len(label_names(target.config))) or ()
            classes = saved_classes(source, rows) or len(labels)
            labels = labels if classes == len(labels) else None
            names = labels or [f"LABEL_{index}" for index in range(classes)]
            kwargs = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        model, fresh = load_pretrained(base, type(target), dtype=checkpoint_dtype(base), **kwargs)
        applied = apply_adapter_(model, source, directory)
    except IncompatibleSourceError:
        raise
    except NotImplementedError as error:
        raise IncompatibleSourceError(
            f"an adapter of type {config.peft_type} cannot be merged into weights; expected LoRA or alike",
            subject=source.ref,
        ) from error
    except UNREADABLE as error:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be applied to '{base.ref}': {error}") from error

    def inside(name: str, modules: set[str]) -> bool:
        return any(name.startswith(f"{module}.") for module in modules)

    # What an adapter adds to weights that its base lacks belongs to weights that nobody has.
    own = {
        name: tensor
        for name, tensor in movable_tensors(applied.model).items()
        if name not in fresh or inside(name, applied.whole)
    }
    ties = tied_names(target)
    touched = {name for name in own if inside(name, applied.touched)}
    return SourceFiles(own, touched | {name for alias, name in ties.items() if inside(alias, applied.touched)}, labels)


def adapter_labels(adapter: Source, base: Source) -> list[str]:
    """Return the label names of an adapter: those of a config.json beside it, else those of its base model."""
    return label_names(load_config(adapter if (adapter.folder / "config.json").is_file() else base))


def saves_head(config: PeftConfig, target: PreTrainedModel) -> bool:
    """Whether an adapter brings a head along whole, in a model like `target`."""
    heads = {name.partition(".")[0] for name in head_tensors(target)}
    return bool(heads & set(getattr(config, "modules_to_save", None) or ()))
