"""The model that a merge starts from."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor
from torch.nn import Parameter

from ..errors import ConfigError, IncompatibleSourceError, NonFiniteError, first_few
from ..hub.reference import Source, reading, reads
from ..internals import computed_patterns, initialize_
from ..tensors.units import head_tensors, largest_weight, movable_tensors, tied_names
from .classes import load_config, model_class, quiet_transformers
from .mixture import Mixture
from .probe import probe, probe_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Tensors below the head that many checkpoints lack, because they were trained for a task that does not use them.
TRAINED_LATER = re.compile(r"(^|\.)(pooler\..+|mask_token|masked_spec_embed|num_batches_tracked)$")
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@reads("a merge cannot start from it")
def load_target(
    source: Source,
    *,
    task: str | None,
    dtype: torch.dtype | Literal["auto"],
    seed: int,
    new_head: bool = False,
    needs_head: bool = False,
    adapts: bool = False,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """Load the model that a merge starts from.

    The model gets a fresh random head if its files hold no head, or a head of another size, or with `new_head`.

    Args:
        source: The model's files.
        task: A task as `model_class` takes it; `None` for the class that the config names.
        dtype: The dtype of the weights; `"auto"` is that of the files.
        seed: Seeds the weights that the files do not hold.
        new_head: Whether to replace the head in the files with a fresh one.
        needs_head: Whether a fresh head is an error, because no data will train it.
        adapts: Whether to freeze the model and attach a mixture of adapters to it.
        **model_kwargs: Further arguments of `from_pretrained`.

    Raises:
        IncompatibleSourceError: The source is an adapter, or its files lack weights below the head; with `needs_head`
            also if they lack weights of the head.
    """
    if source.kind == "adapter":
        raise IncompatibleSourceError(f"'{source.ref}' is an adapter; expected a full model to start from")
    cls = model_class(load_config(source, quantized=adapts), task, str(source.ref))
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, fresh = load_pretrained(source, cls, dtype=dtype, **model_kwargs)
        if problems := fresh_problems(model, fresh, needs_head=needs_head):
            raise IncompatibleSourceError(f"a merge cannot start from '{source.ref}'", problems=problems)
        for name, tensor in movable_tensors(model).items():
            if not math.isfinite(largest_weight(tensor)):
                raise NonFiniteError(f"{name} holds NaN or infinite weights; expected finite ones", subject=source.ref)
        if new_head:
            fresh |= dict.fromkeys(_reinitialize_head_(model, source), "")
    if fresh:
        logger.warning("%s: these weights are new and must be trained: %s", source.ref, ", ".join(sorted(fresh)))
    model.name_or_path = model.config.name_or_path = source.ref.name
    if not source.trusted:  # the code of a stranger does not come along, so nothing may name it
        vars(model.config).pop("auto_map", None)
    if adapts:
        Mixture(model, fresh)
    return model


def untie_(model: PreTrainedModel) -> None:
    """Change `model` so that each tied weight has a parameter of its own, and its configs say so.

    Raises:
        ConfigError: The architecture computes something else when its weights are not tied.
    """
    ties = tied_names(model)
    before = _output(model) if ties and model.device.type != "meta" else None
    for alias, name in ties.items():
        module_name, _, key = alias.rpartition(".")
        tensor = model.get_parameter(name)
        setattr(model.get_submodule(module_name), key, Parameter(tensor.detach().clone(), tensor.requires_grad))
    for module in model.modules():
        if ties and isinstance(module, transformers.PreTrainedModel):
            module.all_tied_weights_keys = {}
            module.config.tie_word_embeddings = False
    if before is not None and not torch.equal(before, _output(model)):
        raise ConfigError(
            f"untie: a {type(model).__name__} computes something else when its weights are not tied; leave untie out"
        )


def _output(model: PreTrainedModel) -> Tensor:
    """Return the output of a model on one random batch; an empty tensor if the batch does not fit the model."""
    training = model.training
    try:
        return probe(model, {name: tensor.to(model.device) for name, tensor in probe_batch(model, 0).items()})
    except Exception:  # a model shows by any error that it needs other inputs, or has no weights
        return torch.empty(0)
    finally:
        model.train(training)


def fresh_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors that `from_pretrained` would draw at random if the files of `model` hold `tensors`.

    The values describe a wrong shape; they are empty for a tensor that is missing.
    """
    found = {}
    for name, expected in movable_tensors(model).items():
        if name in tensors and (got := tensors[name].shape) != expected.shape:
            found[name] = _describe_shapes(got, expected.shape)
        elif name not in tensors and not is_computed(model, name):
            found[name] = ""
    return found


def _describe_shapes(got: Sequence[int], expected: Sequence[int]) -> str:
    return f" (got shape {tuple(got)}, expected {tuple(expected)})"


def is_computed(model: PreTrainedModel, name: str) -> bool:
    """Whether the model computes a tensor, so that no checkpoint needs to hold it."""
    return any(re.search(pattern, name) for pattern in computed_patterns(model))


def fresh_problems(model: PreTrainedModel, fresh: Mapping[str, str], *, needs_head: bool) -> list[str]:
    """List the problems of a merge that starts with the random tensors `fresh`, as `fresh_tensors` returns them.

    A random head is a problem only with `needs_head`; otherwise it is trained on the data.
    """
    trained = {name for name in fresh if name in head_tensors(model) or TRAINED_LATER.search(name)}

    def list_tensors(names: Collection[str]) -> str:
        return f"{len(names)} of its tensors: {first_few([name + fresh[name] for name in sorted(names)])}"

    problems = []
    if body := fresh.keys() - trained:
        advice = "download it again, or compare its config.json with its files"
        problems.append(f"its files hold no weights, or weights of another shape, for {list_tensors(body)}; {advice}")
    if needs_head and trained:
        advice = "give data to train them, or start from a model that holds them"
        problems.append(
            f"its files hold no head that fits, and no head is trained without data: {list_tensors(trained)}; {advice}"
        )
    return problems


def _reinitialize_head_(model: PreTrainedModel, source: Source) -> set[str]:
    """Change the head of `model` to fresh random weights and return the names of its tensors."""
    names = head_tensors(model)
    if not names:
        raise IncompatibleSourceError(
            f"'{source.ref}' has other label names than the data, and its head cannot be distinguished from the rest "
            f"of a {type(model).__name__}; expected a base model with the data's label names in its config.json"
        )
    for module_name in {name.rpartition(".")[0] for name in names}:
        initialize_(model.get_submodule(module_name), model)
    return names


def load_pretrained(
    source: Source, cls: type[PreTrainedModel], **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Load the files of `source` as a `cls`; also return the tensors that are random, as `fresh_tensors` does."""
    with reading(source.ref, f"it cannot be loaded as a {cls.__name__}"):
        loaded: Any = cls.from_pretrained(
            source.folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    model, info = loaded
    tied = set(tied_names(model))
    fresh = dict.fromkeys(info["missing_keys"], "")
    fresh |= {name: _describe_shapes(got, expected) for name, got, expected in info["mismatched_keys"]}
    return model, {name: shapes for name, shapes in fresh.items() if name not in tied}


def checkpoint_dtype(source: Source) -> torch.dtype:
    """Return the dtype of the files of `source`; float32 if they hold several.

    Weights that keep their dtype are mapped from the files; others are copied into memory.
    """
    floating = source.float_dtypes()
    return FLOATING[floating.pop()] if len(floating) == 1 else torch.float32
