"""The existing ways that learn how much of each model goes into one: `compare` runs them beside ours; rules as in `baselines`."""

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
from .inputs import MethodInputs, all_sources, difference, each_source, weight_names_of, wide_dtype

logger = logging.getLogger(__name__)


def mixture_(
    inputs: MethodInputs, *, per_layer: bool = True, steps: int = 500, lr: float = 1e-3, initial: float = 0.3
) -> None:
    """Change the model to `base + sum_k c_k (S_k - base)` with coefficients in [0, 1] learned on the labels.

    AdaMerging (arXiv:2310.02575) with the labels' loss in place of its entropy, and its settings: Adam at 1e-3 for 500
    batches, from 0.3, cut to [0, 1]. One coefficient per source, `per_layer=False`, is also what LoraHub
    (arXiv:2307.13269) learns, there without gradients. The slope of a coefficient is `<dL/dW, S_k - base>`, taken in the
    gradient hook, so that no gradient is stored.

    Memory: the sources stay mapped, in no private memory.

    Args:
        inputs: See `MethodInputs`.
        per_layer: One coefficient per source and layer instead of per source.
        steps: Batches, one step each.
        lr: Step size of Adam; a coefficient moves by at most about this much per step.
        initial: Where all coefficients start.

    Raises:
        NonFiniteError: A loss or a gradient became NaN or infinite.
    """
    units = partition(inputs.model, "layer") if per_layer else [Unit("", tuple(movable_tensors(inputs.model)))]
    with all_sources(inputs) as sources:
        coefficients = torch.full((len(sources), len(units)), initial, dtype=torch.float64)
        _learn_(inputs, inputs.start, sources, units, coefficients, steps=steps, lr=lr, project=_into_box_)
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
    """Change the model to PEARL as it was meant, the rival of arXiv:2606.14900, whose code trains none of its adapters.

    The first source stays as it is; as many LoRA adapters as there are sources are trained on the labels, one after
    another, each from its own seed (`seed + k`); then one weight per adapter is learned on the simplex, by Adam from
    1/K, cut at 0 and renormalised at each step. Fine-tuning trains a head whole, so that a head is part of what an
    adapter changes.

    Memory: as the fine-tuning of one adapter; K + 1 P of disk, where the K trained models are kept.

    Args:
        inputs: See `MethodInputs`.
        rank: Rank of each adapter, and its alpha, so that its scale is 1.
        epochs: Epochs of training for each.
        learning_rate: Of the adapters; the published code's is 1e-3 or 5e-5, by script, and few steps at the second
            leave a new adapter near 0.
        mixing_epochs: Passes over the labels while the weights are learned.
        mixing_lr: Step size of Adam on the weights.

    Raises:
        ConfigError: A LoRA adapter does not fit the model.
        NonFiniteError: A loss, a gradient or a weight became NaN or infinite.
    """
    tensors, first = movable_tensors(inputs.model), inputs.room("first")
    sources = each_source(inputs)
    overwrite_(tensors, next(sources))
    number = 1 + sum(1 for _ in sources)
    overwrite_(first, tensors)  # from the model, whose dtype the source may not have
    adapted = []
    lora = {"r": rank, "lora_alpha": rank, **_adapted_modules(inputs.model)}
    for k in range(number):
        overwrite_(tensors, first)
        inputs.finetune(epochs, inputs.seed + k, lora, learning_rate)
        trained = inputs.room(f"adapted-{k}")
        overwrite_(trained, tensors)
        adapted.append({n: t for n, t in trained.items() if n in tensors and not torch.equal(t, first[n])})
    inputs.model.eval()
    overwrite_(tensors, first)
    units = [Unit("", tuple(tensors))]
    coefficients = torch.full((number, 1), 1 / number, dtype=torch.float64)
    steps = mixing_epochs * inputs.epoch
    _learn_(inputs, first, adapted, units, coefficients, steps=steps, lr=mixing_lr, project=_onto_simplex_)
    logger.info("PEARL: weights %s", [round(float(c), 3) for c in coefficients[:, 0]])


def _adapted_modules(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return which modules an adapter changes where a model has no linear layer outside its head: the convolutions."""
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
    """Change `coefficients` `(sources, units)` by Adam on the labels, and the model to the mixture that they make.

    Every source's tensors are mixed as `start + sum_k c_k (S_k - start)`; `project` brings coefficients back, in place,
    to where they may be.
    """
    column = {name: index for index, unit in enumerate(units) for name in unit.tensors}
    weight_names, adam = weight_names_of(inputs), torch.optim.Adam([coefficients], lr=lr)
    tensors = movable_tensors(inputs.model)

    def mix_() -> None:
        for name in dict.fromkeys(name for values in sources for name in values):
            if not start[name].is_floating_point():
                continue
            own = [float(c) for c in coefficients[:, column[name]]]
            pairs = [(c, values[name]) for c, values in zip(own, sources, strict=True) if name in values]
            over = 1.0 if name in weight_names else max(1.0, sum(c for c, _ in pairs))
            mixed = start[name].to(wide_dtype(start[name]), copy=True)
            for c, value in pairs:
                mixed.add_(difference(value, start[name]), alpha=c / over)
            tensors[name].data.copy_(mixed)

    mix_()
    for batch in inputs.batches(steps):
        slopes = torch.zeros_like(coefficients)

        def meet(name: str, gradient: Tensor, slopes: Tensor = slopes) -> None:
            device = gradient.device
            for k, values in enumerate(sources):
                if name in values:
                    products = inner_products(gradient, values[name].to(device), start[name].to(device))
                    slopes[k, column[name]] += products[0]

        with preserved_state(inputs.model):
            gradient_pass(inputs.model, batch, meet)
        if not slopes.isfinite().all():
            raise NonFiniteError("a gradient of the mixture is NaN or infinite; try a lower lr")
        coefficients.grad = slopes
        adam.step()
        project(coefficients)
        mix_()
    coefficients.grad = None


def _into_box_(coefficients: Tensor) -> None:
    """Change each coefficient to the nearest one in [0, 1]."""
    coefficients.clamp_(0.0, 1.0)


def _onto_simplex_(coefficients: Tensor) -> None:
    """Change the coefficients of each unit: none below 0, and a sum of 1; equal ones where all were cut."""
    coefficients.clamp_(min=0.0)
    sums = coefficients.sum(0)
    coefficients.div_(sums).masked_fill_(sums == 0, 1 / len(coefficients))
