"""How should the merge be weighed and fine-tuned, and what do unlabelled inputs add?

Run it with `python -m tests.benchmarks.teaching CELL …` after `python -m tests.benchmarks.data` and
`python -m tests.benchmarks.sources`. A cell is `BENCHMARK:TARGET:LABELS:SEED`, as in `emoji:noto:64:0`. Its labels,
order and sources are those of `tests.benchmarks.compare`; the rows are those that decide the default. The record is
`tests/benchmarks/results/teaching.json`; a row that it holds is not run again. `--table` prints the tables of the
record, and runs nothing; with `--untouched` those of the targets that chose no rule.

Times are seconds of CPU on one thread. They include reading the sources, not the evaluation on the test samples.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from scipy.stats import rankdata

from grasp_hf.comparison.methods import (
    evaluate_stacked,
    finetune_with_gate,
    keep_base,
    load_best_source,
    run_ours,
    run_placebo,
    run_taught,
)
from grasp_hf.comparison.results import interval
from grasp_hf.comparison.run import MOST_UNLABELED
from grasp_hf.comparison.workbench import Workbench
from grasp_hf.record.text import markdown_table
from grasp_hf.runs.prepare import prepare
from tests.benchmarks.compare import RESULTS, UNTOUCHED, recipe_of, write_record
from tests.benchmarks.packages import cache_folder

RECORD = RESULTS / "teaching.json"
OURS = "default"
PREVIOUS = "previous default"


def _finetuned(start: Callable[[Workbench], None], bench: Workbench) -> None:
    start(bench)
    bench.finetune(bench.epochs)


ROWS: dict[str, Callable[[Workbench], Any]] = {
    OURS: run_ours,
    "default, with unlabelled inputs": run_taught,
    "plain mean of the sources, our fine-tuning": partial(run_ours, method="average"),
    "learned coefficients (blend), our fine-tuning": partial(run_ours, method="blend"),
    "best source, our fine-tuning": partial(finetune_with_gate, load_best_source),
    "best source, fine-tuned in full": partial(_finetuned, load_best_source),
    "base, fine-tuned in full": partial(_finetuned, keep_base),
    "base, our fine-tuning": partial(finetune_with_gate, keep_base),
    "placebo sources, default": run_placebo,
    "stacked predictions, untrained": evaluate_stacked,
}


def run_cell(cell: str, rows: list[str], cache: Path) -> None:
    """Run the rows of a cell that the record lacks, and add each to the record as soon as it ends."""
    benchmark, target, labels, seed_text = cell.split(":")
    size, seed = (None if labels == "all" else int(labels)), int(seed_text)
    missing = [name for name in rows if (cell, name) not in {(row["cell"], row["row"]) for row in read_record()}]
    if not missing:
        return
    os.chdir(cache)
    recipe = recipe_of(benchmark, target, size)
    base, sources, data = prepare(recipe)
    base.config = replace(recipe.config, seed=seed)
    shuffled = data.train.shuffle(seed=seed)
    count = size or len(shuffled)
    rest = shuffled.select(range(count, min(len(shuffled), count + MOST_UNLABELED)))
    order = [*sources]
    random.Random(seed).shuffle(order)
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(
            base,
            order,
            replace(data, train=shuffled.select(range(count))),
            unlabeled=rest if len(rest) else None,
            epochs=base.config.total_epochs(len(sources)),
            directory=Path(folder),
        )
        for name in missing:
            began = time.process_time()
            losses = ROWS[name](bench)
            seconds = time.process_time() - began
            found = {"cell": cell, "row": name, **(losses or bench.test()).evaluation(), "seconds": round(seconds, 1)}
            write_record(RECORD, {"results": [*read_record(), found]})
            print(found, flush=True)


def read_record() -> list[dict[str, Any]]:
    """Return the rows of the record."""
    return json.loads(RECORD.read_text())["results"] if RECORD.exists() else []


def tables(*, untouched: bool, summary: bool = False) -> list[str]:
    """Return a table of means and differences for each benchmark, and one over all cells; `summary` returns the last only."""
    everything = read_record()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in everything:
        benchmark, target, *_ = row["cell"].split(":")
        if (target in UNTOUCHED.get(benchmark, ())) == untouched:
            found.setdefault(row["cell"], {})[row["row"]] = row
    cells = {cell: rows for cell, rows in found.items() if OURS in rows}
    if summary:
        return [_ranks(cells)]
    shown = [_means(name, {c: r for c, r in cells.items() if c.startswith(f"{name}:")}) for name in UNTOUCHED]
    return [table for table in [*shown, _ranks(cells)] if table]


def _means(benchmark: str, cells: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name in _everywhere(cells):
        line = {f"{benchmark}, {len(cells)} cells": name}
        for measure in ("accuracy", "loss"):
            if all(measure in rows[name] for rows in cells.values()):
                own = [rows[name][measure] for rows in cells.values()]
                differences = [rows[name][measure] - rows[OURS][measure] for rows in cells.values()]
                text = f"{fmean(own):.3f}"
                line[measure] = text if name == OURS else f"{text} ({interval(differences, signed=True)})"
        line["CPU s"] = f"{fmean(rows[name]['seconds'] for rows in cells.values()):.0f}"
        lines.append(line)
    return markdown_table(lines) if lines else ""


def _ranks(cells: dict[str, dict[str, Any]]) -> str:
    names = _everywhere(cells)
    if not names:
        return ""
    best = "best source, fine-tuned in full"
    lines = {name: {f"{len(cells)} cells": name} for name in names}
    for measure in ("accuracy", "loss"):
        some = [rows for rows in cells.values() if all(measure in rows[name] for name in names)]
        for name in names if some else ():
            text = f"{fmean(rows[name][measure] for rows in some):.3f}"
            differences = [rows[name][measure] - rows[OURS][measure] for rows in some]
            lines[name][measure] = text if name == OURS else f"{text} ({interval(differences, signed=True)})"
    for title, sign, measure in (("rank by accuracy", -1, "accuracy"), ("rank by loss", 1, "loss")):
        some = [rows for rows in cells.values() if all(measure in rows[name] for name in names)]
        if not some:
            continue
        ranks = [rankdata([sign * rows[name][measure] for name in names]) for rows in some]
        for index, name in enumerate(names):
            lines[name][title] = f"{fmean(float(rank[index]) for rank in ranks):.1f}"
            ahead = sum(sign * (rows[name][measure] - rows[best][measure]) < 0 for rows in some)
            lines[name][f"ahead of the best source by {measure}"] = f"{ahead} of {len(some)}"
    for name in names:
        times = [rows[name]["seconds"] / rows[best]["seconds"] for rows in cells.values()]
        lines[name]["time, of the best source's"] = f"{fmean(times):.1f}"
    return markdown_table(list(lines.values()))


def _everywhere(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Return the rows that all cells have, in the order of `ROWS`."""
    return [name for name in [*ROWS, PREVIOUS] if cells and all(name in rows for rows in cells.values())]


def main() -> None:
    """Run the missing rows of some cells, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of the record")
    parser.add_argument("--untouched", action="store_true", help="the tables of the targets that chose no rule")
    parser.add_argument("--summary", action="store_true", help="only the table over all cells")
    args = parser.parse_args()
    if args.table:
        print("", *tables(untouched=args.untouched, summary=args.summary), sep="\n\n")
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for cell in args.cells:
        run_cell(cell, args.rows, args.cache.absolute())


if __name__ == "__main__":
    main()
