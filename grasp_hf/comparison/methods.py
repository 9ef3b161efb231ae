"""The rows of a comparison: controls, existing methods and ours, on the same labels with the same fine-tuning."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from accelerate import Accelerator

from ..config.grasp import GraspConfig
from ..errors import ConfigError
from ..models.finetune import finetune_
from ..validation.losses import SampleLosses, sample_losses
from .ensembles import ensemble_losses, logit_fusion, stacked_losses
from .mixtures import adapter_targets, mixture_, pearl_
from .soups import average_, cocktail_, fisher_average_, greedy_soup_
from .task_vectors import dare_, gradfix_, task_arithmetic_, ties_
from .workbench import COMMON, Workbench

Group = Literal["control", "existing", "ours"]

WITH_GATE = ", with our gate"  # ends the titles of rows whose fine-tuning goes through our gate


def keep_base(bench: Workbench) -> None:
    """Leave the base model unchanged."""
    bench.restore_base()


def load_source(bench: Workbench, source: str) -> None:
    """Take one source unchanged."""
    bench.load_source_weights(source)


def load_best_source(bench: Workbench) -> None:
    """Take the source with the lowest loss on the labels."""
    losses = {}
    for source in bench.sources:
        bench.load_source_weights(source)
        losses[source] = bench.selection_loss()
    bench.load_source_weights(min(losses, key=losses.__getitem__))


def run_paper(bench: Workbench, threshold: float) -> None:
    """Run the loop of arXiv:2606.14900 from the first source.

    It fine-tunes all weights, as in the paper, but with the batch size and the learning rate of the recipe, as every
    method. Each of its fine-tunings ends with a whole step, so it makes up to one more step per source than the
    others.

    Args:
        bench: The workbench.
        threshold: Cosine above which a layer is copied: 1 copies nothing, -1 everything.
    """
    epochs = bench.epochs / len(bench.sources)
    settings = bench.settings(name for name in COMMON if name != "lora")
    if bench.generates:  # the paper keeps the epoch with the best accuracy, which a language model lacks
        settings["training_arguments"] = {"metric_for_best_model": "loss", **settings["training_arguments"]}
    config = GraspConfig.paper(threshold=threshold, initial_epochs=epochs, finetune_epochs=epochs, **settings)
    first, *others = bench.sources
    bench.load_source_weights(first)
    bench.merge(config, others)


def finetune_with_gate(start: Callable[[Workbench], None], bench: Workbench) -> None:
    """Run `start`, and fine-tune its result through the gate, as ours does; the gate needs as many steps again."""
    start(bench)
    bench.finetune(bench.epochs, gate=True)


def run_ours(bench: Workbench, **settings: Any) -> None:
    """Merge by the recipe, with the settings of a variant."""
    bench.restore_base()
    bench.merge_by_recipe(settings)


def run_placebo(bench: Workbench) -> None:
    """Merge by the recipe, with a placebo in place of each source."""
    bench.restore_base()
    bench.merge_by_recipe({}, placebo=True)


def run_lora_on_labels(bench: Workbench, rank: int = 8, learning_rate: float = 1e-3) -> None:
    """Fine-tune the base by a LoRA adapter of its linear layers, and its whole head.

    As in PEARL's row, the learning rate is 1e-3 and the scale of the adapter is 1.
    """
    with bench.open_inputs() as inputs:
        lora = {"r": rank, "lora_alpha": rank, **adapter_targets(inputs.model)}
        inputs.finetune(bench.epochs, bench.seed, lora, learning_rate)


def run_existing(bench: Workbench, method: Callable[..., None], **settings: Any) -> None:
    """Run an existing method with settings of its own."""
    with bench.open_inputs() as inputs:
        method(inputs, **settings)


def run_mixture(bench: Workbench, per_layer: bool) -> None:
    """Learn a mixture of task vectors in as many steps as fine-tuning has, or in AdaMerging's 500 if there is none.

    AdaMerging's learning rate of 0.001 hardly moves a coefficient in 32 steps. Here it is at least 0.01, and large
    enough for a coefficient to cross its whole range.
    """
    arguments = bench.config.training_arguments
    batches = math.ceil(len(bench.data.train) / arguments.get("per_device_train_batch_size", bench.config.batch_size))
    steps = math.ceil(bench.epochs * math.ceil(batches / arguments.get("gradient_accumulation_steps", 1)))
    settings = {"steps": steps, "lr": max(1e-2, 1 / steps)} if steps else {}
    run_existing(bench, mixture_, per_layer=per_layer, **settings)


def run_pearl(bench: Workbench) -> None:
    """Train each of PEARL's adapters for its three epochs, or for fewer if fine-tuning has fewer, but not for 0."""
    run_existing(bench, pearl_, epochs=min(3, bench.epochs) or 3)


def run_taught(bench: Workbench) -> None:
    """Merge by the recipe, with the training samples that the run does not label as unlabelled inputs."""
    bench.restore_base()
    bench.merge_by_recipe({}, taught=True)


def evaluate_stacked(bench: Workbench) -> SampleLosses:
    """Return the losses of the sources' predictions, stacked by the labels, on the test samples; nothing is trained."""
    with bench.open_inputs() as inputs:
        return stacked_losses(inputs, bench.selection_samples, bench.data.test, bench.collator, bench.config)


