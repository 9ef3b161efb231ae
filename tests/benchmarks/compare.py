"""Compares all methods on real data: five benchmarks, with 64, 256 and all labels.

Run it with `python -m tests.benchmarks.compare sentiment emoji sotu` after `python -m tests.benchmarks.data` and
`python -m tests.benchmarks.sources`. Each run is a target domain and a seed. The seed draws the labels, the order of
the sources, and all random numbers of a method. The sources are those of all other domains; in `unrelated` they have
nothing to do with the target, so that none should help. Every method is fine-tuned in the same number of steps. A
stopped run continues. `smollm` has 64 labels and few rows only, because its model is large.

Sources that were trained on another machine differ (a GPT-2 by 0.01 nats), so every run begins anew there. A finished
run replaces the run of that name in the record. All rows of a run have the same models, except one row of ours, see
README.md here. Different runs may have different models; the record names them.

The results are in `tests/benchmarks/results/<benchmark>.json`, without the scores of single test samples. So the
intervals of the tables are over runs only. They hold the noise of the test samples as far as the runs have other
targets, and so other test samples. The tables of each target in the cache hold it in full. `--table` prints the tables of these results and runs
nothing; with `--merged` the scores are those before fine-tuning. `--untouched` takes the targets that chose no rule of
the default. `--show` names the tables to print: `rows` (every row of each benchmark), `leaders` (the best other row of
each benchmark and number of labels), `ranks` (mean ranks over all runs), `ungated` (ours without the gate against the
other rows), and `summary` (five rows over both sets of targets).
"""

import argparse
import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import binomtest, rankdata

from grasp_hf.comparison.methods import WITH_GATE
from grasp_hf.comparison.results import OURS, Comparison, Result, interval, kind_of, title_of
from grasp_hf.comparison.run import compare, model_identities
from grasp_hf.config.recipe import Recipe
from grasp_hf.record.text import markdown_table
from tests.benchmarks.emoji import STYLES
from tests.benchmarks.packages import cache_folder
from tests.benchmarks.sentiment import DOMAINS
from tests.benchmarks.smollm import SOURCES
from tests.benchmarks.sotu import ERAS
from tests.benchmarks.unrelated import TASKS

RECIPES = Path(__file__).parents[2] / "recipes" / "benchmarks"
RESULTS = Path(__file__).parent / "results"
EPOCHS: dict[str, dict[int | None, float]] = {
    "sentiment": {64: 8, 256: 6, None: 1},
    "emoji": {64: 8, 256: 6, None: 4},
    "sotu": {64: 8, 256: 6, None: 2},
    "smollm": {64: 4},
    "unrelated": {64: 8, 256: 6, None: 1},
}
FEWER: dict[tuple[str, str, int | None], float] = {
    ("sentiment", "movie", None): 0.25,  # this target has four times as many labels as the others
    ("unrelated", "movie", None): 0.25,
}
TARGETS = {
    "sentiment": ("nyt", "amazonHL", "movie"),
    "emoji": ("noto", "fluent-emoji-flat", "openmoji"),
    "sotu": ("2005-2021",),
    "smollm": ("editorials",),
    "unrelated": ("nyt", "amazonHL", "movie"),
}
UNTOUCHED = {
    "sentiment": ("uci_yelp", "tweets"),
    "emoji": ("twemoji",),
    "sotu": ("1989-2004",),
    "smollm": ("films",),
    "unrelated": ("uci_yelp", "tweets"),
}
TARGETS_OF = {"unrelated": "sentiment"}  # the benchmark whose targets a benchmark has, if they are not its own
DOMAINS_OF = {
    "sentiment": tuple(DOMAINS),
    "emoji": tuple(STYLES),
    "sotu": tuple(ERAS),
    "smollm": SOURCES,
    "unrelated": tuple(TASKS),
}
KIND = {"sentiment": "lora", "emoji": "dinov2", "sotu": "gpt2", "smollm": "smollm2", "unrelated": "unrelated"}
METHODS_OF = {"smollm": ("base", "best-source", "average")}  # besides ours; the other benchmarks run all
UNGATED = "without the gate"
SUMMARY = {
    OURS: "grasp_hf, default",
    "best-source": "best source on the labels, fine-tuned",
    "average": "average of all sources, fine-tuned",
    "base": "base model, fine-tuned",
    "published": "GRASP as in the paper",
}
SHOWN = ("rows", "leaders", "ranks", "ungated", "summary")
VARIANTS: dict[str, dict[str, Any]] = {
    "running average": {"method": "average"},
    UNGATED: {"gate": False},
}


