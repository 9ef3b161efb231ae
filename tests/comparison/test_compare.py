"""The comparison: the same labels and steps for every method, the cases that it refuses, and its tables."""

import json
import math
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from filelock import FileLock
from matplotlib.collections import LineCollection
from PIL import Image
from scipy.stats import ttest_1samp
from transformers import Trainer, ViTImageProcessorPil

import grasp_hf
from grasp_hf.cli import main
from grasp_hf.comparison import fairness
from grasp_hf.comparison import methods as methods_module
from grasp_hf.comparison import run as run_module
from grasp_hf.comparison.figure import comparison_figure
from grasp_hf.comparison.methods import METHODS, Method
from grasp_hf.comparison.noise import decode, half_interval
from grasp_hf.comparison.results import OURS, Comparison, Result, interval
from grasp_hf.comparison.run import code_digest, compare
from grasp_hf.comparison.workbench import Workbench
from grasp_hf.config.grasp import GraspConfig
from grasp_hf.config.recipe import Recipe
from grasp_hf.data.digests import sample_hashes
from grasp_hf.data.tasks import prepare_images
from grasp_hf.errors import ConfigError, DataError, OutputExistsError
from grasp_hf.runs.prepare import prepare
from grasp_hf.tensors.units import movable_tensors
from grasp_hf.validation.losses import SampleLosses
from tests.support.models import (
    WORDS,
    copied,
    perturbed,
    saved,
    saved_adapter,
    tiny_data,
    tiny_model,
    write_images,
)
from tests.support.processes import made_once

