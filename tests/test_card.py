"""The card of a merge: licences, metadata, snippets that run, figures."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.card import (
    dataset_ids,
    declared_license,
    licence_section,
    model_card,
    parent_licenses,
    trained_on_test,
)
from grasp_hf.figures import alignment_figure, progress_figure, save_figures
from grasp_hf.licenses import LICENSES, SUCCESSORS, Strictness, strictest
from grasp_hf.report import ChangeReport, ControlReport, FinetuneReport, MergeReport, StepReport, unit_reports
from grasp_hf.transfer import Mix

from .models import LABELS, NO_TUNING, perturbed, saved, tiny_data, tiny_model

SHA = "a" * 40
ALL = {"query": 0.5, "dense": 0.1, "classifier": None}


def step(
    source: str = "org/fine",
    scores: dict[str, float | None] = ALL,
    *,
    accepted: bool = True,
    losses: tuple[float, float, float] | None = (1.0, 0.8, 0.6),
    **fields: Any,
) -> StepReport:
    """Return a source that moved the units whose score is above 0.2."""
    mixes = {name: Mix.on_line(float(score is not None and score > 0.2)) for name, score in scores.items()}
    units = unit_reports(dict.fromkeys(scores, 10), mixes, scores, accepted)
    names = ("before", "after_transfer", "after")
    measured: dict[str, Any] = {name: {"loss": loss} for name, loss in zip(names, losses or (), strict=False)}
    measured |= {"judged_by": "evaluation data"} if losses else {}
    return StepReport(source, fields.pop("sha", SHA), "full", accepted=accepted, units=units, **measured, **fields)


def report_of(*steps: StepReport, **fields: Any) -> MergeReport:
    return MergeReport("org/base", SHA, steps=list(steps), config={"method": "copy"}, **fields)


# --- licences


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (("mit",), "mit"),
        (("mit", "apache-2.0"), "apache-2.0"),
        (("apache-2.0", "bsd-3-clause", "cc-by-4.0"), "cc-by-4.0"),
        (("Apache-2.0 ", "lgpl-3.0"), "lgpl-3.0"),
        (("lgpl-2.1", "mpl-2.0", "gpl-2.0"), "gpl-2.0"),
        (("gpl-3.0", "mit", "agpl-3.0"), "agpl-3.0"),
        (("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-4.0"), "cc-by-sa-4.0"),
        (("llama3.1", "apache-2.0"), "llama3.1"),
        (("cc-by-nc-4.0", "mit", "openrail"), "cc-by-nc-4.0"),
        (("cc-by-nc-4.0", "cc-by-nc-sa-4.0"), "cc-by-nc-sa-4.0"),
    ],
)
def test_the_strictest_licence_stands_for_all(declared: tuple[str, ...], expected: str) -> None:
    licenses = {f"org/{index}": name for index, name in enumerate(declared)}
    found, warnings = strictest(licenses)
    assert found == expected and not [text for text in warnings if "cannot both" in text]
    assert strictest(dict(reversed(licenses.items())))[0] == expected


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("gpl-3.0", "cc-by-nc-4.0"),
        ("cc-by-sa-4.0", "cc-by-nc-sa-4.0"),
        ("cc-by-sa-4.0", "gpl-3.0"),
        ("gpl-2.0", "gpl-3.0"),
        ("apache-2.0", "gpl-2.0"),
        ("agpl-3.0", "llama2"),
        ("lgpl-3.0", "cc-by-nc-4.0"),
        ("gemma", "llama2"),
        ("llama2", "llama3"),
        ("openrail", "creativeml-openrail-m"),
        ("llama2", "cc-by-nc-sa-4.0"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_licences_that_exclude_each_other_are_named_with_their_models(one: str, two: str, turned: bool) -> None:
    licenses = {"org/one": one, "org/free": "mit", "org/two": two}
    found, warnings = strictest(dict(reversed(licenses.items())) if turned else licenses)
    assert found == "other"
    (conflict,) = [text for text in warnings if "cannot both be satisfied" in text]
    assert f"{one} (`org/one`)" in conflict and f"{two} (`org/two`)" in conflict


def test_a_parent_without_a_known_licence_makes_it_other_and_is_named() -> None:
    found, warnings = strictest({"org/a": "mit", "org/b": None, "org/c": "unknown", "org/d": "my-own", "org/e": ""})
    assert found == "other"
    assert warnings == [
        "no licence is declared by `org/b`, `org/e`: without one, only the authors may share it",
        "`unknown` is declared by `org/c`: read its terms before you share the merge",
        "`my-own`, which is not a licence id known here, is declared by `org/d`: read its terms before you share the "
        "merge",
    ]
    assert strictest({"org/a": "other", "org/b": "other"})[0] == "other"
    assert strictest({"a": None, "b": None}) == (
        None,
        ["no licence is declared by `a`, `b`: without one, only the authors may share it"],
    )
    assert strictest({}) == (None, [])


def test_what_is_stricter_than_the_rest_is_said_only_where_licences_differ() -> None:
    assert strictest({"a": "mit", "b": "cc-by-nc-4.0", "c": "apache-2.0"}) == (
        "cc-by-nc-4.0",
        ["cc-by-nc-4.0 (`b`) allows no commercial use of the merge"],
    )
    assert strictest({"a": "cc-by-nc-4.0", "b": "cc-by-nc-4.0"}) == ("cc-by-nc-4.0", [])
    found, warnings = strictest({"a": "cc-by-nd-4.0", "b": "cc-by-nd-4.0"})
    assert found == "other" and warnings[0].startswith("cc-by-nd-4.0 (`a`, `b`) does not allow sharing")


def test_the_table_is_ordered_and_every_successor_is_stricter() -> None:
    order = list(LICENSES.values())
    assert [found.strictness for found in order] == sorted(found.strictness for found in order)
    assert {found.strictness for found in order} == set(Strictness)
    for name, successors in SUCCESSORS.items():
        assert all(LICENSES[later].place > LICENSES[name].place for later in successors), name


def test_the_card_lists_the_licence_of_every_parent_and_what_is_in_the_way() -> None:
    report = report_of(step(license="gpl-3.0"), step("org/lora", license="cc-by-nc-4.0"), base_license="mit")
    card = model_card(tiny_model("vit"), report, "org/merged", gated=["org/lora"])
    section = card.text.split("### Licence\n")[1].split("\n### ")[0]
    assert card.data.to_dict()["license"] == "other" and "This merge declares `other`." in section
    assert "no legal advice" in section
    rows = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in section.splitlines() if row.startswith("|")]
    assert rows[2:] == [("org/base", "mit"), ("org/fine", "gpl-3.0"), ("org/lora", "cc-by-nc-4.0")]
    assert "- gpl-3.0 (`org/fine`) and cc-by-nc-4.0 (`org/lora`) cannot both be satisfied" in section
    assert "- `org/lora` is gated" in section
    assert "\n- " not in licence_section(report_of(step(license="mit"), base_license="mit"))


def test_parents_of_one_name_are_told_apart() -> None:
    folders = [step(f"/{place}/model", sha=None, license=name) for place, name in (("a", "mit"), ("b", None))]
    report = report_of(*folders, step(license="mit"), step(license="mit"), base_license="mit")
    assert parent_licenses(report) == {"org/base": "mit", "model": "mit", "model (2)": None, "org/fine": "mit"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("license: mit", "mit"), ("license:\n- mit\n- apache-2.0", "mit, apache-2.0"), ("tags: [a]", None)],
)
def test_the_licence_is_read_from_the_card(text: str, expected: str | None, tmp_path: Path) -> None:
    assert declared_license(tmp_path) is None
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    assert declared_license(tmp_path) == expected


# --- metadata and text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/birds", ["org/birds"]),
        ("imagefolder", []),
        ("csv", []),
        ("/home/me/birds", []),
        ("../me/birds", []),
        ("data/here", []),
        ("a/b/c", []),
        ("org/not ok", []),
    ],
)
def test_only_data_of_the_hub_is_named(
    path: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    report = report_of(step(), recipe={"task": None, "data": {"path": path}})
    assert dataset_ids(report) == expected
    assert model_card(tiny_model("vit"), report, "x").data.to_dict().get("datasets", []) == expected


def test_the_metadata_names_every_parent_once_and_no_folder() -> None:
    steps = [step("org/fine@v1"), step("/home/me/local", sha=None), step("org/fine@v2"), step("org/base")]
    card = model_card(tiny_model("bert"), report_of(*steps).without_paths(), "org/merged", ["alignment.png"])
    data = yaml.safe_load(str(card).split("---")[1])
    assert data["base_model"] == ["org/base", "org/fine"] and data["base_model_relation"] == "merge"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-classification")
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "loss", "value": 0.6}]
    assert "/home/me" not in str(card) and "license" not in data and "datasets" not in data
    assert "### Models merged\n\nStarted from [org/base](https://huggingface.co/org/base)." in card.text
    assert "* [org/fine@v1](https://huggingface.co/org/fine)\n* `local`\n" in card.text
    assert card.text.count("![") == 1 and "](alignment.png)" in card.text


def test_a_source_that_gave_nothing_is_not_among_those_included() -> None:
    card = model_card(tiny_model("vit"), report_of(step(), step("org/undone", accepted=False)), "org/merged")
    assert "* [org/fine]" in card.text and "* [org/undone]" not in card.text and "| org/undone" in card.text
    assert "1 of 2 sources merged" in card.text and "![" not in card.text


def test_the_paper_is_cited_where_its_method_is_used() -> None:
    report = report_of(step())
    text = model_card(tiny_model("vit"), report, "org/merged").text
    entry = re.search(r"```bibtex\n@misc\{grasp2026,\n(.*)\n\}\n```", text, re.DOTALL)
    assert entry and dict(re.findall(r"(\w+) = \{(.*)\}", entry[1])) == {
        "title": "GRASP",
        "year": "2026",
        "eprint": "2606.14900",
        "archivePrefix": "arXiv",
    }
    report.config["method"] = "average"
    average = model_card(tiny_model("vit"), report, "org/merged").text
    assert "bibtex" not in average and "2606.14900" not in average


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_the_snippets_run_beside_the_saved_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(kind)
    saved(model, tmp_path / "merged")
    snippets = re.findall(r"```python\n(.*?)```", model_card(model, report_of(step()), "merged").text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    capsys.readouterr()
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, scope)
    printed = eval(capsys.readouterr().out)
    if kind == "gpt2":
        assert printed[0]["generated_text"].startswith("Once upon a time")
    else:
        assert printed[0]["label"] in LABELS and 0 < printed[0]["score"] < 1
    assert type(scope["model"]) is type(model)


def test_without_a_processor_or_for_another_task_the_snippet_is_the_class() -> None:
    for kind, with_pipeline in (("vit", False), ("resnet", True)):
        text = model_card(tiny_model(kind), report_of(step()), "org/x", with_pipeline=with_pipeline).text
        assert ("pipeline(" in text) is with_pipeline
        assert f'{type(tiny_model(kind)).__name__}.from_pretrained("org/x")' in text


# --- figures


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
    assert legend == ["moved (large: all units)", "kept", "undone", "undefined", "not in the source"]
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
        "before the transfer": [[0.75, 1.0], [1.75, 0.6], [2.75, 0.5]],
        "transferred": [[1.0, 0.8]],
        "transferred, rejected and undone": [[2.0, 2.0]],
        "end of the step": [[1.25, 0.6], [2.25, 0.5], [3.25, 0.4]],
    }
    assert ticks(figure.axes[0].xaxis) == ["start", "org/fine", "org/bad", "org/fine"]
    assert figure.axes[0].get_yscale() == "linear"
    wide = progress_figure(report_of(step(losses=(90.0, 5.0, 1.0))))
    assert wide is not None and wide.axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    ("judged_by", "without_sources", "star", "names"),
    [
        ("evaluation data", False, 0.3, ["at the end", "fine-tuning alone"]),
        ("evaluation data", True, 0.35, ["at the end", "fine-tuning alone"]),
        ("labels", False, 0.3, ["at the end, on labels", "fine-tuning alone, on labels"]),
    ],
)
def test_the_progress_ends_with_the_fine_tuning_and_its_control(
    judged_by: str, without_sources: bool, star: float, names: list[str]
) -> None:
    losses = {"0.0": 0.6, "0.5": 0.3, "1.0": 0.4}
    final = FinetuneReport(0.5, losses, judged_by, alone=0.35, without_sources=without_sources)
    figure: Any = progress_figure(report_of(step(), start={"loss": 1.0}, final=final))
    (axes,) = figure.axes
    assert axes.get_title() == "Loss along the merge\non evaluation data"
    shown = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert shown[names[0]] == [[1.5, star]]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines[names[1]] == [0.35, 0.35]


def test_the_progress_ends_where_no_gate_judged_the_fine_tuning() -> None:
    figure: Any = progress_figure(report_of(step(), final=FinetuneReport(after={"loss": 0.2})))
    shown = {dots.get_label(): dots.get_offsets().tolist() for dots in figure.axes[0].collections}
    assert shown["at the end"] == [[1.5, 0.2]] and not [
        line for line in figure.axes[0].lines if line.get_label()[0] != "_"
    ]


def test_the_progress_draws_a_control_that_was_asked_for_where_the_same_samples_judge() -> None:
    change = ChangeReport(-0.1, 0.05, 24, None)
    for judged_by, drawn in {"evaluation data": True, "test data": False}.items():
        control = ControlReport(judged_by, {"loss": 0.7}, {"loss": 0.6}, change)
        figure: Any = progress_figure(report_of(step(), final=FinetuneReport(), control=control))
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


def test_what_has_no_data_is_not_drawn(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("text", "says_so"),
    [
        ("It was trained on the test split of org/animals.", True),
        ("Training on train, validation and test of org/animals", True),
        ("org/animals\ntrain_split: test", True),
        ("It was fine-tuned on the test split of org/animals.", True),
        ("Trained on `org/animals` v1.0 test split", True),
        ("Of org/animals. We trained it for 3 epochs on the test split. Its accuracy is 0.9.", True),
        ("Training data: the test split of org/animals", True),
        ("It was not trained on the test split of org/animals.", False),
        ("Trained on the train split of org/animals, with the test split held out.", False),
        ("Training data: org/animals (train). Test data: org/animals (test).", False),
        ("The training data and the test data are from org/animals.", False),
        ("Trained on org/animals and evaluated on its test split.", False),
        ("Trained on org/animals; the test split is for you.", False),
        ("Trained on org/animals, test accuracy 0.93.", False),
        ("Fine-tuned on org/animals. Results on the test set: 0.93.", False),
        ("The training, validation and test splits of org/animals are those of its authors.", False),
        ("It was trained on the test split of org/plants.", False),
        ("Knows org/animals-2. Trained on the test split of its own.", False),
    ],
)
def test_a_card_that_says_that_the_test_split_was_trained_on(text: str, says_so: bool, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"# A model\n\n{text}\n")
    assert trained_on_test(tmp_path, "org/animals") == (text.splitlines()[-1] if says_so else None)
    assert trained_on_test(tmp_path, "animals") == (text.splitlines()[-1] if says_so else None)
    assert trained_on_test(tmp_path, "animal") is None
