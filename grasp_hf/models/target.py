"""The model that a merge starts from."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import IncompatibleSourceError, first_few
from ..hub.reference import UNREADABLE, Source
from ..internals import computed_patterns, initialize_, tied_names
from ..tensors.units import head_tensors, movable_tensors
from .classes import load_config, model_class, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Tensors below the head that many a checkpoint lacks, because it was trained for a task that has no use for them.
TRAINED_LATER = re.compile(r"(^|\.)(pooler\..+|mask_token|masked_spec_embed|num_batches_tracked)$")
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        model, fresh = load_pretrained(source, cls, dtype=dtype, **model_kwargs)
        if problems := fresh_problems(model, fresh, needs_head=needs_head):
            raise IncompatibleSourceError(f"'{source.ref}' cannot be the start of a merge", problems=problems)
        if new_head:
            fresh |= dict.fromkeys(_reinitialize_head_(model, source), "")
    if fresh:
        logger.warning("%s: new weights, which must be trained: %s", source.ref, ", ".join(sorted(fresh)))
    model.name_or_path = model.config.name_or_path = source.ref.name
    return model


def fresh_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what `model` would draw anew where its files hold `tensors`, each with the shape that is wrong, if any."""
    found = {}
    for name, expected in movable_tensors(model).items():
        if name in tensors and (got := tensors[name].shape) != expected.shape:
            found[name] = _shapes(got, expected.shape)
        elif name not in tensors and not is_computed(model, name):
            found[name] = ""
    return found


def _shapes(got: Sequence[int], expected: Sequence[int]) -> str:
    return f" (got shape {tuple(got)}, expected {tuple(expected)})"


def is_computed(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a tensor is never saved, because every model computes the same one."""
    return any(re.search(pattern, name) for pattern in computed_patterns(model))


def fresh_problems(model: PreTrainedModel, fresh: Mapping[str, str], *, needs_head: bool) -> list[str]:
    """Say which `fresh` tensors, as `fresh_tensors` returns them, a merge must not start with.

    They are random: those of a head are trained on the data, so they are a problem with `needs_head` only.
    """
    trained = {name for name in fresh if name in head_tensors(model) or TRAINED_LATER.search(name)}

    def listed(names: Collection[str]) -> str:
        return f"{len(names)} of its tensors: {first_few([name + fresh[name] for name in sorted(names)])}"

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
        initialize_(model.get_submodule(module_name), model)
    return names


def load_pretrained(
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
    tied = set(tied_names(model))
    fresh = dict.fromkeys(info["missing_keys"], "")
    fresh |= {name: _shapes(got, expected) for name, got, expected in info["mismatched_keys"]}
    return model, {name: shapes for name, shapes in fresh.items() if name not in tied}


def checkpoint_dtype(source: Source) -> torch.dtype:
    """Return the dtype to load `source` in without a copy: the checkpoint's own, float32 where it holds several."""
    floating = source.float_dtypes()
    return FLOATING[floating.pop()] if len(floating) == 1 else torch.float32
