"""From files to models on the CPU: the target, and one source at a time, checked before it is used."""

import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel, pipelines
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging as transformers_logging

from .adapters import adapter_problems, apply_adapter_, load_adapter_config, saved_classes
from .checkpoint import file_tensors, runtime_tensors
from .errors import IncompatibleSourceError, NonFiniteError, first_line, shortened
from .headers import header_tensors
from .hub.listing import TOKENIZERS
from .hub.pull import ShardedSource
from .hub.reference import UNREADABLE, Source
from .matching import tensor_problems
from .rows import RowMatch, RowMatches, class_tensors, label_names, match_head, match_tokens, token_tensors, vocabulary
from .tensors.mapped import MappedTensors
from .tensors.units import head_tensors, movable_tensors

logger = logging.getLogger(__name__)

TASKS: dict[str, Any] = pipelines.SUPPORTED_TASKS
PROCESSING_FILES = ("tokenizer*.json", "vocab*", *TOKENIZERS, "preprocessor_config.json", "processor_config.json")
# Settings that change what the same weights mean, and that no shape tells.
WITHOUT_SHAPE = (
    "num_hidden_layers",  # an ALBERT shares them
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "activation_function",
    "window_size",
    "rope_theta",
    "rope_parameters",
)
# Tensors below the head that many a checkpoint lacks, because it was trained for a task that has no use for them.
TRAINED_LATER = re.compile(r"(^|\.)(pooler\..+|mask_token|masked_spec_embed|num_batches_tracked)$")
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


@dataclass
class Comparison:
    """How a source meets the target.

    Attributes:
        tensors: The source's tensors, without those of a head that does not fit.
        rows: Where rows are matched by label name or token, the matches by tensor.
        notes: What a reader should know of them.
        problems: Everything that keeps it from being merged.
    """

    tensors: dict[str, Tensor]
    rows: dict[str, RowMatch]
    notes: list[str]
    problems: list[str]


@dataclass
class Read:
    """What the files of a source hold: its own tensors by runtime name, which may move, and what its classes mean."""

    tensors: dict[str, Tensor]
    candidates: set[str]
    labels: list[str] | None  # None where the classes have no names
    problems: list[str] = field(default_factory=list)


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
    if source.kind == "adapter" and not (source.folder / "config.json").is_file():
        raise IncompatibleSourceError(f"'{source.ref}' is an adapter; expected a full model")
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted)
    except (ValueError, OSError, KeyError, StrictDataclassError) as error:
        if not source.trusted and "auto_map" in _raw_config(source):
            raise IncompatibleSourceError(
                f"'{source.ref}' needs Python code of its own; read it, and let it run with "
                f"trust_remote_code: ['{source.ref}']"
            ) from error
        raise IncompatibleSourceError(f"'{source.ref}': its config.json cannot be used: {error}") from error
    if getattr(config, "quantization_config", None):
        raise IncompatibleSourceError(
            f"'{source.ref}': its weights are quantized, expected float weights; name the model that it was made from, or "
            "dequantize it and save it first"
        )
    return config


