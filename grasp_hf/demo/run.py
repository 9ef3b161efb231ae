"""The main job on real handwriting, beside the controls that say whether it was worth it."""

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
Score = tuple[str, float]  # what was tried, and its accuracy on the test images


def run_demo(directory: Path, *, seed: int = 0) -> str:
    """Build a small world of real digits in `directory`, merge its models and return a table of all methods.

    The merge is what `grasp-hf merge recipe.yaml` does in that folder; its result is left in `merged/`.

    Args:
        directory: New or empty folder, or one of an earlier demo with the same seed, whose models are used again.
        seed: Seed of the world and of every method.

    Raises:
        OutputExistsError: The folder holds something else.
    """
    began = time.perf_counter()
    with _one_thread():
        _build(directory, seed)
        recipe = Recipe.from_yaml(directory / RECIPE_FILE, [f"seed={seed}"])
        merger, sources, data = prepare(recipe)
        logger.info("\nevery source as it is")
        alone = _sources_alone(recipe.locate("base"), sources, data)
        logger.info("\nmerging %d sources with %d labels", len(sources), len(data.train))
        merger.merge(sources, **data.keywords())
        merger.save_pretrained(directory / "merged")
        ours = ("grasp_hf, default", merger.evaluate(data.test, data_collator=data.collator)["accuracy"])
        rate = recipe.config.training_arguments["learning_rate"]
        paper = GraspConfig.paper(seed=seed, training_arguments={"learning_rate": rate})
        logger.info("\npublished method (arXiv:2606.14900) with the same labels, steps and learning rate")
        published = ("published method, from the base", _accuracy(recipe.locate("base"), paper, sources, data))
        scores = [*alone, *_fine_tuning_alone(recipe, sources, data), published, ours]
    minutes = (time.perf_counter() - began) / 60
    return f"\n{_table(scores, data)}\n\n{_verdict(scores, data)}\n{directory / 'merged'} holds the merged model ({minutes:.1f} min)."


def _build(directory: Path, seed: int) -> None:
    marker = directory / "world.yaml"
    if directory.exists() and not directory.is_dir():
        raise OutputExistsError(f"'{directory}' is a file; name a new folder with --output")
    if directory.exists() and any(directory.iterdir()):
        if not marker.exists() or yaml.safe_load(marker.read_text()) != {"seed": seed}:
            raise OutputExistsError(
                f"'{directory}' holds something else, or the demo of another seed; name a new folder with --output"
            )
        logger.info("using the models in %s again", directory)
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
    scores = []
    alone = GraspConfig(method="average", order="given", gate=False, final_epochs=0)
    for source in sources:
        accuracy = _accuracy(base, alone, [source], data)
        name = f"source {Path(source).name} ({locate(source).kind})"
        logger.info("%s: %.3f of the test images right", name, accuracy)
        scores.append((name, accuracy))
    return scores


def _fine_tuning_alone(recipe: Recipe, sources: list[str], data: Samples) -> list[Score]:
    """Fine-tune the base, and the full source with the lowest held-out loss, for as many steps as the whole merge."""
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
        (f"fine-tuning {Path(best).name} alone (best on validation)", _accuracy(best, budget, [], data)),
    ]


def _accuracy(start: str, config: GraspConfig, sources: list[str], data: Samples) -> float:
    merger = GraspMerger.from_pretrained(start, config=config)
    merger.merge(sources, **data.keywords())
    return merger.evaluate(data.test, data_collator=data.collator)["accuracy"]


def _table(scores: list[Score], data: Samples) -> str:
    measure = f"accuracy on {len(data.test)} test images, ± standard error"
    rows = [
        {"": name, measure: f"{accuracy:.3f} ± {_standard_error(accuracy, data):.3f}"} for name, accuracy in scores
    ]
    return markdown_table(rows)


def _verdict(scores: list[Score], data: Samples) -> str:
    ours = scores[-1][1]
    name, best = max(scores[:-1], key=lambda score: score[1])
    if ours == best:
        return f"grasp_hf and {name} are first, equally good. One run: try other seeds with --seed."
    spread = 2 * math.hypot(_standard_error(ours, data), _standard_error(best, data))
    gap = f"{100 * abs(ours - best):.1f} points {'above' if ours > best else 'below'}"
    text = f"grasp_hf is first, {gap} {name}" if ours > best else f"First is {name}; grasp_hf is {gap} it"
    certainty = "more than" if abs(ours - best) > spread else "less than"
    return (
        f"{text}, {certainty} two standard errors ({100 * spread:.1f} points). One run: try other seeds with --seed."
    )


def _standard_error(accuracy: float, data: Samples) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / len(data.test))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for models this small, threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
