"""The scale of a classifier's logits, which goes into the weights of a linear head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..tensors.units import head_tensors
from .batches import Batch
from .gradients import preserved_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # relative to the largest logit


@torch.no_grad()
def scale_logits_(model: PreTrainedModel, factor: float, batch: Batch) -> bool:
    """Change the weights of the last linear layer so that all logits are `factor` times as large.

    Args:
        model: A classifier.
        factor: Factor of the logits, above 0.
        batch: Inputs on which the change is checked.

    Returns:
        Whether it worked. If not, as for a head that is not linear, the model is as before.
    """
    head = head_tensors(model)
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and f"{name}.weight" in head
    ]
    if len(linear) != 1:
        return False
    parameters = [parameter for parameter in (linear[0].weight, linear[0].bias) if parameter is not None]
    before = [parameter.clone() for parameter in parameters]
    with preserved_state(model):
        model.eval()
        logits = model(**batch)["logits"].float()
        for parameter in parameters:
            parameter.mul_(factor)
        scaled = model(**batch)["logits"].float()
    if (scaled - factor * logits).abs().max() <= TOLERANCE * factor * logits.abs().max():
        return True
    for parameter, values in zip(parameters, before, strict=True):
        parameter.copy_(values)
    return False
