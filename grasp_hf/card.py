"""The model card of a merge, in the words and metadata that the Hub knows."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from yaml import YAMLError

from .loading import task_of
from .report import MergeReport

TEXT = """---
{{ card_data }}
---

# {{ title }}

{{ count }} merged into one `{{ model_class }}`, one at a time, with grasp_hf.{{ guided }}

## Usage

```python
from transformers import {{ model_class }}

model = {{ model_class }}.from_pretrained("{{ model_id }}")
```

## Merge details

### Merge method

{{ method }}

### Models merged

Started from `{{ base }}`.

{{ table }}

The scores are means over units; every unit's score, coefficient and decision are in `grasp_report.json`. Losses are
on held-out data of the target task: before the transfer, after it, and after fine-tuning.

### Configuration

```yaml
{{ configuration }}```
"""


GUIDED = """ Gradients of labelled target data
said what to take from each; the method follows [GRASP](https://arxiv.org/abs/2606.14900)."""


def hub_ids(report: MergeReport) -> list[str]:
    """Return the Hub ids of the base and the merged sources, each once; local folders have no id."""
    named = [(report.base, report.base_sha)] + [(step.source, step.sha) for step in report.steps]
    return list(dict.fromkeys(name.partition("@")[0] for name, sha in named if sha))


def declared_license(folder: Path) -> str | None:
    """Return the licence that the card in `folder` declares; `None` where there is no card or no licence in it."""
    card = folder / "README.md"
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except (ValueError, OSError, YAMLError):
        return None


def shared_license(report: MergeReport) -> str | None:
    """Return the licence that the base and all sources declare; `None` where they differ or one declares none."""
    licenses = {report.base_license, *(step.license for step in report.steps)}
    return licenses.pop() if len(licenses) == 1 else None


def _evaluation_rows(report: MergeReport, task: str | None) -> list[EvalResult]:
    """Return the last held-out loss and accuracy as rows of the card's metadata."""
    last = report.steps[-1].after if report.steps else report.start
    return [
        EvalResult(
            task_type=task or "other",
            dataset_type="held-out",
            dataset_name="held-out data of the target task",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in last.items()
    ]


def model_card(model: PreTrainedModel, report: MergeReport, model_id: str) -> ModelCard:
    """Return the card for `model` as merged by `report`, under the name of `model_id`."""
    task = task_of(type(model))
    rows = _evaluation_rows(report, task)
    data = ModelCardData(
        base_model=hub_ids(report) or None,
        base_model_relation="merge" if hub_ids(report) else None,
        library_name="transformers",
        pipeline_tag=task,
        license=shared_license(report),
        model_name=Path(model_id).name if rows else None,
        eval_results=rows or None,
        tags=["merge", "grasp", "grasp_hf"],
    )
    method = report.config.get("method")
    described = {
        "copy": "Units whose gradients agree with the target's were copied from each source.",
        "average": "Each unit is the mean over the sources that bring it.",
        "blend": "Each unit moved part of the way to each source, with coefficients learned on the target data.",
    }[str(method)]
    return ModelCard.from_template(
        data,
        template_str=TEXT,
        title=Path(model_id).name,
        count=f"{sum(step.moved > 0 for step in report.steps)} of {len(report.steps)} sources",
        model_class=type(model).__name__,
        model_id=model_id,
        method=f"`{method}`. {described}",
        guided="" if method == "average" else GUIDED,
        base=report.base,
        table=report.table(),
        configuration=report.configuration(),
    )
