"""The arguments of the command line: commands, options, help texts, and what is wrong usage."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from .settings import settings_help

COMMANDS = {
    "plan": "List every model of a recipe and all problems, before any weight is read.",
    "rank": "Order the sources of a recipe by their estimated gain, without merging any.",
    "merge": "Merge the sources of a recipe into one model folder.",
    "append": "Merge further sources into a published merge, without downloading the earlier ones.",
    "push": "Upload a merge that was saved in a folder, as one commit.",
    "reproduce": "Repeat a published merge from its record, and compare the weights bit for bit.",
    "compare": "Run every method on the same labels with the same fine-tuning, and compare the results.",
    "demo": "Make small models of real handwritten digits, merge them, and compare with controls.",
}
EXAMPLES = {
    "plan": ["grasp-hf plan recipes/digits/full.yaml"],
    "rank": [
        "grasp-hf rank recipes/digits/full.yaml --json ranking.json",
        "grasp-hf merge recipes/digits/full.yaml --output merged order=rank top=2",
    ],
    "merge": [
        "grasp-hf merge recipes/digits/full.yaml --output merged method=copy threshold=0.2",
        "grasp-hf merge recipe.yaml --output merged training_arguments.learning_rate=1.0e-5",
        "grasp-hf merge recipe.yaml --output merged --push-to-hub me/merged",
    ],
    "append": [
        "grasp-hf append me/merged org/new-model --push-to-hub me/merged",
        "grasp-hf append merged ./new-model --output merged-2 data.data_files.train=more.csv",
    ],
    "push": ["grasp-hf push merged me/merged --private"],
    "reproduce": ["grasp-hf reproduce me/merged"],
    "compare": [
        "grasp-hf compare recipe.yaml --output comparison --seeds 0 1 2",
        "grasp-hf compare recipe.yaml --output comparison --sizes 64 all --methods base average",
    ],
    "demo": ["grasp-hf demo --output grasp-demo"],
}
# Keys of `METHODS` in `grasp_hf.comparison.methods`, here because that module imports torch.
COMPARED_METHODS = (
    *("base", "best-source", "average", "base-line", "best-source-line", "average-line", "lora-labels", "placebo"),
    *(
        "loop-nothing",
        "loop-all",
        "ensemble",
        "stacked",
        "fusion",
        "pearl",
        "lm-cocktail",
        "greedy-soup",
        "task-arithmetic",
    ),
    *("ties", "dare", "fisher", "lorahub", "adamerging", "lorahub-line", "adamerging-line", "gradfix", "published"),
    *("taught", "ours"),
)
WITHOUT_OVERRIDES = ("demo", "push")
WITH_SETTINGS = ("rank", "merge", "compare")  # in their help
SEVERAL_VALUES = ("seeds", "sizes", "methods")
NOT_HELPED = 3
EXIT_CODES = (
    "exit codes: 0 success, 1 problem with models, data or settings, 2 wrong usage, 3 merge --strict where the sources "
    "harm or have no measurable effect, 130 interrupted"
)
WIDEST = 100  # columns


def parse(arguments: Sequence[str] | None, version: str) -> argparse.Namespace:
    """Return the options of a command, with `overrides` (`key=value`) and, of `append`, `sources`.

    Help and `--version` are printed and end the process with code 0, wrong usage with code 2.
    """
    parser = _parser(version)
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    command: argparse.ArgumentParser = options.parser
    # argparse takes positional arguments in one run only, so that overrides behind an option are left over.
    if rest and (options.command in WITHOUT_OVERRIDES or any(text.startswith("-") for text in rest)):
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command not in WITHOUT_OVERRIDES:
        options.overrides += _overrides_among_values(command, options) + rest
        if getattr(options, "no_check", False):
            options.overrides.append("check=false")
        _separate_sources(command, options)
    if options.command in ("merge", "append") and not options.push_to_hub:
        for name in ("private", "create_pr"):
            if getattr(options, name):
                command.error(f"--{name.replace('_', '-')}: expected --push-to-hub as well")
    return options


def _overrides_among_values(command: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Remove each `key=value` from the options with several values, to which argparse gives it, and return all."""
    found = []
    for name in SEVERAL_VALUES:
        values = getattr(options, name, None) or []
        overrides = [value for value in values if isinstance(value, str) and "=" in value]
        if overrides and len(overrides) == len(values):
            command.error(f"argument --{name}: expected at least one value, got: {' '.join(overrides)}")
        if overrides:
            setattr(options, name, [value for value in values if value not in overrides])
        found += overrides
    return found


