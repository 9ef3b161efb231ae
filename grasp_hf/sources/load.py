"""Load a source as tensors with the target's names and shapes, and check them before they are used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.sources import NO_OPTIONS, SourceOptions
from ..errors import GraspError, IncompatibleSourceError, describe
from ..hub.pull import ShardedSource
from ..hub.reference import Source, reading, reads
from ..models.batches import Batch
from ..models.classes import load_config, quiet_transformers, read_config, wrong_number_of_labels
from ..models.mixture import mixture_of
from ..models.target import checkpoint_dtype, load_pretrained
from ..tensors.mapped import MappedTensors
from ..tensors.placing import overwrite_
from ..tensors.safetensors_files import map_tensors
from ..tensors.units import head_tensors, movable_tensors, tied_names
from .adapter_limits import limit_problems
from .architecture import architecture_problems
from .checkpoint import drop_tied_, file_tensors, fill_tied_, runtime_tensors
from .fit import Fit, SourceFiles, fit_source
from .headers import header_tensors
from .identity import check_identity, fits_twice
from .rows import class_tensors, default_names, label_names
from .values import check_values

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


FULL_MODEL = "it is a full model, expected a LoRA adapter with output='adapter'; merge it with output='model'"


@dataclass
class LoadedSource:
    """A source in memory, with the target's names and shapes.

    Attributes:
        tensors: Values by runtime name, in the target's shapes, on the CPU, mapped from files. A head that the source
            lacks, or that does not fit, is left out. A row without a counterpart holds the target's values. If the
            values come shard by shard, these tensors are on the meta device.
        candidates: Names of the tensors that may move: all of a full model, the touched ones of an adapter.
        notes: Remarks for the report: how the head and the vocabulary were matched.
        shards: The values, one set per shard in the order of arrival; a set is emptied when the next one is requested.
        ranks: Rank of the difference to the base, for each tensor that a LoRA adapter changes.
    """

    tensors: dict[str, Tensor]
    candidates: set[str]
    notes: list[str] = field(default_factory=list)
    shards: Iterable[Mapping[str, Tensor]] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shards = self.shards or [self.tensors]


@reads("it cannot be read")
def load_source(
    source: Source,
    target: PreTrainedModel,
    *,
    base: Source | None,
    directory: Path,
    processing_class: Any = None,
    accepted_bases: Collection[str] = (),
    options: SourceOptions = NO_OPTIONS,
    check: bool = False,
    data: Callable[[], Batch] | None = None,
    token: str | None = None,
) -> LoadedSource:
    """Load one source with the target's names and shapes, and check that it fits.

    Args:
        source: The files of the source.
        target: The model that the source will be merged into; it is not changed.
        base: The model that the target started from. An adapter must be an adapter of this model.
        directory: Folder for the files of weights that an adapter changes, that are fused, or whose rows are matched.
        processing_class: The target's tokenizer; its tokens are matched with the source's by their strings.
        accepted_bases: Names of models that the user declares to be the same as `base`.
        options: What the user says about the source.
        check: Whether to compare the source with the merge that takes it whole, on one batch, if memory allows.
        data: Returns a batch of the user's data, for that comparison.
        token: Hub token with which the base was loaded.

    Raises:
        IncompatibleSourceError: The source does not fit; the error lists all problems.
        NonFiniteError: A weight is NaN or infinite. Values that come shard by shard are checked when they arrive, and
            the iteration over `shards` raises the error.
    """
    if isinstance(source, ShardedSource):
        if loaded := _load_in_shards(source, target, processing_class, options):
            return loaded
        source.gather()
    with quiet_transformers():
        if source.kind == "adapter":
            files = _read_adapter(source, target, base, directory, accepted_bases, options, token)
            files.notes += other_base_notes(source, base)
        elif mixture_of(target) is not None:
            raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=[FULL_MODEL])
        else:
            files = _read_full(source, target, directory, options)
    fit = _require_fit(source, files, target, processing_class, options)
    tensors = fit.tensors
    mixture, own_tensors = mixture_of(target), movable_tensors(target)
    # A vector of coefficients is no weight: its values are compared with nothing.
    check_values(
        source.ref, tensors, own_tensors if mixture is None else {name: own_tensors[name] for name in mixture.base}
    )
    if check and source.kind == "full" and options.accept:
        fit.notes.append(
            f"not compared with its own library, because it is accepted that it differs: {options.accept}"
        )
    elif check and files.reference is None and mixture is None:
        fit.notes.append("not compared with its own library, because the memory does not hold it twice")
    elif check and files.reference:
        with quiet_transformers():
            fit.notes += check_identity(source, files.reference, files.tensors, target, data)
    if fit.rows:
        targets = movable_tensors(target)
        own = {name: targets[name].detach() for name in fit.rows}
        buffer = MappedTensors(directory / "rows", own)
        for name, match in fit.rows.items():
            match.fill_(buffer[name], own[name], tensors[name])
        tensors |= buffer
    return LoadedSource(tensors, files.candidates & set(tensors), fit.notes, ranks=files.ranks)


def load_mixture_(
    target: PreTrainedModel, adapter: Source, base: Source, *, accepted_bases: Collection[str], token: str | None
) -> None:
    """Change `target`, which has an empty mixture, to its base with one adapter; arguments as for `load_source`."""
    with tempfile.TemporaryDirectory(prefix="grasp_hf-") as directory:
        loaded = load_source(
            adapter, target, base=base, directory=Path(directory), accepted_bases=accepted_bases, token=token
        )
        overwrite_(movable_tensors(target), loaded.tensors)


def _load_in_shards(
    source: ShardedSource, target: PreTrainedModel, processing_class: Any, options: SourceOptions
) -> LoadedSource | None:
    """Check from its headers that a source fits, and return a source whose shards are read one by one.

    Return `None` if one shard alone does not determine the target's tensors, because tensors are fused or rows are
    matched by name. Return `None` also if a check needs all files: tied tensors that are saved twice, tensors that the
    target does not have, or an unusual dtype.
    """
    headers = header_tensors(source, source.listing, token=source.token) or {}
    with quiet_transformers():
        files = _read_full(source, target, Path(), options, headers)
    runtime_names = {id(tensor): name for name, tensor in files.tensors.items()}
    one_to_one = set(runtime_names) == set(map(id, headers.values())) and len(files.tensors) == len(headers)
    if not one_to_one or any(tensor.dtype == torch.uint8 for tensor in headers.values()):
        return None
    names = {key: runtime_names[id(tensor)] for key, tensor in headers.items()}
    fit = _require_fit(source, files, target, processing_class, options)
    if fit.rows:
        return None
    return LoadedSource(
        fit.tensors, set(fit.tensors), fit.notes, _read_shards(source, names, fit.tensors, movable_tensors(target))
    )


def _read_shards(
    source: ShardedSource, names: Mapping[str, str], like: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each shard that are in `like`; `names` maps names in files to runtime names.

    The values are compared with those of `target`.
    """
    for path in source.shards():
        with reading(source.ref, f"{path.name} cannot be read"):
            found = map_tensors(path)
            values = {names[key]: tensor for key, tensor in found.items() if names[key] in like}
            del found
        check_values(source.ref, values, target)
        yield values
        values.clear()  # a removed file occupies the disk until nothing maps it


