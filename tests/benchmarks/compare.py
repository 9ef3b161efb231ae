"""What merging is worth on real data: all methods, on three benchmarks, with 64, 256 and all labels.

Run it with `python -m tests.benchmarks.compare sentiment emoji sotu` after `python -m tests.benchmarks.data` and
`python -m tests.benchmarks.sources`. Each run is a target domain and a seed: the seed draws the labels, the order of the
sources, and everything random in a method; the sources are those of all other domains. Fine-tuning has as many steps for
every method. A stopped run goes on where it was. Sources that are trained on another machine are others to the bit (a GPT-2
by 0.01 nats), so there every run begins anew; once it is through, it takes the place of the one of that name in the record.
All rows of a run are of the same models (but for one of ours, see README.md here); runs may be of other ones, and the record
says of which. The results stand in `tests/benchmarks/results/<benchmark>.json`; `--table` prints the tables of what is
there already, with `--merged` as it was before fine-tuning. `--untouched` takes targets that no rule of the default was
chosen by. `--show` names the tables to print: `rows` (every row of each benchmark), `leaders` (the best other row of each
benchmark and number of labels), `ranks` (mean ranks over all runs), `ungated` (ours without the gate against the other
rows), and `summary` (five rows over both sets of targets).
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

from grasp_hf.comparison.results import OURS, Comparison, Result, interval, kind_of, title_of
from grasp_hf.comparison.run import compare, model_identities
from grasp_hf.config.recipe import Recipe
from grasp_hf.record.text import markdown_table
from tests.benchmarks.emoji import STYLES
from tests.benchmarks.packages import cache_folder
from tests.benchmarks.sentiment import DOMAINS
from tests.benchmarks.sotu import ERAS

RECIPES = Path(__file__).parents[2] / "recipes" / "benchmarks"
RESULTS = Path(__file__).parent / "results"
EPOCHS: dict[str, dict[int | None, float]] = {
    "sentiment": {64: 8, 256: 6, None: 1},
    "emoji": {64: 8, 256: 6, None: 4},
    "sotu": {64: 8, 256: 6, None: 2},
}
FEWER: dict[tuple[str, str, int | None], float] = {
    ("sentiment", "movie", None): 0.25,  # of four times as many labels as the other targets have
}
TARGETS = {
    "sentiment": ("nyt", "amazonHL", "movie"),
    "emoji": ("noto", "fluent-emoji-flat", "openmoji"),
    "sotu": ("2005-2021",),
}
UNTOUCHED = {"sentiment": ("uci_yelp", "tweets"), "emoji": ("twemoji",), "sotu": ("1989-2004",)}
DOMAINS_OF = {"sentiment": tuple(DOMAINS), "emoji": tuple(STYLES), "sotu": tuple(ERAS)}
KIND = {"sentiment": "lora", "emoji": "dinov2", "sotu": "gpt2"}
UNGATED = "without the gate"
SUMMARY = {
    OURS: "grasp_hf, default",
    "best-source": "best source on the labels, fine-tuned",
    "average": "average of all sources, fine-tuned",
    "base": "base model, fine-tuned",
    "published": "GRASP as published",
}
SHOWN = ("rows", "leaders", "ranks", "ungated", "summary")
VARIANTS: dict[str, dict[str, Any]] = {
    "running average": {"method": "average"},
    UNGATED: {"gate": False},
}


def overrides(benchmark: str, target: str, size: int | None) -> list[str]:
    """Return what turns the benchmark's recipe into that of another target and number of labels."""
    others = [domain for domain in DOMAINS_OF[benchmark] if domain != target]
    sources = json.dumps([f"{benchmark}/sources/{KIND[benchmark]}-{domain}" for domain in others])
    if benchmark == "emoji":
        data = [f"data.data_dir={benchmark}/{target}"]
    else:
        data = [f"data.data_files.{split}={benchmark}/{target}/{split}.csv" for split in ("train", "test")]
    epochs = FEWER.get((benchmark, target, size), EPOCHS[benchmark][size])
    return [f"sources={sources}", f"final_epochs={epochs}", *data]


