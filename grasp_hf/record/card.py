"""The model card of a merge: its text, and the metadata that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ..config.methods import METHODS
from ..config.yaml_loader import load_yaml
from ..errors import one_line
from ..files import exists
from ..hub.licenses import clean_license, license_of, strictest
from ..hub.reference import SourceRef
from ..models.classes import task_of
from ..models.padding import max_tokens
from .entries import EVALUATION_DATA
from .report import MergeReport
from .text import code, code_block, escape_markdown, markdown_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_CARD = 500_000  # characters that are searched
LARGEST_LICENSE = 2_000
LONGEST_SENTENCE = 500  # characters; the search below takes time that grows with the cube of them
SENTENCE_END = re.compile(r"(?<=[.;!?])\s+")
TRAINED_ON_TEST = re.compile(
    r"\b(train|(fine-?)?tun)(ed|ing)\b.*?(\b(on|with|using|from)\b|\bdata:)"
    r".*?\btest\b(?!\s+(loss|accuracy|score|error|f1|\w+:))"
    r"|train_split:\s*test\b",
    re.IGNORECASE,
)
NOT_TRAINED_ON_TEST = re.compile(
    r"\b((aside|but|disjoint|except|held|holding|kept|never|no|not|other|separate|tested|testing|unseen|without)\b"
    r"|assess|achiev|evaluat|measur|reach|report|result|scor)",
    re.IGNORECASE,
)
TEXT = """---
{{ card_data }}
---

# {{ title }}

{{ count }} merged into one {{ made }}, one at a time, with grasp_hf.{{ guided }}

## Result

{{ outcome }}

## Usage

{{ usage }}

## Merge details

### Merge method

{{ method }}

### Models merged

Started from {{ base }}.{{ included }}

{{ table }}

A score is the mean over the units of a source. `grasp_report.json` holds the score, coefficient and decision of every
unit.{{ losses }}

{{ conclusions }}
{{ figures }}
### Licence

{{ licence }}

### Configuration

