"""Losses, halves and batches in plain Python and torch, as a reference for those of the package.

Nothing here imports `grasp_hf`.
"""

import random
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

SCALES = [0.0, *(2 ** (half / 2) for half in range(-6, 9))]  # factors of the logits: 0, and from 1/8 to 16


@torch.no_grad()
def class_losses(model: nn.Module, data: Any, scale: float = 1.0) -> Tensor:
    """Return minus the log probability of the right class of each sample, in evaluation mode, float64, shape `(n,)`."""
    batch, training = data[:], model.training
    logits = model.eval()(**batch).logits.double() * scale
    model.train(training)
    return -logits.log_softmax(-1)[torch.arange(len(logits)), batch["labels"]]


def calibrated_losses(model: nn.Module, data: Any) -> Tensor:
    """Return the losses after the logits were multiplied by the one scale of `SCALES` with the smallest sum."""
    return min((class_losses(model, data, scale) for scale in SCALES), key=lambda losses: float(losses.sum()))


def mean_loss(model: nn.Module, *data: Any) -> float:
    """Return the mean loss over the samples of all data sets."""
    return float(torch.cat([class_losses(model, samples) for samples in data]).mean())


def halves(number: int, seed: int) -> tuple[list[int], list[int]]:
    """Return two random halves of the first `number` integers, sorted."""
    order = list(range(number))
    random.Random(seed).shuffle(order)
    return sorted(order[: number // 2]), sorted(order[number // 2 :])


def shuffled_batches(data: Any, size: int, number: int, seed: int, *, drop_last: bool = False) -> list[dict[str, Any]]:
    """Return `number` batches of `data`, shuffled anew in each epoch; `drop_last` leaves out a batch that is not full."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        data, size, shuffle=True, generator=generator, collate_fn=default_data_collator, drop_last=drop_last
    )
    return list(islice(chain.from_iterable(repeat(loader)), number))
