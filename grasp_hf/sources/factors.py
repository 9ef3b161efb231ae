"""LoRA adapters as low-rank blocks of a mixture: no weight of the base is read or changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from torch import Tensor

from ..errors import IncompatibleSourceError, NonFiniteError, first_few
from ..hub.reference import Source
from ..internals import adapter_weights_in_runtime_names, lora_factors, lora_variant
from ..models.classes import quiet_transformers
from ..models.mixture import PLAIN_STARTS, Factors, Mixture, layer_shape, lora_layers
from .adapter_options import for_inference
from .adapters import PREFIX, fit_adapter, in_runtime_names, load_adapter_config
from .fit import SourceFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fields of `peft.LoraConfig` that make an adapter more than a low-rank change of layers.
NOT_LOW_RANK = {
    "use_dora": "DoRA rescales whole weights by their norms",
    "lora_bias": "biases are no low-rank change",
    "bias": "biases are no low-rank change",
    "target_parameters": "single parameters, such as fused experts, are no layers",
    "trainable_token_indices": "single tokens are no low-rank change",
    "layer_replication": "the layers are those of the base",
}
ADVICE = "merge it with output='model'"
FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def add_adapter_(
    mixture: Mixture, source: Source, base_config: PretrainedConfig, labels: list[str] | None
) -> SourceFiles:
    """Change `mixture` by adding an adapter as a block with the coefficient 0, and return it as a source.

    Earlier blocks without a coefficient are removed first. PEFT decides which layers the adapter changes, and by which
    factor: it adapts a model on the meta device.

    Args:
        mixture: The mixture of the target.
        source: The adapter. Its base is that of the target.
        base_config: The configuration of the base, with the classes of the adapter.
        labels: Label names of the adapter by class id; `None` if its classes have no names.

    Raises:
        IncompatibleSourceError: The adapter is no plain LoRA adapter, or replaces whole modules below the head.
        NonFiniteError: A weight is NaN or infinite.
    """
    with quiet_transformers(), torch.device("meta"):
        model = type(mixture.model)(base_config)
    stored = load_adapter_config(source)
    if problems := block_problems(stored, mixture.whole):
        raise IncompatibleSourceError(f"'{source.ref}' cannot be merged", problems=problems)
    config, stored_weights = in_runtime_names(model, for_inference(stored), source)
    config.init_lora_weights = False  # the values are those of the file
    adapted, every = fit_adapter(model, config, stored_weights, source)
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    every = adapter_weights_in_runtime_names(adapted, every)
    weights = {key: every[key] for key in sorted(own)}
    _check_base_weights(mixture, {key: every[key] for key in every.keys() - own.keys()}, source)
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"{key} holds NaN or infinite weights; expected finite ones", subject=source.ref)
    blocks = dict(_take_blocks(adapted, weights, source))
    whole = {key.removeprefix(PREFIX): value for key, value in weights.items()}
    if below := [name for name in sorted(whole) if not mixture.is_whole(name)]:
        raise IncompatibleSourceError(
            f"'{source.ref}' changes weights below the head as a whole ({first_few(below)}); expected only low-rank "
            f"changes with output='adapter'; {ADVICE}"
        )
    for name in [name for name in blocks if mixture.is_whole(f"{name}.weight")]:
        whole |= _change_whole(mixture, name, blocks.pop(name), source)
    slot = mixture.add(blocks, remove_unused=True)
    candidates = {*(f"{name}.weight" for name in blocks), *whole}
    own = {name: value for name, value in mixture.base.items() if name not in mixture.fresh} if whole else {}
    return SourceFiles({**mixture.vectors(slot), **own, **whole}, candidates, labels)


def _check_base_weights(mixture: Mixture, stored: Mapping[str, Tensor], source: Source) -> None:
    """Raise an error if weights of the base in an adapter's file, such as those of embeddings, are not the base's."""
    tensors = dict(mixture.model.named_parameters(remove_duplicate=False))
    for key, value in stored.items():
        name = key.removeprefix(PREFIX).replace(".base_layer", "")
        base = mixture.base.get(name, tensors.get(name))
        if base is None or base.shape != value.shape or not torch.equal(base.cpu(), value.to(base.dtype)):
            raise IncompatibleSourceError(
                f"'{source.ref}' holds {name}, a weight of its base, with other values than the base; output='adapter' "
                f"keeps the base as it is; {ADVICE}"
            )


def block_problems(config: PeftConfig, whole: Collection[str]) -> list[str]:
    """List the problems in an adapter's configuration that keep it from being a block of a mixture.

    Args:
        config: The configuration.
        whole: Names of the modules of the target that move whole, such as its head.
    """
    kind = PeftType(config.peft_type)
    if kind != PeftType.LORA:
        return [f"it is an adapter of type {kind.value}, expected LoRA with output='adapter'; {ADVICE}"]
    problems = []
    values: dict[str, Any] = vars(config)
    if values["init_lora_weights"] not in PLAIN_STARTS:
        problems.append(
            f"its init_lora_weights '{values['init_lora_weights']}' also changes the weights of the base, which stay as they "
            f"are with output='adapter'; {ADVICE}, or convert it (path_initial_model_for_weight_conversion of PEFT)"
        )
    for field, meaning in NOT_LOW_RANK.items():
        if values.get(field) not in (None, False, [], {}, "none"):
            problems.append(
                f"{field}: got {values[field]!r}, expected none with output='adapter', because {meaning}; {ADVICE}"
            )
    ends = tuple(whole)
    saved = [name for name in values["modules_to_save"] or () if not any(_is_end(name, end) for end in ends)]
    if saved:
        problems.append(
            f"it replaces whole modules ({first_few(saved)}), expected low-rank changes and the head of a classifier with "
            f"output='adapter'; {ADVICE}"
        )
    return problems


def _is_end(name: str, module: str) -> bool:
    """Whether `name` names `module`, a module around it, or one inside it by the first part of its name."""
    return module == name or module.endswith(f".{name}") or name.startswith(f"{module}.")


def _take_blocks(adapted: PeftModel, weights: dict[str, Tensor], source: Source) -> Iterator[tuple[str, Factors]]:
    """Yield the difference of each layer, and remove its factors from `weights`."""
    for name, layer in lora_layers(adapted):
        problem, base = lora_variant(layer), layer.get_base_layer()
        if problem:
            raise IncompatibleSourceError(
                f"'{source.ref}' changes {name} by {problem}, which is not a low-rank change of its weights; "
                f"output='adapter' mixes plain LoRA only; {ADVICE}"
            )
        if layer_shape(base) is None:
            raise IncompatibleSourceError(
                f"'{source.ref}' adapts {name}, a {type(base).__name__}; output='adapter' mixes adapters of linear "
                f"layers and embeddings only; {ADVICE}"
            )
        keys = next(keys for keys in FACTORS if f"{PREFIX}{name}.{keys[0]}" in weights)
        a, b = (weights.pop(f"{PREFIX}{name}.{key}").float() for key in keys)
        yield name, Factors(a, b * lora_factors(layer)[2])


def _change_whole(mixture: Mixture, name: str, block: Factors, source: Source) -> Mapping[str, Tensor]:
    """Return the weights of a layer in the head, after a low-rank change."""
    key = f"{name}.weight"
    layer, difference = mixture.model.get_submodule(name), block.b @ block.a
    if not isinstance(layer, torch.nn.Linear):
        difference = difference.T
    base = mixture.base[key]
    if key in mixture.fresh or base.shape != difference.shape:
        raise IncompatibleSourceError(
            f"'{source.ref}' makes a low-rank change of {key}, but the target has a new {key}; expected an adapter that "
            "holds its head as a whole (modules_to_save)"
        )
    return {key: base.float() + difference}
