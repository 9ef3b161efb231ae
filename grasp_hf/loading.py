"""From files to models on the CPU: the target, and one source at a time, checked before it is used."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PretrainedConfig, PreTrainedModel, pipelines
from transformers.utils import logging as transformers_logging

from .adapters import adapter_problems, apply_adapter_, load_adapter_config
from .errors import IncompatibleSourceError, NonFiniteError
from .matching import head_tensors, label_problem, movable_tensors, tensor_problems
from .sources import Source

logger = logging.getLogger(__name__)

TASKS: dict[str, Any] = pipelines.SUPPORTED_TASKS
UNREADABLE = (ValueError, RuntimeError, OSError, EOFError, UnpicklingError, SafetensorError)
PROCESSING_FILES = ("tokenizer*.json", "vocab*", "*.model", "preprocessor_config.json", "processor_config.json")
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class LoadedSource:
    """A source in memory.

    Attributes:
        model: The source as a model of the target's class, on the CPU, memory-mapped in its checkpoint's dtype.
        candidates: Names of the tensors that may move: all of a full model, those that an adapter touches, and never
            a head that does not fit.
        own: Names of the tensors that are really the source's; the rest (a head that it lacks) were not in its files.
    """

    model: PreTrainedModel
    candidates: set[str]
    own: set[str]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bars and load reports of transformers off the terminal; their content is checked here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is going away
            warnings.filterwarnings("ignore", module=r"peft\.")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(source: Source) -> PretrainedConfig:
    """Return the model configuration of a full source.

    Raises:
        IncompatibleSourceError: It cannot be read, names an architecture that transformers does not hold, or is that of
            quantized weights.
    """
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        raise IncompatibleSourceError(f"'{source.ref}': its config.json cannot be used: {error}") from error
    if getattr(config, "quantization_config", None):
        raise IncompatibleSourceError(
            f"'{source.ref}': its weights are quantized, expected float weights; dequantize it and save it first"
        )
    return config


def model_class(config: PretrainedConfig, task: str | None = None, name: str = "model") -> type[PreTrainedModel]:
    """Return the class for `task`, or the one that the config names where `task` is left out.

    Args:
        config: The model's configuration.
        task: A pipeline name (`text-classification`) or an auto class (`AutoModelForQuestionAnswering`).
        name: What errors call the model.

    Raises:
        IncompatibleSourceError: There is no such task, or the architecture has no model for it.
    """
    if task is None:
        found = getattr(transformers, (config.architectures or [""])[0], None)
        if found is None or is_headless(config):
            raise IncompatibleSourceError(
                f"'{name}' names the architecture {config.architectures}, which has no task on top; say which one you "
                "want, for example task='text-classification'"
            )
        return found
    if task.startswith("AutoModelFor") and hasattr(transformers, task):
        autos = [getattr(transformers, task)]
    elif task in TASKS:
        autos = TASKS[task]["pt"]
    else:
        raise IncompatibleSourceError(
            f"unknown task '{task}', expected the name of an AutoModelFor class, or one of {', '.join(sorted(TASKS))}"
        )
    for auto in autos:
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise IncompatibleSourceError(f"'{name}' is a {config.model_type}, which has no model for the task '{task}'")


def is_headless(config: PretrainedConfig) -> bool:
    """Whether a checkpoint names an architecture without a task on top, such as `BertModel`."""
    return (config.architectures or [""])[0] in _class_names(transformers.AutoModel)


def task_of(cls: type[PreTrainedModel]) -> str | None:
    """Return the pipeline name of the task that a model class solves; `None` where there is none."""
    for task, details in TASKS.items():
        for auto in details["pt"]:
            if cls.__name__ in _class_names(auto) and auto is not transformers.AutoModel:
                return str(task)
    return None


def _class_names(auto: Any) -> set[str]:
    names: set[str] = set()
    for value in auto._model_mapping._model_mapping.values():
        names |= set(value) if isinstance(value, tuple | list) else {value}
    return names


def load_target(
    source: Source, *, task: str | None, dtype: torch.dtype, seed: int, new_head: bool = False, **model_kwargs: Any
) -> PreTrainedModel:
    """Load the model that a merge starts from.

    It gets a fresh head, drawn from `seed`, where its files hold none or one of another size, or with `new_head`.

    Raises:
        IncompatibleSourceError: It is an adapter, or its files lack most of the weights below the head.
    """
    if source.kind == "adapter":
        raise IncompatibleSourceError(f"'{source.ref}' is an adapter; expected a full model to start from")
    cls = model_class(load_config(source), task, str(source.ref))
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, fresh = _from_pretrained(source, cls, dtype=dtype, **model_kwargs)
        if new_head:
            fresh |= _reinitialize_head_(model, source)
    body = set(movable_tensors(model)) - head_tensors(model)
    if len(fresh & body) > len(body) / 2:
        raise IncompatibleSourceError(
            f"'{source.ref}' lacks most weights of a {cls.__name__}, starting with {min(fresh & body)}"
        )
    if fresh:
        logger.warning("%s: new weights, which must be trained: %s", source.ref, ", ".join(sorted(fresh)))
    model.name_or_path = model.config._name_or_path = source.ref.name
    return model


def _reinitialize_head_(model: PreTrainedModel, source: Source) -> set[str]:
    """Change the head of `model` to fresh random weights, and return the names of its tensors."""
    names = head_tensors(model)
    if not names:
        raise IncompatibleSourceError(
            f"'{source.ref}' has other label names than the data, and its head cannot be told from the rest of a "
            f"{type(model).__name__}; expected a base model with the data's label names in its config.json"
        )
    for module_name in {name.rpartition(".")[0] for name in names}:
        module = model.get_submodule(module_name)
        for marked in (module, *module.parameters(recurse=False)):
            vars(marked).pop("_is_hf_initialized", None)  # transformers leaves alone what was loaded
        model._init_weights(module)
    return names


def load_source(
    source: Source, target: PreTrainedModel, *, base: Source | None, keep_head: bool = False
) -> LoadedSource:
    """Load one source as a model of the target's class and check that it fits.

    Args:
        source: Where the files are.
        target: The model that it will be merged into; not changed.
        base: The model that the target started from; an adapter must be an adapter of it.
        keep_head: Leave the head out where the label names differ, instead of refusing the source.

    Raises:
        IncompatibleSourceError: It does not fit; all of its problems are listed.
        NonFiniteError: A weight is NaN or infinite.
    """
    with quiet_transformers():
        if source.kind == "adapter":
            loaded = _load_adapter(source, target, base, keep_head)
        else:
            loaded = _load_full(source, target)
    _check_fit(source, loaded, target, keep_head)
    for name, tensor in movable_tensors(loaded.model).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"'{source.ref}': {name} holds NaN or infinite weights; expected finite ones")
    return loaded


def _load_full(source: Source, target: PreTrainedModel) -> LoadedSource:
    config = load_config(source)
    if problems := architecture_problems(config, target):
        raise IncompatibleSourceError(_listed(source, problems))
    model, fresh = _from_pretrained(source, type(target), dtype=_checkpoint_dtype(source), config=config)
    names = set(movable_tensors(model))
    return LoadedSource(model, candidates=names - fresh, own=names - fresh)


def architecture_problems(config: PretrainedConfig, target: PreTrainedModel) -> list[str]:
    """List what a source's config alone says against merging it into `target`."""
    problems = []
    if config.model_type != target.config.model_type:
        problems.append(f"another architecture: got {config.model_type}, expected {target.config.model_type}")
    return problems


