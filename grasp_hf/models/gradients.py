"""Gradients of a model, handed over one by one, so that the model never holds all of them."""

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
from ..tensors.units import movable_tensors
from .batches import Batch, batch_loss, labelled_terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mean_gradient(
    target: PreTrainedModel, batches: Iterable[Batch], buffers: Mapping[str, Tensor]
) -> tuple[set[str], float]:
    """Overwrite `buffers` with the gradient of the mean loss over all samples (or labelled tokens) of `batches`.

    The model stays in its present mode. `buffers` holds one tensor per parameter, by name.

    Returns:
        The names of the parameters that have a gradient, and the mean loss.
    """
    found: set[str] = set()
    total, loss = 0.0, 0.0
    for batch in batches:
        weight = labelled_terms(target, batch)
        fraction = weight / (total + weight)
        missing = set(found)

        def add(name: str, gradient: Tensor, fraction: float = fraction, missing: set[str] = missing) -> None:
            mean = buffers[name]
            if name in found:
                mean.lerp_(gradient.to(mean.device, mean.dtype), fraction)
            else:
                mean.copy_(gradient * fraction)
                found.add(name)
            missing.discard(name)

        batch_loss = gradient_pass(target, batch, add)
        for name in missing:  # a parameter without a gradient on this batch counts as zero
            buffers[name].mul_(1 - fraction)
        total += weight
        loss += fraction * (batch_loss - loss)
    return found, loss


Visit = Callable[[str, Tensor], None]


@contextmanager
def preserved_state(model: torch.nn.Module) -> Iterator[None]:
    """Restore after the block the mode of every module and the `requires_grad` of every parameter.

    The gradients are cleared. A model that was on one device returns to it.
    """
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
    """Restore after the block the random states of Python, NumPy and torch."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def visit_gradients(model: torch.nn.Module, visit: Visit) -> Iterator[None]:
    """Inside the block, hand each gradient to `visit(name, gradient)` as soon as it is complete, and free it.

    Every floating-point parameter that a merge may change takes part, even a frozen one. The model holds only the
    gradients that backward is computing. When the block ends or raises, the model has no gradients and no hooks.
    """
    handles = []
    movable = {name: t for name, t in movable_tensors(model).items() if isinstance(t, torch.nn.Parameter)}
    frozen = [p for p in movable.values() if p.is_floating_point() and not p.requires_grad]

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None  # backward has just accumulated it
            visit(name, gradient)

        return hook

    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for name, parameter in movable.items():
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

    We do not use Accelerate's `backward`, because it scales the loss by settings of the training (gradient
    accumulation, mixed precision).
    """
    with visit_gradients(model, visit), checkpointed(model), torch.enable_grad():
        loss, _ = batch_loss(model, batch)
        loss.backward()
    return float(loss.detach())


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, keep only the inputs of the layers that have activation checkpointing switched on.

    transformers itself does this in train mode only; the block does it in any mode. The checkpoints are never
    reentrant: a reentrant one would hand over partial gradients of a layer that is used more than once.
    """
    checkpointing_layer = transformers.GradientCheckpointingLayer
    layers = [m for m in model.modules() if isinstance(m, checkpointing_layer) and m.gradient_checkpointing]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    caching = [config for config in configs if layers and getattr(config, "use_cache", False)]
    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, type(layer).forward.__get__(layer), use_reentrant=False)
    for config in caching:
        config.use_cache = False  # backward runs a layer again, and it would write its keys twice
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
        for config in caching:
            config.use_cache = True


@contextmanager
def checkpointing(model: PreTrainedModel, asked: bool) -> Iterator[None]:
    """Switch on activation checkpointing inside the block, if `asked` is true and it is off.

    Raises:
        ConfigError: The model does not support activation checkpointing.
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
