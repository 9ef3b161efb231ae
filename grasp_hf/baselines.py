"""The existing ways to make one model of many that `compare` runs beside ours, on the same labels.

Each is its paper's rule on the tensors that a source brings. Three things are the same in all of them:

- A source that brings only some tensors (an adapter) equals the base elsewhere: its task vector is 0 there, and a mean
  counts a tensor once per source that brings it.
- Statistics of normalisation layers are no weights, and no multiple of them beyond the sources is a statistic (a
  variance would become negative): where weights move by coefficients that sum to more than 1, statistics move by those
  coefficients divided by their sum. A rule for single elements (trimming, dropping, masking) leaves them alone.
- Integer tensors, such as the batch count of a BatchNorm, have no direction: those of the base stay, except in a mean,
  which follows `interpolate_`.

All is computed in float32 or better, tensor by tensor. Memory is given in models (P), beside the P of the model itself.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from peft.utils.merge_utils import dare_linear, dare_ties, ties
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from .alignment import inner_products
from .batches import IGNORED, Batch, Collator, batch_loss, labelled_terms
from .errors import ConfigError, DataError, IncompatibleSourceError, NonFiniteError
from .gradients import gradient_pass, preserved_state
from .matching import Unit, head_tensors, movable_tensors, partition
from .measure import mean_gradient
from .report import Evaluation
from .transfer import interpolate_, overwrite_, placed

logger = logging.getLogger(__name__)

TENTHS = tuple(tenth / 10 for tenth in range(1, 11))
LEAST_FISHER = 1e-30  # far below any Fisher that counts, far above the smallest float32


class FineTune(Protocol):
    """Trains an adapter with these arguments of `LoraConfig` for so many epochs, and merges it into the model."""

    def __call__(self, epochs: float, seed: int, lora: dict[str, Any], learning_rate: float) -> None:
        """Change the model, which may be left in train mode."""


@dataclass
class Trial:
    """What one method may use: the model at the base, the sources, and the labels.

    Attributes:
        model: Holds the base's weights, in eval mode; a method leaves its result in it.
        start: The base's tensors by runtime name, mapped from a file.
        stream: Every source once, one at a time; each call starts anew.
        together: All sources at once, mapped from their files.
        batches: So many shuffled batches of labelled samples, epoch after epoch.
        epoch: Batches in one pass over the labels.
        loss: Mean loss of `model` as it is now over the labels.
        room: A scratch file of that name with room for each tensor of `wide_like(start)`; contents undefined. No method
            asks for one name twice.
        finetune: Fine-tunes `model` in place.
        seed: Seed of everything that a method draws.
    """

    model: PreTrainedModel
    start: Mapping[str, Tensor]
    stream: Callable[[], Iterator[Mapping[str, Tensor]]]
    together: Callable[[], AbstractContextManager[Sequence[Mapping[str, Tensor]]]]
    batches: Callable[[int], Iterable[Batch]]
    epoch: int
    loss: Callable[[], float]
    room: Callable[[str], Mapping[str, Tensor]]
    finetune: FineTune
    seed: int


def wide_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without storage of the same names and shapes, in float32 where `tensors` are shorter floats.

    Sums over sources are kept in these: a half precision sum loses what the tenth source adds.
    """
    return {name: torch.empty(t.shape, dtype=_wide_dtype(t), device="meta") for name, t in tensors.items()}


def average_(trial: Trial) -> None:
    """Change the model to the mean of the sources, a uniform soup (arXiv:2203.05482).

    Memory: one source at a time; 1 P of disk.
    """
    mean, seen = trial.room("mean"), Counter[str]()
    for values in _each_source(trial):
        _take_into_mean_(mean, values, seen)
    overwrite_(movable_tensors(trial.model), {name: mean[name] for name in seen})


def greedy_soup_(trial: Trial) -> None:
    """Change the model to a greedy soup (arXiv:2203.05482): sources join the mean, best first, if the loss does not rise.

    The paper sorts and judges by held-out accuracy; a few labels have too few values of it, so the loss takes its place.

    Memory: the sources stay mapped, in no private memory; 1 P of disk.

    Raises:
        NonFiniteError: No source has a finite loss.
    """
    tensors, mean, seen = movable_tensors(trial.model), trial.room("mean"), Counter[str]()
    with _all_sources(trial) as sources:
        losses = []
        for values in sources:
            with placed(tensors, values, trial.start):
                losses.append(_loss(trial))
        order = sorted(range(len(sources)), key=losses.__getitem__)
        if not math.isfinite(losses[order[0]]):
            raise NonFiniteError(f"none of the {len(sources)} sources has a finite loss on the labels")
        best = math.inf
        for index in order:
            values = sources[index]
            for name, value in values.items():
                interpolate_(tensors[name], mean[name], value, 1 / (seen[name] + 1))
            loss = _loss(trial)
            if loss <= best:
                best = loss
                _take_into_mean_(mean, values, seen)
                logger.info("greedy soup: took source %d, loss %.4f", index + 1, loss)
            else:
                overwrite_(tensors, {name: mean[name] if seen[name] else trial.start[name] for name in values})


