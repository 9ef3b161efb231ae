"""The figures of a merge: what they draw, and that they can be read."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.record.card import model_card
from grasp_hf.record.entries import ChangeReport, ControlReport, FinetuneReport, unit_reports
from grasp_hf.record.figures import alignment_figure, progress_figure, save_figures
from grasp_hf.record.report import StepReport
from grasp_hf.tensors.mixing import Mix
from tests.support.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model
from tests.support.reports import ALL, SHA, report_of, step


def pixels(figure: Any) -> list[Any]:
    """Return the values of the coloured cells, `None` where a cell has none."""
    values = figure.axes[0].images[1].get_array()
    return [[None if x is None or x != x else round(float(x), 3) for x in row] for row in values.filled(float("nan"))]


def marks(figure: Any) -> list[list[tuple[float, float]]]:
    """Return the places of the cells that moved, were kept and were undone, as (column, row)."""
    return [[(float(x), float(y)) for x, y in dots.get_offsets()] for dots in figure.axes[0].collections]


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_heat_map_shows_scores_and_decisions() -> None:
    adapter = step("/me/lora", {"query": 0.4}, sha=None, accepted=False)
    figure = alignment_figure(report_of(step(), adapter))
    assert figure is not None
    axes = figure.axes[0]
    assert pixels(figure) == [[0.5, 0.1, None], [0.4, None, None]]
    assert marks(figure) == [[(0.0, 0.0)], [(1.0, 0.0)], [(0.0, 1.0)]]
    assert (ticks(axes.xaxis), ticks(axes.yaxis)) == (list(ALL), ["org/fine", "lora"])
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "Score (cosine) per source and unit",
        "unit",
        "source",
    )
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["moved (large dot: all units)", "kept", "undone", "undefined", "not in the source"]
    assert figure.axes[1].get_ylabel() == "cosine"


def test_many_units_share_the_column_of_their_layer() -> None:
    names = [f"vit.encoder.layer.{layer}.{part}" for layer in range(12) for part in ("query", "dense")]
    scores: dict[str, float | None] = {"vit.embeddings.projection": None, **dict.fromkeys(names, 0.1), "classifier": 0}
    scores["vit.encoder.layer.3.query"] = 0.7
    figure: Any = alignment_figure(report_of(step("org/few", {"vit.encoder.layer.3.dense": 0.6}), step(scores=scores)))
    assert figure is not None
    expected = ["embeddings", *(f"layer.{layer}" for layer in range(12)), "classifier"]
    assert ticks(figure.axes[0].xaxis) == expected
    assert pixels(figure)[1] == [None, 0.1, 0.1, 0.1, 0.4, *[0.1] * 8, 0.0]
    assert pixels(figure)[0][4] == 0.6 and pixels(figure)[0].count(None) == 13
    assert marks(figure)[0] == [(4.0, 0.0), (4.0, 1.0)]
    sizes = figure.axes[0].collections[0].get_sizes()
    assert sizes[0] > sizes[1]  # all units of the first moved, half of the second's


def test_an_average_shows_its_coefficients() -> None:
    units = unit_reports({"a": 1, "b": 1}, {"a": Mix(0.5, 0.5), "b": Mix(1, 0.25)}, {"a": None, "b": None}, True)
    figure = alignment_figure(report_of(StepReport("org/fine", SHA, "full", units=units)))
    assert figure is not None and pixels(figure) == [[0.5, 0.25]]
    assert figure.axes[0].get_title() == "Coefficient per source and unit"


def test_the_progress_shows_what_was_rejected() -> None:
    steps = [step(), step("org/bad", accepted=False, losses=(0.6, 2.0, 0.5)), step(losses=(0.5, float("inf"), 0.4))]
    figure: Any = progress_figure(report_of(*steps, start={"loss": 1.0}))
    assert figure is not None
    shown = {dots.get_label(): dots.get_offsets().tolist() for dots in figure.axes[0].collections}
    assert shown == {
        "start": [[0.0, 1.0]],
        "before the source": [[0.75, 1.0], [1.75, 0.6], [2.75, 0.5]],
        "with the source": [[1.0, 0.8]],
        "with the source, which was rejected": [[2.0, 2.0]],
        "end of the step": [[1.25, 0.6], [2.25, 0.5], [3.25, 0.4]],
    }
    assert ticks(figure.axes[0].xaxis) == ["start", "org/fine", "org/bad", "org/fine"]
    assert figure.axes[0].get_yscale() == "linear"
    wide = progress_figure(report_of(step(losses=(90.0, 5.0, 1.0))))
    assert wide is not None and wide.axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    ("validated_by", "without_sources", "star", "names"),
    [
        ("evaluation data", False, 0.3, ["after the last fine-tuning", "fine-tuning alone"]),
        ("evaluation data", True, 0.35, ["after the last fine-tuning", "fine-tuning alone"]),
        ("labels", False, 0.3, ["after the last fine-tuning, on labels", "fine-tuning alone, on labels"]),
    ],
)
def test_the_progress_ends_with_the_fine_tuning_and_its_control(
    validated_by: str, without_sources: bool, star: float, names: list[str]
) -> None:
    losses = {"0.0": 0.6, "0.5": 0.3, "1.0": 0.4}
    final = FinetuneReport(0.5, losses, validated_by, alone=0.35, without_sources=without_sources)
    figure: Any = progress_figure(report_of(step(), start={"loss": 1.0}, final=final))
    (axes,) = figure.axes
    assert axes.get_title() == "Loss along the merge\non evaluation data"
    shown = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert shown[names[0]] == [[1.5, star]]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines[names[1]] == [0.35, 0.35]


def test_the_progress_ends_with_the_evaluation_data_if_nothing_validated_the_fine_tuning() -> None:
    figure: Any = progress_figure(report_of(step(), final=FinetuneReport(after={"loss": 0.2})))
    shown = {dots.get_label(): dots.get_offsets().tolist() for dots in figure.axes[0].collections}
    assert shown["after the last fine-tuning"] == [[1.5, 0.2]] and not [
        line for line in figure.axes[0].lines if line.get_label()[0] != "_"
    ]


def test_the_progress_draws_a_control_on_the_same_samples_only() -> None:
    change = ChangeReport(-0.1, 0.05, 24, None)
    for validated_by, drawn in {"evaluation data": True, "test data": False}.items():
        control = ControlReport(validated_by, {"loss": 0.7}, {"loss": 0.6}, change)
        figure: Any = progress_figure(report_of(step(), final=FinetuneReport(), controls=[control]))
        assert ("fine-tuning alone" in {line.get_label() for line in figure.axes[0].lines}) == drawn


def test_forty_sources_with_long_names_have_labels_that_do_not_overlap() -> None:
    steps = [step(f"organisation/a-model-with-quite-a-long-name-{index:02}") for index in range(40)]
    for draw in (alignment_figure, progress_figure):
        figure = draw(report_of(*steps))
        assert figure is not None
        figure.draw_without_rendering()
        for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels]
            assert not any(one.overlaps(two) for one, two in zip(boxes, boxes[1:], strict=False))
            assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)


def test_a_figure_without_data_is_not_drawn(tmp_path: Path) -> None:
    assert save_figures(report_of(), tmp_path) == [] and not list(tmp_path.iterdir())
    assert save_figures(report_of(step(losses=None)), tmp_path) == ["alignment.png"]
    assert save_figures(report_of(step()), tmp_path) == ["alignment.png", "progress.png"]
    assert all(min(Image.open(path).size) > 200 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2


def test_the_figures_of_a_real_merge(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    source = saved(perturbed(tiny_model("vit"), 1), tmp_path / "fine")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**NO_TUNING, gate=False, batch_size=8))
    merger.merge([source], train_dataset=tiny_data("vit", 8), eval_dataset=tiny_data("vit", 8, seed=1))
    figures = save_figures(merger.report, tmp_path)
    card = model_card(merger.model, merger.report.without_paths(), "org/merged", figures)
    assert re.findall(r"!\[.+\]\((.+)\)", card.text) == figures == ["alignment.png", "progress.png"]
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("name", ["/me/a$\\foo$", "/me/a$x$b", "/me/模型", "/me/my|model*x*"])
def test_names_are_drawn_and_listed_as_they_are(name: str, tmp_path: Path) -> None:
    report = report_of(step(name, sha=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(save_figures(report, tmp_path)) == 2
    figure = alignment_figure(report)
    assert figure is not None and ticks(figure.axes[0].yaxis) == [name.removeprefix("/me/").replace("$", r"\$")]
    columns = re.split(r"(?<!\\)\|", report.table().splitlines()[-1])[1:-1]
    assert re.sub(r"\\(\W)", r"\1", columns[0].strip()) == name.removeprefix("/me/"), "as Markdown shows it"
    assert len(columns) == len(re.split(r"\|", report.table().splitlines()[0])[1:-1])
