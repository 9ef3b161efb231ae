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
    """The settings of a merge: how sources are merged, validated and ordered, and how the model is fine-tuned.

    Attributes:
        method: How a source is merged. `"blend"` learns on the training data, for each unit, how much of the merge so
            far (`T`) and how much of the source (`S`) it takes: `B + k (T - B) + t (S - B)`, where `B` is the model
            that the merge began with. It starts from the mean of all sources. `"average"` keeps the mean of all
            accepted sources, unit by unit: `T + (S - T) / n`. It needs no gradients; in the given order and without
            fine-tuning it needs no data. `"copy"` replaces the units whose gradients in the two models agree.
        unit: Tensors that are decided together. `"layer"` is a transformer block or a stage, and outside of those the
            same as `"module"`. `"module"` is the tensors of one module; a normalisation layer includes its statistics.
            `"tensor"` is each tensor alone, but a normalisation layer stays whole. `"parameter"` is each parameter
            alone; statistics never move, as in the published procedure.
        threshold: `copy` takes the units whose gradient cosine is above this value; in [-1, 1].
        num_batches: Batches of training data that each source is measured on. `average` needs none. `copy` averages
            the cosines of the batches. `blend` makes one descent step on the coefficients for each batch, in each half
            of the labels, and adds up Fisher information.
        accumulate_gradients: `copy` takes one cosine, of the gradients over all batches together. That is the cosine
            of one large batch. It needs disk space for a second set of gradients.
        batch_size: Samples in a batch. It holds for measuring and, unless `training_arguments` says otherwise, for
            fine-tuning.
        coefficient_lr: First step size of Adam on the coefficients of `blend`; in (0, 1]. It falls to 0. Adam moves a
            coefficient by at most about one step for each batch, so `num_batches * coefficient_lr / 2` bounds how far
            one source can pull.
        gate: Undo a transfer that does harm, and keep of a fine-tuning only what lowers the loss of unseen samples. A
            transfer does harm if the loss on the validation samples rises by more than its standard error, or ends
            above the loss before the first source (see `grasp_hf.validation.gate`). The validation samples are the
            evaluation data and, as long as the model was not fine-tuned on them, the labels; each half of the labels
            then validates coefficients that the other labels taught. The mean of all accepted sources is merged, as by
            `average`, unless the mean of the learned coefficients, or a mean weighted by Fisher information
            (arXiv:2111.09832), is ahead of it by more than a standard error.
        initial_epochs: Epochs of fine-tuning before the first source.
        finetune_epochs: Epochs of fine-tuning after each source.
        final_epochs: Epochs of fine-tuning after the last source. `num_train_epochs` in `training_arguments` replaces
            those of the three settings that are not 0.
        lora: Fine-tune a LoRA adapter instead of all weights. The adapter is merged into the model at the end of each
            fine-tuning. The values are arguments of `peft.LoraConfig`, such as `{r: 8, target_modules: all-linear}`.
            The head is trained whole. Frozen layers are adapted too, unless `target_modules` leaves them out.
        order: Which source is merged first. `"given"` keeps the order of the list. `"loss"` begins with the source
            whose own loss on the labels (or on the evaluation data) is lowest. `"rank"` begins with the highest
            first-order gain (see `GraspMerger.rank`). The last two read every source twice.
        top: Merge only this many sources, the first of the order. It does not go with `order="given"`.
        prefetch: Fetch the next source while one is merged. At most two sources are then on the disk, otherwise one.
        accepted_bases: Base models of adapters that you declare to be the same as the target's. Each is a name,
            `org/name` or `org/name@revision`, that an adapter gives as its base although the target started from
            another.
        trust_remote_code: Models whose own Python code may run. Each is a reference; the code is that of their
            configuration and model classes. Read it first.
        seed: Seeds the shuffling of the batches. Fine-tuning after source k is seeded with `seed + k`.
        published: Follow arXiv:2606.14900 to the letter. `GraspConfig.paper` (in a recipe, `preset: paper`) sets this
            and everything that belongs to it.
        training_arguments: Arguments of `transformers.TrainingArguments` for fine-tuning. They override the other
            settings. Paths of checkpoints (`output_dir`), `push_to_hub` and tokens are refused.

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