def _require_fit(
    source: Source, files: SourceFiles, target: PreTrainedModel, processing_class: Any, options: SourceOptions
) -> Fit:
    fit = fit_source(source, files, target, processing_class, options)
    if fit.problems:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=fit.problems)
    return fit


def _read_full(
    source: Source,
    target: PreTrainedModel,
    directory: Path,
    options: SourceOptions,
    headers: Mapping[str, Tensor] | None = None,
) -> SourceFiles:
    config = load_config(source, options.labels)
    architecture = architecture_problems(config, target, str(source.ref), options.accept)
    if config.model_type != target.config.model_type:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=architecture)
    source.float_dtypes()
    raw = file_tensors(source) if headers is None else headers
    tensors, problems, notes = runtime_tensors(raw, target, directory)
    expected = movable_tensors(target)
    if not architecture and not expected.keys() <= tensors.keys():
        with torch.device("meta"):
            model = type(target)(config)
        fill_tied_(tensors, model, expected)
    files = SourceFiles(
        tensors,
        set(tensors),
        label_names(config),
        problems + architecture,
        notes=notes,
        problem_type=config.problem_type,
    )
    if headers is None and fits_twice(source):
        files.reference = lambda: load_pretrained(source, type(target), dtype=checkpoint_dtype(source))[0]
    return files


