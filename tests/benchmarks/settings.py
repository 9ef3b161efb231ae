"""Changes each setting of the default alone, on real data, to show which settings matter.

Run it with `python -m tests.benchmarks.settings sotu:2005-2021 sentiment:nyt emoji:noto` after
`python -m tests.benchmarks.sources`; each argument is a benchmark and a target. Labels, order of the sources and
epochs are those of the benchmark in `tests.benchmarks.compare`. A stopped run continues. The results are in
`tests/benchmarks/results/settings.json`. `--table` prints, for each benchmark and number of labels, the mean of each
setting over runs, and how much better it is than the default, with the 95 % interval over runs.
"""

import argparse
import json
import logging
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from grasp_hf.comparison.results import Result, interval
from grasp_hf.comparison.run import compare
from grasp_hf.config.grasp import GraspConfig
from grasp_hf.record.text import markdown_table
from tests.benchmarks.compare import RESULTS, TARGETS, UNTOUCHED, recipe_of, write_record
from tests.benchmarks.packages import cache_folder

FILE = RESULTS / "settings.json"
DEFAULT = "default"


def settings(config: GraspConfig, sources: int) -> dict[str, dict[str, Any]]:
    """Return the changes of a benchmark's configuration by title; all have the same epochs of fine-tuning, or none."""
    epochs, rate = config.final_epochs, config.training_arguments["learning_rate"]

    def at(rate: float) -> dict[str, Any]:
        return {"training_arguments": {**config.training_arguments, "learning_rate": rate}}

    return {
        "units: module": {"unit": "module"},
        "units: tensor": {"unit": "tensor"},
        "coefficients: 1/k": {"method": "average"},
        "coefficients: one step by the sign of the slope": {"num_batches": 1, "coefficient_lr": 0.5},
        "coefficients: 32 batches": {"num_batches": 32},
        "copy: cosine above 0": {"method": "copy", "threshold": 0.0},
        "copy: cosine above 0.3": {"method": "copy"},
        "order: as given": {"order": "given"},
        "order: rank": {"order": "rank"},
        "fine-tuned before the first source": {"initial_epochs": epochs, "final_epochs": 0},
        "fine-tuned after every source": {"finetune_epochs": epochs / sources, "final_epochs": 0},
        "not fine-tuned": {"final_epochs": 0},
        "learning rate: half": at(rate / 2),
        "learning rate: double": at(rate * 2),
        "no gate": {"gate": False},
    }


def run(
    benchmark: str, target: str, size: int, seed: int, cache: Path, only: Collection[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run all settings, or `only` some, for one set of labels; return a row for each, and the comparison's setting."""
    recipe = recipe_of(benchmark, target, size)
    changed = settings(recipe.config, len(recipe.sources))
    if unknown := [title for title in only if title not in changed]:
        raise ValueError(f"--only: got '{unknown[0]}'; expected some of {', '.join(changed)}")
    changed = {title: changed[title] for title in only or changed}
    folder = cache / "settings" / f"{benchmark}-{target}-{size}"
    done = compare(recipe, folder, sizes=[size], seeds=[seed], methods=["ours"], variants=changed)
    common = {"benchmark": benchmark, "target": target, "labels": size, "seed": seed}
    rows = [common | row(result) for result in done.results if result.seed == seed and not is_source(result)]
    return rows, done.setting


def is_source(result: Result) -> bool:
    """Return whether a result is that of a source alone."""
    return result.method.startswith("source:")


def row(result: Result) -> dict[str, Any]:
    """Return a result as a row of the record."""
    kept = asdict(result)
    return {"setting": result.method.partition(":")[2] or DEFAULT, "seconds": kept["seconds"], **kept["final"]}


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the table of every benchmark and number of labels."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        groups.setdefault(f"{found['benchmark']}, {found['labels']} labels", []).append(found)
    return "\n\n".join(f"{title}\n\n{table(group)}" for title, group in groups.items())


def table(rows: list[dict[str, Any]]) -> str:
    """Return a row per setting: how much lower its loss and how much higher its accuracy is than the default's."""
    runs: dict[str, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for found in rows:
        run = tuple(found[key] for key in ("benchmark", "target", "labels", "seed"))
        runs.setdefault(found["setting"], {})[run] = found
    lines = []
    for setting, own in runs.items():
        line = {"setting": setting, "runs": str(len(own))}
        for measure, sign in {"loss": -1, "accuracy": 1}.items():
            if measure not in rows[0]:
                continue
            gains = [sign * (found[measure] - runs[DEFAULT][run][measure]) for run, found in own.items()]
            line[measure] = f"{fmean(found[measure] for found in own.values()):.3f}"
            line[f"{measure}: better by"] = interval(gains, signed=True) if setting != DEFAULT else "–"
        times = [found["seconds"] / runs[DEFAULT][run]["seconds"] for run, found in own.items()]
        line["time, of the default's"] = f"{fmean(times):.1f}"
        lines.append(line)
    return markdown_table(lines)


def save(rows: list[dict[str, Any]], setting: dict[str, Any], path: Path = FILE) -> None:
    """Write the rows of one set of labels to the results file.

    Earlier rows of other settings stay if the models are the same and the default has the same loss. A different loss
    means that they are of another version.
    """
    record, name = json.loads(path.read_text()), "{benchmark}-{target}-{labels}-{seed}".format(**rows[0])
    same, earlier = ["benchmark", "target", "labels", "seed"], record["settings"].get(name)
    (default,) = (new for new in rows if new["setting"] == DEFAULT)
    as_before = any(all(old[key] == default[key] for key in (*same, "setting", "loss")) for old in record["results"])
    if earlier and earlier["models"] == setting["models"] and as_before:
        same.append("setting")
        setting = {**setting, "variants": earlier["variants"] | setting["variants"]}
    new = {tuple(row[key] for key in same) for row in rows}
    kept = [old for old in record["results"] if tuple(old[key] for key in same) not in new]
    record["settings"][name] = setting
    record["results"] = kept + rows
    write_record(path, record)


def main() -> None:
    """Run and record all missing runs, and print the tables of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="BENCHMARK:TARGET")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--sizes", nargs="+", type=int, choices=(64, 256), default=[64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="SETTING", help="default: all")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables of the recorded results")
    args = parser.parse_args()
    if args.table:
        print(tables(json.loads(FILE.read_text())["results"]))
        return
    torch.set_num_threads(1)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("grasp_hf.comparison").setLevel(logging.INFO)
    known = [
        f"{benchmark}:{target}"
        for targets in (TARGETS, UNTOUCHED)
        for benchmark in targets
        for target in targets[benchmark]
    ]
    if unknown := [name for name in args.targets if name not in known]:
        parser.error(f"target: got '{unknown[0]}'; expected some of {', '.join(known)}")
    args.cache = args.cache.absolute()
    os.chdir(args.cache)  # because the recipes' paths are relative to it
    for seed in args.seeds:
        for size in args.sizes:
            for name in args.targets:
                benchmark, _, target = name.partition(":")
                save(*run(benchmark, target, size, seed, args.cache, args.only))
    print(tables(json.loads(FILE.read_text())["results"]))


if __name__ == "__main__":
    main()
