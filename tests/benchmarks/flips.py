"""Measures how often the verdict on a source changes when the same merge is repeated with another seed.

Run it with `python -m tests.benchmarks.flips demo sentiment:nyt emoji:noto`; each argument is the world of
`grasp-hf demo`, or a benchmark and a target with 64 labels, whose sources `tests.benchmarks.sources` makes. The seed
orders the batches and seeds every fine-tuning. The labels are the same for all seeds; `--draw` draws other labels for
each seed, for the demo out of its labels and its validation samples together.

The verdict follows from the change of the loss by the source and its 95 % interval: a source helps if the whole interval
is below 0, harms if it is above 0, and otherwise has no measurable effect. A pair is two seeds and one source. The table
shows the share of pairs with `helps` in one seed and `harms` in the other, with different verdicts, and with a source
that only one of the two merges accepts. `--json FILE` writes a row for each merge and source, and keeps the rows of
other cells in FILE. `--table` runs nothing and prints the table of `tests/benchmarks/results/flips.json`.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import transformers
from torch.utils.data import ConcatDataset, Subset

from grasp_hf.comparison.run import code_digest
from grasp_hf.config.recipe import Recipe
from grasp_hf.data.samples import Samples
from grasp_hf.demo.digits import build_world
from grasp_hf.record.entries import ChangeReport
from grasp_hf.record.text import markdown_table
from grasp_hf.runs.prepare import prepare
from tests.benchmarks.compare import RESULTS, TARGETS, UNTOUCHED, recipe_of, write_record
from tests.benchmarks.packages import cache_folder, complete

FILE = RESULTS / "flips.json"
DEMO = "demo"
CELLS = (DEMO, "sentiment:nyt", "emoji:noto")
SIZE = 64
HELPS, HARMS, UNCLEAR = "helps", "harms", "no measurable effect"
PACKAGES = ("torch", "transformers", "peft")

Row = dict[str, Any]  # one source in one merge
Flip = Callable[[Row, Row], bool]
FLIPS: dict[str, Flip] = {
    "helps and harms": lambda one, other: {one["verdict"], other["verdict"]} == {HELPS, HARMS},
    "another verdict": lambda one, other: one["verdict"] != other["verdict"],
    "accepted once": lambda one, other: one["accepted"] != other["accepted"],
}


def verdict(change: ChangeReport | None) -> str | None:
    """Return the verdict on a change of the loss; `None` if nothing validated it.

    A change without an interval, which is that of a single sample, has no measurable effect.
    """
    if change is None:
        return None
    if change.half_interval is None or abs(change.loss) <= change.half_interval:
        return UNCLEAR
    return HELPS if change.loss < 0 else HARMS


def recipe(cell: str, cache: Path, seed: int) -> Recipe:
    """Return the recipe of a cell with a seed; the first call for the demo makes its models."""
    if cell != DEMO:
        benchmark, _, target = cell.partition(":")
        found = recipe_of(benchmark, target, SIZE)
        return replace(found, config=replace(found.config, seed=seed))
    home = cache / DEMO
    if not home.exists():
        with complete(home) as new:
            build_world(new)
    return Recipe.from_yaml(home / "recipe.yaml", [f"seed={seed}"])


def drawn(data: Samples, size: int, seed: int) -> Samples:
    """Return the samples with `size` other labels and, if there are validation samples, as many others of them."""
    if data.validation is None:
        return replace(data, train=data.train.shuffle(seed=seed).select(range(size)))
    pool: ConcatDataset[Any] = ConcatDataset([data.train, data.validation])
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = order[:size], order[size : size + len(data.validation)]
    train, validation = (Subset(pool, part) for part in parts)
    return replace(data, train=train, validation=validation)


def merge(recipe: Recipe, draw: int | None) -> list[Row]:
    """Merge the sources of a recipe, and return a row for each.

    Args:
        recipe: Its seed is that of the merge.
        draw: Seeds the draw of the labels; `None` keeps the labels of the recipe.
    """
    began = time.process_time()
    merger, sources, data = prepare(recipe)
    if draw is not None:
        data = drawn(data, min(SIZE, len(data.train)), draw)
    report = merger.merge(sources, **data.keywords())
    test = merger.evaluate(data.test, data_collator=data.collator)
    common = {"seed": recipe.config.seed, "test": test, "seconds": time.process_time() - began}  # CPU seconds
    return [
        {
            "source": step.name,
            "verdict": verdict(step.change),
            "loss": step.change and step.change.loss,
            "half_interval": step.change and step.change.half_interval,
            "accepted": step.accepted,
            "reason": str(step.reason),
            **common,
        }
        for step in report.steps
    ]


def shares(rows: Iterable[Row]) -> dict[str, float]:
    """Return the share of pairs with each of `FLIPS`, over all pairs of two merges of the same source.

    Pairs with a source that nothing validated do not count. No pair at all gives no shares.
    """
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        if row["verdict"] is not None:
            by_source.setdefault(row["source"], []).append(row)
    pairs = [pair for own in by_source.values() for pair in combinations(own, 2)]
    return {name: fmean(flip(*pair) for pair in pairs) for name, flip in FLIPS.items()} if pairs else {}


def tables(rows: list[Row]) -> str:
    """Return a table for each cell: a row per source, and one for all pairs."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["draw"]), []).append(row)
    return "\n\n".join(_table(*group, own) for group, own in groups.items()) or "flips: nothing yet"


