"""Fine-tuning: one run of `transformers.Trainer` that restores all weights of its best epoch."""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import is_liger_kernel_available

from ..config.grasp import GraspConfig
from ..errors import ConfigError, NonFiniteError
from ..internals import (
    average_each_batch_,
    checkpoints_in_runtime_names,
    child_modules,
    forget_adapter_,
    lora_variant,
    normalizes_batches,
    restore_child_modules_,
)
from ..tensors.units import head_tensors, movable_tensors
from .batches import Batch, Collator, is_class_ids
from .classes import quiet_transformers
from .gradients import preserved_randomness, preserved_state
from .mixture import Mixture, block_problems, layer_shape, lora_blocks, lora_layers, mixture_of
from .trainer_patches import (
    EpochStatistics,
    KeepCheckpoints,
    TrainingProgress,
    WholeEvaluationTrainer,
    keep_resumable_,
    only_weights_changed,
    trainer_refusals,
)


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints that a training can go on from, with the optimizer, the schedule and the random state.

    Attributes:
        folder: Folder of the checkpoints.
        last: The checkpoint to go on from; `None` begins anew.
        keep: Called with the folder of each checkpoint as soon as it is complete.
        seconds: Without evaluation data, the end of an epoch keeps a checkpoint if the last one is older than this. With
            evaluation data, every epoch keeps one.
    """

    folder: Path
    last: Path | None
    keep: Callable[[Path], None]
    seconds: float


def finetune_(
    model: PreTrainedModel,
    train_dataset: Any,
    eval_dataset: Any,
    collator: Collator,
    config: GraspConfig,
    *,
    epochs: float,
    seed: int,
    directory: Path,
    loss: Callable[..., Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Change `model` in place by fine-tuning it; with evaluation data, keep the weights of the best epoch.

    Args:
        model: A model in any mode. It is in train mode and on the Trainer's device afterwards.
        train_dataset: Labelled samples.
        eval_dataset: Evaluation data that chooses the best epoch; `None` keeps the last epoch.
        collator: Makes batches from samples and keeps only the model's columns.
        config: The configuration; its `training_arguments` override every value that is set here.
        epochs: Number of epochs; 0 changes nothing.
        seed: Seeds shuffling and dropout.
        directory: Folder for the weights of the best epoch during the training.
        loss: The `compute_loss_func` of the Trainer; `None` stands for the loss of the model.
        checkpoints: Checkpoints to keep and to go on from; `None` keeps none.

    Raises:
        ConfigError: The Trainer refuses `training_arguments`.
        NonFiniteError: The loss or a weight became NaN or infinite.
    """
    if not config.trains(epochs):
        return
    with _prepared_trainer(
        model, train_dataset, eval_dataset, collator, config, epochs, seed, directory, loss, checkpoints
    ) as trainer:
        last = checkpoints and checkpoints.last
        try:
            result = trainer.train(resume_from_checkpoint=str(last) if last else None)
        except ImportError as error:  # for example the package of an optimizer
            raise ConfigError(f"training_arguments: {error}") from error
    if not math.isfinite(result.training_loss):
        raise NonFiniteError(f"fine-tuning ended with the loss {result.training_loss}; try a lower learning_rate")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"fine-tuning made {name} NaN or infinite; try a lower learning_rate")


def check_finetuning(
    model: PreTrainedModel,
    train_dataset: Any,
    eval_dataset: Any,
    collator: Collator,
    config: GraspConfig,
    directory: Path,
) -> None:
    """Raise the `ConfigError` that `finetune_` would raise, before a merge starts; the arguments are the same.

    The function builds a Trainer with its optimizer, schedule and reporting, and discards it. An adapter may leave
    rounding errors in the weights; nothing else changes.
    """
    with (
        preserved_state(model),
        _prepared_trainer(model, train_dataset, eval_dataset, collator, config, 1, config.seed, directory) as trainer,
        trainer_refusals(),
    ):
        trainer.get_train_dataloader()
        trainer.create_optimizer_and_scheduler(num_training_steps=1)
        if trainer.args.gradient_accumulation_steps < 1:
            raise ValueError("gradient_accumulation_steps: expected at least 1")
        if trainer.args.use_liger_kernel and not is_liger_kernel_available():
            raise ImportError("use_liger_kernel needs the package liger-kernel")