{{ configuration }}{{ citation }}"""
WEIGHED = """ The predictions of
the sources on labelled data of the target task decided how much of each was merged."""
GUIDED = """ Gradients on labelled
data of the target task decided how much of each source was merged, as in [GRASP](https://arxiv.org/abs/2606.14900)."""
LOSSES = """ `loss before` and `loss after`
are mean losses on {samples} of the target task, without and with the source."""

# For each task, the imports of the usage snippet, and an input that needs no file and no network.
PIPELINES = {
    "image-classification": ("from PIL import Image\n", 'Image.new("RGB", (224, 224), "white")'),
    "text-classification": ("", '"An example sentence."'),
    "text-generation": ("", '"Once upon a time", max_new_tokens=10'),
}

CAPTIONS = {
    "alignment.png": "Score of each source, layer by layer, and the decision",
    "progress.png": "Loss along the merge",
}


def hub_ids(report: MergeReport) -> list[str]:
    """Return the Hub ids of the base and of the merged sources, each once; local folders have no id."""
    parents = [(report.base, report.base_sha)] + [(step.source, step.sha) for step in report.steps if step.moved]
    return list(dict.fromkeys(SourceRef.parse(name).name for name, sha in parents if sha))


def declared_license(folder: Path) -> str | None:
    """Return the licence that the card in `folder` declares; `None` if there is no card, or no licence in it.

    Of the metadata only the licence is parsed: those of many cards hold thousands of results.
    """
    lines = iter(_read_card(folder).lstrip("\ufeff").splitlines())
    if next(lines, "").strip() != "---":
        return None
    found: list[str] = []
    for line in lines:
        if line.strip() == "---" or (found and not line.startswith((" ", "-", "#")) and line.strip()):
            break
        if found or line.startswith(("license:", "'license':", '"license":')):
            found.append(line)
    try:
        metadata = load_yaml("\n".join(found)[:LARGEST_LICENSE])
        return license_of(metadata) if isinstance(metadata, dict) else None
    except YAMLError:
        return None


def _read_card(folder: Path, limit: int | None = None) -> str:
    """Return the first `limit` characters of the card in `folder`; empty if there is no card."""
    path = folder / "README.md"
    try:
        if not path.is_file():
            return ""
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(limit)
    except OSError:
        return ""


def trained_on_test(folder: Path, dataset: str) -> str | None:
    """Return the line of the card in `folder` that reports a training on the test split of `dataset`; `None` without one."""
    text = _read_card(folder, LARGEST_CARD)
    if not re.search(rf"(?<![\w-]){re.escape(dataset)}(?![\w-])", text):
        return None
    for line in text.splitlines():
        for sentence in (text[:LONGEST_SENTENCE] for text in SENTENCE_END.split(line)):
            if TRAINED_ON_TEST.search(sentence) and not NOT_TRAINED_ON_TEST.search(sentence):
                return line.strip()
    return None


def parent_licenses(report: MergeReport) -> dict[str, str | None]:
    """Return the declared licence of the base and of each merged source, by name.

    A number is added to a name that several folders have.
    """
    licenses: dict[str, str | None] = {}
    seen: set[tuple[str, str | None, str | None]] = set()
    steps = [(step.name, step.sha, step.license) for step in report.steps if step.moved]
    for name, sha, license in [(report.base_name, report.base_sha, report.base_license), *steps]:
        if (name, sha, license) in seen:
            continue
        seen.add((name, sha, license))
        number = 2
        name = unique = one_line(name).replace("`", "'")  # warnings show it as code
        while unique in licenses:
            unique, number = f"{name} ({number})", number + 1
        licenses[unique] = None if license is None else clean_license(license)
    return licenses


def dataset_ids(report: MergeReport) -> list[str]:
    """Return the Hub id of the recipe's data set; an empty list if the data is a folder, or the name of a file format."""
    path = (report.run.recipe.get("data") or {}).get("path")
    if not isinstance(path, str) or path.count("/") != 1 or exists(Path(path)):
        return []
    try:
        validate_repo_id(path)
    except HFValidationError:
        return []
    return [path]


def usage(model: PreTrainedModel, model_id: str, *, with_pipeline: bool = True, max_length: int | None = None) -> str:
    """Return Markdown with Python that loads the model; for a task in `PIPELINES`, a call of a pipeline comes first.

    Args:
        model: The merged model.
        model_id: The repository or folder that the code loads.
        with_pipeline: Whether a pipeline finds a tokenizer or processor there. It always feeds pictures of three channels.
        max_length: Number of tokens at which the texts of the merge were cut, so that the pipeline cuts them there too.
    """
    task, class_name, trust = task_of(type(model)), type(model).__name__, ""
    if not hasattr(transformers, class_name):  # the repository holds the code of the class
        auto_map = getattr(model.config, "auto_map", None) or {}
        auto_class = next((name for name in auto_map if name.startswith("AutoModel")), None)
        if auto_class is None:
            return (
                "Its class is not a part of transformers, so import it first: "
                f"`{class_name}.from_pretrained('{model_id}')`."
            )
        class_name, trust = auto_class, ", trust_remote_code=True"
    load = f'from transformers import {class_name}\n\nmodel = {class_name}.from_pretrained("{model_id}"{trust})'
    blocks = [f"```python\n{load}\n```"]
    if with_pipeline and task in PIPELINES and getattr(model.config, "num_channels", 3) == 3:
        imports, example = PIPELINES[task]
        cut = f", truncation=True, max_length={max_length}" if max_length and task == "text-classification" else ""
        run = f'{imports}from transformers import pipeline\n\nrun = pipeline("{task}", model="{model_id}"{trust}{cut})'
        blocks = [f"```python\n{run}\nprint(run({example}))\n```", "As a model for further work:", *blocks]
    return "\n\n".join(blocks)


def adapter_usage(model: PreTrainedModel, report: MergeReport, model_id: str) -> str:
    """Return Markdown with Python that loads the base of an adapter and then the adapter."""
    class_name, arguments = type(model).__name__, f'"{report.base_id}"'
    if report.base_sha:
        arguments += f', revision="{report.base_sha}"'
    imports, config = class_name, ""
    if not model.can_generate():  # the configuration names the classes, and the adapter holds the head
        imports, config = f"AutoConfig, {class_name}", f'config = AutoConfig.from_pretrained("{model_id}")\n'
        arguments += ", config=config, ignore_mismatched_sizes=True"
    return (
        "```python\n"
        f"from peft import PeftModel\nfrom transformers import {imports}\n\n{config}"
        f"base = {class_name}.from_pretrained({arguments})\n"
        f'model = PeftModel.from_pretrained(base, "{model_id}")\n'
        "```"
    )


def _adapter_of(model: PreTrainedModel, report: MergeReport) -> str:
    """Return the name of the result: a LoRA adapter, with its rank and its base."""
    rank = f" of rank {report.run.adapter.rank}" if report.run.adapter else ""
    return f"LoRA adapter{rank} of {_link(report.base_name, report.base_sha)}, a `{type(model).__name__}`"


def licence_section(report: MergeReport, gated: Collection[str] = ()) -> str:
    """Return the licence that the merge declares, the licence of every parent, and warnings about conflicts and gates."""
    licenses = parent_licenses(report)
    declared, warnings = strictest(licenses)
    warnings += [f"{code(name)} is gated: the conditions for its files may also apply to the merge" for name in gated]
    if declared:
        choice = f"This merge declares `{declared}`, chosen from the licences that the cards of its parents declare."
    else:
        choice = "This merge declares no licence, because no card of its parents declares one."
    rows = [
        {"model": escape_markdown(name), "licence": escape_markdown(license) if license else None}
        for name, license in licenses.items()
    ]
    sections = [f"{choice} This is no legal advice.", markdown_table(rows)]
    if warnings:
        sections.append("\n".join(f"- {text}" for text in warnings))
    return "\n\n".join(sections)


def _evaluation_rows(report: MergeReport, task: str | None) -> list[EvalResult]:
    """Return loss and accuracy as rows of the metadata: those on the test data or, without any, on the evaluation data."""
    scores, on_test, count = report.scores()
    name_of_data = (
        "test data, which chose nothing" if on_test else f"{EVALUATION_DATA}, which also chose what was kept"
    )
    number = f" ({count} samples)" if count else ""
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type="test" if on_test else "validation",
            dataset_name=f"{name_of_data}{number}",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in scores.items()
    ]