def recipe_of(benchmark: str, target: str, size: int | None) -> Recipe:
    """Return the recipe of a target and number of labels."""
    return Recipe.from_yaml(RECIPES / f"{benchmark}.yaml", overrides(benchmark, target, size))


def run(benchmark: str, target: str, size: int | None, seed: int, cache: Path, variants: bool) -> Comparison:
    """Run all methods for one target, number of labels and seed, and return the results of that target so far."""
    recipe = recipe_of(benchmark, target, size)
    folder = comparison_folder(benchmark, target, size, cache)
    return compare(recipe, folder, sizes=[size], seeds=[seed], variants=VARIANTS if variants else {})


def comparison_folder(benchmark: str, target: str, size: int | None, cache: Path) -> Path:
    """Return where the results of a target and number of labels are or will be."""
    return cache / "comparisons" / f"{benchmark}-{target}-{size or 'all'}"


def combinations(benchmark: str, cache: Path) -> Iterator[tuple[str, int | None, Path]]:
    """Yield every target and number of labels, with the folder of its results."""
    for size in EPOCHS[benchmark]:
        for target in TARGETS[benchmark] + UNTOUCHED[benchmark]:
            yield target, size, comparison_folder(benchmark, target, size, cache)


def restore(benchmark: str, cache: Path) -> None:
    """Put runs of another machine into the cache that lacks them, if they are of the models and the data that are here."""
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
                known.results.append(Result(**{name: row[name] for name in names}))
        if known and len(known.results) > len(there):
            known.save(folder)


def save(benchmark: str, cache: Path) -> None:
    """Write the runs that are through in the cache to the results file; those that it does not hold stay as they are."""
    path = RESULTS / f"{benchmark}.json"
    record = json.loads(path.read_text())
    for target, size, folder in combinations(benchmark, cache):
        if (folder / "comparison.json").exists():
            found, place = Comparison.load(folder), {"target": target, "labels": size or "all"}
            for seed in (result.seed for result in found.results if result.method == OURS):
                run = place | {"seed": seed}
                kept = [row for row in record["results"] if any(row[key] != value for key, value in run.items())]
                record["results"] = kept + [place | asdict(row) for row in found.results if row.seed == seed]
                record["settings"][run_name(folder, seed)] = found.setting
    write_record(path, record)


def run_name(folder: Path, seed: int) -> str:
    """Return what the record of a run is called."""
    return f"{folder.name}-{seed}"


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a results file, each of its `results` on a line of its own."""
    head = json.dumps({**record, "results": []}).removesuffix("]}")
    path.write_text(f"{head}\n" + ",\n".join(map(json.dumps, record["results"])) + "\n]}\n")


def comparisons(benchmark: str, targets: Collection[str], *, merged: bool = False) -> dict[str, Comparison]:
    """Return the results by number of labels; targets count as seeds, sources as one mean.

    With `merged` they are those of the models before fine-tuning, where a method has one.
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
    """Return a table by the benchmark's measure and, where that is not the loss, one by loss: a line per method.

    It gives the mean over runs by number of labels, and by how much that is better than ours; `merged` as `comparisons`.
    """
    found = comparisons(benchmark, targets, merged=merged)
    if not found:
        return [f"{benchmark}: nothing yet"]
    losses = {labels: by_loss(comparison) for labels, comparison in found.items()}
    measures = {comparison.measure: found for comparison in found.values()} | {"loss": losses}
    return [_table(benchmark, measure, some) for measure, some in measures.items()]


def by_loss(comparison: Comparison) -> Comparison:
    """Return the results without any other measure than the loss."""
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
    """Return how many runs there are, in words."""
    count = sum(len(comparison.runs(OURS, 0)) for comparison in found)
    return f"{count} run{'s' * (count != 1)}"