Everything = tuple[Comparison, Path, dict[str, int]]
TRAIN, TEST, BATCH, EPOCHS = 24, 102, 4, 2
FAST = ["base", "average", OURS]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, a full fine-tune and an adapter of it, images, and a recipe of all."""
    return made_once(tmp_path_factory, "comparison-world", make_world)


def make_world(folder: Path) -> None:
    base = saved(tiny_model("vit"), folder / "base")
    saved(perturbed(tiny_model("vit"), seed=1), folder / "fine")
    adapter = folder / "lora"
    saved_adapter(tiny_model("vit"), base, adapter, modules_to_save=["classifier"], target_modules=["q_proj"])
    write_images(folder / "images", {"train": TRAIN // 3, "test": TEST // 3})
    write_recipe(folder, folder)


def write_recipe(world: Path, to: Path, **values: Any) -> Recipe:
    """Write a recipe of the world to `to`, and return it read."""
    recipe = {
        "base_model": f"{world}/base",
        "sources": [f"{world}/fine", f"{world}/lora"],
        "data": {"path": "imagefolder", "data_dir": f"{world}/images"},
        "batch_size": BATCH,
        "final_epochs": EPOCHS,
        "training_arguments": {"learning_rate": 0.01},
        **values,
    }
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Recipe.from_yaml(to / "recipe.yaml")


@pytest.fixture(scope="session")
def recipe(world: Path) -> Recipe:
    return Recipe.from_yaml(world / "recipe.yaml")


@pytest.fixture(scope="session")
def everything(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    """Compare all methods once; return the results, their folder, and the number of training steps of each row."""
    made = made_once(tmp_path_factory, "comparison-of-everything", partial(compare_everything, recipe))
    comparison, steps = pickle.loads((made / "results.pickle").read_bytes())
    # A copy, because a comparison locks its folder and another worker may look at it.
    return comparison, copied(str(made / "comparison"), tmp_path_factory.mktemp("everything") / "comparison"), steps


def compare_everything(recipe: Recipe, folder: Path) -> None:
    steps: dict[str, int] = {}
    made = 0
    train, score = Trainer.train, Comparison.save

    def counting(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        result = train(self, *args, **kwargs)
        made += self.state.global_step
        return result

    def saving(self: Comparison, directory: Path) -> None:
        nonlocal made
        steps[self.results[-1].method], made = made, 0
        score(self, directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", counting)
        patch.setattr(Comparison, "save", saving)
        variants = {"without the gate": {"gate": False}}
        comparison = compare(recipe, folder / "comparison", seeds=[3], variants=variants)
    (folder / "results.pickle").write_bytes(pickle.dumps((comparison, steps)))


def scores(comparison: Comparison) -> dict[tuple[str, int, int], Any]:
    """Return the scores and problems of a comparison, without durations."""
    return {(r.method, r.size, r.seed): (r.merged, r.final, r.problem) for r in comparison.results}


RAN = [name for name, method in METHODS.items() if not method.needs_unlabeled]  # every training sample is a label


def test_every_method_is_run_and_scored_on_the_test_samples(everything: Everything, recipe: Recipe) -> None:
    results = everything[0].results
    rows = [f"source:{source}" for source in recipe.sources] + RAN + ["variant:without the gate"]
    assert [result.method for result in results] == rows
    for result in results:
        assert (result.size, result.seed, result.problem) == (TRAIN, 3, None)
        correct = result.final["accuracy"] * TEST
        assert math.isfinite(result.final["loss"]) and correct == pytest.approx(round(correct))
        for name in result.samples:
            evaluation = {"merged": result.merged, "final": result.final}[name]
            for measure, value in evaluation.items():
                found = decode(result.samples[name], measure)
                assert len(found.sums) == TEST and found.sums.sum() / found.terms.sum() == pytest.approx(value)
        assert result.samples.keys() == {"final", *(["merged"] if result.merged else [])}
    before = {result.method for result in results if result.merged}
    assert before == {name for name, method in METHODS.items() if method.finetuned}


def test_every_method_makes_as_many_steps_of_fine_tuning(
    everything: Everything,
) -> None:
    steps = everything[2]
    whole = EPOCHS * TRAIN // BATCH
    none = {name for name in steps if name.startswith("source:")} | {"ensemble", "stacked"}
    assert {name for name, made in steps.items() if made == 0} == none
    # The gate trains on two halves of the labels, each in half the steps; ours also does so without any source.
    lines = {OURS, "placebo", *(name for name in METHODS if name.endswith("-line"))}
    assert lines >= {"base-line", "best-source-line", "average-line", "lorahub-line", "adamerging-line"}
    assert all(steps[name] in (whole, 2 * whole) for name in lines - {OURS, "placebo"}) and 2 * whole in steps.values()
    assert {steps[OURS], steps["placebo"]} <= {whole, 2 * whole, 3 * whole}
    assert {name for name, made in steps.items() if made > whole} - lines == {"pearl"}  # it trains its adapters first
    assert {name: made for name, made in steps.items() if 0 < made < whole} == {}


def test_a_source_alone_is_the_source(everything: Everything, recipe: Recipe, world: Path) -> None:
    merger, _, data = prepare(replace(recipe, base_model=f"{world}/fine"))
    alone = merger.evaluate(data.test, data_collator=data.collator)
    assert everything[0].results[0].final == pytest.approx(alone, rel=1e-5)


def test_lora_on_the_labels_is_the_base_with_an_adapter_of_rank_8(
    everything: Everything, world: Path, tmp_path: Path
) -> None:
    settings = {"lora": {"r": 8, "lora_alpha": 8}, "training_arguments": {"learning_rate": 1e-3}}
    plain = compare(write_recipe(world, tmp_path, **settings), tmp_path / "out", seeds=[3], methods=["base"])
    expected, found = ({r.method: r.final for r in one.results} for one in (plain, everything[0]))
    assert found["lora-labels"] == expected["base"] != found["base"]


def test_the_placebo_row_is_ours_on_other_sources(everything: Everything) -> None:
    found = {result.method: result.final for result in everything[0].results}
    assert found["placebo"] != found[OURS]


def test_a_row_does_not_depend_on_the_others(everything: Everything, recipe: Recipe, tmp_path: Path) -> None:
    alone = scores(compare(recipe, tmp_path / "some", seeds=[3], methods=["loop-all", "gradfix", "placebo"]))
    whole = scores(everything[0])
    assert {method for method, _, _ in alone} >= {"loop-all", "gradfix", "placebo", OURS}
    assert all(whole[row] == reached for row, reached in alone.items())


def test_the_files_of_a_comparison(everything: Everything) -> None:
    comparison, folder, _ = everything
    assert {file.name for file in folder.iterdir()} == {
        *("comparison.json", "comparison.md", f"comparison-{TRAIN}.png"),
    }
    assert Comparison.load(folder) == comparison
    text = (folder / "comparison.md").read_text()
    assert text.startswith(f"{TRAIN} labels, accuracy on the test split\n")
    assert text == f"{comparison}\n" and all(METHODS[name].title in text for name in RAN)
    with Image.open(folder / f"comparison-{TRAIN}.png") as figure:
        assert figure.width > 500 and figure.height > 500 and len(figure.convert("L").getcolors() or []) > 20


def test_a_file_instead_of_the_folder_of_results(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError, match="file' cannot be written: File exists; name another folder"):
        compare(recipe, tmp_path / "file", seeds=[0], methods=["base"])


def test_a_killed_comparison_continues(recipe: Recipe, world: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(world / "recipe.yaml"), "--output", str(tmp_path / "killed"), "--seeds", "0", "1"]
    arguments += ["--sizes", "6", "--methods", *FAST]
    code = "from grasp_hf.cli import main; raise SystemExit(main())"
    record = tmp_path / "killed" / "comparison.json"
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
        deadline = time.monotonic() + 120
        while not record.exists() or len(json.loads(record.read_text())["results"]) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = Comparison.load(tmp_path / "killed")
    assert 3 <= len(before.results) < 10
    after = compare(recipe, tmp_path / "killed", seeds=[0, 1], sizes=[6], methods=FAST)
    assert after.results[: len(before.results)] == before.results
    assert scores(after) == scores(compare(recipe, tmp_path / "whole", seeds=[0, 1], sizes=[6], methods=FAST))


def test_a_folder_that_another_process_writes_to_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "comparison"
    output.mkdir()
    with FileLock(output / ".lock"), pytest.raises(ConfigError, match=f"another process is running .*'{output}'"):
        compare(recipe, output, seeds=[0], methods=["base"])
    compare(recipe, output, seeds=[0], methods=["base"])
    assert not (output / ".lock").exists() and (output / "comparison.json").exists()


def test_a_seed_begins_at_the_base_whatever_was_run_before(recipe: Recipe, tmp_path: Path) -> None:
    alone = scores(compare(recipe, tmp_path / "alone", seeds=[1], sizes=[9], methods=["base"]))
    both = scores(compare(recipe, tmp_path / "both", seeds=[0, 1], sizes=[6, 9], methods=["base"]))
    assert len(both) == 4 * len(alone) == 4 * 4
    assert {row: reached for row, reached in both.items() if row in alone} == alone
    compare(recipe, tmp_path / "resumed", seeds=[0], sizes=[9], methods=["base"])
    resumed = scores(compare(recipe, tmp_path / "resumed", seeds=[0, 1], sizes=[9], methods=["base"]))
    assert len(resumed) == 8 and {row: both[row] for row in resumed} == resumed


def test_the_base_comes_back_after_an_error(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, sources, data = prepare(recipe)
    before = {name: tensor.clone() for name, tensor in movable_tensors(base.model).items()}
    moved: list[bool] = []

    def run(bench: Workbench) -> None:
        bench.load_source_weights(sources[0])
        moved.append(any(not torch.equal(now, before[name]) for name, now in movable_tensors(base.model).items()))
        raise KeyboardInterrupt("after the copy")

    monkeypatch.setattr(run_module, "prepare", lambda recipe: (base, sources, data))
    monkeypatch.setitem(METHODS, "average", Method("interrupted", "control", run))
    with pytest.raises(KeyboardInterrupt, match="after the copy"):
        compare(recipe, tmp_path / "out", seeds=[0], methods=["average"])
    assert moved == [True]
    assert all(torch.equal(now, before[name]) for name, now in movable_tensors(base.model).items())


def test_a_finished_comparison_runs_nothing(
    everything: Everything, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, folder, _ = everything
    monkeypatch.setattr(run_module, "Workbench", None)
    assert compare(recipe, folder, seeds=[3]) == comparison


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[str], list[int], set[str]]]]:
    """Replace all methods by two that record their sources and their labels."""
    seen: list[tuple[list[str], list[int], set[str]]] = []

    def record(bench: Workbench) -> SampleLosses:
        names = [Path(source).name for source in bench.sources]
        seen.append((names, bench.data.train["labels"], sample_hashes(bench.data.train)))
        ones = torch.ones(TEST)
        return SampleLosses(ones, ones, ones, ones > 0)

    methods = {name: Method(name, "control", record, finetuned=False) for name in ("one", OURS)}
    monkeypatch.setattr(run_module, "METHODS", methods)
    yield seen


def test_a_seed_draws_the_labels_and_the_order_and_all_methods_get_them(
    spied: list[tuple[list[str], list[int], set[str]]], world: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe").mkdir()
    recipe = write_recipe(world, tmp_path / "recipe", sources=[f"{world}/fine", f"{world}/lora"])
    compare(recipe, tmp_path / "out", seeds=[0, 1, 2], sizes=[6, None])
    assert len(spied) == 2 * 2 * 3
    pairs = list(zip(spied[::2], spied[1::2], strict=True))
    assert all(one == ours for one, ours in pairs)
    few, all_labels = [one for one, _ in pairs[:3]], [one for one, _ in pairs[3:]]
    assert {len(found) for _, _, found in few} == {6} and len({frozenset(found) for _, _, found in few}) == 3
    assert {len(found) for _, _, found in all_labels} == {TRAIN}
    assert {tuple(names) for names, _, _ in few} == {("fine", "lora"), ("lora", "fine")}
    assert [names for names, _, _ in few] == [names for names, _, _ in all_labels]


def test_more_labels_than_there_are_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"sizes: got 25, but the split 'train' has {TRAIN} samples; expected no more"):
        compare(recipe, tmp_path / "out", sizes=[25])


def failing(group: Any, error: Exception | None = None) -> Method:
    def run(bench: Workbench) -> None:
        raise error or DataError("no labels like that")

    return Method("poor thing", group, run)


def test_an_existing_method_that_cannot_run_is_listed_with_its_problem(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "poor", failing("existing"))
    comparison = compare(recipe, tmp_path / "out", seeds=[0], methods=["base", "poor"])
    assert {r.method: r.problem for r in comparison.results if r.problem} == {"poor": "no labels like that"}
    assert {r.method for r in comparison.results if r.final} >= {"base", OURS}
    assert "- poor thing: no labels like that" in (tmp_path / "out" / "comparison.md").read_text()
    cells = next(line for line in comparison.table(TRAIN).splitlines() if line.startswith("| poor thing"))
    assert [cell.strip() for cell in cells.strip("|").split("|")] == [
        *("poor thing", "0", "–", "–", "–"),
    ]


def test_a_control_that_fails_stops_the_comparison_and_keeps_the_results(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "average", failing("control"))
    with pytest.raises(DataError, match="while running 'poor thing' with seed 5: no labels like that"):
        compare(recipe, tmp_path / "out", seeds=[5], methods=FAST)
    assert [result.method for result in Comparison.load(tmp_path / "out").results][-1] == "base"


def results(**runs: list[float]) -> list[Result]:
    """Return results of methods by seed; of an accuracy `a`, the loss is `1 - a`."""
    return [
        Result(method, 64, seed, {}, {"loss": 1 - value, "accuracy": value}, 1.0)
        for method, values in runs.items()
        for seed, value in enumerate(values)
    ]


RUNS = {"base": [0.5, 0.6, 0.9], OURS: [0.7, 0.7, 0.8]}


def test_a_difference_is_paired_and_above_zero_where_the_other_is_better() -> None:
    accuracy = Comparison(results(**RUNS), {})
    assert accuracy.measure == "accuracy"
    assert accuracy.differences("base", 64) == pytest.approx([-0.2, -0.1, 0.1])
    losses = Comparison([replace(r, final={"loss": r.final["loss"]}) for r in results(**RUNS)], {})
    assert losses.measure == "loss"
    assert losses.differences("base", 64) == pytest.approx([-0.2, -0.1, 0.1])


def test_a_difference_takes_the_seeds_that_both_have() -> None:
    comparison = Comparison(results(base=[0.5, 0.6, 0.9], ours=[0.7]), {})
    assert comparison.differences("base", 64) == pytest.approx([-0.2])


def test_the_interval_is_that_of_a_t_test() -> None:
    values = [0.1, -0.05, 0.2, 0.15]
    half = ttest_1samp(values, 0).confidence_interval(0.95).high - statistics.fmean(values)
    assert interval(values, signed=True) == f"+{statistics.fmean(values):.3f} ± {half:.3f}"
    assert interval([0.5, 0.7]) == f"0.600 ± {12.706 * 0.1:.3f}"  # the quantile of one degree of freedom
    assert interval([0.5]) == "0.500" and interval([]) == "–"


def test_the_tables_show_the_scores_and_the_costs_of_each_row() -> None:
    found = [*results(**RUNS), *results(ensemble=[0.8, 0.8, 0.8]), replace(results(x=[0.4])[0], method="source:org/x")]
    lines = cells(Comparison(found, {}).table(64))
    assert lines[0] == ["", "runs", "merged", "final (runs)", "vs ours (runs)"]
    assert lines[2] == ["source org/x", "1", "–", "0.400", "-0.300"]
    assert lines[3][:2] == ["base model", "3"] and lines[3][4].startswith("-0.067 ± ")
    assert lines[4][:4] == ["ensemble of all", "3", "–", "0.800 ± 0.000"] and lines[4][4].startswith("+0.067 ± ")
    assert lines[5] == ["grasp_hf, as in the recipe", "3", "–", "0.733 ± 0.143", "–"]
    costs = cells(Comparison(found, {}).costs_table())
    assert costs[0] == ["", "kind", "memory (models)", "sources at once"]
    assert costs[2:] == [
        ["base model", "control", "1", "1"],
        ["ensemble of all", "existing", "1 (K to predict)", "1"],
        ["grasp_hf, as in the recipe", "ours", "1", "1"],
    ]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_tables_fit_in_a_terminal() -> None:
    """Every method has losses with two digits before the point; the name of one source is longer than the column."""
    long = "source:org/" + "long-" * 12 + "name"
    values = [("source:cardiffnlp/twitter-roberta-base", 12.0), (long, 12.0), *((name, 13.5) for name in METHODS)]
    found = [
        Result(name, 64, seed, {"loss": 20 + seed}, {"loss": v + seed}, 1.0) for name, v in values for seed in (1, 2)
    ]
    text = str(Comparison(found, {}))
    assert all(method.title in text for method in METHODS.values()), "no title of a method is shortened"
    assert "| source org/long-lon…ong-long-long-name " in text and "| source cardiffnlp/twitter-roberta-base " in text
    assert max(map(len, text.splitlines())) <= 100


def test_compare_is_at_the_top_and_brings_datasets_only_where_it_is_used() -> None:
    code = """