@contextmanager
def _prepared_trainer(
    model: PreTrainedModel,
    train_dataset: Any,
    eval_dataset: Any,
    collator: Collator,
    config: GraspConfig,
    epochs: float,
    seed: int,
    directory: Path,
    loss: Callable[..., Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Trainer]:
    """Yield a Trainer for `model`; after the block, merge its LoRA adapter and remove its temporary checkpoints."""
    temporary = tempfile.TemporaryDirectory(prefix="training-", dir=directory, ignore_cleanup_errors=True)
    with (
        nullcontext(str(checkpoints.folder)) if checkpoints else temporary as folder,
        preserved_randomness(),
        only_weights_changed(model),
        quiet_transformers(),
        checkpoints_in_runtime_names(model),
        attach_lora(model, config.lora, seed) as trained,
    ):
        arguments = training_arguments(
            config,
            epochs=epochs,
            seed=seed,
            directory=Path(folder),
            samples=len(train_dataset),
            evaluates=eval_dataset is not None,
            normalizes_batches=normalizes_batches(model),
        )
        if checkpoints:
            keep_resumable_(arguments, evaluates=eval_dataset is not None)
        with trainer_refusals():
            trainer = _build_trainer(
                trained, train_dataset, eval_dataset, collator, arguments, paper=config.published, loss=loss
            )
        if checkpoints:
            trainer.add_callback(KeepCheckpoints(checkpoints.keep, checkpoints.seconds, checkpoints.last))
        yield trainer


@contextmanager
def attach_lora(
    model: PreTrainedModel, lora: dict[str, Any] | None, seed: int
) -> Iterator[PreTrainedModel | PeftModel]:
    """Yield a LoRA adapter on `model` for training, and merge it into the weights of `model` after the block.

    If a mixture is attached to `model`, the adapter becomes one more block of it, with the coefficient 1. All weights of the head are trained, unless some of them are tied. After the block, `model` has its own modules and
    parameters again. If the block raises, the training is lost.

    Args:
        model: The base model; it is changed in place.
        lora: Arguments of `peft.LoraConfig`, with the default `target_modules="all-linear"`. `None` yields `model`
            itself, to train all weights, unless a mixture is attached to it.
        seed: Seeds the adapter's initial weights.

    Raises:
        ConfigError: The adapter does not fit the model, or would train a copy of tied weights, which would be lost; or it
            is no plain LoRA adapter, and `model` has a mixture.
    """
    mixture = mixture_of(model)
    if lora is None and mixture is None:
        yield model
        return
    lora = lora or {}
    children = {module: child_modules(module) for module in model.modules()}
    tensors = movable_tensors(model)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {name for name, p in model.named_parameters(remove_duplicate=False) if holders[id(p)] > 1}
    defaults: dict[str, Any] = {"target_modules": "all-linear"}
    head = set() if model.can_generate() else {name.partition(".")[0] for name in head_tensors(model)}
    if mixture is not None:
        head = {*mixture.whole}
    if any(name.startswith(f"{module}.") for name in tied for module in head):
        head = set()
    excluded = head | {name.rpartition(".")[0] for name in tied if "target_modules" not in lora}
    if head:
        defaults["modules_to_save"] = sorted(head)
    if excluded:
        defaults["exclude_modules"] = rf"({'|'.join(map(re.escape, sorted(excluded)))})(\..*)?"
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                config = LoraConfig(**(defaults | lora))
                if mixture is not None and (problems := block_problems(config, mixture.whole)):
                    raise ConfigError("the fine-tuning of an adapter", problems=[f"lora: {text}" for text in problems])
                adapter = get_peft_model(model, config)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"lora: cannot be applied to a {type(model).__name__}: {error}") from error
        if lost := sorted(tied - dict(model.named_parameters(remove_duplicate=False)).keys()):
            raise ConfigError(
                f"lora: it would train a copy of {lost[0].rpartition('.')[0]}, whose weights are tied to others, and "
                "lose the copy afterwards; leave this module out of target_modules and modules_to_save"
            )
        if mixture is not None:
            _check_layers(adapter)
            yield adapter
            _add_to_mixture_(mixture, adapter)
            return
        yield adapter
        merged = movable_tensors(adapter.merge_and_unload())
        for name, tensor in tensors.items():
            if merged[name] is not tensor:
                tensor.data.copy_(merged[name].data)
    finally:
        forget_adapter_(model)
        for module, own in children.items():
            restore_child_modules_(module, own)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def _check_layers(adapter: PeftModel) -> None:
    """Raise `ConfigError` unless an adapter only makes low-rank changes of linear layers and embeddings."""
    for name, layer in lora_layers(adapter):
        if (variant := lora_variant(layer)) or layer_shape(layer.get_base_layer()) is None:
            raise ConfigError(
                f"lora: it changes {name} by {variant or type(layer).__name__}; expected plain LoRA of linear layers and "
                "embeddings with output='adapter'"
            )


