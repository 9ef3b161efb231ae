"""The existing ways that answer with all models at once; `compare` runs them beside ours."""

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..internals import use_plain_attention_
from ..models.batches import IGNORED, Collator, batch_loss, class_terms
from ..record.entries import Evaluation
from ..tensors.placing import overwrite_, placed
from ..tensors.units import movable_tensors
from .inputs import MethodInputs, each_source


@torch.no_grad()
def ensemble_evaluation(
    inputs: MethodInputs, dataset: Any, collator: Collator, accelerator: Accelerator, batch_size: int
) -> Evaluation:
    """Return `loss` and, for a classifier, `accuracy` in [0, 1] of the mean of the sources' probabilities.

    The loss is the mean negative logarithm of what the sources give the true label (or token) on average. The model
    holds the base's weights before and after.

    Memory: one source at a time; a row of probabilities per sample, or one number per token.

    Raises:
        DataError: The labels are no classes.
    """
    model, tensors, number = inputs.model, movable_tensors(inputs.model), 0
    totals: list[Tensor] = []
    labels: list[Tensor] = []
    for values in each_source(inputs):
        loader = accelerator.prepare_data_loader(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))
        with placed(tensors, values, inputs.start):
            for index, batch in enumerate(loader):
                _, output = batch_loss(model, batch)
                logits, truth = class_terms(model, output["logits"], batch["labels"])
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
        use_plain_attention_(config)  # there is no attention outside of the members
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
        terms, truth = class_terms(self, logits, labels)
        loss = cross_entropy(
            terms, truth, ignore_index=IGNORED, reduction="mean" if num_items_in_batch is None else "sum"
        )
        return type(outputs[0])(loss=loss if num_items_in_batch is None else loss / num_items_in_batch, logits=logits)


def logit_fusion(inputs: MethodInputs) -> LogitFusion:
    """Return a `LogitFusion` of the sources, each a copy of the base with a source's weights, in eval mode.

    Memory: K P, private.
    """
    members = []
    for values in each_source(inputs):
        member = deepcopy(inputs.model)
        overwrite_(movable_tensors(member), values)
        members.append(member)
    return LogitFusion(inputs.model.config, members).eval()