def _raw_config(source: Source) -> str:
    try:
        return (source.folder / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _custom_class(config: PretrainedConfig, autos: Sequence[Any]) -> type[PreTrainedModel] | None:
    """Return the class that a trusted model brings along for one of `autos`, or for its architecture."""
    if not type(config).__module__.startswith("transformers_modules"):
        return None
    named = getattr(config, "auto_map", None) or {}
    for auto, reference in named.items():
        wanted = auto in {found.__name__ for found in autos} if autos else None
        if wanted or (wanted is None and reference.rpartition(".")[2] in (config.architectures or [])):
            found: Any = get_class_from_dynamic_module(reference, config._name_or_path)
            found.register_for_auto_class(auto)  # its code is saved with it
            type(config).register_for_auto_class()
            return cast(type[PreTrainedModel], found)
    return None


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
        found = _custom_class(config, ()) or getattr(transformers, (config.architectures or [""])[0], None)
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
    if custom := _custom_class(config, autos):
        return custom
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
    source: Source,
    *,
    task: str | None,
    dtype: torch.dtype | Literal["auto"],
    seed: int,
    new_head: bool = False,
    needs_head: bool = False,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Load the model that a merge starts from.

    It gets a fresh head, drawn from `seed`, where its files hold none or one of another size, or with `new_head`.

    Raises:
        IncompatibleSourceError: It is an adapter, or its files lack weights below the head, or, with `needs_head`, those
            of the head.
    """
    if source.kind == "adapter":
        raise IncompatibleSourceError(f"'{source.ref}' is an adapter; expected a full model to start from")
    cls = model_class(load_config(source), task, str(source.ref))
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, fresh = _from_pretrained(source, cls, dtype=dtype, **model_kwargs)
        if problems := fresh_problems(model, fresh, needs_head=needs_head):
            raise IncompatibleSourceError(
                f"'{source.ref}' cannot be the start of a merge:\n- " + "\n- ".join(problems)
            )
        if new_head:
            fresh |= dict.fromkeys(_reinitialize_head_(model, source), "")
    if fresh:
        logger.warning("%s: new weights, which must be trained: %s", source.ref, ", ".join(sorted(fresh)))
    model.name_or_path = model.config._name_or_path = source.ref.name
    return model


def fresh_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what `model` would draw anew where its files hold `tensors`, each with the shape that is wrong, if any."""
    found = {}
    for name, expected in movable_tensors(model).items():
        if name in tensors and (got := tensors[name].shape) != expected.shape:
            found[name] = _shapes(got, expected.shape)
        elif name not in tensors and not _is_computed(model, name):
            found[name] = ""
    return found


def _shapes(got: Sequence[int], expected: Sequence[int]) -> str:
    return f" (got shape {tuple(got)}, expected {tuple(expected)})"


def _is_computed(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a tensor is never saved, because every model computes the same one."""
    patterns = [*(model._keys_to_ignore_on_save or ()), *(model._keys_to_ignore_on_load_missing or ())]
    return any(re.search(pattern, name) for pattern in patterns)


def fresh_problems(model: PreTrainedModel, fresh: Mapping[str, str], *, needs_head: bool) -> list[str]:
    """Say which `fresh` tensors, as `fresh_tensors` returns them, a merge must not start with.

    They are random: those of a head are trained on the data, so they are a problem with `needs_head` only.
    """
    trained = {name for name in fresh if name in head_tensors(model) or TRAINED_LATER.search(name)}

    def listed(names: Collection[str]) -> str:
        return f"{len(names)} of its tensors: {shortened([name + fresh[name] for name in sorted(names)])}"

    problems = []
    if body := fresh.keys() - trained:
        advice = "download it again, or compare its config.json with its files"
        problems.append(f"its files hold no weights, or of another shape, for {listed(body)}; {advice}")
    if needs_head and trained:
        advice = "give data to train them with, or start from a model that holds them"
        problems.append(
            f"its files hold no head that fits, and without data none is trained: {listed(trained)}; {advice}"
        )
    return problems


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
            raise IncompatibleSourceError(f"'{source.ref}': {path.name} cannot be read: {error}") from error
        _check_finite(source, values)
        yield values
        values.clear()  # a file's room is free when it is removed and nothing maps it any more


def _compared(source: Source, read: Read, target: PreTrainedModel, processing_class: Any) -> Comparison:
    found = compare(source, read, target, processing_class)
    if found.problems:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged:\n- " + "\n- ".join(found.problems))
    return found


def compare(source: Source, read: Read, target: PreTrainedModel, processing_class: Any) -> Comparison:
    """Match heads and vocabularies, and list what keeps a source from being merged; its tensors may be on the meta device."""
    targets = movable_tensors(target)
    brings_head = source.kind == "full" or bool(read.candidates & head_tensors(target))
    head = match_head(target, read.tensors, read.labels, brings=brings_head)
    tokens = match_vocabularies(source, read.tensors, target, processing_class)
    tensors = {name: tensor.detach() for name, tensor in read.tensors.items() if name not in head.left_out}
    matches = {name: match for name, match in (head.rows | tokens.rows).items() if name in tensors}
    lacking = [name for name in targets if name not in tensors and name not in head.left_out]
    problems = [*read.problems, *tensor_problems(targets, tensors, {*lacking, *head.left_out, *matches})]
    problems += head.problems + tokens.problems
    lacking = [name for name in lacking if not _is_computed(target, name)]
    if lacking and source.kind == "full":
        problems.append(f"{len(lacking)} tensors are not in its files, starting with {min(lacking)}")
    return Comparison(tensors, matches, [*head.notes, *tokens.notes], problems)


def match_vocabularies(
    source: Source, tensors: Mapping[str, Tensor], target: PreTrainedModel, processing_class: Any
) -> RowMatches:
    """Match the tokens of `source`, which holds `tensors`, with the target's; by number where its tokenizer is not known.

    An adapter has the vocabulary of its base model.
    """
    expected = vocabulary(processing_class)
    if source.kind == "adapter" or not token_tensors(target):
        return RowMatches()
    if expected is None:
        return RowMatches(
            notes=["vocabulary: tokens matched by their numbers, for the target's tokenizer is not known"]
        )
    return match_tokens(target, expected, tensors, vocabulary(load_processing_class(source)))


def _check_finite(source: Source, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise NonFiniteError(f"'{source.ref}': {name} holds NaN or infinite weights; expected finite ones")


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; a finite sum says so in one pass without a mask."""
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(tensor).all())


def _read_full(
    source: Source, target: PreTrainedModel, directory: Path, headers: Mapping[str, Tensor] | None = None
) -> Read:
    config = load_config(source)
    architecture = architecture_problems(config, target)
    if config.model_type != target.config.model_type:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged:\n- " + "\n- ".join(architecture))
    source.float_dtypes()
    try:
        raw = file_tensors(source) if headers is None else headers
        tensors, problems = runtime_tensors(raw, target, directory)
    except UNREADABLE as error:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be read: {error}") from error
    return Read(tensors, set(tensors), label_names(config), problems + architecture)


def architecture_problems(config: PretrainedConfig, target: PreTrainedModel) -> list[str]:
    """List what a source's config alone says against merging it into `target`."""
    problems = []
    if config.model_type != target.config.model_type:
        return [f"another architecture: got {config.model_type}, expected {target.config.model_type}"]
    for key in WITHOUT_SHAPE:
        got, expected = getattr(config, key, None), getattr(target.config, key, None)
        if got != expected:
            problems.append(f"another {key}: got {got}, expected {expected}")
    return problems


def _from_pretrained(
    source: Source, cls: type[PreTrainedModel], **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Load the files of `source` as a `cls`; also return what was drawn anew, as `fresh_tensors` does."""
    try:
        loaded: Any = cls.from_pretrained(
            source.folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except UNREADABLE as error:
        raise IncompatibleSourceError(f"'{source.ref}' cannot be loaded as a {cls.__name__}: {error}") from error
    model, info = loaded
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    fresh = dict.fromkeys(info["missing_keys"], "")
    fresh |= {name: _shapes(got, expected) for name, got, expected in info["mismatched_keys"]}
    return model, {name: shapes for name, shapes in fresh.items() if name not in tied}


def _checkpoint_dtype(source: Source) -> torch.dtype:
    """Return the dtype to load `source` in without a copy: the checkpoint's own, float32 where it holds several."""
    floating = source.float_dtypes()
    return FLOATING[floating.pop()] if len(floating) == 1 else torch.float32


def _read_adapter(
    source: Source,
    target: PreTrainedModel,
    base: Source | None,
    directory: Path,
    accepted_bases: Collection[str],
    token: str | None,
) -> Read:
    config = load_adapter_config(source)
    if problems := adapter_problems(config, source, base, accepted_bases, token=token):
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged:\n- " + "\n- ".join(problems))
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
        model, fresh = _from_pretrained(base, type(target), dtype=_checkpoint_dtype(base), **kwargs)
        applied = apply_adapter_(model, source, directory)
    except IncompatibleSourceError:
        raise
    except NotImplementedError as error:
        raise IncompatibleSourceError(
            f"'{source.ref}': an adapter of type {config.peft_type} cannot be merged into weights; expected LoRA or alike"
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
    ties = target.get_expanded_tied_weights_keys(all_submodels=True)
    touched = {name for name in own if inside(name, applied.touched)}
    return Read(own, touched | {name for alias, name in ties.items() if inside(alias, applied.touched)}, labels)


def adapter_labels(adapter: Source, base: Source) -> list[str]:
    """Return the label names of an adapter: those of a config.json beside it, else those of its base model."""
    return label_names(load_config(adapter if (adapter.folder / "config.json").is_file() else base))


def saves_head(config: PeftConfig, target: PreTrainedModel) -> bool:
    """Whether an adapter brings a head along whole, in a model like `target`."""
    heads = {name.partition(".")[0] for name in head_tensors(target)}
    return bool(heads & set(getattr(config, "modules_to_save", None) or ()))


def load_processing_class(source: Source) -> Any:
    """Return the tokenizer or processor in the folder of `source`, `None` where there is none."""
    # Without these, transformers makes up a tokenizer that knows no word.
    if not any(path for pattern in PROCESSING_FILES for path in source.folder.glob(pattern)):
        return None
    problem: Exception | None = None
    for auto in (AutoProcessor, AutoTokenizer):  # a processor of sounds needs more files than its tokenizer
        try:
            with quiet_transformers():
                return auto.from_pretrained(source.folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError, ImportError) as error:
            problem = error
    if problem:
        said = first_line(problem)
        logger.warning("%s: its tokenizer or processor cannot be loaded, and is left out: %s", source.ref, said)
    return None
