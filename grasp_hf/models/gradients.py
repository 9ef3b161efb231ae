"""Gradients of a model that leave as they arrive, so that no set of them is held."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from .batches import Batch, batch_loss, labelled_terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mean_gradient(
    target: PreTrainedModel, batches: Iterable[Batch], room: Mapping[str, Tensor]
) -> tuple[set[str], float]:
    """Write the gradient of the mean loss over all samples (or tokens) of `batches` to `room`, in the present mode.

    Returns:
        The names of the parameters that have a gradient, and the mean loss.
    """
    found: set[str] = set()
    total, loss = 0.0, 0.0
    for batch in batches:
        weight = labelled_terms(target, batch)
        share = weight / (total + weight)

        without = set(found)

        def gather(name: str, gradient: Tensor, share: float = share, without: set[str] = without) -> None:
            kept = room[name]
            if name in found:
                kept.lerp_(gradient.to(kept.device, kept.dtype), share)
            else:
                kept.copy_(gradient * share)
                found.add(name)
            without.discard(name)

        batch_loss = gradient_pass(target, batch, gather)
        for name in without:
            room[name].mul_(1 - share)
        total += weight
        loss += share * (batch_loss - loss)
    return found, loss


Visit = Callable[[str, Tensor], None]


@contextmanager
def preserved_state(model: torch.nn.Module) -> Iterator[None]:
    """Give every module its mode and every parameter its `requires_grad` and device back, and clear the gradients."""
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = {parameter.device for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        if len(devices) == 1:
            model.to(devices.pop())


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Give Python, NumPy and torch their random states back at the end."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def gradients_leaving(model: torch.nn.Module, visit: Visit) -> Iterator[None]:
    """Inside the block, hand each gradient to `visit(name, gradient)` as soon as it is complete, and free it.

    Every floating-point parameter takes part, also a frozen one. The model never holds more gradients than those that
    backward is working on, and none are left, nor any hook, when the block ends or raises.
    """
    handles = []
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None  # backward has just accumulated it
            visit(name, gradient)

        return hook

    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if parameter.is_floating_point():
                handles.append(parameter.register_post_accumulate_grad_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(False)


def gradient_pass(model: PreTrainedModel, batch: Batch, visit: Visit) -> float:
    """Run one forward and backward pass in the model's present mode, hand each gradient to `visit`, return the loss.

    Accelerate has chosen the device and made the batches, but its own backward would scale the loss by settings that
    belong to training (gradient accumulation, mixed precision).
    """
    with gradients_leaving(model, visit), checkpointed(model), torch.enable_grad():
        loss, _ = batch_loss(model, batch)
        loss.backward()
    return float(loss.detach())


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, keep only the inputs of those layers that activation checkpointing is switched on for.

    transformers itself does so in train mode only. Never reentrant: a reentrant checkpoint would hand out partial
    gradients of a layer that is used more than once.
    """
    checkpointing_layer = transformers.GradientCheckpointingLayer
    layers = [m for m in model.modules() if isinstance(m, checkpointing_layer) and m.gradient_checkpointing]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    caching = [config for config in configs if layers and getattr(config, "use_cache", False)]
    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, type(layer).forward.__get__(layer), use_reentrant=False)
    for config in caching:
        config.use_cache = False  # a layer that is run twice would write its keys twice
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
        for config in caching:
            config.use_cache = True


@contextmanager
def checkpointing(model: PreTrainedModel, asked: bool) -> Iterator[None]:
    """Switch activation checkpointing on inside the block where it was `asked` for and is off.

    Raises:
        ConfigError: The model does not support it.
    """
    if not asked or any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    names = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers < 5.20
    try:
        getattr(model, f"{names}_checkpointing_enable")({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"training_arguments: gradient_checkpointing: {error}") from error
    try:
        yield
    finally:
        getattr(model, f"{names}_checkpointing_disable")()
