"""Merging with learned coefficients: mixtures of task vectors, and PEARL."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from ..errors import NonFiniteError
from ..models.gradients import gradient_pass, preserved_state
from ..tensors.placing import overwrite_
from ..tensors.products import inner_products
from ..tensors.units import Unit, head_tensors, movable_tensors, partition
from .inputs import (
    MethodInputs,
    open_checked_sources,
    parameter_names,
    stream_checked_sources,
    task_vector,
    wide_dtype,
)

logger = logging.getLogger(__name__)


def mixture_(
    inputs: MethodInputs, *, per_layer: bool = True, steps: int = 500, lr: float = 1e-3, initial: float = 0.3
) -> None:
    """Change the model to `base + sum_k c_k (S_k - base)` with coefficients in [0, 1] learned on the labels.

    This is AdaMerging (arXiv:2310.02575) with the loss on the labels in place of its entropy. The defaults are its
    settings: Adam at 1e-3 for 500 batches, from 0.3, clamped to [0, 1]. With `per_layer=False` it learns one
    coefficient per source, as LoraHub (arXiv:2307.13269) does without gradients. The derivative by a coefficient is
    `<dL/dW, S_k - base>`. The gradient hook computes it, so no gradient is stored.

    Memory: the sources stay mapped, outside private memory.

    Args:
        inputs: The model, the sources and the labels.
        per_layer: Whether each layer of each source has its own coefficient; otherwise each source has one.
        steps: Number of batches, with one step each.
        lr: Learning rate of Adam; a coefficient moves by at most about this much per step.
        initial: Initial value of all coefficients.

    Raises:
        NonFiniteError: A loss or a gradient became NaN or infinite.
    """
    units = partition(inputs.model, "layer") if per_layer else [Unit("", tuple(movable_tensors(inputs.model)))]
    with open_checked_sources(inputs) as sources:
        coefficients = torch.full((len(sources), len(units)), initial, dtype=torch.float64)
        _learn_(inputs, inputs.base, sources, units, coefficients, steps=steps, lr=lr, project=_clamp_)
    logger.info("mixture: coefficients per source %s", [round(float(c), 3) for c in coefficients.mean(1)])


def pearl_(
    inputs: MethodInputs,
    *,
    rank: int = 16,
    epochs: float = 3,
    learning_rate: float = 1e-3,
    mixing_epochs: int = 3,
    mixing_lr: float = 0.01,
) -> None:
    """Change the model to PEARL, a baseline of arXiv:2606.14900, as the paper describes it.

    The first source stays unchanged. K LoRA adapters of it are trained on the labels, each from its own seed
    (`seed + k`). Then Adam learns one weight per adapter, from 1/K, on the simplex: after each step negative weights
    become 0, and all are scaled to a sum of 1. Fine-tuning trains the whole head, so the adapters also change the
    head. The code of the paper, unlike this, trains none of its adapters.

    Memory: that of fine-tuning one adapter; K + 1 P of disk for the K trained models.

    Args:
        inputs: The model, the sources and the labels.
        rank: Rank of each adapter, and its alpha, so the scale is 1.
        epochs: Epochs of training for each adapter.
        learning_rate: Learning rate of the adapters. The paper's scripts use 1e-3 or 5e-5; after few steps at 5e-5 a
            new adapter is still near 0.
        mixing_epochs: Passes over the labels to learn the weights.
        mixing_lr: Learning rate of Adam for the weights.

    Raises:
        ConfigError: A LoRA adapter does not fit the model.
        NonFiniteError: A loss, a gradient or a weight became NaN or infinite.
    """
    tensors, first = movable_tensors(inputs.model), inputs.buffer("first")
    sources = stream_checked_sources(inputs)
    overwrite_(tensors, next(sources))
    number = 1 + sum(1 for _ in sources)
    overwrite_(first, tensors)  # through the model, because the source may have another dtype
    adapted = []
    lora = {"r": rank, "lora_alpha": rank, **adapter_targets(inputs.model)}
    for k in range(number):
        overwrite_(tensors, first)
        inputs.finetune(epochs, inputs.seed + k, lora, learning_rate)
        trained = inputs.buffer(f"adapted-{k}")
        overwrite_(trained, tensors)
        adapted.append({n: t for n, t in trained.items() if n in tensors and not torch.equal(t, first[n])})
    inputs.model.eval()
    overwrite_(tensors, first)
    units = [Unit("", tuple(tensors))]
    coefficients = torch.full((number, 1), 1 / number, dtype=torch.float64)
    steps = mixing_epochs * inputs.batches_per_epoch
    _learn_(inputs, first, adapted, units, coefficients, steps=steps, lr=mixing_lr, project=_project_onto_simplex_)
    logger.info("PEARL: weights %s", [round(float(c), 3) for c in coefficients[:, 0]])


def adapter_targets(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the convolutions as an adapter's target modules if the model has no linear layer outside its head."""
    head = {name.rpartition(".")[0] for name in head_tensors(model)}
    body = {name: module for name, module in model.named_modules() if name not in head}
    if any(isinstance(module, nn.Linear | Conv1D) for module in body.values()):
        return {}
    return {"target_modules": [name for name, m in body.items() if isinstance(m, nn.Conv2d) and m.groups == 1]}


