"""The model card of a merge, in the words and metadata that the Hub knows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ..config.methods import METHODS
from ..hub.licenses import license_of, strictest
from ..hub.reference import SourceRef
from ..models.classes import task_of
from .entries import EVALUATION_DATA
from .report import MergeReport
from .text import markdown_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

{{ count }} merged into one `{{ model_class }}`, one at a time, with grasp_hf.{{ guided }}

## Usage

{{ usage }}

## Merge details

### Merge method

{{ method }}

### Models merged

Started from {{ base }}.{{ included }}

{{ table }}

The scores are means over units; every unit's score, coefficient and decision are in `grasp_report.json`.{{ losses }}

{{ conclusions }}
{{ figures }}
### Licence

{{ licence }}

### Configuration

```yaml
{{ configuration }}```
{{ citation }}"""
GUIDED = """ Gradients of labelled target data
said what to take from each, one source after the other, as in [GRASP](https://arxiv.org/abs/2606.14900)."""

# By task: what the snippet imports, and a call with an input that needs no file and no network.
PIPELINES = {
    "image-classification": ("from PIL import Image\n", 'Image.new("RGB", (224, 224), "white")'),
    "text-classification": ("", '"An example sentence."'),
    "text-generation": ("", '"Once upon a time", max_new_tokens=10'),
}

CAPTIONS = {
    "alignment.png": "How each source agrees with the target data, layer by layer, and what was decided",
    "progress.png": "Loss along the merge",
}


def hub_ids(report: MergeReport) -> list[str]:
    """Return the Hub ids of the base and of what was merged into it, each once; local folders have no id."""
    named = [(report.base, report.base_sha)] + [(step.source, step.sha) for step in report.steps if step.moved]
    return list(dict.fromkeys(SourceRef.parse(name).name for name, sha in named if sha))


def declared_license(folder: Path) -> str | None:
    """Return the licence that the card in `folder` declares; `None` where there is no card or no licence in it."""
    card = folder / "README.md"
    try:
        return license_of(ModelCard.load(card, ignore_metadata_errors=True).data) if card.is_file() else None
    except (ValueError, OSError, YAMLError):
        return None


def trained_on_test(folder: Path, dataset: str) -> str | None:
    """Return the line of the card in `folder` that says that its model was trained on a test split, if it names `dataset`."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not re.search(rf"(?<![\w-]){re.escape(dataset)}(?![\w-])", text):
        return None
    for line in text.splitlines():
        for sentence in SENTENCE_END.split(line):
            if TRAINED_ON_TEST.search(sentence) and not NOT_TRAINED_ON_TEST.search(sentence):
                return line.strip()
    return None


def parent_licenses(report: MergeReport) -> dict[str, str | None]:
    """Return what the base and all that was merged into it declare; folders of one name are told apart by a number."""
    licenses: dict[str, str | None] = {}
    seen: set[tuple[str, str | None, str | None]] = set()
    steps = [(step.name, step.sha, step.license) for step in report.steps if step.moved]
    for name, sha, license in [(_base_name(report), report.base_sha, report.base_license), *steps]:
        if (name, sha, license) in seen:
            continue
        seen.add((name, sha, license))
        number = 2
        unique = name
        while unique in licenses:
            unique, number = f"{name} ({number})", number + 1
        licenses[unique] = license
    return licenses


def dataset_ids(report: MergeReport) -> list[str]:
    """Return the Hub id of the recipe's data set; nothing where the data is a folder, or files that a builder reads."""
    path = (report.run.recipe.get("data") or {}).get("path")
    if not isinstance(path, str) or path.count("/") != 1 or Path(path).exists():
        return []
    try:
        validate_repo_id(path)
    except HFValidationError:
        return []
    return [path]


def usage(model: PreTrainedModel, model_id: str, *, with_pipeline: bool = True) -> str:
    """Return Python that uses the model: as a pipeline on a literal input, for the tasks in `PIPELINES`; as a class."""
    task, cls, trust = task_of(type(model)), type(model).__name__, ""
    if not hasattr(transformers, cls):  # the model's own code
        autos = getattr(model.config, "auto_map", None) or {}
        own, cls = cls, next((name for name in autos if name.startswith("AutoModel")), "")
        trust = ", trust_remote_code=True"
        if not cls:
            return (
                f"Its class is not a part of transformers, so import it first: `{own}.from_pretrained('{model_id}')`."
            )
    load = f'from transformers import {cls}\n\nmodel = {cls}.from_pretrained("{model_id}"{trust})'
    blocks = [f"```python\n{load}\n```"]
    if with_pipeline and task in PIPELINES:
        imports, example = PIPELINES[task]
        run = f'{imports}from transformers import pipeline\n\nrun = pipeline("{task}", model="{model_id}"{trust})'
        blocks = [f"```python\n{run}\nprint(run({example}))\n```", "As a model for further work:", *blocks]
    return "\n\n".join(blocks)