def _table(cell: str, draw: bool, rows: list[Row]) -> str:
    merges = {row["seed"]: row["test"] for row in rows}
    labels = "other labels for each seed" if draw else "the same labels"
    seeds = f"{len(merges)} seed{'s' * (len(merges) != 1)}"
    title = f"{cell}, {seeds}, {labels}; on the test samples: {_spread(merges.values())}"
    lines = []
    for source in [*dict.fromkeys(row["source"] for row in rows), None]:
        own = [row for row in rows if source in (row["source"], None)]
        verdicts = Counter(row["verdict"] or "not validated" for row in own)
        line = {
            "source": source or "all",
            "verdicts": ", ".join(f"{name} {count}" for name, count in verdicts.most_common()),
            "accepted": f"{sum(row['accepted'] for row in own)} of {len(own)}",
        }
        found = shares(own)
        lines.append(line | {name: f"{100 * found[name]:.0f} %" if found else "–" for name in FLIPS})
    return f"{title}\n\n{markdown_table(lines)}"


def _spread(scores: Iterable[dict[str, float]]) -> str:
    """Return the mean of each score over merges, with its standard deviation if there are several merges."""
    found = [*scores]
    values = {name: [score[name] for score in found] for name in found[0]}
    return ", ".join(
        f"{name} {fmean(own):.3f}" + (f" (standard deviation {stdev(own):.3f})" if len(own) > 1 else "")
        for name, own in values.items()
    )


def save(path: Path, rows: list[Row]) -> None:
    """Write the rows of one cell to a file; rows of other cells in it stay."""
    group = rows[0]["cell"], rows[0]["draw"]
    new: dict[str, Any] = {"command": "python -m tests.benchmarks.flips", "settings": {}, "results": []}
    record = json.loads(path.read_text()) if path.exists() else new
    versions = {name: version(name) for name in PACKAGES} | {"code": code_digest()}
    record["settings"][group[0] + ", drawn" * group[1]] = versions
    record["results"] = [row for row in record["results"] if (row["cell"], row["draw"]) != group] + rows
    write_record(path, record)


def main() -> None:
    """Merge with every seed, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=CELLS, metavar="CELL", help=f"default: {' '.join(CELLS)}")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--seeds", nargs="+", type=int, default=[*range(10)])
    parser.add_argument("--draw", action="store_true", help="draw other labels for each seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write a row for each merge and source to FILE")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the recorded results")
    args = parser.parse_args()
    if args.table:
        print(tables(json.loads(FILE.read_text())["results"] if FILE.exists() else []))
        return
    found = [f"{name}:{target}" for part in (TARGETS, UNTOUCHED) for name in part for target in part[name]]
    if unknown := [cell for cell in args.cells if cell not in (DEMO, *found)]:
        parser.error(f"cell: got '{unknown[0]}'; expected some of {', '.join((DEMO, *found))}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = args.json and args.json.absolute()
    args.cache = args.cache.absolute()
    os.chdir(args.cache)  # because the recipes' paths are relative to it
    for cell in args.cells:
        rows: list[Row] = []
        for seed in args.seeds:
            draw = seed if args.draw else None if cell == DEMO else 0
            rows += [{"cell": cell, "draw": args.draw} | row for row in merge(recipe(cell, args.cache, seed), draw)]
            if path:
                save(path, rows)
            print(f"{cell}, seed {seed}: {rows[-1]['seconds']:.0f} s", flush=True)
        print("", tables(rows), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
