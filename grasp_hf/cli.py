"""The command line: `grasp-hf plan | rank | merge | append | push | reproduce | compare | demo`.

Each command imports what it needs when it runs, so that help and wrong usage are answered without torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import __version__
from .config.arguments import NOT_HELPED, parse
from .config.recipe import Recipe
from .errors import ConfigError, GraspError, printable

if TYPE_CHECKING:
    from .data.samples import Samples
    from .merger import GraspMerger
    from .runs.deliver import Delivery

INTERRUPTED = 130  # exit code
NOT_COMPARED = (
    "--strict: nothing would compare the merge with fine-tuning alone; add --control, which needs a split 'test' or "
    "'validation'"
)


def run() -> None:
    """Run the command line and leave: the entry point of `grasp-hf`.

    A scheduler or a container stops a job with SIGTERM, which counts as Ctrl-C. The state of a merge stays on the disk.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    code = main()
    gc.freeze()  # otherwise Python's last collection walks all objects of torch and transformers, for a second
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Interrupt the command. A second signal ends the process at once: the state on the disk is complete at any moment."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_DFL)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parse(arguments, __version__)
    try:
        with _lines_on_stdout(logging.DEBUG if options.verbose else logging.INFO):
            if "recipe" in options:
                options.recipe = Recipe.from_yaml(options.recipe, options.overrides)
            return {
                "plan": _plan,
                "rank": _rank,
                "merge": _merge,
                "append": _append,
                "push": _push,
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
        return INTERRUPTED


class _PrintableFormatter(logging.Formatter):
    """Removes what a terminal must not show; a message may quote a stranger's file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def _lines_on_stdout(level: int) -> Iterator[None]:
    """Print what the package logs: lines such as that of each source on stdout, warnings on stderr."""
    logger = logging.getLogger("grasp_hf")
    lines, warnings = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    lines.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings.setLevel(logging.WARNING)
    logger.setLevel(level)
    for handler in (lines, warnings):
        handler.setFormatter(_PrintableFormatter())
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in (lines, warnings):
            logger.removeHandler(handler)


# Commands: each takes its options, prints its result and returns the exit code


def _plan(options: argparse.Namespace) -> int:
    from .runs.plan import plan, plan_table, problem_list

    _check_json(options.json)
    rows = plan(options.recipe)
    print(printable(plan_table(rows, options.recipe, verbose=options.verbose)))
    _write_json(options.json, map(asdict, rows))
    return int(bool(problem_list(rows)))


def _rank(options: argparse.Namespace) -> int:
    from .merging.ranking import ranking_table
    from .runs.prepare import prepare

    _check_json(options.json)
    merger, sources, data = prepare(options.recipe)
    rows = merger.rank(sources, **data.keywords())
    print(printable(ranking_table(rows)))
    _write_json(options.json, ({**row.summary(), "units": [asdict(unit) for unit in row.units]} for row in rows))
    return int(any(row.problem for row in rows))


def _check_json(path: Path | None) -> None:
    """Raise `ConfigError` if a file cannot be written, before the work whose result it is for."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        problem = "it is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
        raise ConfigError(f"--json: '{path}' cannot be written: {problem}; name another file")


def _write_json(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    if path:
        try:
            path.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: '{path}' cannot be written: {error.strerror}; name another file") from error


def _merge(options: argparse.Namespace) -> int:
    from .record.entries import Reason
    from .runs.deliver import merge_sources

    to = _delivery(options)
    measures_itself = options.control or not options.strict  # --control checks what it needs
    if not measures_itself and not options.recipe.config.compares_alone:
        raise ConfigError(f"{NOT_COMPARED}; or set gate and final_epochs, and no other epochs")
    with to.checked() as state:
        merger, sources, data = _prepare_merge(options.recipe, options, state.folder)
        if not measures_itself and merger.report.finetuned and data.validation is None:
            raise ConfigError(f"{NOT_COMPARED}; or a split 'validation', because the model has learned the labels")
        merge_sources(merger, sources, data, to, state, control=options.control)
    verdict = merger.report.run.verdict
    if not options.strict or verdict == Reason.HELPS:
        return 0
    print(f"--strict: against fine-tuning alone: {verdict or 'no source is in the model'}", file=sys.stderr)
    return NOT_HELPED


def _append(options: argparse.Namespace) -> int:
    from .runs.deliver import merge_sources
    from .runs.lineage import append_recipe

    if not options.sources or not (options.output or options.push_to_hub):
        raise ConfigError("append: expected at least one source, and --output or --push-to-hub")
    to = _delivery(options)
    with to.checked() as state:
        recipe = append_recipe(options.merged, options.sources, options.overrides)
        merger, sources, data = _prepare_merge(recipe, options, state.folder)
        if not merger.report.continues:
            raise ConfigError(f"the data has other labels than '{options.merged}'; start a new merge from it")
        merge_sources(merger, sources, data, to, state)
    return 0


def _delivery(options: argparse.Namespace) -> Delivery:
    from .runs.deliver import Delivery

    output, fresh = getattr(options, "output", None), getattr(options, "fresh", False)
    return Delivery(output, options.push_to_hub, options.private, options.create_pr, fresh)


def _prepare_merge(
    recipe: Recipe, options: argparse.Namespace, state_folder: Path
) -> tuple[GraspMerger, list[str], Samples]:
    """Return what `prepare` does, if the plan has no problems and the Hub accepts the repository."""
    from .hub.push import Destination, create_repo
    from .record.text import wrap
    from .runs.costs import disk_warnings, estimate
    from .runs.plan import plan, problem_list
    from .runs.prepare import prepare

    rows = plan(recipe)
    if problems := problem_list(rows):
        raise ConfigError("nothing was merged, because of these problems", problems=problems)
    for text in disk_warnings(estimate(rows, recipe.config), state_folder.parent):
        logging.getLogger(__name__).warning("%s", wrap(text, "", "  "))
    if options.push_to_hub:
        created = create_repo(Destination(options.push_to_hub, private=options.private or None))
        logging.getLogger(__name__).info("the repository '%s' exists; the merge is pushed to it at the end", created)
    return prepare(recipe)


def _push(options: argparse.Namespace) -> int:
    from .config.grasp import GraspConfig
    from .hub.push import check_repo_id
    from .merger import GraspMerger
    from .runs.deliver import push

    check_repo_id(options.push_to_hub)
    trusted = [str(Path(options.folder).expanduser())] if options.trust_remote_code else []
    config = GraspConfig(trust_remote_code=trusted)
    merger = GraspMerger.from_pretrained(options.folder, config=config, dtype="auto")
    if not merger.report.continues:
        raise ConfigError(f"'{options.folder}' is not a merge by grasp_hf; push another model with its push_to_hub")
    push(merger, _delivery(options), Path(options.folder))
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from .runs.lineage import reproduce

    replay = reproduce(options.merged, options.overrides)
    print(replay)
    return int(bool(replay.differences))


def _compare(options: argparse.Namespace) -> int:
    from .comparison.run import compare
    from .runs.plan import plan, problem_list

    if problems := problem_list(plan(options.recipe)):
        raise ConfigError("nothing was compared, because of these problems", problems=problems)
    done = compare(options.recipe, options.output, sizes=options.sizes, seeds=options.seeds, methods=options.methods)
    print(f"\n{done}\n\nsaved: {options.output}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo.run import run_demo

    print(run_demo(options.output, seed=options.seed))
    return 0
