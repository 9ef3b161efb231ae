"""Classes match by name or by number, and a user can name those of a source, in a recipe and from Python."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError, Recipe, merge_pretrained
from grasp_hf.errors import ConfigError
from grasp_hf.runs.lineage import append_recipe, reproduce
from grasp_hf.runs.plan import plan
from grasp_hf.runs.prepare import prepare
from tests.support.models import NO_TUNING, copied, perturbed, saved, tiny_data, tiny_model

BERT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
MEAN: dict[str, Any] = {"method": "average", **NO_TUNING}
COPY_ALL: dict[str, Any] = {**NO_TUNING, "method": "copy", "threshold": -1.0, "gate": False, "num_batches": 1}
PETS = ["cat", "dog", "fish"]


def names(labels: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}


def numbers(classes: int) -> list[str]:
    return [f"LABEL_{number}" for number in range(classes)]


def bert(labels: list[str], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**BERT, **names(labels)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=torch.arange(24).view(3, 8)).logits)


def trained_adapter(base: str, classes: int, folder: Path) -> Any:
    """Write a LoRA adapter with a head, as PEFT does for a base without one, and return its model."""
    torch.manual_seed(3)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=classes)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_the_head_of_an_adapter_without_label_names_is_matched_by_number(classes: int, tmp_path: Path) -> None:
    base = saved(BertModel(BertConfig(**BERT)), tmp_path / "base")
    adapted = trained_adapter(base, classes, tmp_path / "adapter")
    merger = GraspMerger.from_pretrained(
        base, task="text-classification", config=GraspConfig(**COPY_ALL), **names(numbers(classes))
    )
    data = tiny_data("bert", 8).map(lambda sample: {"labels": sample["labels"] % classes})
    step = merger.merge([str(tmp_path / "adapter")], train_dataset=data).steps[0]
    assert step.notes == ["head: classes matched by their numbers, because they have no names"]
    torch.testing.assert_close(logits(merger.model), logits(adapted))


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_a_full_model_without_label_names_is_matched_by_number(classes: int, tmp_path: Path) -> None:
    base = saved(bert(numbers(classes)), tmp_path / "base")
    fine = perturbed(bert([str(number) for number in range(classes)]), 1)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN))
    merger.merge([saved(fine, tmp_path / "fine")])
    torch.testing.assert_close(logits(merger.model), logits(fine))


def test_classes_without_names_of_another_number_have_nothing_in_common(tmp_path: Path) -> None:
    base = saved(bert(numbers(3)), tmp_path / "base")
    fine = saved(perturbed(bert(numbers(5)), 1), tmp_path / "fine")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN))
    (note,) = merger.merge([fine]).steps[0].notes
    assert note.startswith("head stays: its classes have no names, and their number differs: got LABEL_0, ")
    weight = merger.model.get_parameter("classifier.weight")
    assert torch.equal(weight, bert(numbers(3)).classifier.weight)


def test_the_head_of_a_masked_language_model_has_no_classes(tmp_path: Path) -> None:
    """Its config may name the labels of an earlier task."""
    base, fine = (BertForMaskedLM(BertConfig(**BERT, **names(labels))) for labels in (numbers(2), PETS))
    merger = GraspMerger.from_pretrained(saved(base, tmp_path / "base"), config=GraspConfig(**MEAN))
    assert not merger.merge([saved(fine, tmp_path / "fine")]).steps[0].notes[1:]
    torch.testing.assert_close(logits(merger.model), logits(fine))


def test_a_head_that_was_trained_for_another_kind_of_labels_stays(tmp_path: Path) -> None:
    kinds = ("single_label_classification", "multi_label_classification", "regression", None)
    for kind in kinds:
        model = bert(PETS)
        model.config.problem_type = kind
        saved(model, tmp_path / f"base-{kind}")
        saved(perturbed(model, 1), tmp_path / f"fine-{kind}")
    for kind in kinds:
        for other in kinds:
            merger = GraspMerger.from_pretrained(str(tmp_path / f"base-{kind}"), config=GraspConfig(**MEAN))
            notes = " ".join(merger.merge([str(tmp_path / f"fine-{other}")]).steps[0].notes)
            differ = None not in (kind, other) and kind != other
            assert (f"head stays: it was trained for {other}, expected {kind}" in notes) == differ
            moved = not torch.equal(merger.model.get_parameter("classifier.weight"), bert(PETS).classifier.weight)
            assert moved != differ


def test_a_recipe_names_the_labels_of_a_source(tmp_path: Path) -> None:
    saved(bert(PETS), tmp_path / "base")
    fine = perturbed(bert(numbers(3)), 1)
    saved(fine, tmp_path / "fine")
    text = "base_model: base\nsources:\n- {id: fine, labels: [fish, cat, dog]}\nmethod: average\norder: given\nfinal_epochs: 0\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.sources == ["fine"]
    (_, row) = plan(recipe)
    assert row.labels == ["fish", "cat", "dog"] and "classes matched by name, 3 of 3" in row.notes[-1]
    merger, sources, data = prepare(recipe)
    (step,) = merger.merge(sources, **data.keywords()).steps
    assert "classes matched by name, 3 of 3" in step.notes[-1]
    torch.testing.assert_close(logits(merger.model), logits(fine)[:, [1, 2, 0]])


def test_python_names_the_labels_of_a_source_in_each_verb(tmp_path: Path) -> None:
    base, source = saved(bert(PETS), tmp_path / "base"), saved(perturbed(bert(numbers(3)), 1), tmp_path / "fine")
    expected = logits(perturbed(bert(numbers(3)), 1))[:, [1, 2, 0]]
    entry = {"id": source, "labels": ["fish", "cat", "dog"]}
    model = merge_pretrained(base, [entry], config=GraspConfig(**MEAN))
    torch.testing.assert_close(logits(model), expected)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN))
    merger.merge_source({"id": Path(source), "labels": ("fish", "cat", "dog")})
    torch.testing.assert_close(logits(merger.model), expected)
    options = {source: {"labels": ["fish", "cat", "dog"]}}
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN, source_options=options))
    assert "classes matched by name" in merger.merge([source]).steps[0].notes[-1]
    torch.testing.assert_close(logits(merger.model), expected)


def test_the_labels_of_the_model_that_a_merge_starts_from(tmp_path: Path) -> None:
    first = {"id": saved(bert(numbers(3)), tmp_path / "first"), "labels": PETS}
    second = saved(perturbed(bert(["dog", "fish", "cat"]), 1), tmp_path / "second")
    model: Any = merge_pretrained(None, [first, second], config=GraspConfig(**MEAN))
    assert model.config.id2label == dict(enumerate(PETS))
    other = perturbed(bert(PETS), 1).get_parameter("classifier.weight")
    mean = (bert(numbers(3)).classifier.weight + other[[2, 0, 1]]) / 2
    torch.testing.assert_close(model.classifier.weight, mean)


def test_the_labels_of_an_adapter(tmp_path: Path) -> None:
    base = saved(BertModel(BertConfig(**BERT)), tmp_path / "base")
    adapted = trained_adapter(base, 3, tmp_path / "adapter")
    merger = GraspMerger.from_pretrained(
        base, task="text-classification", config=GraspConfig(**COPY_ALL), **names(PETS)
    )
    entry = {"id": str(tmp_path / "adapter"), "labels": ["fish", "cat", "dog"]}
    merger.merge([entry], train_dataset=tiny_data("bert", 8))
    torch.testing.assert_close(logits(merger.model), logits(adapted)[:, [1, 2, 0]])
    with pytest.raises(
        IncompatibleSourceError, match=r"labels: got 2 names \(cat, dog\), expected 3, one for each class"
    ):
        merger.merge([{**entry, "labels": ["cat", "dog"]}], train_dataset=tiny_data("bert", 8))


def test_labels_that_are_too_few_are_refused_and_planned(tmp_path: Path) -> None:
    base, source = saved(bert(PETS), tmp_path / "base"), saved(bert(numbers(3)), tmp_path / "fine")
    config = GraspConfig(**MEAN, source_options={source: {"labels": ["cat", "dog"]}})
    message = "labels: got 2 names (cat, dog), expected 3, one for each class of its head"
    with pytest.raises(IncompatibleSourceError, match="labels: got 2 names"):
        GraspMerger.from_pretrained(base, config=config).merge([source])
    (_, row) = plan(Recipe(sources=[source], base_model=base, config=config))
    assert row.problems == [message]
    config = GraspConfig(**MEAN, source_options={base: {"labels": ["cat", "dog"]}})
    with pytest.raises(IncompatibleSourceError, match="labels: got 2 names"):
        GraspMerger.from_pretrained(base, config=config)


def test_the_record_keeps_what_was_said_about_a_source(tmp_path: Path) -> None:
    base, source = saved(bert(PETS), tmp_path / "base"), saved(perturbed(bert(numbers(3)), 1), tmp_path / "fine")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN))
    merger.merge([{"id": source, "labels": ["fish", "cat", "dog"]}])
    merger.save_pretrained(tmp_path / "merged")
    values = yaml.safe_load((tmp_path / "merged/grasp_config.yaml").read_text())
    assert values["source_options"] == {source: {"labels": ["fish", "cat", "dog"]}}
    assert not reproduce(str(tmp_path / "merged")).differences
    recipe = append_recipe(str(tmp_path / "merged"), ["org/next"])
    assert recipe.config.source_options == {}, "what a record says about sources is not for the next ones"
    public = merger.report.without_paths()
    assert str(tmp_path) not in json.dumps(public.run.config) and "fine" in public.run.config["source_options"]


def test_a_subfolder_and_a_revision_of_a_source(tmp_path: Path) -> None:
    base, _ = saved(bert(PETS), tmp_path / "base"), saved(bert(PETS, 1), tmp_path / "runs/checkpoint-5")
    entry = {"id": str(tmp_path / "runs"), "subfolder": "checkpoint-5"}
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN))
    assert merger.merge([entry]).steps[0].moved
    hub = {"id": "org/x", "subfolder": "a/b", "revision": "v1", "accept": ["rope_theta"]}
    recipe = Recipe.from_dict({"base_model": "org/b", "sources": [hub, "org/y"]})
    assert recipe.sources == ["org/x/a/b@v1", "org/y"]
    assert recipe.config.options_of("org/x/a/b@v1").accept == ["rope_theta"]


def test_a_source_without_a_tokenizer_can_be_said_to_have_the_same(tmp_path: Path) -> None:
    from tests.sources.test_rows import WORDS, text_model

    base = text_model(tmp_path / "base", WORDS, seed=0)
    source = Path(text_model(tmp_path / "source", WORDS, seed=1))
    for path in source.glob("tokenizer*"):
        path.unlink()
    recipe = {"base_model": base, "sources": [str(source)], **MEAN}
    (_, row) = plan(Recipe.from_dict(recipe))
    assert row.problems and f"sources: [{{id: {source}, same_tokenizer: true}}]" in row.problems[0]
    entry = {"id": str(source), "same_tokenizer": True}
    (_, row) = plan(Recipe.from_dict({**recipe, "sources": [entry]}))
    assert not row.problems and "tokens matched by their numbers, because the user says so" in row.notes[0]
    model: Any = merge_pretrained(base, [entry], config=GraspConfig(**MEAN))
    fine: Any = BertForSequenceClassification.from_pretrained(source)
    assert torch.equal(model.get_input_embeddings().weight, fine.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"id": "org/x", "label": ["a"]}, r"sources\[0\].label: unknown key, did you mean labels"),
        ({"labels": ["a"]}, r"sources\[0\].id: missing, expected a reference, such as org/name"),
        ({"id": 3}, r"sources\[0\].id: got 3, expected str"),
        (
            {"id": "org/x", "labels": [False, True]},
            r"sources\[0\].labels: got \[False, True\], expected texts; put each in",
        ),
        ({"id": "org/x", "labels": "neg"}, r"sources\[0\].labels: got 'neg', expected list of str or null"),
        ({"id": "org/x", "labels": []}, r"sources\[0\].labels: got \[\], expected a name for each class"),
        ({"id": "org/x", "accept": [1]}, r"sources\[0\].accept: got \[1\], expected texts"),
        ({"id": "org/x", "same_tokenizer": "yes"}, r"sources\[0\].same_tokenizer: got 'yes', expected bool"),
        ({"id": "org/x@v1", "revision": "v2"}, r"sources\[0\].revision: got 'v2', but the id names one: 'org/x@v1'"),
    ],
)
def test_a_wrong_entry_is_one_clear_error(entry: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        Recipe.from_dict({"base_model": "org/b", "sources": [entry, "org/y"]})
    merger = GraspMerger.from_pretrained(saved(bert(PETS), tmp_path / "base"), config=GraspConfig(**MEAN))
    with pytest.raises(ConfigError, match=problem):
        merger.merge([entry])


def test_one_source_with_two_opinions_is_refused() -> None:
    entries = [{"id": "org/x", "labels": ["a"]}, {"id": "org/x", "labels": ["b"]}]
    with pytest.raises(ConfigError, match=r"sources\[1\]: 'org/x' occurs twice with other keys"):
        Recipe.from_dict({"base_model": "org/b", "sources": entries})
    with pytest.raises(ConfigError, match=r"source_options\['org/x'\].lables: unknown key, did you mean labels"):
        GraspConfig(source_options={"org/x": {"lables": ["a"]}})
    with pytest.raises(ConfigError, match=r"source_options\['org/x'\]: got 3, expected a section with keys"):
        GraspConfig(source_options={"org/x": 3})


def test_options_are_found_with_and_without_a_revision_and_in_other_spellings(tmp_path: Path) -> None:
    config = GraspConfig(source_options={"org/x": {"labels": ["a"]}, f"{tmp_path}/": {"same_tokenizer": True}})
    assert config.options_of("org/x@v1").labels == ["a"] and config.options_of("org/xy").labels is None
    assert config.options_of(str(tmp_path)).same_tokenizer
    entry = {"id": copied(saved(tiny_model("bert"), tmp_path / "a"), tmp_path / "b"), "same_tokenizer": False}
    assert merge_pretrained(str(tmp_path / "a"), [entry], config=GraspConfig(**MEAN)) is not None
