"""The Fisher information of a model's parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..models.batches import IGNORED, Batch, batch_loss, class_terms, labelled_terms, predicts_next
from ..models.gradients import gradient_pass, preserved_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 1024  # rows of logits for which labels are drawn at once
LEAST_FISHER = 1e-30  # far below any Fisher information that counts, far above the smallest float32


def fisher_(
    buffer: Mapping[str, Tensor],
    model: PreTrainedModel,
    batches: Sequence[Batch],
    names: Collection[str],
    *,
    seed: int,
) -> None:
    """Change `buffer`: write the diagonal Fisher information of `model` in eval mode, at the inputs of `batches`.

    The Fisher information of a parameter is the expected square of `d log p(y | x)`, with `y` drawn from the model's own
    predictions `p`. True labels would favour a model that fits them worse. The gradients of single terms are independent
    and have the mean 0. So the square of the summed gradient of a batch estimates the sum of their squares, without a pass
    per sample. The estimate is right on average, but noisy: it says little about a single element, and two equal models
    do not get equal weights there. A tensor without a gradient has a Fisher information of 0.

    Args:
        buffer: One tensor per name, of the shape of that parameter.
        model: The model; comes back unchanged.
        batches: Labelled batches. The labels only say which terms are ignored.
        names: Tensors to measure; a tensor that is not a parameter has no gradient.
        seed: Seeds the labels that are drawn.

    Raises:
        DataError: The labels are not classes.
        NonFiniteError: A loss, or the Fisher information of a parameter, is NaN or infinite.
    """
    for name in names:
        buffer[name].zero_()
    with preserved_state(model), torch.random.fork_rng():
        model.eval()
        torch.manual_seed(seed)
        for batch in batches:
            weight = labelled_terms(model, batch)

            def square(name: str, gradient: Tensor, weight: int = weight) -> None:
                if name in names:
                    gradient = gradient.to(buffer[name].device, buffer[name].dtype)
                    buffer[name].addcmul_(gradient, gradient, value=float(weight) ** 2)

            gradient_pass(model, _draw_labels(model, batch), square)
    for name in names:
        if not torch.isfinite(buffer[name]).all():
            raise NonFiniteError(f"the Fisher information of {name} is NaN or infinite; expected finite numbers")


@torch.no_grad()
def _draw_labels(model: Any, batch: Batch) -> Batch:
    """Return `batch` with each label drawn from the predictions of `model`; ignored labels stay ignored."""
    _, output = batch_loss(model, batch)
    logits, _ = class_terms(model, output.get("logits"), batch.get("labels"))
    labels = batch["labels"].clone()
    drawn_for = labels[:, 1:] if predicts_next(model) else labels
    # A few rows at a time because vocabularies are large, and on the CPU so that every device draws the same labels.
    drawn = [torch.multinomial(rows.softmax(-1).cpu(), 1) for rows in logits.split(ROWS)]
    drawn_for.copy_(
        torch.where(drawn_for == IGNORED, drawn_for, torch.cat(drawn).view_as(drawn_for).to(labels.device))
    )
    drawn_batch = {**batch, "labels": labels}
    if model.can_generate() and model.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        # The labels were drawn for the prefix of the true labels. From the drawn ones, the model would make another.
        drawn_batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return drawn_batch
