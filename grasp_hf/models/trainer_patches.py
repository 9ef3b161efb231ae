"""Our changes to the behaviour of `transformers.Trainer`, and the reasons for them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..errors import ConfigError, GraspError
from ..internals import forget_original_forward_, forward_hooks, restore_forward_hooks_


@contextmanager
def only_weights_changed(model: PreTrainedModel) -> Iterator[None]:
    """Undo after the block what the Trainer and PEFT change on a model besides its weights.

    The Trainer sets `use_cache` in the model's configuration. It leaves an autocast wrapper, which would cast later
    gradient passes, and after an interrupt its hooks. PEFT sets `tie_word_embeddings` to false in the configuration,
    and leaves hooks if activations are checkpointed.
    """
    forward = vars(model).get("forward")
    configs = [(config, dict(vars(config))) for config in (model.config, model.config.get_text_config())]
    hooks = {module: forward_hooks(module) for module in model.modules()}
    try:
        yield
    finally:
        forget_original_forward_(model)
        vars(model).pop("forward", None)
        if forward is not None:
            vars(model)["forward"] = forward
        for config, values in configs:
            vars(config).clear()
            vars(config).update(values)
        for module, own_hooks in hooks.items():
            restore_forward_hooks_(module, own_hooks)


@contextmanager
def trainer_refusals() -> Iterator[None]:
    """Raise `ConfigError` if the Trainer refuses `training_arguments`, or a package that they need is missing."""
    try:
        yield
    except GraspError:
        raise
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"training_arguments: {error}") from error


class WholeEvaluationTrainer(Trainer):
    """A Trainer whose `dataloader_drop_last` drops training samples only, never evaluation samples."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of the evaluation samples; it keeps a last batch that is not full."""
        drops = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops


BUFFERS = "buffers.pt"


class EpochStatistics(TrainerCallback):
    """Keeps the buffers, such as BatchNorm statistics, beside each checkpoint; the checkpoint of an adapter lacks them."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the buffers of this checkpoint."""
        torch.save(
            [buffer.cpu() for buffer in kwargs["model"].buffers()], _checkpoint(args, state.global_step) / BUFFERS
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the buffers of the best epoch."""
        if args.load_best_model_at_end and state.best_global_step:
            restore_buffers_(kwargs["model"], _checkpoint(args, state.best_global_step))


class KeepCheckpoints(TrainerCallback):
    """Asks for a checkpoint at the end of an epoch, and reports each one that is complete.

    Args:
        keep: Called with the folder of each checkpoint.
        seconds: Least time between two checkpoints of a training that has no other reason for one.
        resumed: The checkpoint that the training goes on from.
    """

    def __init__(self, keep: Callable[[Path], None], seconds: float, resumed: Path | None) -> None:
        self._keep, self._seconds, self._resumed = keep, seconds, resumed
        self._last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the buffers of the checkpoint."""
        if self._resumed is not None:
            restore_buffers_(kwargs["model"], self._resumed)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint if the last one is too old."""
        if time.monotonic() - self._last >= self._seconds and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the checkpoint."""
        self._keep(_checkpoint(args, state.global_step))
        self._last = time.monotonic()


def keep_resumable_(arguments: TrainingArguments, *, evaluates: bool) -> None:
    """Change `arguments` so that checkpoints hold all that a training needs to go on.

    With evaluation data every epoch keeps one, because the Trainer knows the best epoch only by its checkpoints.
    """
    arguments.save_only_model = False
    arguments.save_total_limit = 2  # the best or the one before, and the last
    if evaluates and arguments.save_strategy == "best":
        arguments.save_strategy = type(arguments.save_strategy)("epoch")


def restore_buffers_(model: Any, checkpoint: Path) -> None:
    """Change the buffers of `model` to those that `EpochStatistics` saved beside a checkpoint, if it did."""
    path = checkpoint / BUFFERS
    if path.exists():
        for buffer, value in zip(model.buffers(), torch.load(path, weights_only=True), strict=True):
            buffer.copy_(value)


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}")


class TrainingProgress(TrainerCallback):
    """One progress bar, on a terminal or in a notebook, that disappears at the end."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._bar = tqdm(total=state.max_steps, desc="fine-tuning", unit="step", leave=False, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar by one step."""
        self._bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._bar.close()
