"""The command line: `grasp-hf plan | rank | merge | append | push | reproduce | compare | demo`."""

import argparse
import gc
import json
import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets

from .comparison.methods import METHODS
from .comparison.run import compare
from .config.grasp import GraspConfig
from .config.recipe import Recipe
from .data.samples import Samples
from .errors import ConfigError, GraspError
from .hub.push import Destination, check_repo_id, create_repo
from .merger import GraspMerger
from .merging.ranking import ranking_table
from .runs.deliver import Delivery, merge_sources, push
from .runs.lineage import append_recipe, reproduce
from .runs.plan import plan, plan_table, problem_list
from .runs.prepare import prepare

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
    "push": "example:\n  grasp-hf push merged me/merged --private",
    "reproduce": "example:\n  grasp-hf reproduce me/merged",
    "compare": (
        "example:\n  grasp-hf compare recipe.yaml --output comparison --seeds 0 1 2\n"
        "  grasp-hf compare recipe.yaml --output comparison --sizes 64 256 all --methods base best-source average"
    ),
    "demo": "example:\n  grasp-hf demo --output grasp-demo",
}
WITHOUT_OVERRIDES = ("demo", "push")
SEVERAL = ("seeds", "sizes", "methods")  # options with several values
EXIT_CODES = "exit codes: 0 done, 1 a source, the data or the configuration is not fit, 2 wrong usage, 130 interrupted"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one run only: overrides behind an option are left over.
    if rest and (options.command in WITHOUT_OVERRIDES or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command not in WITHOUT_OVERRIDES:
        options.overrides += _taken_by_options(parser, options) + rest
        folders = [text for text in options.overrides if options.command == "append" and Path(text).is_dir()]
        options.sources = [text for text in options.overrides if "=" not in text or text in folders]
        options.overrides = [text for text in options.overrides if text not in options.sources]
        if options.command != "append" and (wrong := options.sources):
            parser.error(f"expected key=value, got: {' '.join(wrong)}")
    if options.command in ("merge", "append") and not options.push_to_hub:
        for name in ("private", "create_pr"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')}: expected --push-to-hub beside it")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with _lines_on_stdout(logging.DEBUG if options.verbose else logging.INFO):
            return {
                "plan": _plan,
                "rank": _rank,
                "merge": _merge,
                "append": _append,
                "push": _push_folder,
                "reproduce": _reproduce,
                "compare": _compare,
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


def _taken_by_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Take each `key=value` out of the options of `SEVERAL`, to which argparse gives all that stands behind them."""
    found = []
    for name in SEVERAL:
        values = getattr(options, name, None) or []
        taken = [value for value in values if isinstance(value, str) and "=" in value]
        if taken and len(taken) == len(values):
            parser.error(f"argument --{name}: expected at least one value, got: {' '.join(taken)}")
        if taken:
            setattr(options, name, [value for value in values if value not in taken])
        found += taken
    return found


def run() -> None:
    """Run the command line and leave: the entry point of `grasp-hf`.

    Who stops a job (a scheduler, a container) sends SIGTERM: what was merged before is saved, as after Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
        dest="command", required=True, metavar="plan | rank | merge | append | push | reproduce | compare | demo"
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
    compare = command(
        "compare",
        "Run every method on the same labels, with the same fine-tuning, and tell by how much each differs from ours.",
    )
    for sub in (plan, rank, merge, compare):
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
    merge.add_argument("--control", action="store_true", help="also fine-tune without any source, and report the gain")
    push = command("push", "Upload a merge that was saved in a folder, as one commit.")
    push.add_argument("folder", help="folder of a merge")
    push.add_argument("push_to_hub", metavar="org/name", help="repository")
    push.add_argument(
        "--trust-remote-code", action="store_true", help="let Python code run that was saved with the merge"
    )
    for sub in (merge, append):
        sub.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the merged model to this repository")
    for sub in (merge, append, push):
        sub.add_argument("--private", action="store_true", help="make the repository private where it is new")
        sub.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    again = command("reproduce", "Make a published merge again from its record, and compare the weights bit for bit.")
    again.add_argument("merged", help="Hub id or folder of a merge")
    again.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the record")
    compare.add_argument(
        "--output", required=True, type=Path, help="folder for the results; a stopped run goes on there"
    )
    compare.add_argument("--seeds", nargs="+", type=_seed, default=[0, 1, 2], help="one run each (default: 0 1 2)")
    compare.add_argument("--sizes", nargs="+", type=_size, default=[None], help="numbers of labels, or all (default)")
    compare.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="only these rows, every source alone, and ours: " + ", ".join(METHODS),
    )
    demo = command(
        "demo", "Make a small world of real handwritten digits, merge its models, and compare with controls."
    )
    demo.add_argument("--output", type=Path, default=Path("grasp-demo"), help="folder for it (default: grasp-demo)")
    demo.add_argument("--seed", type=_natural, default=0, help="seed of the world and of the merge (default: 0)")
    return parser


def _plan(options: argparse.Namespace) -> int:
    recipe = Recipe.from_yaml(options.recipe, options.overrides)
    _check_json(options.json)
    rows = plan(recipe)
    print(plan_table(rows, recipe))
    _write_json(options.json, map(asdict, rows))
    return int(bool(problem_list(rows)))


def _rank(options: argparse.Namespace) -> int:
    recipe = Recipe.from_yaml(options.recipe, options.overrides)
    _check_json(options.json)
    merger, sources, data = prepare(recipe)
    rows = merger.rank(sources, **data.keywords())
    print(ranking_table(rows))
    _write_json(options.json, ({**row.summary(), "units": [asdict(unit) for unit in row.units]} for row in rows))
    return int(any(row.problem for row in rows))


def _check_json(path: Path | None) -> None:
    """Raise `ConfigError` where a file cannot be written, before the work that ends in it."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        what = "it is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
        raise ConfigError(f"--json: '{path}' cannot be written: {what}; name another file")


def _write_json(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    if path:
        try:
            path.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: '{path}' cannot be written: {error.strerror}; name another file") from error


def _merge(options: argparse.Namespace) -> int:
    recipe = Recipe.from_yaml(options.recipe, options.overrides)
    to = _delivery(options)
    with to.checked():
        merger, sources, data = _planned(recipe, options)
        merge_sources(merger, sources, data, to, control=options.control)
    return 0


def _delivery(options: argparse.Namespace) -> Delivery:
    return Delivery(getattr(options, "output", None), options.push_to_hub, options.private, options.create_pr)


def _planned(recipe: Recipe, options: argparse.Namespace) -> tuple[GraspMerger, list[str], Samples]:
    """Return what `prepare` does, once the plan is without problems and the Hub takes what will be pushed."""
    if problems := problem_list(plan(recipe)):
        raise ConfigError("nothing was merged, because of these problems", problems=problems)
    if options.push_to_hub:
        create_repo(Destination(options.push_to_hub, private=options.private or None))
    return prepare(recipe)


def _append(options: argparse.Namespace) -> int:
    if not options.sources or not (options.output or options.push_to_hub):
        raise ConfigError("append: expected at least one source, and --output or --push-to-hub")
    to = _delivery(options)
    with to.checked():
        recipe = append_recipe(options.merged, options.sources, options.overrides)
        merger, sources, data = _planned(recipe, options)
        if not merger.report.continues:
            raise ConfigError(f"the data has other labels than '{options.merged}'; start a new merge from it")
        merge_sources(merger, sources, data, to)
    return 0


def _push_folder(options: argparse.Namespace) -> int:
    check_repo_id(options.push_to_hub)
    trusted = [str(Path(options.folder).expanduser())] if options.trust_remote_code else []
    config = GraspConfig(trust_remote_code=trusted)
    merger = GraspMerger.from_pretrained(options.folder, config=config, dtype="auto")
    if not merger.report.continues:
        raise ConfigError(f"'{options.folder}' is not a merge by grasp_hf; push another model with its push_to_hub")
    push(merger, _delivery(options), Path(options.folder))
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    replay = reproduce(options.merged, options.overrides)
    print(replay)
    return int(bool(replay.differences))


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected numbers, got '{text}'")
    return int(text)


def _seed(text: str) -> int | str:
    return text if "=" in text else _natural(text)


def _size(text: str) -> int | str | None:
    return None if text == "all" else _seed(text)


def _compare(options: argparse.Namespace) -> int:
    recipe = Recipe.from_yaml(options.recipe, options.overrides)
    if problems := problem_list(plan(recipe)):
        raise ConfigError("nothing was compared, because of these problems", problems=problems)
    done = compare(recipe, options.output, sizes=options.sizes, seeds=options.seeds, methods=options.methods)
    print(f"\n{done}\n\nsaved: {options.output}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo.run import run_demo  # as all that imports datasets, where it is needed: half a second

    print(run_demo(options.output, seed=options.seed))
    return 0
