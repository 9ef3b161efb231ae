"""The model class and the task of a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers.utils import logging as transformers_logging

from ..errors import IncompatibleSourceError, first_few
from ..hub.reference import Source, reading
from ..internals import class_names, class_of, has_own_code, own_class, task_classes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars and load reports of transformers; this package checks loaded weights itself."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
            warnings.filterwarnings("ignore", module=r"peft\.")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(source: Source, labels: Sequence[str] | None = None, *, quantized: bool = False) -> PretrainedConfig:
    """Return the model configuration of a full source, or of an adapter that has one.

    Args:
        source: The source.
        labels: Names of its classes by class id, instead of those in its config.json.
        quantized: Whether its weights may be quantized: those of a base of adapters, which stays as it is.

    Raises:
        IncompatibleSourceError: The source is an adapter, its config.json cannot be read, transformers does not have
            its architecture, its weights are quantized, or `labels` are too few or too many.
    """
    if source.kind == "adapter" and not (source.folder / "config.json").is_file():
        raise IncompatibleSourceError(f"'{source.ref}' is an adapter; expected a full model")
    try:
        with reading(source.ref, "its config.json cannot be used"):
            config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted)
    except IncompatibleSourceError as error:
        if not source.trusted and "auto_map" in _raw_config(source):
            raise IncompatibleSourceError(
                f"'{source.ref}' needs Python code of its own; read the code, and allow it to run with "
                f"trust_remote_code: ['{source.ref}']"
            ) from error
        raise
    if not quantized and getattr(config, "quantization_config", None):
        raise IncompatibleSourceError(
            "its weights are quantized, expected float weights; name the float model that it was made from, or "
            "dequantize it and save it first",
            subject=source.ref,
        )
    if labels is not None:
        if len(labels) != config.num_labels and not is_headless(config):
            raise wrong_number_of_labels(source, labels, config.num_labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
    return config


def wrong_number_of_labels(source: Source, labels: Sequence[str], classes: int) -> IncompatibleSourceError:
    """Return the error for `labels` that are too few or too many for a head with `classes` classes."""
    return IncompatibleSourceError(
        f"labels: got {len(labels)} names ({first_few(labels)}), expected {classes}, one for each class of its head",
        subject=source.ref,
    )


def _raw_config(source: Source) -> str:
    try:
        return (source.folder / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _custom_class(config: PretrainedConfig, autos: Sequence[Any]) -> type[PreTrainedModel] | None:
    """Return the class that a trusted model defines for one of `autos`; without `autos`, for its architecture."""
    if not has_own_code(config):
        return None
    named = getattr(config, "auto_map", None) or {}
    for auto, reference in named.items():
        if autos:
            wanted = auto in {candidate.__name__ for candidate in autos}
        else:
            wanted = reference.rpartition(".")[2] in (config.architectures or [])
        if wanted:
            found: Any = own_class(reference, config)
            found.register_for_auto_class(auto)  # save_pretrained then saves the code too
            type(config).register_for_auto_class()
            return cast("type[PreTrainedModel]", found)
    return None


def model_class(config: PretrainedConfig, task: str | None = None, name: str = "model") -> type[PreTrainedModel]:
    """Return the model class for `task`; without a task, the class that the config names.

    Args:
        config: The model's configuration.
        task: A pipeline name (`text-classification`) or an auto class (`AutoModelForQuestionAnswering`).
        name: The model's name in errors.

    Raises:
        IncompatibleSourceError: The task is unknown, the architecture has no model for it, or neither the config nor
            `task` names a task.
    """
    if task is None:
        found = _custom_class(config, ()) or getattr(transformers, (config.architectures or [""])[0], None)
        if found is None or is_headless(config):
            raise IncompatibleSourceError(
                f"'{name}' names the architecture {config.architectures}, which has no task on top; name the task, "
                "for example task='text-classification'"
            )
        return found
    if task.startswith("AutoModelFor") and hasattr(transformers, task):
        autos = [getattr(transformers, task)]
    else:
        tasks = task_classes()
        if task not in tasks:
            raise IncompatibleSourceError(
                f"unknown task '{task}', expected the name of an AutoModelFor class, or one of "
                f"{', '.join(sorted(tasks))}"
            )
        autos = [*tasks[task]]
    if custom := _custom_class(config, autos):
        return custom
    for auto in autos:
        if found := class_of(auto, config):
            return found
    raise IncompatibleSourceError(f"'{name}' is a {config.model_type}, which has no model for the task '{task}'")


def is_headless(config: PretrainedConfig) -> bool:
    """Whether a config names an architecture without a task on top, such as `BertModel`."""
    return (config.architectures or [""])[0] in class_names(transformers.AutoModel)


def task_of(cls: type[PreTrainedModel]) -> str | None:
    """Return the pipeline name of the task that a model class solves; `None` if no pipeline uses the class."""
    for task, autos in task_classes().items():
        for auto in autos:
            if cls.__name__ in class_names(auto) and auto is not transformers.AutoModel:
                return task
    return None