import sys
import grasp_hf
assert "datasets" not in sys.modules
from grasp_hf import compare
assert compare is sys.modules["grasp_hf.comparison.run"].compare
try:
    grasp_hf.comapre
except AttributeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "module 'grasp_hf' has no attribute 'comapre'\n"), run.stderr


def test_the_figure_shows_runs_means_and_intervals() -> None:
    rows = [("base", "control", [0.5, 0.6], [0.4], half_interval([0.5, 0.6])), ("ours", "ours", [0.7], [], None)]
    (axes,) = comparison_figure(rows, "accuracy", "runs").axes
    assert axes.get_xlabel() == "test accuracy, each run and the mean with its 95 % interval over runs"
    (bar,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    half = 12.706 * statistics.stdev([0.5, 0.6]) / math.sqrt(2)
    assert bar.get_segments()[0][:, 0].tolist() == pytest.approx([0.55 - half, 0.55 + half], rel=1e-3)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "ours"]  # the best on top


def test_the_order_of_rows_does_not_depend_on_when_they_were_run() -> None:
    one = [replace(results(x=[0.4])[0], method=name) for name in ("variant:v", OURS, "base", "source:b", "source:a")]
    assert Comparison(one, {}).methods(64) == ["source:b", "source:a", "base", OURS, "variant:v"]
    assert Comparison(one, {}).methods(65) == []


