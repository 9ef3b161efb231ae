"""The settings of a merge."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from .checks import lora_problems, plain_value, training_argument_problems, value_problems
from .methods import METHODS

PAPER = {
    "method": "copy",
    "unit": "parameter",
    "threshold": 0.3,
    "num_batches": 1,
    "batch_size": 32,
    "gate": False,
    "order": "given",
    "initial_epochs": 3,
    "finetune_epochs": 3,
    "final_epochs": 0,
    "published": True,
    "training_arguments": {
        "learning_rate": 5.0e-5,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "metric_for_best_model": "accuracy",
    },
}


if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


@dataclass(frozen=True, kw_only=True)
class GraspConfig:
    """How each source is measured, transferred and followed by fine-tuning.

    Attributes:
        method: `"blend"` learns on the training data how much of the target and how much of the source each unit takes,
            counted from the weights that `merge` found, `B + k (T - B) + t (S - B)`, from the mean of all sources on;
            `"average"` keeps the mean of all accepted sources so far, unit by unit, `T + (S - T) / n`, and needs no
            gradients (and in the given order, without fine-tuning, no data); `"copy"` replaces the units whose gradients
            agree.
        unit: Tensors decided together. `"layer"`: a transformer block or a stage, and outside of those as `"module"`.
            `"module"`: the tensors of one module, a normalisation layer with its statistics. `"tensor"`: each tensor
            alone, but a normalisation layer still whole. `"parameter"`: each parameter alone, statistics never moved,
            as published.
        threshold: `copy` takes units whose gradient cosine is strictly greater than this; in [-1, 1].
        num_batches: Batches of training data that each source is measured on, but for an average. `copy` averages the
            cosine of each batch; `blend` makes one descent step on the coefficients per batch, for each half of the labels,
            and adds up Fisher information.
        accumulate_gradients: Let `copy` take the cosine of the gradients over all batches together, which is that of
            one large batch. Needs room for a second set of gradients on disk.
        batch_size: Samples per batch, in measuring and (unless `training_arguments` says otherwise) in fine-tuning.
        coefficient_lr: First step size of Adam on the coefficients of `blend`; it falls to 0. Adam moves a coefficient by at
            most about one step per batch, so `num_batches * coefficient_lr / 2` bounds how far one source can pull.
        gate: Undo a transfer that harms by more than its standard error on the samples that judge it, or ends above the
            loss before the first source, and keep of each fine-tuning only what lowers the loss of samples that it did
            not see (see `grasp_hf.validation.gate`). Judges are the evaluation data and, as long as the model was not fine-tuned
            on them, the labels; each half of those judges coefficients that the other labels taught `blend`. What goes
            in is the mean of all accepted sources, that of `average`, unless the learned coefficients (their mean), or
            a mean weighted by Fisher information (arXiv:2111.09832), are ahead of it by more than a standard error.
        initial_epochs: Epochs of fine-tuning before the first source.
        finetune_epochs: Epochs of fine-tuning after each source.
        final_epochs: Epochs of fine-tuning after the last source. `num_train_epochs` in `training_arguments` replaces
            those of the three that are not 0.
        lora: Fine-tune a LoRA adapter instead of all weights, and merge it into the model at the end of each step:
            arguments of `peft.LoraConfig`, such as `{r: 8, target_modules: all-linear}`. The head is trained whole, and
            frozen layers are adapted too unless `target_modules` leaves them out.
        order: `"given"`; `"loss"`: the source first whose own loss on the labels (or evaluation data) is lowest; or
            `"rank"`: the most promising first, by the first-order gain (see `GraspMerger.rank`). The last two read every
            source twice.
        top: Merge only this many sources, the first in that order; not with `order="given"`.
        prefetch: Bring the following source to this machine while one is merged: at most two are on the disk then, else one.
        accepted_bases: Names (`org/name` or `org/name@revision`) that adapters may give as their base although the
            target started from another: you declare that they are the same weights.
        trust_remote_code: References whose own Python code may run: their configuration and model classes. Read the code
            first.
        seed: Seed of the batches; fine-tuning after source k is seeded with `seed + k`.
        published: Follow arXiv:2606.14900 to the letter, see `paper`.
        training_arguments: Anything that `transformers.TrainingArguments` takes; what stands here wins.

    Raises:
        ConfigError: A value has the wrong type or is out of range; all problems are listed.
    """

    method: MethodName = "blend"
    unit: Literal["layer", "module", "tensor", "parameter"] = "layer"
    threshold: float = 0.3
    num_batches: int = 8
    accumulate_gradients: bool = False
    batch_size: int = 32
    coefficient_lr: float = 0.1
    gate: bool = True
    initial_epochs: float = 0
    finetune_epochs: float = 0
    final_epochs: float = 3
    lora: dict[str, Any] | None = None
    order: Literal["given", "loss", "rank"] = "loss"
    top: int | None = None
    prefetch: bool = True
    accepted_bases: list[str] = field(default_factory=list)
    trust_remote_code: list[str] = field(default_factory=list)
    seed: int = 42
    published: bool = False
    training_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain_value(value))
        problems = value_problems(GraspConfig, vars(self)) or self._range_problems()
        if isinstance(self.training_arguments, dict):
            for key, value in self.training_arguments.items():
                if value is False and key.endswith("_strategy"):  # YAML reads no as that
                    self.training_arguments[key] = "no"
            problems += training_argument_problems(self.training_arguments)
        if isinstance(self.lora, dict):
            problems += lora_problems(self.lora)
        problems += [problem for name in ("training_arguments", "lora") if (problem := self._unwritable(name))]
        if problems:
            raise ConfigError("the configuration has problems", problems=problems)

    def _unwritable(self, name: str) -> str | None:
        """Say which value the record of a merge could not hold."""
        try:
            json.dumps(getattr(self, name))
        except (TypeError, ValueError) as error:
            return f"{name}: a value of it cannot be written to the record of a merge: {error}"
        return None

    def _range_problems(self) -> list[str]:
        epochs = "expected a finite number of 0 or more"
        checks = [
            ("threshold", "expected a cosine in [-1, 1]", -1 <= self.threshold <= 1),
            ("num_batches", "expected at least 1", self.num_batches >= 1),
            ("batch_size", "expected at least 1", self.batch_size >= 1),
            ("coefficient_lr", "expected a number in (0, 1]", 0 < self.coefficient_lr <= 1),
            ("initial_epochs", epochs, 0 <= self.initial_epochs < math.inf),
            ("finetune_epochs", epochs, 0 <= self.finetune_epochs < math.inf),
            ("final_epochs", epochs, 0 <= self.final_epochs < math.inf),
            ("seed", "expected 0 to 2**32 - 1000", 0 <= self.seed <= 2**32 - 1000),
            (
                "top",
                "expected at least 1, and an order other than 'given' with it",
                self.top is None or (self.top >= 1 and self.order != "given"),
            ),
            (
                "accumulate_gradients",
                "expected method='copy' with it, and not published",
                not self.accumulate_gradients or (self.method == "copy" and not self.published),
            ),
            ("lora", "expected none with published", self.lora is None or not self.published),
            (
                "published",
                "expected method='copy' and unit='parameter' with it",
                not self.published or (self.method, self.unit) == ("copy", "parameter"),
            ),
        ]
        return [f"{name}: {expected}, got {getattr(self, name)!r}" for name, expected, fine in checks if not fine]

    @property
    def needs_data(self) -> bool:
        """Whether a merge needs training data: always, but for an average without fine-tuning in the order given."""
        epochs = self.initial_epochs or self.finetune_epochs or self.final_epochs
        return METHODS[self.method].needs_data or self.order != "given" or bool(epochs)

    def total_epochs(self, sources: int) -> float:
        """Return the epochs of fine-tuning in a whole merge of so many sources."""
        return self.initial_epochs + self.finetune_epochs * min(sources, self.top or sources) + self.final_epochs

    @property
    def learns(self) -> bool:
        """Whether coefficients are learned, which needs the weights that a merge began with."""
        return METHODS[self.method].learns

    @property
    def finetunes_between(self) -> bool:
        """Whether the model is fine-tuned before the last source."""
        return self.trains(self.initial_epochs) or self.trains(self.finetune_epochs)

    @property
    def compares_alone(self) -> bool:
        """Whether the fine-tuning at the end is also tried without any source, which needs the weights of the start."""
        return self.gate and self.trains(self.final_epochs) and not self.finetunes_between

    def trains(self, epochs: float) -> bool:
        """Whether fine-tuning that is due for so many epochs does anything."""
        asked = self.training_arguments
        return epochs > 0 and (asked.get("num_train_epochs", epochs) > 0 or asked.get("max_steps", 0) > 0)

    def for_part(self, share: float) -> "GraspConfig":
        """Return the configuration for training on this share of the labels in as many passes over them."""
        steps = self.training_arguments.get("max_steps", 0)
        if steps <= 0 or share == 1:
            return self
        fewer = {"max_steps": math.ceil(steps * share)}
        return dataclasses.replace(self, training_arguments=self.training_arguments | fewer)

    @classmethod
    def paper(cls, **overrides: Any) -> "GraspConfig":
        """Return the procedure of arXiv:2606.14900 (GRASP) as its code runs it, for comparison.

        Reproduced with its flaws: the target is measured in train mode (dropout on, its batch statistics changed by
        the measurement) against a source in eval mode, on a single batch, with 1e-8 added to the denominator of the
        cosine; parameters are copied one by one without the statistics that belong to them, heads included; nothing
        is undone. Fine-tuning is AdamW with a cosine schedule that steps once an epoch, and the epoch with the best
        accuracy on the evaluation data is kept. `overrides` replace single fields.
        """
        arguments = {**PAPER["training_arguments"], **overrides.pop("training_arguments", {})}  # type: ignore[dict-item]
        return cls(**{**PAPER, "training_arguments": arguments, **overrides})
