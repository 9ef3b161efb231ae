"""Trains and scores any model of the benchmarks."""

import tempfile
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from grasp_hf.models.batches import Collator


def collator_for(model: Any, processor: Any) -> Collator:
    """Return the collator for `model`: for images, for texts, or for texts that are their own labels."""
    if model.can_generate():
        return DataCollatorForLanguageModeling(processor, mlm=False)
    return default_data_collator if model.main_input_name == "pixel_values" else DataCollatorWithPadding(processor)


def train_(
    model: Any, processor: Any, examples: Any, seed: int, *, head_rate: float | None = None, **arguments: Any
) -> None:
    """Train `model` in place in batches of 32.

    Args:
        model: A model with or without an adapter.
        processor: Its tokenizer or image processor.
        examples: Samples with labels, or with tokens for a language model.
        seed: Seeds the order of the samples and dropout.
        head_rate: Learning rate of `model.classifier`; by default that of all weights.
        **arguments: Arguments of `transformers.TrainingArguments`.
    """
    optimizer = None
    if head_rate is not None:
        head = list(model.classifier.parameters())
        body = [weight for weight in model.parameters() if all(weight is not other for other in head)]
        groups: list[dict[str, Any]] = [{"params": body}, {"params": head, "lr": head_rate}]
        optimizer = torch.optim.AdamW(groups, lr=arguments["learning_rate"], weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        )
        trainer = Trainer(
            model,
            settings,
            data_collator=collator_for(model, processor),
            train_dataset=examples,
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def score(model: Any, processor: Any, examples: Any) -> float:
    """Return the accuracy of `model`; for a language model, the negative log-likelihood per token."""
    model.eval()
    total = count = 0.0
    for batch in DataLoader(examples, batch_size=100, collate_fn=collator_for(model, processor)):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        output = model(**batch)
        if model.can_generate():
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(output.loss) * tokens, count + tokens
        else:
            right = output.logits.argmax(-1) == batch["labels"]
            total, count = total + int(right.sum()), count + len(right)
    return total / count