def damaged(world: Path, to: Path, split: str, count: int = 1, of: str = "test") -> Path:
    """Return a copy of the images in which some samples of another split are also in `split`."""
    images = copied(str(world / "images"), to)
    for index in range(count):
        (images / split / "cat").mkdir(parents=True, exist_ok=True)
        copy = images / split / "cat" / f"copy-{index}.png"
        copy.write_bytes((images / of / "dog" / f"{index}.png").read_bytes())
    return images


def with_images(world: Path, to: Path, images: Path) -> Recipe:
    return write_recipe(world, to, data={"path": "imagefolder", "data_dir": str(images)})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_test_samples_among_the_labels_are_refused_whatever_their_label(
    split: str, world: Path, tmp_path: Path
) -> None:
    recipe = with_images(world, tmp_path, damaged(world, tmp_path / "images", split, 2))
    with pytest.raises(DataError, match=f"^2 samples of the split 'test' are also in the split '{split}'"):
        compare(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_validation_samples_among_the_labels_are_refused(world: Path, tmp_path: Path) -> None:
    recipe = with_images(world, tmp_path, damaged(world, tmp_path / "images", "validation", 3, of="train"))
    with pytest.raises(DataError, match="^3 samples of the split 'validation' are also in the split 'train'"):
        compare(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_content_of_a_sample_is_what_the_model_sees() -> None:
    rows = {"input_ids": [[1, 2], [1, 2, 3]], "attention_mask": [[1, 1], [1, 1, 1]], "labels": [0, 1]}
    found = sample_hashes(Dataset.from_dict(rows))
    other = sample_hashes(Dataset.from_dict({**rows, "labels": [1, 1], "attention_mask": [[1, 0], [1, 1, 1]]}))
    assert len(found) == 2 and found == other
    assert not found & sample_hashes(Dataset.from_dict({**rows, "input_ids": [[2, 1], [1, 2, 4]]}))
    images = tiny_data("vit", 6)
    assert len(sample_hashes(images)) == 6
    assert sample_hashes(images) == sample_hashes(images.with_format(None))


def test_the_content_of_an_image_is_its_pixels() -> None:
    pictures = [Image.fromarray(np.full((4, 4), value, dtype=np.uint8)) for value in (10, 20)]

    def split(mode: str, name: str) -> Dataset:
        rows = {
            "image": [picture.convert(mode) for picture in pictures],
            "labels": [0, 1],
            "name": [name, f"{name} 2"],
        }
        return Dataset.from_dict(rows).cast_column("image", ImageFeature())

    splits = DatasetDict(train=split("RGB", "a"), test=split("P", "b"))
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    train, test = prepare_images(splits, "image", processor)[0].values()
    assert sample_hashes(train) == sample_hashes(test) and len(sample_hashes(train)) == 2


def test_too_few_test_samples_are_refused_with_what_they_could_show(world: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"train": 2, "test": 16})
    visible = 100 * 1.96 * math.sqrt(0.5 / 48)  # two models that differ on every second sample
    with pytest.raises(
        DataError, match=f"'test' has 48 samples.* {visible:.0f} points.* 100.*768 samples tell 5 points"
    ):
        compare(with_images(world, tmp_path, images), tmp_path / "out")


def test_too_few_validation_samples_are_refused_with_what_they_could_show(world: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"train": 2, "validation": 16, "test": 34})
    with pytest.raises(
        DataError,
        match=r"^the split 'validation' has 48 samples: two models must differ by about 20 points of accuracy to be "
        r"told apart; expected at least 50 samples \(768 samples tell 5 points apart\); or remove the split, and methods choose by the "
        r"training labels$",
    ):
        compare(with_images(world, tmp_path, images), tmp_path / "out")
    enough = write_images(tmp_path / "enough", {"train": 2, "validation": 17, "test": 34})
    done = compare(with_images(world, tmp_path, enough), tmp_path / "out", seeds=[0], methods=["base"])
    assert {"train", "validation", "test"} == set(done.setting["digests"])