def task_arithmetic_(trial: Trial, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + w * sum_k (S_k - base)` (arXiv:2212.04089).

    Memory: one source at a time; 1 P of disk.

    Args:
        trial: See `Trial`.
        weights: `w` is the one of these with the lowest loss; the paper searches (0, 1] too.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    total, seen = trial.room("direction"), Counter[str]()
    for values in _each_source(trial):
        for name, value in _moving(trial, values):
            vector = _difference(value, trial.start[name])
            _ = total[name].add_(vector) if seen[name] else total[name].copy_(vector)
            seen[name] += 1
    _search_(trial, total, seen, weights)


def ties_(
    trial: Trial,
    *,
    density: float = 0.2,
    weights: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0),
) -> None:
    """Change the model to `base + w * TIES(S_k - base)` (arXiv:2306.01708), by `peft.utils.merge_utils.ties`.

    Each task vector keeps its largest elements, each element takes the sign with the larger total, and those that have
    it are averaged. As in PEFT and mergekit the largest are found per tensor (the paper: in the whole model), so that
    a tensor of fewer than `1 / density` elements stays that of the base.

    Memory: a few times K copies of the largest tensor; 1 P of disk.

    Args:
        trial: See `Trial`.
        density: Share of elements that each task vector keeps; 0.2 is the paper's.
        weights: `w` is the one of these with the lowest loss; the paper's is 1 where nothing can choose it.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction = trial.room("direction")
    with _all_sources(trial) as sources:
        _combine_(trial, sources, direction, lambda v: ties(v, torch.ones(len(v)), density), averages=True)
        brought = [name for values in sources for name, _ in _moving(trial, values)]
    _search_(trial, direction, dict.fromkeys(brought, 1), weights)


def dare_(
    trial: Trial,
    *,
    densities: Sequence[float] = (0.1, 0.8),
    weights: Sequence[float] = TENTHS,
    with_ties: bool = False,
) -> None:
    """Change the model to `base + w * sum_k drop(S_k - base) / density` (arXiv:2311.03099), by `peft.utils.merge_utils`.

    Each element of each task vector is dropped with probability `1 - density` and the rest are scaled up.

    Memory: a few times K copies of the largest tensor; 1 P of disk.

    Args:
        trial: See `Trial`.
        densities: Share of elements that are kept: 0.1 is the rate that the paper advertises (90 % dropped), 0.8 the
            one that its authors' scripts merge with. The one with the lowest loss is chosen, as the paper tunes it.
        weights: `w` is the one of these with the lowest loss.
        with_ties: Elect signs and average, as TIES does, instead of adding up. The sum is the paper's main choice.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    direction, merge = trial.room("direction"), dare_ties if with_ties else dare_linear
    with _all_sources(trial) as sources:
        counts = Counter(name for values in sources for name, _ in _moving(trial, values))
        if with_ties:
            counts = Counter(dict.fromkeys(counts, 1))

        def drop_(density: float) -> None:
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                _combine_(
                    trial, sources, direction, lambda v: merge(v, torch.ones(len(v)), density), averages=with_ties
                )

        found: dict[float, tuple[float, float]] = {}
        for density in densities:
            drop_(density)
            found[density] = _lowest(_losses_(trial, direction, counts, weights))
        density = min(found, key=found.__getitem__)
        loss, weight = found[density]
        if not math.isfinite(loss):
            raise NonFiniteError(f"DARE has no finite loss with any density of {densities} and weight of {weights}")
        if density != densities[-1]:
            drop_(density)
    _move_(trial, direction, counts, weight)
    logger.info("DARE: density %g, weight %g, loss %.4f", density, weight, loss)


def fisher_average_(trial: Trial) -> None:
    """Change the model to the mean of the sources, each element weighted by its Fisher information (arXiv:2111.09832).

    The diagonal Fisher of each source at the labelled inputs, one pass, with labels drawn from the source's own
    predictions as the definition says (true labels would favour the source that fits them worst). Gradients of single
    terms are then independent with mean 0, so the square of a whole batch's summed gradient estimates the sum of their
    squares, without a pass per sample. What has no Fisher (statistics, unused tokens) becomes the plain mean.

    Memory: one source at a time, the batches of one pass; 3 P of disk.

    Raises:
        DataError: The labels are no classes.
        NonFiniteError: A loss or the Fisher of a source is not finite.
    """
    model, tensors, batches = trial.model, movable_tensors(trial.model), list(trial.batches(trial.epoch))
    weighted, total, fisher, seen = trial.room("weighted"), trial.room("total"), trial.room("fisher"), set[str]()
    for index, values in enumerate(_each_source(trial)):
        brought = dict(_moving(trial, values))
        for name in brought:
            fisher[name].zero_()
        with placed(tensors, values, trial.start), preserved_state(model), torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            for batch in batches:
                _add_fisher_(fisher, model, batch, brought)
        for name, value in brought.items():
            if not torch.isfinite(fisher[name]).all():
                raise NonFiniteError(f"the Fisher information of {name} in source {index + 1} is NaN or infinite")
            fisher[name].add_(LEAST_FISHER)
            if name not in seen:
                weighted[name].zero_()
                total[name].zero_()
            weighted[name].addcmul_(fisher[name], value.to(fisher[name].dtype))
            total[name].add_(fisher[name])
            seen.add(name)
    for name in seen:
        tensors[name].data.copy_(weighted[name].div_(total[name]))


def _add_fisher_(
    fisher: Mapping[str, Tensor], model: PreTrainedModel, batch: Batch, names: Mapping[str, Tensor]
) -> None:
    """Add to `fisher` the squares of the gradient of the summed loss of `batch` under labels that `model` predicts."""
    weight = labelled_terms(model, batch)

    def square(name: str, gradient: Tensor) -> None:
        if name in names:
            gradient = gradient.to(fisher[name].device, fisher[name].dtype)
            fisher[name].addcmul_(gradient, gradient, value=float(weight) ** 2)

    gradient_pass(model, _with_drawn_labels(model, batch), square)


@torch.no_grad()
def _with_drawn_labels(model: PreTrainedModel, batch: Batch) -> Batch:
    """Return `batch` with each label drawn from what `model` predicts; ignored labels stay ignored."""
    _, output = batch_loss(model, batch)
    logits, _ = _terms(model, output["logits"], batch["labels"])
    labels = batch["labels"].clone()
    drawn_for = labels[:, 1:] if _shifts(model, labels) else labels
    drawn = torch.multinomial(logits.softmax(-1), 1).view(drawn_for.shape)
    drawn_for.copy_(torch.where(drawn_for == IGNORED, drawn_for, drawn))
    return {**batch, "labels": labels}


def mixture_(
    trial: Trial, *, per_layer: bool = True, steps: int = 500, lr: float = 1e-3, initial: float = 0.3
) -> None:
    """Change the model to `base + sum_k c_k (S_k - base)` with coefficients in [0, 1] learned on the labels.

    AdaMerging (arXiv:2310.02575) with the labels' loss in place of its entropy, and its settings: Adam at 1e-3 for 500
    batches, from 0.3, cut to [0, 1]. One coefficient per source, `per_layer=False`, is also what LoraHub
    (arXiv:2307.13269) learns, there without gradients. The slope of a coefficient is `<dL/dW, S_k - base>`, taken in the
    gradient hook, so that no gradient is stored.

    Memory: the sources stay mapped, in no private memory.

    Args:
        trial: See `Trial`.
        per_layer: One coefficient per source and layer instead of per source.
        steps: Batches, one step each.
        lr: Step size of Adam; a coefficient moves by at most about this much per step.
        initial: Where all coefficients start.

    Raises:
        NonFiniteError: A loss or a gradient became NaN or infinite.
    """
    units = partition(trial.model, "layer") if per_layer else [Unit("", tuple(movable_tensors(trial.model)))]
    with _all_sources(trial) as sources:
        coefficients = torch.full((len(sources), len(units)), initial, dtype=torch.float64)
        _learn_(trial, trial.start, sources, units, coefficients, steps=steps, lr=lr, project=_into_box_)
    logger.info("mixture: coefficients per source %s", [round(float(c), 3) for c in coefficients.mean(1)])


def gradfix_(trial: Trial, *, weights: Sequence[float] = TENTHS) -> None:
    """Change the model to `base + a * mean_k (m * (S_k - base))`, GradFix (arXiv:2510.09658) with several sources.

    `m` keeps the elements of a task vector that go down: whose sign is opposite to that of the gradient of the labels'
    mean loss at the base, one pass. Masked, then averaged, as the authors merge; `a` is searched as they search it.

    Memory: one source at a time; 2 P of disk.

    Args:
        trial: See `Trial`.
        weights: `a` is the one of these with the lowest loss.

    Raises:
        NonFiniteError: No weight gives a finite loss.
    """
    gradients, direction, seen = trial.room("gradients"), trial.room("direction"), Counter[str]()
    weight_names = _weight_names(trial)
    with preserved_state(trial.model):
        found, _ = mean_gradient(trial.model, trial.batches(trial.epoch), gradients)
    for values in _each_source(trial):
        for name, value in _moving(trial, values):
            vector = _difference(value, trial.start[name])
            if name in found:
                vector.mul_(vector.sign() == -gradients[name].sign())
            elif name in weight_names:
                vector.zero_()
            _take_into_mean_(direction, {name: vector}, seen)
    _search_(trial, direction, dict.fromkeys(seen, 1), weights)


def pearl_(
    trial: Trial,
    *,
    rank: int = 16,
    epochs: int = 3,
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
        trial: See `Trial`.
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
    tensors, first = movable_tensors(trial.model), trial.room("first")
    with _all_sources(trial) as sources:
        number = len(sources)
        overwrite_(tensors, sources[0])
    for name, tensor in tensors.items():  # from the model, whose dtype the source may not have
        first[name].copy_(tensor.detach())
    adapted = []
    lora = {"r": rank, "lora_alpha": rank, **_adapted_modules(trial.model)}
    for k in range(number):
        overwrite_(tensors, first)
        trial.finetune(epochs, trial.seed + k, lora, learning_rate)
        trained = trial.room(f"adapted-{k}")
        for name, tensor in tensors.items():
            trained[name].copy_(tensor.detach())
        adapted.append({n: t for n, t in trained.items() if n in tensors and not torch.equal(t, first[n])})
    trial.model.eval()
    overwrite_(tensors, first)
    units = [Unit("", tuple(tensors))]
    coefficients = torch.full((number, 1), 1 / number, dtype=torch.float64)
    steps = mixing_epochs * trial.epoch
    _learn_(trial, first, adapted, units, coefficients, steps=steps, lr=mixing_lr, project=_onto_simplex_)
    logger.info("PEARL: weights %s", [round(float(c), 3) for c in coefficients[:, 0]])


def _adapted_modules(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return which modules an adapter changes where a model has no linear layer outside its head: the convolutions."""
    head = {name.rpartition(".")[0] for name in head_tensors(model)}
    body = {name: module for name, module in model.named_modules() if name not in head}
    if any(isinstance(module, nn.Linear | Conv1D) for module in body.values()):
        return {}
    return {"target_modules": [name for name, m in body.items() if isinstance(m, nn.Conv2d) and m.groups == 1]}


@torch.no_grad()
def ensemble_evaluation(
    trial: Trial, dataset: Any, collator: Collator, accelerator: Accelerator, batch_size: int
) -> Evaluation:
    """Return `loss` and, for a classifier, `accuracy` in [0, 1] of the mean of the sources' probabilities.

    The loss is the mean negative logarithm of what the sources give the true label (or token) on average. The model
    holds the base's weights before and after.

    Memory: one source at a time; a row of probabilities per sample, or one number per token.

    Raises:
        DataError: The labels are no classes.
    """
    model, tensors, number = trial.model, movable_tensors(trial.model), 0
    totals: list[Tensor] = []
    labels: list[Tensor] = []
    for values in _each_source(trial):
        loader = accelerator.prepare_data_loader(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))
        with placed(tensors, values, trial.start):
            for index, batch in enumerate(loader):
                _, output = batch_loss(model, batch)
                logits, truth = _terms(model, output["logits"], batch["labels"])
                rows, truth = logits.log_softmax(-1).cpu().double(), truth.cpu()
                if batch["labels"].ndim > 1:  # a vocabulary for each token would be too much to keep
                    rows, truth = rows[truth != IGNORED], truth[truth != IGNORED]
                    rows = rows.gather(1, truth[:, None])
                if number:
                    totals[index] = torch.logaddexp(totals[index], rows)
                else:
                    totals.append(rows)
                    labels.append(truth)
        number += 1
    scores, truth = torch.cat(totals) - math.log(number), torch.cat(labels)
    classifies = scores.shape[1] > 1
    likelihoods = scores.gather(1, truth[:, None]) if classifies else scores
    accuracy = {"accuracy": float((scores.argmax(1) == truth).double().mean())} if classifies else {}
    return {"loss": -float(likelihoods.mean()), **accuracy}


class LogitFusion(PreTrainedModel):
    """Several models that answer with the mean of their logits, trained jointly: "Multi-Source Fusion".

    This is what the code of arXiv:2606.14900 runs under the name of parameter averaging: no parameter is averaged. For
    classifiers with one class id per sample, and for language models.

    Memory: all members, in private memory, and in training as many gradients and optimiser states.

    Args:
        config: The members' config; a copy is kept.
        members: Models of one class.
    """

    def __init__(self, config: PreTrainedConfig, members: Sequence[PreTrainedModel]) -> None:
        self._generates = members[0].can_generate()
        config = deepcopy(config)
        config._attn_implementation = "eager"  # there is no attention outside of the members
        super().__init__(config)
        self.main_input_name = members[0].main_input_name
        self._names = [f"member_{k}" for k in range(len(members))]
        for name, member in zip(self._names, members, strict=True):
            self.add_module(name, member)  # a ModuleList would hide their tied weights from transformers
        self.post_init()

    def init_weights(self) -> None:
        """Leave the members' weights as they are."""

    def can_generate(self) -> bool:  # type: ignore[override]
        """Whether the members can, which says how labels are read."""
        return self._generates

    def forward(
        self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> ModelOutput:
        """Return what a member returns, with the mean logits and, for `labels`, their loss.

        `num_items_in_batch` divides the loss instead of the number of labels, as the Trainer asks.
        """
        outputs = [self.get_submodule(name)(**inputs) for name in self._names]
        logits = torch.stack([output.logits for output in outputs]).mean(0)
        if labels is None:
            return type(outputs[0])(logits=logits)
        terms, truth = _terms(self, logits, labels)
        loss = cross_entropy(
            terms, truth, ignore_index=IGNORED, reduction="mean" if num_items_in_batch is None else "sum"
        )
        return type(outputs[0])(loss=loss if num_items_in_batch is None else loss / num_items_in_batch, logits=logits)


def logit_fusion(trial: Trial) -> LogitFusion:
    """Return a `LogitFusion` of the sources, each a copy of the base with a source's weights, in eval mode.

    Memory: K P, private.
    """
    members = []
    for values in _each_source(trial):
        member = deepcopy(trial.model)
        overwrite_(movable_tensors(member), values)
        members.append(member)
    return LogitFusion(trial.model.config, members).eval()


def _shifts(model: PreTrainedModel, labels: Tensor) -> bool:
    """Whether each label is that of the position before, as in causal language models."""
    return labels.ndim > 1 and model.can_generate() and not model.config.is_encoder_decoder


def _terms(model: PreTrainedModel, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the loss is the mean of: logits `(n, classes)` in float32 and class ids `(n,)`, some of them ignored.

    Raises:
        DataError: There is no class id for each row of logits.
    """
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        raise DataError(
            f"got {labels.dtype} labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}, "
            "expected one class id for each row of logits"
        )
    if _shifts(model, labels):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits.flatten(0, -2).float(), labels.flatten()


def _learn_(
    trial: Trial,
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
    weight_names, adam = _weight_names(trial), torch.optim.Adam([coefficients], lr=lr)
    tensors = movable_tensors(trial.model)

    def mix_() -> None:
        for name in dict.fromkeys(name for values in sources for name in values):
            if not start[name].is_floating_point():
                continue
            own = [float(c) for c in coefficients[:, column[name]]]
            pairs = [(c, values[name]) for c, values in zip(own, sources, strict=True) if name in values]
            over = 1.0 if name in weight_names else max(1.0, sum(c for c, _ in pairs))
            mixed = start[name].to(_wide_dtype(start[name]), copy=True)
            for c, value in pairs:
                mixed.add_(_difference(value, start[name]), alpha=c / over)
            tensors[name].data.copy_(mixed)

    mix_()
    for batch in trial.batches(steps):
        slopes = torch.zeros_like(coefficients)

        def meet(name: str, gradient: Tensor, slopes: Tensor = slopes) -> None:
            device = gradient.device
            for k, values in enumerate(sources):
                if name in values:
                    products = inner_products(gradient, values[name].to(device), start[name].to(device))
                    slopes[k, column[name]] += products[0]

        with preserved_state(trial.model):
            gradient_pass(trial.model, batch, meet)
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


def _combine_(
    trial: Trial,
    sources: Sequence[Mapping[str, Tensor]],
    direction: Mapping[str, Tensor],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    averages: bool,
) -> None:
    """Write what `merge` makes of the task vectors to `direction`; for statistics, their mean or their sum."""
    weight_names = _weight_names(trial)
    for name in trial.start:
        vectors = [_difference(v[name], trial.start[name]) for v in sources if name in v]
        if not vectors or not trial.start[name].is_floating_point():
            continue
        if name in weight_names:
            direction[name].copy_(merge(vectors))
        else:
            direction[name].copy_(torch.stack(vectors).sum(0) / (len(vectors) if averages else 1))


def _search_(
    trial: Trial, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> None:
    """Move the model by the multiple of `direction` with the lowest loss; see `_move_`."""
    loss, weight = _lowest(_losses_(trial, direction, counts, weights))
    if not math.isfinite(loss):
        raise NonFiniteError(f"none of the weights {', '.join(map(str, weights))} gives a finite loss on the labels")
    _move_(trial, direction, counts, weight)
    logger.info("weight %g, loss %.4f", weight, loss)


def _losses_(
    trial: Trial, direction: Mapping[str, Tensor], counts: Mapping[str, int], weights: Sequence[float]
) -> dict[float, float]:
    """Return the loss for each multiple of `direction`; the model is left at the last of them."""
    losses = {}
    for weight in weights:
        _move_(trial, direction, counts, weight)
        losses[weight] = _loss(trial)
    return losses


def _lowest(losses: Mapping[float, float]) -> tuple[float, float]:
    """Return the lowest loss and its weight, the first one if several are equal."""
    weight = min(losses, key=losses.__getitem__)
    return losses[weight], weight


def _move_(trial: Trial, direction: Mapping[str, Tensor], counts: Mapping[str, int], weight: float) -> None:
    """Change the model to `base + weight * direction`, statistics by no more than the mean of `counts` task vectors."""
    tensors, weight_names = movable_tensors(trial.model), _weight_names(trial)
    for name, count in counts.items():
        share = weight if name in weight_names else min(weight, 1 / count)
        start = trial.start[name]
        tensors[name].data.copy_(torch.add(start.to(_wide_dtype(start)), direction[name], alpha=share))


def _take_into_mean_(mean: Mapping[str, Tensor], values: Mapping[str, Tensor], seen: Counter[str]) -> None:
    """Change each tensor of `mean` from the mean of the `seen` ones to that with `values`, and count them."""
    for name, value in values.items():
        seen[name] += 1
        interpolate_(mean[name], mean[name], value, 1 / seen[name])


def _weight_names(trial: Trial) -> set[str]:
    """Return the names of parameters; all other tensors are statistics."""
    return {name for name, tensor in movable_tensors(trial.model).items() if isinstance(tensor, nn.Parameter)}


def _moving(trial: Trial, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a source that have a direction."""
    for name, value in values.items():
        if trial.start[name].is_floating_point():
            yield name, value


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype


def _difference(value: Tensor, start: Tensor) -> Tensor:
    """Return `value - start`, in float32 or better."""
    return value.to(_wide_dtype(start)) - start.to(_wide_dtype(start))


def _loss(trial: Trial) -> float:
    """Return the loss of the model as it is; infinite where it is not finite, so that it is never chosen."""
    try:
        loss = trial.loss()
    except NonFiniteError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def _each_source(trial: Trial) -> Iterator[Mapping[str, Tensor]]:
    """Yield every source, one at a time; raise where there is none, or one that brings nothing."""
    number = 0
    for number, values in enumerate(trial.stream(), start=1):
        _check_source(trial, values, number)
        yield values
    if number == 0:
        raise ConfigError("got no sources, expected at least one")


@contextmanager
def _all_sources(trial: Trial) -> Iterator[Sequence[Mapping[str, Tensor]]]:
    """Map all sources inside the block; raise where there is none, or one that brings nothing."""
    with trial.together() as sources:
        if not sources:
            raise ConfigError("got no sources, expected at least one")
        for number, values in enumerate(sources, start=1):
            _check_source(trial, values, number)
        yield sources


def _check_source(trial: Trial, values: Mapping[str, Tensor], number: int) -> None:
    if not any(name in trial.start for name in values):
        raise IncompatibleSourceError(
            f"source {number} brings none of the {len(trial.start)} tensors of the target ({len(values)} others)"
        )