def _from_pretrained(source: Source, cls: type[PreTrainedModel], **kwargs: Any) -> tuple[PreTrainedModel, set[str]]:
    """Load the files of `source` as a `cls`; also return the names of the tensors that were not among them."""
    try:
        loaded: Any = cls.from_pretrained(
            source.folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except UNREADABLE as error:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be loaded as a {cls.__name__}: {error}") from error
    model, info = loaded
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    return model, (set(info["missing_keys"]) | mismatched) - tied


def _checkpoint_dtype(source: Source) -> torch.dtype:
    """Return the dtype to load `source` in without a copy: the checkpoint's own, float32 where it holds several."""
    floating = [FLOATING[name] for name in source.dtypes() if name in FLOATING]
    return floating[0] if len(floating) == 1 else torch.float32


def _load_adapter(source: Source, target: PreTrainedModel, base: Source | None, keep_head: bool) -> LoadedSource:
    config = load_adapter_config(source)
    if problems := adapter_problems(config, source, base):
        raise IncompatibleSourceError(_listed(source, problems))
    assert base is not None  # else it were among the problems
    labels = {} if target.can_generate() else {key: getattr(target.config, key) for key in ("id2label", "label2id")}
    model, fresh = _from_pretrained(base, type(target), dtype=_checkpoint_dtype(base), **labels)
    try:
        merged, touched = apply_adapter_(model, source, ignore_mismatched_sizes=keep_head)
    except UNREADABLE as error:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be applied to '{base.ref}': {error}") from error
    names = movable_tensors(merged)
    candidates = {name for name in names if any(name.startswith(f"{module}.") for module in touched)}
    # An adapter does not say what its labels are called: they are those of its base model, and so is an unchanged head.
    merged.config.id2label = load_config(base).id2label
    return LoadedSource(merged, candidates, own=(set(names) - fresh) | candidates)


def _check_fit(source: Source, loaded: LoadedSource, target: PreTrainedModel, keep_head: bool) -> None:
    """Raise with all problems of a loaded source; take a head that does not fit out of what may move."""
    head = head_tensors(target)
    labels = label_problem(target, loaded.model)
    lacking = sorted(name for name in movable_tensors(target) if name not in loaded.own)
    # An adapter without a head leaves the target's alone; one with a head must have the target's labels, as a model must.
    brings_head = bool(loaded.candidates & head) or (bool(labels) and not head)
    if (labels or set(lacking) & head) and ((keep_head and head) or (source.kind == "adapter" and not brings_head)):
        loaded.candidates -= head
        loaded.own -= head
        labels, lacking = None, [name for name in lacking if name not in head]
    problems = tensor_problems(
        target, loaded.model, set(movable_tensors(target)) - loaded.own | (head if labels else set())
    )
    if labels:
        problems.append(labels)
    if lacking and source.kind == "full":
        advice = "; use head='keep' to merge the rest" if set(lacking) <= head else ""
        problems.append(f"{len(lacking)} tensors are not in its files, starting with {lacking[0]}{advice}")
    if problems:
        raise IncompatibleSourceError(_listed(source, problems))


def _listed(source: Source, problems: list[str]) -> str:
    return f"'{source.ref}' cannot be merged:\n- " + "\n- ".join(problems)


def load_processing_class(source: Source) -> Any:
    """Return the tokenizer or processor in the folder of `source`, `None` where there is none."""
    # Without these, transformers makes up a tokenizer that knows no word.
    if not any(path for pattern in PROCESSING_FILES for path in source.folder.glob(pattern)):
        return None
    try:
        with quiet_transformers():
            return AutoProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError):
        return None