def _link(name: str, sha: str | None) -> str:
    """Return the name of a model in Markdown, as a link if the model is on the Hub."""
    if not sha:
        return code(name)
    return f"[{escape_markdown(name)}](https://huggingface.co/{quote(SourceRef.parse(name).name)})"


def _list_included(report: MergeReport) -> str:
    """Return the sources of which the merged model holds something, as a list in Markdown."""
    sources = dict.fromkeys(_link(step.name, step.sha) for step in report.steps if step.moved)
    items = "\n".join(f"* {source}" for source in sources)
    return f" The following models were included in the merge:\n\n{items}" if items else ""


def _metadata(model: PreTrainedModel, report: MergeReport, model_id: str) -> ModelCardData:
    task = task_of(type(model))
    rows = _evaluation_rows(report, task)
    adapter, parents = report.makes_adapter, hub_ids(report)
    if adapter:
        parents = [report.base_id] if report.base_sha else []
    return ModelCardData(
        base_model=parents or None,
        base_model_relation=("adapter" if adapter else "merge") if parents else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        license=strictest(parent_licenses(report))[0],
        datasets=dataset_ids(report) or None,
        model_name=Path(model_id).name if rows else None,
        eval_results=rows or None,
        tags=["merge", "grasp", "grasp_hf", *(["lora"] if adapter else [])],
    )


def _max_length(model: PreTrainedModel, report: MergeReport) -> int | None:
    """Return the number of tokens at which the texts of a recipe were cut; `None` without texts."""
    length = (report.run.recipe.get("data") or {}).get("max_length")
    return min(length, max_tokens(model) or length) if isinstance(length, int) else None


def model_card(
    model: PreTrainedModel,
    report: MergeReport,
    model_id: str,
    figures: Sequence[str] = (),
    *,
    with_pipeline: bool = True,
    gated: Collection[str] = (),
) -> ModelCard:
    """Return the card for `model` as merged by `report`.

    Args:
        model: The merged model.
        report: The record of the merge; call `without_paths` first, so that the card shows no path of this machine.
        model_id: The repository or folder that the usage snippet loads.
        figures: Names of the images to show, which are in the folder of the card.
        with_pipeline: Whether a tokenizer or processor is saved with the model; a pipeline needs one.
        gated: Names of the gated parents.
    """
    method_name = str(report.run.config.get("method"))
    method = METHODS[method_name]
    images = "\n\n".join(f"![{CAPTIONS.get(name, name)}]({name})" for name in figures)
    samples = report.validated_by
    return ModelCard.from_template(
        _metadata(model, report, model_id),
        template_str=TEXT,
        title=Path(model_id).name,
        count=f"{sum(step.moved > 0 for step in report.steps)} of {len(report.steps)} sources",
        made=_adapter_of(model, report) if report.makes_adapter else f"`{type(model).__name__}`",
        usage=adapter_usage(model, report, model_id)
        if report.makes_adapter
        else usage(model, model_id, with_pipeline=with_pipeline, max_length=_max_length(model, report)),
        method=f"`{method_name}`. {method.card}",
        guided=(WEIGHED if method.weighs else GUIDED) if method.needs_data else "",
        base=_link(report.base_name, report.base_sha),
        included=_list_included(report),
        table=report.table(),
        losses=LOSSES.format(samples=samples) if samples else "",
        outcome="\n".join(f"- {text}" for text in report.outcome()) or "Nothing was measured.",
        conclusions="\n".join(f"- {escape_markdown(text)}" for text in report.conclusions()),
        figures=f"\n{images}\n" if images else "",
        licence=licence_section(report, gated),
        configuration=code_block(report.configuration(), "yaml"),
        citation=method.citation,
    )