def _cell(found: Collection[Comparison], method: str) -> str:
    """Return the mean of a method over all runs and, in brackets, by how much it is better than ours.

    Returns a dash if the method lacks a run, because means over other runs than ours cannot be compared.
    """
    if any(one.runs(method, 0).keys() != one.runs(OURS, 0).keys() for one in found):
        return "–"
    mean = f"{fmean(value for one in found for value in one.runs(method, 0).values()):.3f}"
    if method == OURS:
        return mean
    differences = [difference for one in found for difference in one.differences(method, 0)]
    return f"{mean} ({interval(differences, signed=True)})"


def summary(benchmarks: Collection[str]) -> str:
    """Return a line per method of `SUMMARY`: means over all runs of the development and of the untouched targets.

    Accuracy is that of the benchmarks that have one, and the loss that of all of them. The last column has the time of
    all runs together.
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
    """Return the mean rank of each method that all runs have, and by how much it is better than ours in each."""
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
    """Return a line per method: its mean rank over all runs by the benchmarks' measures, and by loss everywhere.

    Beside each: in how many runs ours is better and worse, and whether chance explains that (two-sided sign test). The last
    column has the time of all runs together.
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
    """Return in how many runs a method is behind and ahead of ours, and how likely chance is that unequal."""
    behind, ahead = (sum(sign * value < 0 for value in differences) for sign in (1, -1))
    return f"{behind} / {ahead} (p = {binomtest(behind, behind + ahead).pvalue:.3f})" if behind + ahead else "–"


def ungated(targets: dict[str, Collection[str]]) -> str:
    """Return a line per method without our gate: in how many runs ours without it is better and worse than that."""
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
    """Return a line per benchmark, number of labels and measure: the best control or existing method.

    In brackets stands by how much it is better than ours. Those that are fine-tuned through our gate stand apart.
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
                for column, gated in {"best other row": False, "best one through our gate": True}.items():
                    leads = {name: one.differences(name, 0) for name in rivals if name.endswith("-line") == gated}
                    best = max(leads, key=lambda name: fmean(leads[name]), default=None)
                    row[column] = "–"
                    if best:
                        title = title_of(best).removesuffix(", fine-tuned through our gate")
                        row[column] = f"{title} ({interval(leads[best], signed=True)})"
                rows.append(row)
    return markdown_table(rows) if rows else "all benchmarks: nothing yet"


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="+", choices=EPOCHS)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", choices=("64", "256", "all"), default=["64", "256", "all"])
    parser.add_argument("--untouched", action="store_true", help="run and show the targets of `UNTOUCHED` instead")
    parser.add_argument("--variants", action="store_true", help="also run variants of ours")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--merged", action="store_true", help="show the scores before fine-tuning")
    parser.add_argument(
        "--show",
        nargs="+",
        choices=SHOWN,
        metavar="TABLE",
        help=f"which tables: {', '.join(SHOWN)}; default: all but the summary, and with --merged the rows",
    )
    args = parser.parse_args()
    shown = args.show or (["rows"] if args.merged else SHOWN[:-1])
    if args.merged and shown != ["rows"]:
        parser.error("--merged: only --show rows can be printed as it was before fine-tuning")
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("grasp_hf.comparison").setLevel(logging.INFO)
    targets: dict[str, Collection[str]] = {
        benchmark: (UNTOUCHED if args.untouched else TARGETS)[benchmark] for benchmark in args.benchmarks
    }
    args.cache = args.cache.absolute()
    if not args.table and not args.cache.exists():
        parser.error(
            f"{args.cache} is missing; run python -m tests.benchmarks.data and python -m tests.benchmarks.sources"
        )
    for benchmark in args.benchmarks:
        if not args.table:
            os.chdir(args.cache)  # the recipes' paths start there
            restore(benchmark, args.cache)
            for seed in args.seeds:
                for size in (None if size == "all" else int(size) for size in args.sizes):
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