def overrides(benchmark: str, target: str, size: int | None) -> list[str]:
    """Return the overrides that turn the benchmark's recipe into that of another target and number of labels."""
    others = [domain for domain in DOMAINS_OF[benchmark] if domain != target]
    sources = json.dumps([f"{benchmark}/sources/{KIND[benchmark]}-{domain}" for domain in others])
    if benchmark == "emoji":
        data = [f"data.data_dir={benchmark}/{target}"]
    else:
        folder = f"{TARGETS_OF.get(benchmark, benchmark)}/{target}"
        data = [f"data.data_files.{split}={folder}/{split}.csv" for split in ("train", "test")]
    epochs = FEWER.get((benchmark, target, size), EPOCHS[benchmark][size])
    return [f"sources={sources}", f"final_epochs={epochs}", *data]


def recipe_of(benchmark: str, target: str, size: int | None) -> Recipe:
    """Return the recipe of a target and number of labels."""
    return Recipe.from_yaml(RECIPES / f"{benchmark}.yaml", overrides(benchmark, target, size))


def run(benchmark: str, target: str, size: int | None, seed: int, cache: Path, variants: bool) -> Comparison:
    """Run the methods of a benchmark for one target, number of labels and seed; return its results so far."""
    recipe, methods = recipe_of(benchmark, target, size), METHODS_OF.get(benchmark)
    folder = comparison_folder(benchmark, target, size, cache)
    chosen = VARIANTS if variants else {}
    return compare(recipe, folder, sizes=[size], seeds=[seed], methods=methods, variants=chosen)


def comparison_folder(benchmark: str, target: str, size: int | None, cache: Path) -> Path:
    """Return the folder for the results of a target and number of labels."""
    return cache / "comparisons" / f"{benchmark}-{target}-{size or 'all'}"


def combinations(benchmark: str, cache: Path) -> Iterator[tuple[str, int | None, Path]]:
    """Yield every target and number of labels, with the folder of its results."""
    for size in EPOCHS[benchmark]:
        for target in TARGETS[benchmark] + UNTOUCHED[benchmark]:
            yield target, size, comparison_folder(benchmark, target, size, cache)


def restore(benchmark: str, cache: Path) -> None:
    """Copy recorded results that the cache lacks into it, if their models and data are the present ones."""
    record = json.loads((RESULTS / f"{benchmark}.json").read_text())
    names = [field.name for field in fields(Result)]
    for target, size, folder in combinations(benchmark, cache):
        known = Comparison.load(folder) if (folder / "comparison.json").exists() else None
        there = {(result.method, result.seed) for result in known.results} if known else set()
        missing = []
        for row in record["results"]:
            if (row["target"], row["labels"]) == (target, size or "all") and (row["method"], row["seed"]) not in there:
                missing.append(row)
        here = model_identities(recipe_of(benchmark, target, size)) if missing else None
        for row in missing:
            setting = record["settings"][run_name(folder, row["seed"])]
            if setting["models"] != here:
                continue
            known = known or Comparison([], setting)
            if all(known.setting.get(key) == setting[key] for key in ("models", "digests")):
                known.results.append(Result(**{name: row[name] for name in names if name in row}))
        if known and len(known.results) > len(there):
            known.save(folder)


def save(benchmark: str, cache: Path) -> None:
    """Write the finished runs of the cache to the results file; its other runs stay."""
    path = RESULTS / f"{benchmark}.json"
    record = json.loads(path.read_text())
    for target, size, folder in combinations(benchmark, cache):
        if (folder / "comparison.json").exists():
            found, place = Comparison.load(folder), {"target": target, "labels": size or "all"}
            for seed in (result.seed for result in found.results if result.method == OURS):
                run = place | {"seed": seed}
                kept = [row for row in record["results"] if any(row[key] != value for key, value in run.items())]
                record["results"] = kept + [place | recorded(row) for row in found.results if row.seed == seed]
                record["settings"][run_name(folder, seed)] = found.setting
    write_record(path, record)