def evaluate_ensemble(bench: Workbench) -> SampleLosses:
    """Return the losses of the mean of all sources' probabilities on the test samples."""
    with bench.open_inputs() as inputs:
        return ensemble_losses(inputs, bench.data.test, bench.collator, Accelerator(), bench.config.batch_size)


def evaluate_fusion(bench: Workbench) -> SampleLosses:
    """Return the losses on the test samples of all sources, jointly trained on the mean of their logits.

    Raises:
        ConfigError: The recipe fine-tunes by LoRA.
    """
    if bench.config.lora is not None:
        raise ConfigError(
            "lora: got settings, but Multi-Source fusion trains all weights of all sources; leave out `lora` to run it"
        )
    with bench.open_inputs() as inputs:
        model = logit_fusion(inputs)
    finetune_(
        model,
        bench.data.train,
        bench.data.validation,
        bench.collator,
        bench.config,
        epochs=bench.epochs,
        seed=bench.seed,
        directory=bench.directory,
    )
    model.eval()
    return sample_losses(model, bench.data.test, bench.collator, Accelerator(), bench.config.batch_size)


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        title: Its name in tables and figures.
        group: Whether it is a control, an existing method or ours.
        run: Leaves its result in the model of the workbench. A method that predicts with several models returns its
            losses on the test samples instead.
        memory: Private memory that merging takes, in sizes of the model.
        finetuned: Whether its result is fine-tuned afterwards. Otherwise it fine-tunes by itself, or not at all.
        sources: Number of sources that it needs at once, in memory or on the disk.
        needs_unlabeled: Whether it is left out of a run whose labels are all training samples.
    """

    title: str
    group: Group
    run: Callable[[Workbench], SampleLosses | None]
    memory: str = "1"
    finetuned: bool = True
    sources: Literal["1", "K"] = "1"
    needs_unlabeled: bool = False


def _existing_row(title: str, method: Callable[..., None], sources: Literal["1", "K"] = "1") -> Method:
    return Method(title, "existing", partial(run_existing, method=method), sources=sources)


def _mixture_row(title: str, *, per_layer: bool) -> Method:
    return Method(title, "existing", partial(run_mixture, per_layer=per_layer), sources="K")


def _gated_mixture_row(title: str, *, per_layer: bool) -> Method:
    run = partial(finetune_with_gate, partial(run_mixture, per_layer=per_layer))
    return Method(title + WITH_GATE, "existing", run, finetuned=False, sources="K")


def _gated_row(title: str, start: Callable[[Workbench], None]) -> Method:
    return Method(title + WITH_GATE, "control", partial(finetune_with_gate, start), finetuned=False)


def _paper_row(title: str, group: Group, *, threshold: float, memory: str = "1") -> Method:
    return Method(title, group, partial(run_paper, threshold=threshold), memory, finetuned=False)


METHODS = {  # records of comparisons name methods by these keys
    "base": Method("base model", "control", keep_base),
    "best-source": Method("best source on the labels", "control", load_best_source),
    "average": Method("average of all (uniform soup)", "control", partial(run_existing, method=average_)),
    "base-line": _gated_row("base model", keep_base),
    "best-source-line": _gated_row("best source", load_best_source),
    "average-line": _gated_row("average of all", partial(run_existing, method=average_)),
    "lora-labels": Method("LoRA on the labels", "control", run_lora_on_labels, finetuned=False),
    "placebo": Method("ours with placebo sources", "control", run_placebo, finetuned=False),
    "loop-nothing": _paper_row("the paper's loop, nothing copied", "control", threshold=1.0),
    "loop-all": _paper_row("the paper's loop, everything copied", "control", threshold=-1.0),
    "ensemble": Method("ensemble of all", "existing", evaluate_ensemble, "1 (K to predict)", finetuned=False),
    "stacked": Method(
        "stacked predictions, untrained", "existing", evaluate_stacked, "1 (K to predict)", finetuned=False
    ),
    "fusion": Method(
        "Multi-Source fusion", "existing", evaluate_fusion, "4 K (K to predict)", finetuned=False, sources="K"
    ),
    "pearl": Method("PEARL, with trained adapters", "existing", run_pearl),
    "lm-cocktail": _existing_row("LM-Cocktail", cocktail_),
    "greedy-soup": _existing_row("greedy soup", greedy_soup_, "K"),
    "task-arithmetic": _existing_row("task arithmetic", task_arithmetic_),
    "ties": _existing_row("TIES", ties_, "K"),
    "dare": _existing_row("DARE", dare_, "K"),
    "fisher": _existing_row("Fisher-weighted average", fisher_average_),
    "lorahub": _mixture_row("mixture by source (as LoraHub)", per_layer=False),
    "adamerging": _mixture_row("mixture by layer (as AdaMerging)", per_layer=True),
    "lorahub-line": _gated_mixture_row("mixture by source", per_layer=False),
    "adamerging-line": _gated_mixture_row("mixture by layer", per_layer=True),
    "gradfix": _existing_row("GradFix", gradfix_),
    "published": _paper_row("GRASP as in the paper", "existing", threshold=0.3, memory="1 (paper's code: 6)"),
    "taught": Method("grasp_hf, with unlabelled inputs", "ours", run_taught, finetuned=False, needs_unlabeled=True),
    "ours": Method("grasp_hf, as in the recipe", "ours", run_ours, finetuned=False),
}
