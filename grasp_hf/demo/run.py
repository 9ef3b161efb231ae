"""Runs the demo: one merge of models of handwriting, and controls that show its benefit."""

import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ..config.grasp import GraspConfig
from ..config.recipe import Recipe
from ..data.samples import Samples
from ..errors import OutputExistsError
from ..hub.download import locate
from ..merger import GraspMerger
from ..record.text import markdown_table
from ..runs.prepare import prepare
from .digits import build_world

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
SEEDS = "This is one run; try other seeds with --seed."
Score = tuple[str, float]  # name of a method, and its accuracy on the test images


def run_demo(directory: Path, *, seed: int = 0) -> str:
    """Make models of handwritten digits in `directory`, merge them, and return a table of all methods as text.

    The merge is that of `grasp-hf merge recipe.yaml` in that folder; the merged model is in `merged/`.

    Args:
        directory: New or empty folder, or the folder of an earlier demo with the same seed; its models are used again.
        seed: Seeds the data, the models and every method.

    Raises:
        OutputExistsError: The folder holds something else.
        GraspError: scikit-learn or mlxtend is not installed.
    """
    began = time.perf_counter()
    with _one_thread():
        _make_world(directory, seed)
        recipe = Recipe.from_yaml(directory / RECIPE_FILE, [f"seed={seed}"])
        merger, sources, data = prepare(recipe)
        logger.info("\nevery source alone")
        alone = _sources_alone(recipe.locate("base"), sources, data)
        logger.info("\nmerging %d sources with %d labels", len(sources), len(data.train))
        merger.merge(sources, **data.keywords())
        merger.save_pretrained(directory / "merged")
        ours = ("grasp_hf, default", merger.evaluate(data.test, data_collator=data.collator)["accuracy"])
        rate = recipe.config.training_arguments["learning_rate"]
        paper = GraspConfig.paper(seed=seed, training_arguments={"learning_rate": rate})
        logger.info("\nthe method of the paper (arXiv:2606.14900) with the same labels, steps and learning rate")
        by_paper = ("the paper's method, from the base", _accuracy(recipe.locate("base"), paper, sources, data))
        scores = [*alone, *_fine_tuning_alone(recipe, sources, data), by_paper, ours]
    minutes = (time.perf_counter() - began) / 60
    where = f"The merged model is in {directory / 'merged'} ({minutes:.1f} min)."
    return f"\n{_table(scores, data)}\n\n{_verdict(scores, data)}\n{where}"


def _make_world(directory: Path, seed: int) -> None:
    """Write the data and the models, or check that the folder has those of the same seed."""
    marker = directory / "world.yaml"
    if directory.exists() and not directory.is_dir():
        raise OutputExistsError(f"'{directory}' is a file; name a new folder with --output")
    if directory.exists() and any(directory.iterdir()):
        if not marker.exists() or yaml.safe_load(marker.read_text()) != {"seed": seed}:
            raise OutputExistsError(
                f"'{directory}' holds something else, or a demo with another seed than {seed}; name a new folder with "
                "--output"
            )
        logger.info("using the existing models in %s", directory)
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}-", dir=directory.parent) as name:
        world = Path(name) / "world"
        build_world(world, seed=seed)
        (world / marker.name).write_text(yaml.safe_dump({"seed": seed}))
        if directory.exists():
            directory.rmdir()
        world.rename(directory)


def _sources_alone(base: str, sources: list[str], data: Samples) -> list[Score]:
    """Return the score of each source without fine-tuning."""
    scores = []
    alone = GraspConfig(method="average", order="given", gate=False, final_epochs=0)
    for source in sources:
        accuracy = _accuracy(base, alone, [source], data)
        name = f"source {Path(source).name} ({locate(source).kind})"
        logger.info("%s: accuracy %.3f on the test images", name, accuracy)
        scores.append((name, accuracy))
    return scores


def _fine_tuning_alone(recipe: Recipe, sources: list[str], data: Samples) -> list[Score]:
    """Fine-tune the base, and the full source with the lowest validation loss, in as many steps as the merge has."""
    config = recipe.config
    epochs = config.total_epochs(len(sources))
    budget = replace(config, initial_epochs=epochs, gate=False)
    losses = {
        source: GraspMerger.from_pretrained(source).evaluate(data.validation, data_collator=data.collator)["loss"]
        for source in sources
        if locate(source).kind == "full"
    }
    best = min(losses, key=losses.__getitem__)
    logger.info("\nfine-tuning alone, %g epochs", epochs)
    return [
        ("fine-tuning the base alone", _accuracy(recipe.locate("base"), budget, [], data)),
        (f"fine-tuning {Path(best).name} alone, the best source", _accuracy(best, budget, [], data)),
    ]


def _accuracy(start: str, config: GraspConfig, sources: list[str], data: Samples) -> float:
    """Merge `sources` into the model `start`, and return the accuracy on the test images."""
    merger = GraspMerger.from_pretrained(start, config=config)
    merger.merge(sources, **data.keywords())
    return merger.evaluate(data.test, data_collator=data.collator)["accuracy"]


def _table(scores: list[Score], data: Samples) -> str:
    measure = f"accuracy on {len(data.test)} test images ± standard error"
    rows = [
        {"": name, measure: f"{accuracy:.3f} ± {_standard_error(accuracy, data):.3f}"} for name, accuracy in scores
    ]
    return markdown_table(rows)


def _verdict(scores: list[Score], data: Samples) -> str:
    """Return sentences that compare the last score, ours, with the best other one."""
    ours = scores[-1][1]
    name, best = max(scores[:-1], key=lambda score: score[1])
    if ours == best:
        return f"grasp_hf and {name} are equally good.\n{SEEDS}"
    points, spread = 100 * abs(ours - best), 200 * math.hypot(_standard_error(ours, data), _standard_error(best, data))
    if ours > best:
        text = f"grasp_hf is best, {points:.1f} points above {name}."
    else:
        text = f"{name} is best; grasp_hf is {points:.1f} points below."
    certainty = "more" if points > spread else "less"
    return f"{text}\nThe difference is {certainty} than two standard errors ({spread:.1f} points).\n{SEEDS}"


def _standard_error(accuracy: float, data: Samples) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / len(data.test))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, because threads of models this small mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
