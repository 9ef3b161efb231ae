"""The procedure of the paper (arXiv:2606.14900), written as plainly as possible: the reference for `GraspConfig.paper()`.

Nothing here imports `grasp_hf`, the Trainer, Accelerate or hooks. Two things differ from the authors' code, and neither
changes the algorithm: every stage is seeded, and batches come in the order of the Trainer, so that weights can be compared
exactly. The memory is that of the authors' code on purpose. A measurement holds two models, two sets of gradients and two
sets of sums, and a fine-tuning of the target keeps the source and its gradients alive.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

Example = dict[str, Tensor | int]
Batch = dict[str, Tensor]
Collate = Callable[[list[Example]], Batch]


@dataclass
class Step:
    """The result of one step: step 0 only fine-tunes the first source, and step `k` merges source `k`."""

    cosines: dict[str, float]
    copied: list[str]
    after_transfer: dict[str, Tensor]
    after_finetune: dict[str, Tensor]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all weights and buffers."""
    return deepcopy(model.state_dict())


def add_gradients_(sums: dict[str, Tensor], model: nn.Module, batch: Batch) -> None:
    """Add to `sums` the gradient of the mean loss of `batch`; the last gradient stays in `model`."""
    model.zero_grad()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.clone()
            sums[name] = sums[name] + gradient if name in sums else gradient


def alignment(source: nn.Module, target: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Return the cosine of the summed gradients for each parameter that has a gradient in both models.

    As in the paper, the source is in evaluation mode and the target in training mode: its dropout is on, and the
    measurement changes its running statistics.
    """
    source.eval()
    target.train()
    source_sums: dict[str, Tensor] = {}
    target_sums: dict[str, Tensor] = {}
    for batch in batches:
        add_gradients_(source_sums, source, batch)
        add_gradients_(target_sums, target, batch)
    cosines = {}
    for name, s in source_sums.items():
        if name in target_sums:
            t = target_sums[name]
            dot = torch.dot(s.flatten(), t.flatten())
            cosines[name] = float(dot / (s.norm() * t.norm() + 1e-8))
    return cosines


def transfer(source: nn.Module, target: nn.Module, cosines: dict[str, float], threshold: float) -> list[str]:
    """Copy to `target` every parameter whose cosine is above `threshold`, never a buffer, and return their names."""
    copied = [name for name, cosine in cosines.items() if cosine > threshold]
    state = target.state_dict()
    for name in copied:
        state[name] = source.state_dict()[name].clone()
    target.load_state_dict(state)
    return copied


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order of `n` examples in `epoch`, counted from 0, as `Trainer` with `seed` gives it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the fraction of right predictions in evaluation mode."""
    model.eval()
    hits = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches]
    return torch.cat(hits).double().mean().item()


def finetune(
    model: nn.Module,
    examples: Sequence[Example],
    evaluation: Sequence[Example],
    epochs: int,
    seed: int,
    collate: Collate,
    batch_size: int = 32,
) -> None:
    """Train `model` in place and leave it with the weights of its best epoch, the first one if several are equal.

    If no epoch predicts anything right, this function keeps the first epoch, as `Trainer` does. The authors' code keeps the
    last weights then, because it starts from an accuracy of 0.
    """
    torch.manual_seed(seed)
    optimizer = AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    scheduler = CosineAnnealingLR(optimizer, T_max=epochs)
    best, best_state = -math.inf, model.state_dict()
    for epoch in range(epochs):
        model.train()
        shuffled = [examples[i] for i in epoch_order(len(examples), seed, epoch)]
        # Each loader draws one number from the global generator, as those of `Trainer` do: dropout masks depend on it.
        for batch in DataLoader(shuffled, batch_size, collate_fn=collate, drop_last=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        scheduler.step()
        score = accuracy(model, DataLoader(evaluation, batch_size, collate_fn=collate))  # type: ignore[arg-type]
        if score > best:
            best, best_state = score, snapshot(model)
    model.load_state_dict(best_state)


def merge_as_in_paper(
    first: nn.Module,
    sources: Iterable[Callable[[], nn.Module]],
    examples: Sequence[Example],
    evaluation: Sequence[Example],
    collate: Collate,
    *,
    alignment_batches: Sequence[Batch] | Callable[[int], Sequence[Batch]],
    threshold: float = 0.3,
    initial_epochs: int = 3,
    epochs: int = 3,
    batch_size: int = 32,
    seed: int = 42,
) -> list[Step]:
    """Turn `first` into the merged model, and return the result of each step.

    Args:
        first: The first source; it becomes the target, in place.
        sources: Functions that load the other sources, in order.
        examples: Training examples of the target task.
        evaluation: Validation examples that choose the best epoch.
        collate: Turns a list of examples into a batch with `labels`.
        alignment_batches: The batches to measure at every step, or a function from the step (1, 2, ...) to them.
        threshold: Cosine above which a parameter is copied.
        initial_epochs: Epochs on the first source.
        epochs: Epochs after each transfer.
        batch_size: Examples per batch in training and validation.
        seed: Step `k` seeds its measurement and its fine-tuning with `seed + k`.
    """
    target = first
    before = snapshot(target)
    finetune(target, examples, evaluation, initial_epochs, seed, collate, batch_size)
    steps = [Step({}, [], before, snapshot(target))]
    for k, load in enumerate(sources, start=1):
        source = load()
        torch.manual_seed(seed + k)
        batches = alignment_batches(k) if callable(alignment_batches) else alignment_batches
        cosines = alignment(source, target, batches)
        copied = transfer(source, target, cosines, threshold)
        after_transfer = snapshot(target)
        finetune(target, examples, evaluation, epochs, seed + k, collate, batch_size)
        steps.append(Step(cosines, copied, after_transfer, snapshot(target)))
    return steps
