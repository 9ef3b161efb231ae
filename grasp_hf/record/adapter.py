"""A mixture of adapters as the files of one PEFT adapter."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..internals import is_transposed
from ..models.classes import task_of
from ..models.mixture import Factors, Mixture
from ..tensors.units import movable_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TASKS = {
    "text-generation": "CAUSAL_LM",
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}


def save_adapter_config(directory: Path, mixture: Mixture, base: str, revision: str | None) -> None:
    """Write the configuration of the adapter and that of the model, which names the classes.

    Args:
        directory: The folder.
        mixture: The mixture.
        base: Hub id or folder of the base.
        revision: Commit of the base on the Hub.
    """
    adapter_config(mixture, base, revision).save_pretrained(str(directory))
    config = copy.deepcopy(mixture.model.config)
    if hasattr(config, "quantization_config"):  # that of the base in this run; the adapter is not quantized
        del config.quantization_config
    config.architectures = [type(mixture.model).__name__]
    config.save_pretrained(directory)


def save_adapter_weights(directory: Path, mixture: Mixture) -> Path:
    """Write the weights of the adapter, and return the path of the file."""
    save_file(adapter_weights(mixture), directory / WEIGHTS, metadata={"format": "pt"})
    return directory / WEIGHTS


def adapter_weights(mixture: Mixture) -> dict[str, Tensor]:
    """Return the weights of the adapter by their names in its file: factors in float32, and whole modules."""
    found = {}
    for name, factors in _differences(mixture).items():
        rows = mixture.layers[name].rows
        for key, value in zip(("A", "B"), factors, strict=True):
            suffix = f"lora_embedding_{key}" if rows else f"lora_{key}.weight"
            found[f"base_model.model.{name}.{suffix}"] = value
    tensors = movable_tensors(mixture.model)
    found |= {f"base_model.model.{name}": tensors[name].detach() for name in mixture.base}
    return {name: value.cpu().contiguous() for name, value in found.items()}


def adapter_config(mixture: Mixture, base: str, revision: str | None) -> LoraConfig:
    """Return the configuration of the adapter.

    Each layer has its own rank, if ranks differ. The scaling of every layer is 1, because its factors hold it.
    """
    from peft import LoraConfig  # imported late, because peft takes seconds and full models do not need it

    model = mixture.model
    ranks = {name: len(factors.a) for name, factors in _differences(mixture).items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes the first pattern that fits the end of a name, so that the longest names come first.
    others = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True) if ranks[name] != rank}
    names = [name for name, _ in model.named_modules()]
    config: Any = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_targets(ranks, names),
        modules_to_save=mixture.whole or None,
        fan_in_fan_out=any(is_transposed(model.get_submodule(name)) for name in ranks),
        task_type=TASKS.get(task_of(type(model)) or ""),
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    return config


def _differences(mixture: Mixture) -> dict[str, Factors]:
    """Return the difference of each layer to the base; a difference of zero if there is none, because PEFT needs one."""
    found = mixture.factors()
    if not found:
        name, layer = next(iter(mixture.layers.items()))
        found = {name: Factors(torch.zeros(1, layer.a.shape[1]), torch.zeros(layer.b.shape[0], 1))}
    return found


def _targets(layers: Mapping[str, int], modules: Collection[str]) -> list[str] | str:
    """Return the shortest `target_modules` that name exactly these layers: their last parts, their names, or a pattern."""
    for names in ({name.rpartition(".")[2] for name in layers}, {*layers}):
        if {module for module in modules if module in names or module.endswith(tuple(f".{n}" for n in names))} == {
            *layers
        }:
            return sorted(names)
    return "|".join(map(re.escape, sorted(layers)))
