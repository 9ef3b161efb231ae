"""One small batch of inputs for a model, and its outputs in float32 with the memory of one layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batches import Batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SAMPLES, LENGTH = 2, 16  # size of the batch; tokens of a sample
FRAMES = 4000  # of a sound


def probe_batch(model: PreTrainedModel, seed: int) -> Batch:
    """Return random inputs for a model, by its main input; a model that needs others raises an error on them.

    The tokens are ordinary ones: special ones stand for padding, or for a picture.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    name = model.main_input_name
    if name == "pixel_values":
        vision: Any = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        batch = {name: torch.randn((SAMPLES, channels, height, width), generator=generator)}
    elif name == "input_features":
        length = 2 * getattr(config, "max_source_positions", FRAMES // 2)
        batch = {name: torch.randn((SAMPLES, getattr(config, "num_mel_bins", 80), length), generator=generator)}
    elif name == "input_values":
        batch = {name: torch.randn((SAMPLES, FRAMES), generator=generator)}
    else:
        tokens = _random_tokens(config, generator)
        batch = {name: tokens, "attention_mask": torch.ones_like(tokens)}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = _random_tokens(config, generator)
    return batch


def _random_tokens(config: PretrainedConfig, generator: torch.Generator) -> Tensor:
    text: Any = config.get_text_config()
    values = [value for part in (config, text) for key, value in part.to_dict().items() if "token_id" in key]
    special = {token for value in values for token in (value if isinstance(value, list) else [value])}
    allowed = [token for token in range(min(text.vocab_size, 10**6)) if token not in special] or [0]
    positions = getattr(text, "max_position_embeddings", None) or LENGTH
    shape = (SAMPLES, max(1, min(LENGTH, positions - 4)))
    tokens = torch.tensor(allowed)[torch.randint(len(allowed), shape, generator=generator)]
    if isinstance(text.eos_token_id, int) and 0 <= text.eos_token_id < text.vocab_size:
        tokens[:, -1] = text.eos_token_id  # some classifiers read the last token
    return tokens


@torch.no_grad()
def probe(model: nn.Module, batch: Batch, path: str = "") -> Tensor:
    """Return the first output of the module `path` of a model in eval mode; by default that of the model."""
    found: list[Tensor] = []
    module = model.get_submodule(path)
    hook = module.register_forward_hook(lambda _, inputs, output: found.append(first_tensor(output)))
    try:
        with in_float32(model):
            model.eval()(**batch)
    finally:
        hook.remove()
    return found[-1]


def first_tensor(output: Any) -> Tensor:
    """Return the logits of an output of a module, or its first tensor of floating-point numbers; empty if it has none."""
    if isinstance(output, Tensor):
        return output.detach().float() if output.is_floating_point() else torch.empty(0)
    if getattr(output, "logits", None) is not None:
        return first_tensor(output.logits)
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return next((found for part in parts if (found := first_tensor(part)).numel()), torch.empty(0))


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model of any dtype compute in float32, with the memory of one block and of the layers outside of blocks.

    A block is converted when it is called, and restored after that. The other layers stay converted, because some models
    look up the dtype of an embedding or of an output layer before they call it.
    """
    outside: list[tuple[Tensor, Tensor]] = []
    hooks: list[Any] = []
    for module, recurse, in_list in _layers(model):
        tensors = [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]
        if in_list:
            hooks += _convert_when_called(module, tensors)
        else:
            _widen_(tensors, outside)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _restore_(outside)


def _layers(module: nn.Module, *, in_list: bool = False) -> Iterator[tuple[nn.Module, bool, bool]]:
    """Yield each layer; whether it counts with the modules inside it; and whether it is in a list, as blocks are."""
    if any(isinstance(part, nn.ModuleList) for part in module.modules()):
        yield module, False, in_list
        for child in module.children():
            yield from _layers(child, in_list=in_list or isinstance(module, nn.ModuleList))
    else:
        yield module, True, in_list


def _convert_when_called(module: nn.Module, tensors: Sequence[Tensor]) -> list[Any]:
    kept: list[tuple[Tensor, Tensor]] = []
    before = module.register_forward_pre_hook(lambda *_: _widen_(tensors, kept))
    return [before, module.register_forward_hook(lambda *_: _restore_(kept), always_call=True)]


def _widen_(tensors: Iterable[Tensor], kept: list[tuple[Tensor, Tensor]]) -> None:
    """Change tensors of half precision to float32, and add each with its old values to `kept`."""
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
            kept.append((tensor, tensor.data))
            tensor.data = tensor.data.float()


def _restore_(kept: list[tuple[Tensor, Tensor]]) -> None:
    """Undo `_widen_`, and empty `kept`."""
    while kept:
        tensor, data = kept.pop()
        tensor.data = data