def _read_adapter(
    source: Source,
    target: PreTrainedModel,
    base: Source | None,
    directory: Path,
    accepted_bases: Collection[str],
    options: SourceOptions,
    token: str | None,
) -> SourceFiles:
    # Imported here, because peft takes seconds to import and a merge of full models does not need it.
    from .adapters import (
        adapter_problems,
        apply_adapter_,
        count_saved_classes,
        load_adapted,
        load_adapter_config,
        type_problem,
    )

    config = load_adapter_config(source)
    problems = adapter_problems(config, source, base, accepted_bases, token=token)
    names = [name for name, _ in target.named_modules()]
    problems += training_problems(source, target, options)
    if problems := problems or limit_problems(config, header_tensors(source) or file_tensors(source), names):
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=problems)
    assert base is not None  # an unknown base is one of the problems
    mixture = mixture_of(target)
    kwargs: dict[str, Any] = {}
    labels: list[str] | None = None
    try:
        if not target.can_generate():
            labels = options.labels or adapter_labels(source, base)
            tensors = movable_tensors(target)
            head = {name: tensors[name] for name in head_tensors(target)}
            rows = class_tensors(head, len(label_names(target.config))) or ()
            classes = count_saved_classes(source, rows) or len(labels)
            if classes != len(labels):
                if options.labels:
                    raise wrong_number_of_labels(source, labels, classes)
                labels = default_names(classes)
            kwargs = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        if mixture is not None:
            from .factors import add_adapter_

            base_config = load_config(base, quantized=True)
            base_config.update(kwargs)
            return add_adapter_(mixture, source, base_config, labels)
        model, fresh = load_pretrained(base, type(target), dtype=checkpoint_dtype(base), **kwargs)
        applied = apply_adapter_(model, source, directory)
    except GraspError:
        raise
    except NotImplementedError as error:
        raise IncompatibleSourceError(f"{type_problem(config)}: {error}", subject=source.ref) from error
    except Exception as error:
        problem = f"'{source.ref}' cannot be applied to '{base.ref}': {describe(error)}"
        raise IncompatibleSourceError(problem) from error

    def inside(name: str, modules: set[str]) -> bool:
        return any(name.startswith(f"{module}.") for module in modules)

    # Weights that the base lacks are random here. A low-rank update of them is of no use without the originals.
    own = {
        name: tensor
        for name, tensor in movable_tensors(applied.model).items()
        if name not in fresh or inside(name, applied.whole)
    }
    fill_tied_(own, applied.model, movable_tensors(target))
    touched = {name for name in own if inside(name, applied.touched)}
    for pair in [*tied_names(applied.model).items(), *tied_names(target).items()]:
        touched |= set(pair if touched.intersection(pair) else ())
    problems = drop_tied_(own, target)

    def reference() -> PeftModel:
        plain, _ = load_pretrained(base, type(target), dtype=checkpoint_dtype(base), **kwargs)
        return load_adapted(plain, source, directory)

    return SourceFiles(own, touched & own.keys(), labels, problems, applied.ranks, applied.notes, reference=reference)


def training_problems(adapter: Source, target: PreTrainedModel, options: SourceOptions) -> list[str]:
    """List the settings that an adapter was trained with and that differ from the target's.

    PEFT does not read the config.json that some tools save beside an adapter, but it says how the base model was set, for
    example with scaled positions.
    """
    try:
        config = read_config(adapter)
    except IncompatibleSourceError:  # there is none, or it is of no use to PEFT either
        return []
    if config.model_type != target.config.model_type:  # `adapter_problems` compares the base models
        return []
    return architecture_problems(config, target, str(adapter.ref), options.accept)


def other_base_notes(adapter: Source, base: Source | None) -> list[str]:
    """Return a note for the report if an adapter was trained on another base, such as a quantized one, that was accepted."""
    from .adapters import load_adapter_config, names_folder

    named = load_adapter_config(adapter).base_model_name_or_path or ""
    if base is None or named == base.ref.name or names_folder(named, adapter, base):
        return []
    return [f"trained on '{named}', which accepted_bases declares to be the base"]


def adapter_labels(adapter: Source, base: Source) -> list[str]:
    """Return the label names in the config.json of an adapter; if it has none, those of its base model."""
    named = adapter if (adapter.folder / "config.json").is_file() else base
    return label_names(read_config(named))


def saves_head(config: PeftConfig, target: PreTrainedModel) -> bool:
    """Whether an adapter replaces the head of a model like `target`."""
    heads = {name.partition(".")[0] for name in head_tensors(target)}
    return bool(heads & set(getattr(config, "modules_to_save", None) or ()))