def _learn_(
    inputs: MethodInputs,
    start: Mapping[str, Tensor],
    sources: Sequence[Mapping[str, Tensor]],
    units: Sequence[Unit],
    coefficients: Tensor,
    *,
    steps: int,
    lr: float,
    project: Callable[[Tensor], None],
) -> None:
    """Learn `coefficients` in place by Adam on the labels, and change the model to their mixture.

    Args:
        inputs: The model and the labels.
        start: Tensors that the mixture starts from: it is `start + sum_k c_k (S_k - start)`.
        sources: The tensors of each source `S_k` by name.
        units: Each source has one coefficient for each unit.
        coefficients: Initial coefficients `(sources, units)`.
        steps: Number of batches, with one step each.
        lr: Learning rate of Adam.
        project: Changes coefficients in place to the nearest ones that are allowed.
    """
    column = {name: index for index, unit in enumerate(units) for name in unit.tensors}
    parameters, adam = parameter_names(inputs), torch.optim.Adam([coefficients], lr=lr)
    tensors = movable_tensors(inputs.model)

    def mix_() -> None:
        for name in dict.fromkeys(name for values in sources for name in values):
            if not start[name].is_floating_point():
                continue
            own = [float(c) for c in coefficients[:, column[name]]]
            pairs = [(c, values[name]) for c, values in zip(own, sources, strict=True) if name in values]
            # Statistics stay between the sources, because beyond them a variance may become negative.
            divisor = 1.0 if name in parameters else max(1.0, sum(c for c, _ in pairs))
            mixed = start[name].to(wide_dtype(start[name]), copy=True)
            for c, value in pairs:
                mixed.add_(task_vector(value, start[name]), alpha=c / divisor)
            tensors[name].data.copy_(mixed)

    mix_()
    for batch in inputs.batches(steps):
        derivatives = torch.zeros_like(coefficients)

        def add_derivatives(name: str, gradient: Tensor, derivatives: Tensor = derivatives) -> None:
            device = gradient.device
            for k, values in enumerate(sources):
                if name in values:
                    products = inner_products(gradient, values[name].to(device), start[name].to(device))
                    derivatives[k, column[name]] += products[0]

        with preserved_state(inputs.model):
            gradient_pass(inputs.model, batch, add_derivatives)
        if not derivatives.isfinite().all():
            raise NonFiniteError("a gradient of the mixture is NaN or infinite; try a lower lr")
        coefficients.grad = derivatives
        adam.step()
        project(coefficients)
        mix_()
    coefficients.grad = None


def _clamp_(coefficients: Tensor) -> None:
    """Clamp the coefficients to [0, 1]."""
    coefficients.clamp_(0.0, 1.0)


def _project_onto_simplex_(coefficients: Tensor) -> None:
    """Change the coefficients of each unit to at least 0 and a sum of 1; to equal ones if all were negative."""
    coefficients.clamp_(min=0.0)
    sums = coefficients.sum(0)
    coefficients.div_(sums).masked_fill_(sums == 0, 1 / len(coefficients))
