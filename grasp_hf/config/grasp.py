"""The settings of a merge."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from .checks import lora_problems, plain_value, training_argument_problems, value_problems
from .methods import METHODS
from .sources import SourceOptions, option_problems

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
    """The settings of a merge: how sources are measured and merged, and how the model is fine-tuned.

    In the formulas, `B` are the weights before the merge, `T` those of the target, `S` those of a source.

    Attributes:
        method: How each source is merged into the target.
            The table `grasp_hf.config.methods.METHODS` has a summary of each method. `"weighted"` keeps a mean of the
            sources, weighted by what their predictions on the labels are worth. `"average"` keeps the plain mean and needs
            no data, unless there is fine-tuning or an `order` other than `"given"`. `"blend"` learns `k` and `t` in each
            unit of `B + k (T - B) + t (S - B)`, starting from the mean.
        unit: Tensors that are merged with one decision.
            `"layer"`: a transformer block or a stage; any other tensor belongs to its module. `"module"`: the tensors
            of one module; a normalisation layer includes its statistics. `"tensor"`: each tensor alone, except that a
            normalisation layer with statistics stays whole. `"parameter"`: each parameter alone; statistics are never
            merged, as in the paper.
        threshold: Cosine of gradients above which `copy` takes a unit; in [-1, 1].
            The cosine must be strictly greater.
        num_batches: Batches of training data that measure each source.
            `copy` takes the mean cosine of the batches. `blend` takes one descent step on the coefficients per batch,
            for each half of the labels, and adds up Fisher information over the batches. `weighted` computes one gradient
            of the target for all sources, over no more batches than the labels fill. `average` uses none.
        accumulate_gradients: Whether `copy` takes one cosine of the summed gradients of all batches.
            The result is the cosine of a single large batch. The sum needs disk space for a second set of gradients.
        batch_size: Samples per batch, in measuring and in fine-tuning.
            `training_arguments` can set another size for fine-tuning.
        coefficient_lr: First step size of Adam on the coefficients of `blend`; in (0, 1].
            The step size falls linearly to 0. Adam moves a coefficient by at most about one step size per batch. One
            source therefore moves a coefficient by at most about `num_batches * coefficient_lr / 2`.
        gate: Undo sources and fine-tunes that make the validation loss worse.
            A source is undone if it harms: if the 95 % interval of the change of the loss lies above 0. The validation
            samples are the evaluation data, and also the labels until the model is fine-tuned on them. A fine-tune trains
            one model on each half of the labels, and keeps the point between the start and their mean that is best on
            held-out labels (or on the evaluation data); see `grasp_hf.teaching.folds`. Without the gate, all labels train
            one model, which is kept as it is. With `blend`, each half of the labels validates the coefficients learned from
            the other half, and the plain mean is merged unless another candidate is better by more than a standard error:
            the mean of the learned coefficients, or the mean weighted by Fisher information (arXiv:2111.09832).
        initial_epochs: Epochs of fine-tuning before the first source.
        finetune_epochs: Epochs of fine-tuning after each source.
        final_epochs: Epochs of fine-tuning after the last source.
            `num_train_epochs` in `training_arguments` replaces those of `initial_epochs`, `finetune_epochs` and
            `final_epochs` that are not 0.
        lora: Arguments of `peft.LoraConfig`, to fine-tune an adapter instead of all weights.
            An example is `{r: 8, target_modules: all-linear}`. The adapter is merged into the model after each
            fine-tune. The head is trained whole. Frozen layers are adapted too, unless `target_modules` leaves them
            out.
        order: Order in which the sources are merged.
            `"given"`: the order of the list. `"loss"`: the source with the lowest loss on the labels (and the evaluation
            data) first. `"rank"`: the source with the largest estimated gain first, to first order in the weights, see
            `GraspMerger.rank`. With `"loss"`, with `"rank"` and with the method `weighted` every source is read twice.
        top: Number of sources to merge, the first ones of `order`; all if left out.
            It needs an `order` other than `"given"`.
        prefetch: Download the next source while the current one is merged.
            The disk then holds at most two sources at a time, otherwise only one.
        accepted_bases: Further base models whose adapters may be merged.
            The names are `org/name` or `org/name@revision`. You declare that these models have the same weights as the
            model that the target started from. The word `quantized` stands for all models that were quantized from it,
            as their cards say.
        source_options: What you say about single sources, as sections by reference.
            The keys are `labels` (the names of its classes by class id, instead of those in its files), `same_tokenizer:
            true` (its tokens have the numbers that they have in the target, so its own tokenizer is not read) and
            `accept` (settings of its config whose difference from the target's you accept, such as
            `text_config.rope_parameters`). In a recipe, the entries of `sources` can hold these keys.
        untie: Whether tied weights, such as those of an embedding and an output layer, become two parameters.
            A source may then change one of them alone. The saved model is larger, and its config says that the weights
            are not tied.
        check: Whether to compare each source with the merge that takes it whole, on one batch.
            The source runs in its own library, transformers or PEFT. A difference is an error. A full source that comes in
            shards, or that two copies of do not fit in the memory, is not compared.
        trust_remote_code: References whose own Python code may run.
            The code defines their configuration and model classes. Read it first.
        seed: Seeds the shuffling of the batches, fine-tuning, and the weights of a new head.
            The fine-tuning after source `k` is seeded with `seed + k`.
        published: Follow the paper arXiv:2606.14900 exactly.
            `GraspConfig.paper` (in a recipe, `preset: paper`) sets this and all other settings of the paper.
        training_arguments: Arguments of `transformers.TrainingArguments` for fine-tuning.
            They override the other settings, such as `batch_size` and the epochs. Paths of checkpoints (`output_dir`),
            `push_to_hub` and tokens are refused.

    Raises:
        ConfigError: A value has the wrong type or is out of range. The error lists all problems.
    """

    method: MethodName = "weighted"
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
    source_options: dict[str, Any] = field(default_factory=dict)
    untie: bool = False
    check: bool = True
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
                if value is False and key.endswith("_strategy"):  # YAML reads the word no as False
                    self.training_arguments[key] = "no"
            problems += training_argument_problems(self.training_arguments)
        if isinstance(self.lora, dict):
            problems += lora_problems(self.lora)
        problems += option_problems(self.source_options)
        problems += [problem for name in ("training_arguments", "lora") if (problem := self._check_writable(name))]
        if problems:
            raise ConfigError("the configuration has problems", problems=problems)

    def _check_writable(self, name: str) -> str | None:
        """Return the problem of a field that cannot be written to the record of a merge, which is JSON."""
        try:
            json.dumps(getattr(self, name))
        except (TypeError, ValueError) as error:
            return f"{name}: a value in it cannot be written to the record of a merge: {error}"
        return None

    def _range_problems(self) -> list[str]:
        """Return a problem for each value that is out of range, or does not fit another value."""
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
                "expected at least 1, and order='loss' or order='rank'",
                self.top is None or (self.top >= 1 and self.order != "given"),
            ),
            (
                "accumulate_gradients",
                "expected False unless method='copy' and published=False",
                not self.accumulate_gradients or (self.method == "copy" and not self.published),
            ),
            ("lora", "expected null with published=True", self.lora is None or not self.published),
            (
                "published",
                "expected False unless method='copy' and unit='parameter'",
                not self.published or (self.method, self.unit) == ("copy", "parameter"),
            ),
        ]
        return [f"{name}: got {getattr(self, name)!r}, {expected}" for name, expected, fits in checks if not fits]

    def options_of(self, reference: str) -> SourceOptions:
        """Return what the user says about a source, by its reference with a revision or without."""
        return SourceOptions.of(reference, self.source_options)

    @property
    def needs_data(self) -> bool:
        """Whether a merge needs training data; only an average in the given order without fine-tuning needs none."""
        epochs = self.initial_epochs or self.finetune_epochs or self.final_epochs
        return METHODS[self.method].needs_data or self.order != "given" or bool(epochs)

    def total_epochs(self, sources: int) -> float:
        """Return the epochs of fine-tuning in a whole merge of `sources` sources."""
        return self.initial_epochs + self.finetune_epochs * min(sources, self.top or sources) + self.final_epochs

    @property
    def learns(self) -> bool:
        """Whether the method learns coefficients, which needs a copy of the weights from before the merge."""
        return METHODS[self.method].learns

    @property
    def finetunes_between(self) -> bool:
        """Whether the model is fine-tuned before the last source."""
        return self.trains(self.initial_epochs) or self.trains(self.finetune_epochs)

    @property
    def compares_alone(self) -> bool:
        """Whether the last fine-tune is compared with one without any source.

        The comparison needs a copy of the weights from before the merge.
        """
        return self.gate and self.trains(self.final_epochs) and not self.finetunes_between

    def trains(self, epochs: float) -> bool:
        """Whether fine-tuning for `epochs` epochs trains at all, given `training_arguments`."""
        asked = self.training_arguments
        return epochs > 0 and (asked.get("num_train_epochs", epochs) > 0 or asked.get("max_steps", 0) > 0)

    def for_part(self, share: float) -> "GraspConfig":
        """Return the configuration for training on a part of the labels, with as many passes over it.

        Args:
            share: Fraction of the labels in the part, in (0, 1].
        """
        steps = self.training_arguments.get("max_steps", 0)
        if steps <= 0 or share == 1:
            return self
        fewer = {"max_steps": math.ceil(steps * share)}
        return dataclasses.replace(self, training_arguments=self.training_arguments | fewer)

    @classmethod
    def paper(cls, **overrides: Any) -> "GraspConfig":
        """Return the settings of the paper arXiv:2606.14900 (GRASP), as its code runs it, for comparison.

        The flaws of that code are reproduced:

        - The target is measured in train mode: dropout is on, and the measurement changes its batch statistics. The
          source is measured in eval mode.
        - A single batch measures a source, and 1e-8 is added to the denominator of the cosine.
        - Parameters are copied one by one, heads included, without the statistics that belong to them.
        - Nothing is undone.

        Fine-tuning uses AdamW with a cosine schedule that steps once per epoch. The epoch with the best accuracy on
        the evaluation data is kept.

        Args:
            overrides: Fields that replace those of the paper. `training_arguments` is merged with the paper's.
        """
        arguments = {**PAPER["training_arguments"], **overrides.pop("training_arguments", {})}  # type: ignore[dict-item]
        return cls(**{**PAPER, "training_arguments": arguments, **overrides})
