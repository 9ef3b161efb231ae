"""The command line: `grasp-hf plan | rank | merge | append | reproduce | demo`."""

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .config import Recipe
from .errors import ConfigError, GraspError
from .lineage import append_recipe, reproduce
from .merger import GraspMerger
from .plan import plan, plan_table, problem_list
from .prepare import TaskData, prepare
from .rank import ranking_table
from .saving import check_output

EXAMPLES = {
    "plan": "example:\n  grasp-hf plan recipes/digits/full.yaml",
    "merge": (
        "example:\n  grasp-hf merge recipes/digits/full.yaml --output merged method=copy threshold=0.2\n"
        "  grasp-hf merge recipe.yaml --output merged training_arguments.learning_rate=1.0e-5 --push-to-hub me/merged"
    ),
    "rank": (
        "example:\n  grasp-hf rank recipes/digits/full.yaml --json ranking.json\n"
        "  grasp-hf merge recipes/digits/full.yaml --output merged order=rank top=2"
    ),
    "append": (
        "example:\n  grasp-hf append me/merged org/new-model --push-to-hub me/merged\n"
        "  grasp-hf append merged ./new-model --output merged-2 data.data_files.train=more.csv"
    ),
    "reproduce": "example:\n  grasp-hf reproduce me/merged",
    "demo": "example:\n  grasp-hf demo --output grasp-demo",
}
EXIT_CODES = "exit codes: 0 done, 1 a source, the data or the configuration is not fit, 2 wrong usage, 130 interrupted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one run only: overrides behind an option are left over.
    if rest and (options.command == "demo" or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command != "demo":
        options.overrides += rest
        options.sources = [text for text in options.overrides if "=" not in text]
        options.overrides = [text for text in options.overrides if "=" in text]
        if options.command != "append" and (wrong := options.sources):
            parser.error(f"expected key=value, got: {' '.join(wrong)}")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported
    try:
        with _lines_on_stdout(logging.DEBUG if options.verbose else logging.INFO):
            return {
                "plan": _plan,
                "rank": _rank,
                "merge": _merge,
                "append": _append,
                "reproduce": _reproduce,
                "demo": _demo,
            }[options.command](options)
    except GraspError as error:
        if options.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run() -> None:
    """Run the command line and leave: the entry point of `grasp-hf`."""
    code = main()
    gc.freeze()  # otherwise Python's last collection walks all objects of torch and transformers, for a second
    sys.exit(code)


@contextmanager
def _lines_on_stdout(level: int) -> Iterator[None]:
    """Print what the package logs: lines such as that of each source on stdout, warnings on stderr."""
    logger = logging.getLogger("grasp_hf")
    lines, warnings = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    lines.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings.setLevel(logging.WARNING)
    logger.setLevel(level)
    for handler in (lines, warnings):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (lines, warnings):
            logger.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grasp-hf",
        description="Merge many fine-tuned models into one, one at a time, guided by gradients of your own data.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="plan | rank | merge | append | reproduce | demo"
    )

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text[0].lower() + text[1:-1],
            description=text,
            epilog=f"{EXAMPLES[name]}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("-v", "--verbose", action="store_true", help="show details, and tracebacks of errors")
        return sub

    plan = command("plan", "List every model of a recipe and all problems, before any weight is read.")
    rank = command(
        "rank", "Order the sources of a recipe by what they promise to the fine-tuned base, without merging any."
    )
    merge = command("merge", "Merge the sources of a recipe into one model folder.")
    for sub in (plan, rank, merge):
        sub.add_argument("recipe", help="a YAML file, see recipes/")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write everything that is known to FILE")
    rank.add_argument("--json", type=Path, metavar="FILE", help="also write the ranking, with every unit, to FILE")
    append = command("append", "Merge further sources into a published merge; its earlier sources are not downloaded.")
    append.add_argument("merged", help="Hub id or folder of a merge")
    append.add_argument(
        "overrides", nargs="+", metavar="source | key=value", help="sources, and what replaces a setting"
    )
    merge.add_argument("--output", required=True, type=Path, help="folder for the merged model")
    append.add_argument("--output", type=Path, help="folder for the merged model")
    for sub in (merge, append):
        sub.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the merged model to this repository")
        sub.add_argument("--private", action="store_true", help="make the repository private where it is new")
        sub.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    again = command("reproduce", "Make a published merge again from its record, and compare the weights bit for bit.")
    again.add_argument("merged", help="Hub id or folder of a merge")
    again.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the record")
    demo = command(
        "demo", "Make a small world of real handwritten digits, merge its models, and compare with controls."
    )
    demo.add_argument("--output", type=Path, default=Path("grasp-demo"), help="folder for it (default: grasp-demo)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the world and of the merge (default: 0)")
    return parser


def _plan(options: argparse.Namespace) -> int:
    recipe = Recipe.from_yaml(options.recipe, options.overrides)
    rows = plan(recipe)
    print(plan_table(rows, recipe))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any(row.problems for row in rows))


def _rank(options: argparse.Namespace) -> int:
    recipe = Recipe.from_yaml(options.recipe, options.overrides)
    merger, sources, data = prepare(recipe)
    merger.merge([], **data.merge_arguments())  # an untrained head has no gradient to go by
    rows = merger.rank(sources, train_dataset=data.train, data_collator=data.collator)
    print(ranking_table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any(row.problem for row in rows))


def _merge(options: argparse.Namespace) -> int:
    recipe = Recipe.from_yaml(options.recipe, options.overrides)
    check_output(options.output)
    if problems := problem_list(plan(recipe)):
        raise ConfigError("nothing was merged, because of these problems:\n" + "\n".join(problems))
    merger, sources, data = prepare(recipe)
    _merge_sources(merger, sources, data, options)
    return 0


def _append(options: argparse.Namespace) -> int:
    if not options.sources or not (options.output or options.push_to_hub):
        raise ConfigError("append: expected at least one source, and --output or --push-to-hub")
    recipe = append_recipe(options.merged, options.sources, options.overrides)
    if options.output:
        check_output(options.output)
    if problems := problem_list(plan(recipe)):
        raise ConfigError("nothing was merged, because of these problems:\n" + "\n".join(problems))
    merger, sources, data = prepare(recipe)
    if not merger.report.continues:
        raise ConfigError(f"the data has other labels than '{options.merged}'; start a new merge from it")
    _merge_sources(merger, sources, data, options)
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    replay = reproduce(options.merged, options.overrides)
    print(replay)
    return int(bool(replay.differences))


def _merge_sources(merger: GraspMerger, sources: list[str], data: TaskData, options: argparse.Namespace) -> None:
    before = len(merger.report.steps)
    try:
        merger.merge(sources, **data.merge_arguments())
    except BaseException:
        done = len(merger.report.steps) - before
        if done and options.output:
            merger.save_pretrained(options.output)
            print(f"saved what was merged before: {done} of {len(sources)} sources, {options.output}")
        raise
    print(f"\n{merger.report}\n")
    if data.test is not None:
        scores = merger.evaluate(data.test, data_collator=data.collator)
        print("test: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    if options.output:
        merger.save_pretrained(options.output)
        print(f"saved: {options.output}")
    if options.push_to_hub:
        url = merger.push_to_hub(options.push_to_hub, private=options.private or None, create_pr=options.create_pr)
        print(f"pushed: {url}")


def _demo(options: argparse.Namespace) -> int:
    from .demo import run_demo  # as all that imports datasets, where it is needed: half a second

    print(run_demo(options.output, seed=options.seed))
    return 0