def _separate_sources(command: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Move from `options.overrides` to `options.sources` what is no `key=value`; only `append` takes sources."""
    appends = options.command == "append"
    folders = [text for text in options.overrides if appends and Path(text).is_dir()]  # also one such as lr=1e-5
    options.sources = [text for text in options.overrides if "=" not in text or text in folders]
    options.overrides = [text for text in options.overrides if text not in options.sources]
    if options.sources and not appends:
        command.error(f"expected key=value, got: {' '.join(options.sources)}")


def _parser(version: str) -> argparse.ArgumentParser:
    list_of_commands = "\n".join(
        _wrapped(text[0].lower() + text[1:-1], f"  {name:9}  ") for name, text in COMMANDS.items()
    )
    parser = _Parser(
        prog="grasp-hf",
        usage="grasp-hf [-h] [--version] COMMAND ...",
        description="Merge many fine-tuned models into one, one at a time, guided by gradients of your own data.",
        epilog="\n\n".join(
            [
                f"commands:\n{list_of_commands}",
                "grasp-hf COMMAND -h shows the options of a command.",
                _wrapped(EXIT_CODES),
            ]
        ),
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"grasp-hf {version}", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", prog="grasp-hf", metavar="COMMAND", help=argparse.SUPPRESS)
    parsers = {name: commands.add_parser(name, formatter_class=_formatter) for name in COMMANDS}
    settings = settings_help(_width())
    for name, sub in parsers.items():
        sub.description = _wrapped(COMMANDS[name])
        sub.epilog = _epilog(name, settings)
        sub.set_defaults(parser=sub)
        sub.add_argument("-v", "--verbose", action="store_true", help="show details, and tracebacks of errors")

    for name in ("plan", "rank", "merge", "compare"):
        parsers[name].add_argument("recipe", help="a YAML file, see recipes/")
        parsers[name].add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")
    for name in ("rank", "merge", "append", "reproduce", "compare"):
        parsers[name].add_argument(
            "--no-check", action="store_true", help="do not compare each source with its own library (check=false)"
        )
    for name, content in (("plan", "all that is known"), ("rank", "the ranking, with every unit,")):
        parsers[name].add_argument("--json", type=Path, metavar="FILE", help=f"also write {content} to FILE")
    for name in ("append", "reproduce"):
        parsers[name].add_argument("merged", help="Hub id or folder of a merge")
    for name in ("merge", "append"):
        parsers[name].add_argument(
            "--output", required=name == "merge", type=Path, metavar="FOLDER", help="folder for the merged model"
        )
        parsers[name].add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the merge to this repository")
    for name in ("merge", "append", "push"):
        parsers[name].add_argument("--private", action="store_true", help="make the repository private if it is new")
        parsers[name].add_argument(
            "--create-pr", action="store_true", help="open a pull request instead of changing the branch"
        )
    _add_own_arguments(parsers)
    return parser


def _add_own_arguments(parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    """Add the arguments that only one command has."""
    parsers["merge"].add_argument(
        "--control",
        action="store_true",
        help="also fine-tune without any source, fine-tune the best source, and merge random sources; report the gains",
    )
    parsers["merge"].add_argument(
        "--strict",
        action="store_true",
        help="exit with 3 unless the sources measurably help, against fine-tuning alone; the merge is saved all the same",
    )
    parsers["append"].add_argument(
        "overrides", nargs="+", metavar="source | key=value", help="sources, and changes of settings"
    )
    parsers["reproduce"].add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a value of the record"
    )
    parsers["push"].add_argument("folder", help="folder of a merge")
    parsers["push"].add_argument("push_to_hub", metavar="org/name", help="repository")
    parsers["push"].add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code in the folder; read it first"
    )
    compare, demo = parsers["compare"], parsers["demo"]
    compare.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="folder for the results; a stopped run goes on there",
    )
    compare.add_argument(
        "--seeds", nargs="+", type=_seed, default=[0, 1, 2], metavar="N", help="one run each (default: 0 1 2)"
    )
    compare.add_argument(
        "--sizes", nargs="+", type=_size, default=[None], metavar="N", help="numbers of labels (default: all)"
    )
    compare.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these, ours and every source alone (default: all)"
    )
    demo.add_argument(
        "--output", type=Path, default=Path("grasp-demo"), metavar="FOLDER", help="new folder (default: grasp-demo)"
    )
    demo.add_argument(
        "--seed", type=_natural, default=0, metavar="N", help="seed of the models and of the merge (default: 0)"
    )


def _epilog(command: str, settings: str) -> str:
    parts = ["\n  ".join(["example:", *EXAMPLES[command]])]
    if command == "compare":
        parts.append(_wrapped(", ".join(COMPARED_METHODS), "methods: "))
    if command in WITH_SETTINGS:
        parts.append(settings)
    elif command not in WITHOUT_OVERRIDES:
        parts.append("settings: see grasp-hf merge -h")
    return "\n\n".join([*parts, _wrapped(EXIT_CODES)])


class _Parser(argparse.ArgumentParser):
    """A parser whose errors fit in the terminal."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, _wrapped(f"{self.prog}: error: {message}") + "\n")


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_width())


def _width() -> int:
    return min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)


def _wrapped(text: str, start: str = "") -> str:
    """Return `text` behind `start`, in lines that fit in the terminal; the others are indented as far."""
    return textwrap.fill(
        text,
        _width(),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected numbers, got '{text}'")
    return int(text)


def _seed(text: str) -> int | str:
    return text if "=" in text else _natural(text)


def _size(text: str) -> int | str | None:
    return None if text == "all" else _seed(text)