def licence_section(report: MergeReport, gated: Collection[str] = ()) -> str:
    """Return what the merge declares and why: every parent's licence, and warnings where they are not all one."""
    licenses = parent_licenses(report)
    declared, warnings = strictest(licenses)
    warnings += [f"`{name}` is gated: what was accepted to get its files may hold for the merge too" for name in gated]
    rows = [{"model": name, "licence": license or "–"} for name, license in licenses.items()]
    says = f"This merge declares `{declared}`, chosen from" if declared else "This merge declares no licence, after"
    note = f"{says} what the cards of its parents declare; that is no legal advice."
    return "\n\n".join(
        [note, markdown_table(rows), *(["\n".join(f"- {text}" for text in warnings)] if warnings else [])]
    )


def _evaluation_rows(report: MergeReport, task: str | None) -> list[EvalResult]:
    """Return the last held-out loss and accuracy as rows of the card's metadata."""
    last, kind = report.run.final.after if report.run.final else {}, "held-out"
    if not report.run.final and report.steps and report.steps[-1].validated_by == EVALUATION_DATA:
        last = report.steps[-1].after
    if report.run.test:  # which chose nothing
        last, kind = report.run.test, "test"
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type=kind,
            dataset_name=f"{kind} data of the target task",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in last.items()
    ]


def _base_name(report: MergeReport) -> str:
    return report.base if report.base_sha else Path(report.base).name


def _linked(name: str, sha: str | None) -> str:
    """Return a model for a reader, with a link to its page where it has one."""
    return f"[{name}](https://huggingface.co/{SourceRef.parse(name).name})" if sha else f"`{name}`"


def _included(report: MergeReport) -> str:
    """Return the sources that the merged model took something from, as a list."""
    sources = dict.fromkeys(_linked(step.name, step.sha) for step in report.steps if step.moved)
    items = "\n".join(f"* {source}" for source in sources)
    return f" The following models were included in the merge:\n\n{items}" if items else ""


def _metadata(model: PreTrainedModel, report: MergeReport, model_id: str) -> ModelCardData:
    task = task_of(type(model))
    rows = _evaluation_rows(report, task)
    return ModelCardData(
        base_model=hub_ids(report) or None,
        base_model_relation="merge" if hub_ids(report) else None,
        library_name="transformers",
        pipeline_tag=task,
        license=strictest(parent_licenses(report))[0],
        datasets=dataset_ids(report) or None,
        model_name=Path(model_id).name if rows else None,
        eval_results=rows or None,
        tags=["merge", "grasp", "grasp_hf"],
    )


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
        report: Its record; local folders in it are named by their last part only after `without_paths`.
        model_id: What the usage snippet loads: the name of a repository or of a folder.
        figures: Files beside the card to show, such as `save_figures` returns.
        with_pipeline: Whether a tokenizer or processor is saved with the model, which a pipeline needs.
        gated: Names of the parents whose files are behind conditions.
    """
    name, judged = str(report.run.config.get("method")), report.validated_by
    method = METHODS[name]
    images = "\n\n".join(f"![{CAPTIONS.get(name, name)}]({name})" for name in figures)
    return ModelCard.from_template(
        _metadata(model, report, model_id),
        template_str=TEXT,
        title=Path(model_id).name,
        count=f"{sum(step.moved > 0 for step in report.steps)} of {len(report.steps)} sources",
        model_class=type(model).__name__,
        usage=usage(model, model_id, with_pipeline=with_pipeline),
        method=f"`{name}`. {method.card}",
        guided=GUIDED if method.needs_data else "",
        base=_linked(_base_name(report), report.base_sha),
        included=_included(report),
        table=report.table(),
        losses=f" Losses are\non {judged} of the target task: before the transfer and after it." if judged else "",
        conclusions="\n".join(f"- {text}" for text in report.conclusions()),
        figures=f"\n{images}\n" if images else "",
        licence=licence_section(report, gated),
        configuration=report.configuration(),
        citation=method.citation,
    )
