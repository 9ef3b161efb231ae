"""The methods that a comparison runs, each on the same labels with the same fine-tuning: controls, rivals, ours."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from accelerate import Accelerator

from ..config.grasp import GraspConfig
from ..errors import ConfigError
from ..models.finetune import finetune_
from ..record.entries import Evaluation
from ..validation.losses import sample_losses
from .ensembles import ensemble_evaluation, logit_fusion
from .mixtures import mixture_, pearl_
from .soups import average_, fisher_average_, greedy_soup_
from .task_vectors import dare_, gradfix_, task_arithmetic_, ties_
from .workbench import COMMON, Workbench

Group = Literal["control", "existing", "ours"]


def nothing(bench: Workbench) -> None:
    """Leave the base model as it is."""
    bench.begin()


def source_alone(bench: Workbench, source: str) -> None:
    """Take one source as it is."""
    bench.copy(source)


def best_source(bench: Workbench) -> None:
    """Take the source whose loss on the labels is lowest."""
    losses = {}
    for source in bench.sources:
        bench.copy(source)
        losses[source] = bench.score(bench.labels)["loss"]
    bench.copy(min(losses, key=losses.__getitem__))


def paper(bench: Workbench, threshold: float) -> None:
    """Run the published loop from the first source; a threshold of 1 copies nothing, one of -1 everything.

    It fine-tunes as it was published, all weights, but in batches and at a learning rate of the recipe, as every method
    does; each of its fine-tunings ends with a whole step, so that it makes up to one step per source more than the others.
    """
    each = bench.epochs / len(bench.sources)
    shared = bench.shared(name for name in COMMON if name != "lora")
    if bench.generates:  # it has no accuracy, by which the published loop keeps its best epoch
        shared["training_arguments"] = {"metric_for_best_model": "loss", **shared["training_arguments"]}
    config = GraspConfig.paper(threshold=threshold, initial_epochs=each, finetune_epochs=each, **shared)
    first, *others = bench.sources
    bench.copy(first)
    bench.merge(config, others)


def on_line(start: Callable[[Workbench], None], bench: Workbench) -> None:
    """Fine-tune what `start` leaves in the model as ours is: no further than the labels allow, which costs as much again."""
    start(bench)
    bench.finetune(bench.epochs, gate=True)


def ours(bench: Workbench, **settings: Any) -> None:
    """Merge as the recipe says, with the settings of a variant."""
    bench.begin()
    bench.continue_(settings)


def rival(bench: Workbench, method: Callable[..., None], **settings: Any) -> None:
    """Run an existing method."""
    with bench.inputs() as inputs:
        method(inputs, **settings)


def mixture(bench: Workbench, per_layer: bool) -> None:
    """Learn a mixture of task vectors in as many steps as fine-tuning has, or in AdaMerging's 500 where there is none.

    AdaMerging's steps of 0.001 are too short for coefficients to get anywhere in 32; these are ten times as long at
    least, and long enough for one to cross its whole range.
    """
    arguments = bench.config.training_arguments
    batches = math.ceil(len(bench.data.train) / arguments.get("per_device_train_batch_size", bench.config.batch_size))
    steps = math.ceil(bench.epochs * math.ceil(batches / arguments.get("gradient_accumulation_steps", 1)))
    rival(bench, mixture_, per_layer=per_layer, **({"steps": steps, "lr": max(1e-2, 1 / steps)} if steps else {}))


def pearl(bench: Workbench) -> None:
    """Train PEARL's adapters for its three epochs each, or for as many as fine-tuning has where those are fewer, but not 0."""
    rival(bench, pearl_, epochs=min(3, bench.epochs) or 3)


def ensemble(bench: Workbench) -> Evaluation:
    """Return the scores of the mean of all sources' probabilities."""
    with bench.inputs() as inputs:
        return ensemble_evaluation(inputs, bench.data.test, bench.collator, Accelerator(), bench.config.batch_size)


def fusion(bench: Workbench) -> Evaluation:
    """Return the scores of all sources trained jointly on the mean of their logits."""
    if bench.config.lora is not None:
        raise ConfigError("all weights of all sources are trained jointly; leave out `lora` to run it")
    with bench.inputs() as inputs:
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
    return sample_losses(model, bench.data.test, bench.collator, Accelerator(), bench.config.batch_size).evaluation()


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        title: Its name.
        group: What it stands for.
        run: Leaves its result in the bench's model; one that predicts without a single model returns its scores.
        memory: Private memory it takes to merge, in models.
        sources: How many sources it needs at once, in memory or on the disk.
        finetuned: Whether the budget of fine-tuning is spent on its result; else it has spent it itself, or none.
    """

    title: str
    group: Group
    run: Callable[[Workbench], Evaluation | None]
    memory: str = "1"
    finetuned: bool = True
    sources: Literal["1", "K"] = "1"


def _rival(title: str, method: Callable[..., None], sources: Literal["1", "K"] = "1") -> Method:
    return Method(title, "existing", partial(rival, method=method), sources=sources)


def _mixture(title: str, *, per_layer: bool, line: bool = False) -> Method:
    run = partial(mixture, per_layer=per_layer)
    if line:
        return Method(
            f"{title}, fine-tuned through our gate", "existing", partial(on_line, run), finetuned=False, sources="K"
        )
    return Method(title, "existing", run, sources="K")


def _line(title: str, start: Callable[[Workbench], None]) -> Method:
    return Method(title, "control", partial(on_line, start), finetuned=False)


METHODS = {
    "base": Method("base model", "control", nothing),
    "best-source": Method("best source on the labels", "control", best_source),
    "average": Method("average of all (uniform soup)", "control", partial(rival, method=average_)),
    "base-line": _line("base model, fine-tuned through our gate", nothing),
    "best-source-line": _line("best source, fine-tuned through our gate", best_source),
    "average-line": _line("average of all, fine-tuned through our gate", partial(rival, method=average_)),
    "loop-nothing": Method("published loop, nothing copied", "control", partial(paper, threshold=1.0), "1", False),
    "loop-all": Method("published loop, everything copied", "control", partial(paper, threshold=-1.0), "1", False),
    "ensemble": Method("ensemble of all", "existing", ensemble, "1; K to use", False),
    "fusion": Method("Multi-Source fusion", "existing", fusion, "4 K; K to use", False, "K"),
    "pearl": Method("PEARL, with gradients", "existing", pearl),
    "greedy-soup": _rival("greedy soup", greedy_soup_, "K"),
    "task-arithmetic": _rival("task arithmetic", task_arithmetic_),
    "ties": _rival("TIES", ties_, "K"),
    "dare": _rival("DARE", dare_, "K"),
    "fisher": _rival("Fisher-weighted average", fisher_average_),
    "lorahub": _mixture("learned mixture by source (as LoraHub)", per_layer=False),
    "adamerging": _mixture("learned mixture by layer (as AdaMerging)", per_layer=True),
    "lorahub-line": _mixture("learned mixture by source", per_layer=False, line=True),
    "adamerging-line": _mixture("learned mixture by layer", per_layer=True, line=True),
    "gradfix": _rival("GradFix", gradfix_),
    "published": Method("GRASP as published", "existing", partial(paper, threshold=0.3), "6; ours 1", False),
    "ours": Method("grasp_hf, as the recipe says", "ours", ours, "1", False),
}