def test_a_split_that_is_not_there_is_refused(world: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"train": 2, "validation": 40})
    with pytest.raises(DataError, match="^the data lacks the split 'test'; a comparison needs data with the splits"):
        compare(with_images(world, tmp_path, images), tmp_path / "out")


def test_a_source_that_was_trained_on_the_test_split_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fairness, "hub_dataset", lambda recipe: "org/animals")
    source = copied(str(world / "fine"), tmp_path / "fine")
    (source / "README.md").write_text("A model.\n\nIt was trained on the test split of org/animals.\n")
    with pytest.raises(
        DataError, match=r"^the card of source '.*fine' says that it was trained on the test split: \"It was"
    ):
        compare(write_recipe(world, tmp_path, sources=[str(source)]), tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/animals", "org/animals"),
        ("imdb", "imdb"),
        ("csv", None),
        ("imagefolder", None),
        ("here", None),
        (None, None),
    ],
)
def test_data_of_the_hub_is_known_by_its_name(path: str | None, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert fairness.hub_dataset(Recipe(sources=["org/a"], data={"path": path}, folder=tmp_path)) == expected


def relabelled(source: Path, names: list[str]) -> str:
    config = json.loads((source / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (source / "config.json").write_text(json.dumps(config))
    return str(source)


def saved_with_labels(kind: str, world: Path, to: Path, names: list[str]) -> str:
    """Write a source whose classes have these names: a full model, or an adapter with or without a head."""
    if kind == "full":
        return relabelled(copied(str(world / "fine"), to), names)
    if kind == "adapter":
        (copied(str(world / "lora"), to) / "config.json").write_text((world / "base" / "config.json").read_text())
        return relabelled(to, names)
    saved_adapter(tiny_model("vit"), str(world / "base"), to, target_modules=["q_proj"])
    (to / "config.json").write_text((world / "base" / "config.json").read_text())
    return relabelled(to, names)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_source_with_other_labels_is_refused(kind: str, world: Path, tmp_path: Path) -> None:
    source = saved_with_labels(kind, world, tmp_path / "other", ["bird", "cat", "horse"])
    with pytest.raises(DataError, match=f"'{re.escape(source)}'.* got bird, cat, horse, expected bird, cat, dog"):
        compare(write_recipe(world, tmp_path, sources=[source]), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "names"), [("full", ["dog", "bird", "cat"]), ("adapter without a head", ["a", "b", "c"])]
)
def test_labels_in_another_order_and_adapters_without_a_head_are_fine(
    kind: str, names: list[str], world: Path, tmp_path: Path
) -> None:
    source = saved_with_labels(kind, world, tmp_path / "other", names)
    done = compare(write_recipe(world, tmp_path, sources=[source]), tmp_path / "out", seeds=[0], methods=[OURS])
    assert len(done.results) == 2


@pytest.mark.parametrize("name", ["max_steps", "num_train_epochs"])
def test_a_budget_that_methods_cannot_split_is_refused(name: str, world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(world, tmp_path, training_arguments={name: 3})
    with pytest.raises(
        ConfigError, match=f"^training_arguments.{name}: expected none in a comparison.*set final_epochs"
    ):
        compare(recipe, tmp_path / "out")


def test_all_numbers_of_labels_are_checked_before_any_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"got 25, but the split 'train' has {TRAIN} samples"):
        compare(recipe, tmp_path / "out", seeds=[0], sizes=[6, 25])
    assert not (tmp_path / "out").exists()


def test_a_method_that_could_not_run_is_tried_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "METHODS", {**METHODS, "ties": failing("existing")})
        first = compare(recipe, tmp_path / "out", seeds=[5], methods=["ties"])
    assert [result.problem for result in first.results if result.method == "ties"] == ["no labels like that"]
    kept = compare(recipe, tmp_path / "out", seeds=[5], methods=["base"])
    assert [result.problem for result in kept.results if result.method == "ties"] == ["no labels like that"]
    again = compare(recipe, tmp_path / "out", seeds=[5], methods=["ties"])
    assert [result.problem for result in again.results if result.method == "ties"] == [None]


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (torch.OutOfMemoryError("the GPU is full"), "the GPU is full"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_an_existing_method_that_runs_out_of_memory_does_not_stop_the_others(
    error: Exception, problem: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = failing("existing", error)
    monkeypatch.setattr(run_module, "METHODS", {**METHODS, "ties": poor})
    comparison = compare(recipe, tmp_path / "out", seeds=[0], methods=["ties"])
    assert {r.method: r.problem for r in comparison.results if r.problem} == {"ties": problem}
    assert comparison.results[-1].method == OURS and comparison.results[-1].final


def test_an_error_that_is_not_about_memory_stops_the_comparison(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "METHODS", {**METHODS, "ties": failing("existing", RuntimeError("a bug"))})
    with pytest.raises(RuntimeError, match="^a bug$"):
        compare(recipe, tmp_path / "out", seeds=[0], methods=["ties"])


def language_recipe(tmp_path: Path, counts: dict[str, int]) -> Recipe:
    """Return the recipe of a tiny GPT-2, a source, and a file of texts per split."""
    base = saved(tiny_model("gpt2"), tmp_path / "base")
    source = saved(perturbed(tiny_model("gpt2"), seed=1), tmp_path / "source")
    words = [word for word in WORDS if not word.startswith("[")]
    random_ = random.Random(0)
    for split, count in counts.items():
        texts = [" ".join(random_.choices(words, k=8)) for _ in range(count)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text", *texts]) + "\n")
    files = {split: f"{tmp_path}/{split}.csv" for split in counts}
    data = {"path": "csv", "data_files": files, "text": "text"}
    config = GraspConfig(batch_size=4, final_epochs=1)
    return Recipe(sources=[source], base_model=base, task="text-generation", data=data, config=config)


def test_language_models_are_compared_by_their_loss(tmp_path: Path) -> None:
    recipe = language_recipe(tmp_path, {"train": 12, "validation": 30, "test": 30})
    found = compare(recipe, tmp_path / "out", seeds=[0], methods=["loop-nothing", "published"])
    assert found.measure == "loss" and not [result for result in found.results if result.problem]
    expected = {f"source:{recipe.sources[0]}", "loop-nothing", "published", OURS}
    assert {result.method for result in found.results} == expected


@pytest.mark.parametrize("split", ["test", "validation"])
def test_too_few_texts_to_score_a_language_model_are_refused(tmp_path: Path, split: str) -> None:
    recipe = language_recipe(tmp_path, {"train": 12, "validation": 30, "test": 30, split: 29})
    with pytest.raises(DataError, match=f"the split '{split}' has 29 texts; expected at least 30"):
        compare(recipe, tmp_path / "out", seeds=[0], methods=["base"])


def test_without_fine_tuning_a_mixture_is_learned_as_published(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(methods_module, "mixture_", lambda inputs, **settings: asked.append(settings))
    compare(write_recipe(world, tmp_path, final_epochs=0), tmp_path / "out", seeds=[0], methods=["adamerging"])
    assert asked == [{"per_layer": True}]


def test_other_data_under_the_same_name_is_refused(world: Path, tmp_path: Path) -> None:
    images = copied(str(world / "images"), tmp_path / "images")
    recipe = with_images(world, tmp_path, images)
    compare(recipe, tmp_path / "out", seeds=[5], methods=["base"])
    samples = sorted((images / "train" / "cat").iterdir())
    samples[0].rename(images / "train" / "dog" / "moved.png")  # only its label changes
    with pytest.raises(ConfigError, match=r"on other data \(changed since: train\); name a new folder"):
        compare(recipe, tmp_path / "out", seeds=[5], methods=["base"])


def test_a_variant_keeps_its_settings(everything: Everything, recipe: Recipe) -> None:
    with pytest.raises(
        ConfigError,
        match="holds a variant 'without the gate' with other settings: got {'gate': True}, expected {'gate': False}",
    ):
        compare(recipe, everything[1], seeds=[3], variants={"without the gate": {"gate": True}})


@pytest.mark.parametrize(
    "settings",
    [
        {"top": 1, "order": "loss"},
        {"preset": "paper", "initial_epochs": 1, "finetune_epochs": 1, "training_arguments": {"learning_rate": 0.01}},
        {"method": "copy", "unit": "parameter", "accumulate_gradients": True},
        {"lora": {"r": 2}},
    ],
)
def test_rows_do_not_depend_on_how_the_recipe_merges(
    settings: dict[str, Any], everything: Everything, world: Path, tmp_path: Path
) -> None:
    """The recipe's settings of a merge are ours alone: they change neither the sources alone nor existing methods."""
    other = write_recipe(world, tmp_path, **({"batch_size": BATCH} | settings))
    methods = [name for name in METHODS if name not in ("pearl", "fusion")]
    found = compare(
        other, tmp_path / "out", seeds=[3], methods=methods if "preset" in settings else ["average", "base"]
    )
    assert not [result for result in found.results if result.problem]
    rows, plain = ({r.method: r for r in comparison.results} for comparison in (found, everything[0]))
    for source in other.sources:
        assert rows[f"source:{source}"].final == plain[f"source:{source}"].final
    assert rows["average"].merged == plain["average"].merged


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, 9),  # six batches an epoch, the last with a single label
        # three steps an epoch, of two batches each
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 5),
    ],
)
def test_a_mixture_takes_as_many_steps_as_fine_tuning(
    arguments: dict[str, Any], steps: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is one and a half epochs of 21 labels."""
    recipe = write_recipe(world, tmp_path, final_epochs=1.5, training_arguments=arguments)
    taken, train, learn = [], Trainer.train, methods_module.mixture_

    def counting(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        taken.append(self.state.global_step)
        return result

    def learning(inputs: Any, *, steps: int, **settings: Any) -> None:
        taken.append(steps)
        learn(inputs, steps=steps, **settings)

    monkeypatch.setattr(Trainer, "train", counting)
    monkeypatch.setattr(methods_module, "mixture_", learning)
    compare(recipe, tmp_path / "out", sizes=[21], seeds=[0], methods=["adamerging"])
    assert taken[:2] == [steps, steps]


def test_adapters_of_pearl_are_trained_without_a_budget_too(world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(world, tmp_path, final_epochs=0)
    results = compare(recipe, tmp_path / "out", seeds=[0], methods=["pearl"]).results
    losses = {result.method: result.final["loss"] for result in results}
    alone = [loss for method, loss in losses.items() if method.startswith("source:")]
    assert all(abs(losses["pearl"] - loss) > 1e-4 for loss in alone), "untrained, it is the first source"


def test_fusion_refuses_adapters_and_the_other_methods_run(world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(world, tmp_path, lora={"r": 2})
    found = compare(recipe, tmp_path / "out", seeds=[3], methods=["fusion", "published"])
    problems = {result.method: result.problem for result in found.results}
    assert "leave out `lora`" in (problems["fusion"] or "") and problems["published"] is None


def test_a_comparison_needs_a_base_model(world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(world, tmp_path, base_model=None, sources=[f"{world}/base", f"{world}/fine"])
    with pytest.raises(
        ConfigError, match="^base_model: expected one in a comparison.*; name the model that the sources"
    ):
        compare(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [-1]}, r"- seed: got -1, expected 0 to 2\*\*32 - 1000$"),
        ({"seeds": []}, "^seeds: expected at least one"),
        ({"sizes": []}, "^sizes: expected at least one number of labels"),
        ({"sizes": [8, 0]}, r"^sizes: expected .* got \[8, 0\]$"),
    ],
)
def test_seeds_and_sizes_that_cannot_be_are_refused(
    arguments: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(recipe, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["weights", "configuration"])
def test_other_models_under_the_same_name_are_refused(what: str, world: Path, tmp_path: Path) -> None:
    source = copied(str(world / "fine"), tmp_path / "fine")
    recipe = write_recipe(world, tmp_path, sources=[str(source)])
    compare(recipe, str(tmp_path / "out"), seeds=[0], methods=["base"])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "there"}))
    compare(recipe, str(tmp_path / "out"), seeds=[1], methods=["base"])  # neither key belongs to the model
    if what == "weights":
        saved(perturbed(tiny_model("vit"), 5), source)
    else:
        (source / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    with pytest.raises(ConfigError, match=r"holds a comparison of other models \(changed since: .*fine\); name a new"):
        compare(recipe, tmp_path / "out", seeds=[2], methods=["base"])


def test_unknown_methods_are_named_with_those_that_are_known(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^methods: got tises; expected some of base, best-source, "):
        compare(recipe, tmp_path / "out", methods=["ties", "tises"])


def test_a_folder_with_other_files_is_refused_and_unchanged(recipe: Recipe, world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match="holds files but no 'comparison.json', so it is not a comparison; name a new"
    ):
        compare(recipe, tmp_path / "out")
    (tmp_path / "out" / "comparison.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"comparison.json' is not the record of a comparison"):
        compare(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("change", [{"final_epochs": 3}, {"batch_size": 8}, {"sources": ["{}/lora"]}])
def test_the_folder_of_another_recipe_is_refused(
    change: dict[str, Any],
    everything: Everything,
    world: Path,
    tmp_path: Path,
) -> None:
    change = {key: [v.format(world) for v in value] if key == "sources" else value for key, value in change.items()}
    with pytest.raises(ConfigError, match="holds the comparison of another recipe; name a new folder"):
        compare(write_recipe(world, tmp_path, **change), everything[1])


def test_the_command_prints_the_table(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(world / "recipe.yaml"), "--output", str(tmp_path / "out"), "--sizes", "6", "all"]
    assert main([*arguments, "--seeds", "0", "--methods", "base"]) == 0
    printed = capsys.readouterr().out
    comparison = Comparison.load(tmp_path / "out")
    assert {result.size for result in comparison.results} == {6, TRAIN}
    assert str(comparison) in printed and str(tmp_path / "out") in printed
    assert (tmp_path / "out" / "comparison-6.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--seeds", "4", "5", "batch_size=2", "--sizes", "6", "all", "final_epochs=3", "--methods", "base"],
        ["--methods", "base", "batch_size=2", "final_epochs=3", "--sizes", "6", "all", "--seeds", "4", "5"],
        ["batch_size=2", "--methods", "base", "--seeds", "4", "5", "--sizes", "6", "all", "final_epochs=3"],
    ],
)
def test_overrides_may_follow_an_option_with_several_values(
    options: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def recording(recipe: Recipe, output: Path, **arguments: Any) -> Comparison:
        found.update(arguments, batch_size=recipe.config.batch_size, final_epochs=recipe.config.final_epochs)
        return Comparison([], {})

    monkeypatch.setattr(run_module, "compare", recording)
    assert main(["compare", str(world / "recipe.yaml"), "--output", str(tmp_path / "out"), *options]) == 0
    expected = {"seeds": [4, 5], "sizes": [6, None], "methods": ["base"]}
    assert found == {**expected, "batch_size": 2, "final_epochs": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "batch_size=2"], "argument --seeds: expected at least one value, got: batch_size=2"),
        (["--seeds", "one"], "argument --seeds: expected numbers, got 'one'"),
    ],
)
def test_an_option_without_its_values_is_wrong_usage(
    options: list[str], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(["compare", str(world / "recipe.yaml"), "--output", str(tmp_path / "out"), *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_names_the_problems_of_all_sources_first(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tiny_model("resnet"), tmp_path / "resnet")
    write_recipe(world, tmp_path, sources=[str(tmp_path / "resnet"), str(tmp_path / "missing")])
    assert main(["compare", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "nothing was compared" in error and "resnet" in error and "missing" in error
    assert not (tmp_path / "out").exists()


def test_a_result_is_restored_from_its_fields() -> None:
    result = Result("base", 64, 0, {}, {"loss": 1.0}, 2.5, "no")
    assert Result(**asdict(result)) == result


def test_the_digest_covers_every_file_of_every_folder(tmp_path: Path) -> None:
    package = Path(grasp_hf.__file__).parent
    copy = tmp_path / "grasp_hf"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_digest(copy) == code_digest()
    for name in ("new_room/__init__.py", "new_room/deeper/notes.txt"):
        before = code_digest(copy)
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
        assert code_digest(copy) != before, f"{name} is not covered"
        with_it = code_digest(copy)
        (copy / name).write_text("text")
        assert code_digest(copy) != with_it
    (copy / "__pycache__").mkdir()
    before = code_digest(copy)
    (copy / "__pycache__" / "run.cpython-311.pyc").write_bytes(b"compiled")
    assert code_digest(copy) == before
    moved = code_digest(copy)
    (copy / "new_room" / "deeper" / "notes.txt").rename(copy / "new_room" / "notes.txt")
    assert code_digest(copy) != moved