def recorded(result: Result) -> dict[str, Any]:
    """Return the fields of a result for the record, without the scores of single test samples."""
    fields = asdict(result)
    del fields["samples"]
    return fields


def run_name(folder: Path, seed: int) -> str:
    """Return the name of a run in the record."""
    return f"{folder.name}-{seed}"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a results file with each of its `results` on its own line."""
    head = json.dumps({**record, "results": []}).removesuffix("]}")
    path.write_text(f"{head}\n" + ",\n".join(map(json.dumps, record["results"])) + "\n]}\n")


def comparisons(benchmark: str, targets: Collection[str], *, merged: bool = False) -> dict[str, Comparison]:
    """Return the results by number of labels.

    Each target and seed becomes a run, and the sources alone become one row with their mean.

    Args:
        benchmark: Name of the benchmark.
        targets: Targets whose results are read.
        merged: Whether to return the scores before fine-tuning, for methods that have them.
    """
    rows = json.loads((RESULTS / f"{benchmark}.json").read_text())["results"]
    rows = [row for row in rows if row["target"] in targets]
    found = {}
    for labels in (size or "all" for size in EPOCHS[benchmark]):
        mine = [row for row in rows if row["labels"] == labels]
        if not mine:
            continue
        results = []
        for number, name in enumerate(dict.fromkeys((row["target"], row["seed"]) for row in mine)):
            run = [row for row in mine if (row["target"], row["seed"]) == name]
            alone = [row["final"] for row in run if row["method"].startswith("source:")]
            mean = {key: fmean(final[key] for final in alone) for key in alone[0]}
            results.append(Result("source:(mean of all)", 0, number, {}, mean, 0.0))
            results += [
                Result(
                    row["method"],
                    0,
                    number,
                    row["merged"],
                    (merged and row["merged"]) or row["final"],
                    row["seconds"],
                    row["problem"],
                )
                for row in run
                if not row["method"].startswith("source:")
            ]
        found[str(labels)] = Comparison(results, {})
    return found


def tables(benchmark: str, targets: Collection[str], *, merged: bool = False) -> list[str]:
    """Return a table for the benchmark's measure and one for the loss, with a row per method.

    A cell has the mean over runs for a number of labels, and how much better it is than ours. Arguments as for
    `comparisons`.
    """
    found = comparisons(benchmark, targets, merged=merged)
    if not found:
        return [f"{benchmark}: nothing yet"]
    losses = {labels: by_loss(comparison) for labels, comparison in found.items()}
    measures = {comparison.measure: found for comparison in found.values()} | {"loss": losses}
    return [_table(benchmark, measure, some) for measure, some in measures.items()]


def by_loss(comparison: Comparison) -> Comparison:
    """Return the results with the loss as their only measure."""
    results = [replace(result, final={"loss": result.final["loss"]}) for result in comparison.results if result.final]
    return Comparison(results, {})


def _table(benchmark: str, measure: str, found: dict[str, Comparison]) -> str:
    methods = dict.fromkeys(method for comparison in found.values() for method in comparison.methods(0))
    rows = []
    for method in methods:
        row = {f"{benchmark}: {measure}": title_of(method), "kind": kind_of(method)}
        for labels, comparison in found.items():
            row[f"{labels} labels ({_runs([comparison])})"] = _cell([comparison], method)
        rows.append(row)
    return markdown_table(rows)


def _runs(found: Collection[Comparison]) -> str:
    """Return the number of runs, in words."""
    count = sum(len(comparison.runs(OURS, 0)) for comparison in found)
    return f"{count} run{'s' * (count != 1)}"


def _cell(found: Collection[Comparison], method: str) -> str:
    """Return the mean of a method over all runs and, in brackets, how much better it is than ours.

    If the method lacks a run, return a dash, because means over different runs cannot be compared.
    """
    if any(one.runs(method, 0).keys() != one.runs(OURS, 0).keys() for one in found):
        return "–"
    mean = f"{fmean(value for one in found for value in one.runs(method, 0).values()):.3f}"
    if method == OURS:
        return mean
    differences = [difference for one in found for difference in one.differences(method, 0)]
    return f"{mean} ({interval(differences, signed=True)})"


def summary(benchmarks: Collection[str]) -> str:
    """Return a row per method of `SUMMARY`: means over all runs of the development and of the untouched targets.

    The accuracy is a mean over the benchmarks that have one, and the loss over all. The last column is the time of all
    runs together, in units of our time.
    """
    sets: dict[str, list[Comparison]] = {}
    for name, targets in {"development": TARGETS, "untouched": UNTOUCHED}.items():
        sets[name] = [
            found for benchmark in benchmarks for found in comparisons(benchmark, targets[benchmark]).values()
        ]
    everything = [comparison for found in sets.values() for comparison in found]
    if not everything:
        return "summary: nothing yet"
    seconds = dict.fromkeys(SUMMARY, 0.0)
    for result in chain.from_iterable(comparison.results for comparison in everything):
        if result.method in seconds:
            seconds[result.method] += result.seconds
    rows = []
    for method, title in SUMMARY.items():
        row = {"method": title}
        for name, found in sets.items():
            accurate = [comparison for comparison in found if comparison.measure == "accuracy"]
            for measure, some in {"accuracy": accurate, "loss": [by_loss(comparison) for comparison in found]}.items():
                if some:
                    row[f"{name} targets: {measure} ({_runs(some)})"] = _cell(some, method)
        row["time, of ours"] = f"{seconds[method] / seconds[OURS]:.2f}" if seconds[method] else "–"
        rows.append(row)
    return markdown_table(rows)


def ranked(found: list[Comparison]) -> dict[str, tuple[float, list[float]]]:
    """Return, for each method that all runs have, its mean rank and how much better it is than ours in each run."""
    ran = [
        {method for method in one.methods(0) if one.runs(method, 0).keys() == one.runs(OURS, 0).keys()}
        for one in found
    ]
    everywhere = set.intersection(*ran) if ran else set()
    ranks: dict[str, list[float]] = {}
    differences: dict[str, list[float]] = {}
    for comparison in found:
        methods = [method for method in comparison.methods(0) if method in everywhere]
        for method in methods:
            differences.setdefault(method, []).extend(comparison.differences(method, 0))
        for run in comparison.runs(OURS, 0):
            reached = {method: comparison.runs(method, 0)[run] for method in methods}
            sign = -1 if comparison.measure == "accuracy" else 1
            for method, rank in zip(reached, rankdata([sign * value for value in reached.values()]), strict=True):
                ranks.setdefault(method, []).append(float(rank))
    return {method: (fmean(values), differences[method]) for method, values in ranks.items()}


def overall(targets: dict[str, Collection[str]]) -> str:
    """Return a row per method: its mean ranks over all runs, by the benchmarks' measures and by loss.

    Next to each rank is the number of runs in which ours is better and worse, and the p value of a two-sided sign
    test. The last column is the time of all runs together, in units of our time.
    """
    own = [comparison for benchmark in targets for comparison in comparisons(benchmark, targets[benchmark]).values()]
    if not own:
        return "all benchmarks: nothing yet"
    columns = {"mean rank": ranked(own), "mean rank, by loss": ranked([by_loss(one) for one in own])}
    seconds: defaultdict[str, float] = defaultdict(float)
    for result in chain.from_iterable(comparison.results for comparison in own):
        seconds[result.method] += result.seconds
    rows = []
    for method in sorted(columns["mean rank"], key=lambda method: columns["mean rank"][method][0]):
        row = {"all benchmarks": title_of(method), "kind": kind_of(method)}
        for column, found in columns.items():
            rank, differences = found[method]
            row[column] = f"{rank:.1f}"
            row[f"ours better / worse{column.removeprefix('mean rank')}"] = _sign_test(differences)
        row["time, of ours"] = f"{seconds[method] / seconds[OURS]:.2f}" if seconds[method] else "–"
        rows.append(row)
    return markdown_table(rows)


def _sign_test(differences: Collection[float]) -> str:
    """Return the number of runs in which a method is worse and better than ours, and the p value of a sign test."""
    worse, better = sum(value < 0 for value in differences), sum(value > 0 for value in differences)
    return f"{worse} / {better} (p = {binomtest(worse, worse + better).pvalue:.3f})" if worse + better else "–"


def ungated(targets: dict[str, Collection[str]]) -> str:
    """Return a row per method without our gate: the runs in which ours without the gate is better and worse."""
    own = [comparison for benchmark in targets for comparison in comparisons(benchmark, targets[benchmark]).values()]
    columns = {"better / worse": ranked(own), "by loss": ranked([by_loss(one) for one in own])} if own else {}
    reference = f"variant:{UNGATED}"
    if not columns or any(reference not in found for found in columns.values()):
        return "ours without the gate: nothing yet"
    rows = []
    for method, _ in sorted(columns["better / worse"].items(), key=lambda item: item[1][0]):
        if kind_of(method) == "ours" or method.endswith("-line"):
            continue
        row = {"ours without the gate, against": title_of(method), "kind": kind_of(method)}
        for column, found in columns.items():
            pairs = zip(found[method][1], found[reference][1], strict=True)
            row[column] = _sign_test([one - other for one, other in pairs])
        rows.append(row)
    return markdown_table(rows)


def leaders(targets: dict[str, Collection[str]]) -> str:
    """Return a row per benchmark, number of labels and measure: the best control or existing method.

    The number in brackets is how much better it is than ours. Methods with our gate have a column of their own.
    """
    rows = []
    for benchmark in targets:
        for labels, found in comparisons(benchmark, targets[benchmark]).items():
            for measure, one in ({found.measure: found} | {"loss": by_loss(found)}).items():
                own = one.runs(OURS, 0)
                rivals = [
                    method
                    for method in one.methods(0)
                    if kind_of(method) != "ours" and one.runs(method, 0).keys() == own.keys()
                ]
                row = {
                    "measure": f"{benchmark}, {labels} labels: {measure} ({_runs([one])})",
                    "ours": f"{fmean(own.values()):.3f}",
                }
                for column, gated in {"best other row": False, "best row with our gate": True}.items():
                    leads = {name: one.differences(name, 0) for name in rivals if name.endswith("-line") == gated}
                    best = max(leads, key=lambda name: fmean(leads[name]), default=None)
                    row[column] = "–"
                    if best:
                        title = title_of(best).removesuffix(WITH_GATE)
                        row[column] = f"{title} ({interval(leads[best], signed=True)})"
                rows.append(row)
    return markdown_table(rows) if rows else "all benchmarks: nothing yet"


def main() -> None:
    """Run all missing runs, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="+", choices=EPOCHS)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", choices=("64", "256", "all"), default=["64", "256", "all"])
    parser.add_argument("--untouched", action="store_true", help="run and print the targets of `UNTOUCHED` instead")
    parser.add_argument("--variants", action="store_true", help="also run variants of ours")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of the recorded results")
    parser.add_argument("--merged", action="store_true", help="print the scores before fine-tuning")
    parser.add_argument(
        "--show",
        nargs="+",
        choices=SHOWN,
        metavar="TABLE",
        help=f"tables to print: {', '.join(SHOWN)}; default: all but the summary, with --merged only the rows",
    )
    args = parser.parse_args()
    shown = args.show or (["rows"] if args.merged else SHOWN[:-1])
    if args.merged and shown != ["rows"]:
        parser.error("--merged: expected --show rows, because the other tables have no scores before fine-tuning")
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("grasp_hf.comparison").setLevel(logging.INFO)
    targets: dict[str, Collection[str]] = {
        benchmark: (UNTOUCHED if args.untouched else TARGETS)[benchmark] for benchmark in args.benchmarks
    }
    args.cache = args.cache.absolute()
    if not args.table and not args.cache.exists():
        parser.error(
            f"--cache: '{args.cache}' does not exist; run python -m tests.benchmarks.data and then "
            "python -m tests.benchmarks.sources"
        )
    for benchmark in args.benchmarks:
        if not args.table:
            os.chdir(args.cache)  # because the recipes' paths are relative to it
            restore(benchmark, args.cache)
            for seed in args.seeds:
                sizes = [None if size == "all" else int(size) for size in args.sizes]
                for size in (size for size in sizes if size in EPOCHS[benchmark]):
                    for target in targets[benchmark]:
                        run(benchmark, target, size, seed, args.cache, args.variants)
                        save(benchmark, args.cache)
        if "rows" in shown:
            print("", *tables(benchmark, targets[benchmark], merged=args.merged), sep="\n\n")
    over_all = {"leaders": leaders, "ranks": overall, "ungated": ungated, "summary": summary}
    found = [table(targets) for name, table in over_all.items() if name in shown]
    if found:
        print("", *found, sep="\n\n")


if __name__ == "__main__":
    main()
