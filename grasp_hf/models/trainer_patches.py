"""Our changes to the behaviour of `transformers.Trainer`, and the reasons for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback

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


class EpochStatistics(TrainerCallback):
    """Restores the buffers of the best epoch, such as BatchNorm statistics; an adapter's checkpoint lacks them."""

    def __init__(self) -> None:
        self._saved: dict[int, list[Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the buffers of this checkpoint and of the best one so far."""
        self._saved = {step: values for step, values in self._saved.items() if step == state.best_global_step}
        self._saved[state.global_step] = [buffer.clone() for buffer in kwargs["model"].buffers()]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the buffers of the best epoch."""
        if args.load_best_model_at_end and state.best_global_step in self._saved:
            for buffer, value in zip(kwargs["model"].buffers(), self._saved[state.best_global_step], strict=True):
                buffer.copy_(value)


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