@torch.no_grad()
def _add_to_mixture_(mixture: Mixture, adapter: PeftModel) -> None:
    """Change a mixture: add a trained adapter as a block with the coefficient 1, and take over the trained head."""
    blocks = lora_blocks(adapter)
    for name, factors in blocks.items():
        if not all(torch.isfinite(factor).all() for factor in factors):
            raise NonFiniteError(f"fine-tuning made {name} NaN or infinite; try a lower learning_rate")
    slot = mixture.add(blocks)
    for name in blocks:
        mixture.layers[name].coefficients[slot] = 1.0
    trained = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    for name, tensor in movable_tensors(mixture.model).items():
        if (value := trained.get(f"base_model.model.{name}")) is not None and mixture.is_whole(name):
            tensor.data.copy_(value)


def _build_trainer(
    model: PreTrainedModel | PeftModel,
    train_dataset: Any,
    eval_dataset: Any,
    collator: Collator,
    arguments: TrainingArguments,
    *,
    paper: bool,
    loss: Callable[..., Tensor] | None = None,
) -> Trainer:
    """Return the Trainer for one run; raise `ConfigError` if nothing is trainable or the metric does not exist."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "every parameter is frozen, expected some to train; set initial_epochs, finetune_epochs and final_epochs "
            "to 0, or call requires_grad_(True)"
        )
    by_accuracy = arguments.metric_for_best_model in ("accuracy", "eval_accuracy")
    if by_accuracy and eval_dataset is not None and not _has_classes(model, collator([eval_dataset[0]])):
        raise ConfigError(
            f"a {type(model).__name__} has no accuracy to choose the best epoch by; set metric_for_best_model: loss "
            "in training_arguments"
        )
    trainer = WholeEvaluationTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        compute_metrics=_accuracy if by_accuracy else None,
        preprocess_logits_for_metrics=_predictions if by_accuracy else None,
        compute_loss_func=loss,
        optimizers=_paper_optimizer(model, arguments, len(train_dataset)) if paper else (None, None),
        callbacks=[TrainingProgress(), EpochStatistics()],
    )
    trainer.remove_callback(PrinterCallback)
    if not model.can_generate():
        # The Trainer assumes that a model divides its loss by the samples of all accumulated batches. Most classifiers
        # do not, and their gradients would be gradient_accumulation_steps times too large.
        average_each_batch_(trainer)
    return trainer


def _has_classes(model: PreTrainedModel | PeftModel, batch: Batch) -> bool:
    """Whether a model assigns one of several classes to each sample: only then does it have an accuracy."""
    labels = batch.get("labels")
    return (
        not model.can_generate() and (model.config.num_labels or 0) > 1 and labels is not None and is_class_ids(labels)
    )


def training_arguments(
    config: GraspConfig,
    *,
    epochs: float,
    seed: int,
    directory: Path,
    samples: int,
    evaluates: bool,
    normalizes_batches: bool,
) -> TrainingArguments:
    """Return the Trainer's arguments: no output, one checkpoint with weights only, and the user's arguments on top."""
    keeping_best = {
        "eval_strategy": "epoch",
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_total_limit": 1,
        "save_only_model": True,
    }
    values: dict[str, Any] = {
        "output_dir": str(directory),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_drop_last": config.published,
        **(keeping_best if evaluates else {"save_strategy": "no"}),
        **config.training_arguments,
    }
    for name in ("activation", "gradient"):
        if values.get(f"{name}_checkpointing"):
            values.setdefault(f"{name}_checkpointing_kwargs", {"use_reentrant": False})
    if not evaluates:
        values.pop("metric_for_best_model", None)
    with trainer_refusals():
        arguments = TrainingArguments(**values)
    # A BatchNorm cannot normalize a batch of one sample. A data set below one batch must keep its only batch.
    ends_in_one = normalizes_batches and samples % arguments.train_batch_size == 1
    drops = arguments.dataloader_drop_last or ends_in_one
    arguments.dataloader_drop_last = drops and samples >= arguments.train_batch_size
    return arguments


def _predictions(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the predicted class of each sample; an encoder-decoder returns more outputs after its logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def _paper_optimizer(
    model: PreTrainedModel | PeftModel, arguments: TrainingArguments, samples: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return the paper's AdamW, with the same weight decay on all parameters, and its cosine schedule by epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    steps = max(1, samples // (arguments.train_batch_size * arguments.gradient_accumulation_steps))
    epochs = arguments.num_train_epochs

    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step // steps) / epochs))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
