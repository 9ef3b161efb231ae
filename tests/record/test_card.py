"""The card of a merge: licences, metadata, snippets that run, and claims about test data."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from grasp_hf.hub.licenses import LICENSES, SUCCESSORS, Strictness, strictest
from grasp_hf.record.card import (
    dataset_ids,
    declared_license,
    licence_section,
    model_card,
    parent_licenses,
    trained_on_test,
    usage,
)
from grasp_hf.record.entries import ChangeReport, ControlReport
from grasp_hf.record.report import StepReport
from tests.support.models import LABELS, saved, tiny_model
from tests.support.reports import report_of, step

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
def test_the_strictest_licence_is_declared(declared: tuple[str, ...], expected: str) -> None:
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
        "no licence is declared by `org/b`, `org/e`: only the authors may share a model without a licence",
        "`unknown` is declared by `org/c`: read its terms before you share the merge",
        "`my-own`, which is not in the table of licence ids, is declared by `org/d`: read its terms before you share "
        "the merge",
    ]
    assert strictest({"org/a": "other", "org/b": "other"})[0] == "other"
    assert strictest({"a": None, "b": None}) == (
        None,
        ["no licence is declared by `a`, `b`: only the authors may share a model without a licence"],
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


def test_the_card_lists_the_licence_of_every_parent_and_the_conflicts() -> None:
    report = report_of(step(license="gpl-3.0"), step("org/lora", license="cc-by-nc-4.0"), base_license="mit")
    card = model_card(tiny_model("vit"), report, "org/merged", gated=["org/lora"])
    section = card.text.split("### Licence\n")[1].split("\n### ")[0]
    assert card.data.to_dict()["license"] == "other" and "This merge declares `other`, chosen from" in section
    assert "no legal advice" in section
    rows = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in section.splitlines() if row.startswith("|")]
    assert rows[2:] == [("org/base", "mit"), ("org/fine", "gpl-3.0"), ("org/lora", "cc-by-nc-4.0")]
    assert "- gpl-3.0 (`org/fine`) and cc-by-nc-4.0 (`org/lora`) cannot both be satisfied" in section
    assert "- `org/lora` is gated: the conditions for its files may also apply" in section
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
    report.run.config["method"] = "average"
    average = model_card(tiny_model("vit"), report, "org/merged").text
    assert "bibtex" not in average and "2606.14900" not in average


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_the_snippets_run_next_to_the_saved_model(
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


def test_a_card_mentions_no_losses_that_were_not_measured() -> None:
    measured, unmeasured = (
        model_card(tiny_model("vit"), report_of(one), "x").text for one in (step(), StepReport("org/a", "sha", "full"))
    )
    losses = "`loss before` and `loss after`\nare mean losses on evaluation data of the target task"
    assert losses in measured and "mean losses" not in unmeasured and "`grasp_report.json`" in unmeasured
    assert "This merge declares no licence, because no card of its parents declares one." in unmeasured


def test_a_comparison_on_test_data_is_no_training_on_them(tmp_path: Path) -> None:
    change = ChangeReport(-0.3, 0.1, 90, 12)
    controls = [ControlReport("test data", {"loss": 0.7}, {"loss": 0.4}, change)]
    report = report_of(step(), controls=controls, test={"loss": 0.4}, recipe={"data": {"path": "org/animals"}})
    text = model_card(tiny_model("vit"), report, "x").text
    (tmp_path / "README.md").write_text(f"{text}\norg/animals")
    assert "from fine-tuning alone to the merge" in text and trained_on_test(tmp_path, "org/animals") is None


def test_the_scores_on_the_card_say_whether_their_samples_chose_something() -> None:
    data = {"eval": {"samples": 24}, "test": {"samples": 90}}
    chose = model_card(tiny_model("vit"), report_of(step(), data=data), "x")
    (row,) = chose.data.to_dict()["model-index"][0]["results"]
    name = "evaluation data, which also chose what was kept (24 samples)"
    assert (row["dataset"], row["metrics"]) == ({"type": "validation", "name": name}, [{"type": "loss", "value": 0.6}])
    assert "evaluation data: loss 0.600, 24 samples, which also chose what was kept" in chose.text
    tested = model_card(tiny_model("vit"), report_of(step(), data=data, test={"loss": 0.7}), "x")
    (row,) = tested.data.to_dict()["model-index"][0]["results"]
    name = "test data, which chose nothing (90 samples)"
    assert (row["dataset"], row["metrics"]) == ({"type": "test", "name": name}, [{"type": "loss", "value": 0.7}])
    assert "- test: loss 0.700, 90 samples, which chose nothing" in tested.text
    assert tested.text.index("- test: loss") < tested.text.index("## Usage")


def test_a_class_that_transformers_does_not_have_must_be_imported() -> None:
    class Own(type(tiny_model("vit"))):  # type: ignore[misc]
        pass

    text = usage(Own(tiny_model("vit").config), "org/merged")
    assert text.startswith("Its class is not a part of transformers") and "`Own.from_pretrained('org/merged')`" in text
