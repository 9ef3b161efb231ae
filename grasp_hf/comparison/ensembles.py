"""Methods that predict with all sources at once: the ensemble, stacked predictions, and Multi-Source Fusion."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..config.grasp import GraspConfig
from ..errors import DataError
from ..internals import use_plain_attention_
from ..models.batches import IGNORED, Collator, batch_loss, class_terms
from ..teaching.pool import mixture_weights
from ..teaching.predictions import Member, fit_teacher
from ..tensors.placing import overwrite_, placed
from ..tensors.units import movable_tensors
from ..validation.losses import SampleLosses, evaluation_losses, losses_of
from .inputs import MethodInputs, stream_checked_sources


@torch.no_grad()
def ensemble_losses(
    inputs: MethodInputs, dataset: Any, collator: Collator, accelerator: Accelerator, batch_size: int
) -> SampleLosses:
    """Return the losses of the mean of the sources' probabilities: the negative log-probabilities of the true labels.

    The model holds the base's weights before and after.

    Memory: one source at a time; a row of probabilities per sample, or one number per token.

    Raises:
        DataError: The labels are not classes.
    """
    model, tensors, number = inputs.model, movable_tensors(inputs.model), 0
    totals: list[Tensor] = []
    labels: list[Tensor] = []
    terms: list[Tensor] = []
    for values in stream_checked_sources(inputs):
        loader = accelerator.prepare_data_loader(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))
        with placed(tensors, values, inputs.base):
            for index, batch in enumerate(loader):
                _, output = batch_loss(model, batch)
                logits, truth = class_terms(model, output["logits"], batch["labels"])
                rows, truth = logits.log_softmax(-1).cpu().double(), truth.cpu()
                counts = (truth != IGNORED).view(len(batch["labels"]), -1).sum(1)
                if batch["labels"].ndim > 1:  # a probability for each token of the vocabulary would not fit in memory
                    rows, truth = rows[truth != IGNORED], truth[truth != IGNORED]
                    rows = rows.gather(1, truth[:, None])
                if number:
                    totals[index] = torch.logaddexp(totals[index], rows)
                else:
                    totals.append(rows)
                    labels.append(truth)
                    terms.append(counts)
        number += 1
    scores, truth, counts = torch.cat(totals) - math.log(number), torch.cat(labels), torch.cat(terms)
    if scores.shape[1] == 1:
        losses = torch.stack([-part.sum() for part in scores.split(counts.tolist())])
        return SampleLosses(losses, counts.double(), losses, None)
    losses = -scores.gather(1, truth[:, None])[:, 0]
    return SampleLosses(losses, counts.double(), losses, scores.argmax(1) == truth)


def stacked_losses(
    inputs: MethodInputs, labels: Any, test: Any, collator: Collator, config: GraspConfig
) -> SampleLosses:
    """Evaluate the sources' predictions, stacked by the labels; see `grasp_hf.teaching.pool`.

    The predictions of classifiers and of regressions form a log pool. Those of language models form a linear pool, with the
    weights of a mixture. The model holds the base's weights before and after.

    Memory: one source at a time; its logits for each sample, or one number per token.

    Args:
        inputs: The model and the sources.
        labels: Samples that the pool is fitted on.
        test: Samples that it is evaluated on.
        collator: Makes batches.
        config: Size of the batches, and seed.

    Raises:
        DataError: The model is no classifier, no regression and no language model.
    """
    own, tests = [], []
    for values in stream_checked_sources(inputs):
        with placed(movable_tensors(inputs.model), values, inputs.base):
            own.append(evaluation_losses(inputs.model, labels, collator, config.batch_size))
            tests.append(evaluation_losses(inputs.model, test, collator, config.batch_size))
    outputs = [losses.outputs for losses in own if losses.outputs is not None]
    if outputs:
        members = [Member(str(k), one.logits.double().numpy()) for k, one in enumerate(outputs)]
        pool = fit_teacher(members, outputs[0], config.seed).pool
        found = [losses.outputs for losses in tests if losses.outputs is not None]
        logits = torch.from_numpy(pool.logits([one.logits.double().numpy() for one in found])).float()
        return losses_of(replace(found[0], logits=logits))
    tokens = [losses.token_losses for losses in own if losses.token_losses is not None]
    if not tokens:
        raise DataError(f"the predictions of a {type(inputs.model).__name__} cannot be stacked")
    weights = mixture_weights(-torch.stack(tokens).numpy())
    likelihoods = torch.stack([-losses.token_losses for losses in tests if losses.token_losses is not None])
    mixed = -(likelihoods + torch.from_numpy(weights).log()[:, None]).logsumexp(0)
    terms = tests[0].terms
    summed = torch.stack([part.sum() for part in mixed.split(terms.long().tolist())])
    return SampleLosses(summed, terms, summed, None)


class LogitFusion(PreTrainedModel):
    """Several models that predict the mean of their logits and are trained jointly: "Multi-Source Fusion".

    The code of arXiv:2606.14900 runs this under the name of parameter averaging, although it averages no parameter. It
    works for classifiers with one class id per sample, and for language models.

    Memory: all members, in private memory; in training also their gradients and optimiser states.

    Args:
        config: The members' configuration, which is copied.
        members: Models of one class.
    """

    def __init__(self, config: PreTrainedConfig, members: Sequence[PreTrainedModel]) -> None:
        self._generates = members[0].can_generate()
        config = deepcopy(config)
        use_plain_attention_(config)  # because only the members have attention layers
        super().__init__(config)
        self.main_input_name = members[0].main_input_name
        self._names = [f"member_{k}" for k in range(len(members))]
        for name, member in zip(self._names, members, strict=True):
            self.add_module(name, member)  # transformers would not find tied weights in a ModuleList
        self.post_init()

    def init_weights(self) -> None:
        """Keep the members' weights."""

    def can_generate(self) -> bool:  # type: ignore[override]
        """Return whether the members can generate; this decides how labels are read."""
        return self._generates

    def forward(
        self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> ModelOutput:
        """Return a member's output class with the mean logits and, given `labels`, their loss.

        Args:
            labels: Class ids `(n,)`, or token ids `(n, length)` of a language model.
            num_items_in_batch: Divides the summed loss, as the Trainer asks; by default the number of labels does.
            **inputs: The other inputs of the members.
        """
        outputs = [self.get_submodule(name)(**inputs) for name in self._names]
        logits = torch.stack([output.logits for output in outputs]).mean(0)
        if labels is None:
            return type(outputs[0])(logits=logits)
        terms, truth = class_terms(self, logits, labels)
        if num_items_in_batch is None:
            loss = cross_entropy(terms, truth, ignore_index=IGNORED)
        else:
            loss = cross_entropy(terms, truth, ignore_index=IGNORED, reduction="sum") / num_items_in_batch
        return type(outputs[0])(loss=loss, logits=logits)


def logit_fusion(inputs: MethodInputs) -> LogitFusion:
    """Return a `LogitFusion` in eval mode; each member is a copy of the base with the weights of one source.

    Memory: K P, private.
    """
    members = []
    for values in stream_checked_sources(inputs):
        member = deepcopy(inputs.model)
        overwrite_(movable_tensors(member), values)
        members.append(member)
    return LogitFusion(inputs.model.config, members).eval()
