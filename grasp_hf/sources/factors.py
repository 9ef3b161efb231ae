"""LoRA adapters as low-rank blocks of a mixture: no weight of the base is read or changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from ..errors import IncompatibleSourceError, NonFiniteError, first_few
from ..hub.reference import Source
from ..internals import adapter_weights_in_runtime_names, lora_factors, lora_variant
from ..models.classes import quiet_transformers
from ..models.mixture import ADVICE, Factors, Mixture, block_problems, layer_shape, lora_layers
from .adapter_options import for_inference
from .adapters import PREFIX, fit_adapter, in_runtime_names, load_adapter_config
from .fit import SourceFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
