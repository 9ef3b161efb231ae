"""Data from Python that counts its classes in another order than the model is refused; other spellings are not."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from torch.utils.data import ConcatDataset, Subset
from transformers import BertConfig, BertForTokenClassification

from grasp_hf import GraspConfig, GraspMerger, merge_pretrained
from grasp_hf.data.classes import check_class_names
from grasp_hf.errors import DataError
from tests.support.models import LABELS, NO_TUNING, perturbed, saved, tiny_data, tiny_model

OTHER_ORDER = ["dog", "bird", "cat"]
MEAN = GraspConfig(method="average", **NO_TUNING)


def named(names: list[str], column: str = "labels") -> Dataset:
    """Return data for a tiny BERT whose classes have names; `LABELS` are those of the model."""
    data = tiny_data("bert", 12).with_format(None)
    if column != "labels":
        data = data.rename_column("labels", column)
    return data.cast_column(column, ClassLabel(names=names)).with_format("torch")


class Folder:
    """A data set as torchvision makes it from folders of images."""

    def __init__(self, classes: list[str]) -> None:
        self.classes, self._data = classes, tiny_data("bert", 12)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> Any:
        return self._data[row]


@pytest.mark.parametrize(
    "data",
    [
        named(OTHER_ORDER),
        named(OTHER_ORDER, "label"),
        named(["cat", "dog"] + ["x"]),
        Subset(named(OTHER_ORDER), range(6)),
        ConcatDataset([named(LABELS), named(OTHER_ORDER)]),
        Folder(OTHER_ORDER),
        Subset(Folder(OTHER_ORDER), range(6)),  # type: ignore[arg-type]
    ],
)
def test_another_order_of_the_classes_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match="train_dataset counts its classes in another order than the model: got"):
        check_class_names(tiny_model("bert"), data, "train_dataset")


def test_every_public_verb_refuses_it_before_a_source_is_read(tmp_path: Path) -> None:
    base = saved(tiny_model("bert"), tmp_path / "base")
    source = saved(perturbed(tiny_model("bert"), seed=1), tmp_path / "source")
    wrong, right = named(OTHER_ORDER), named(LABELS)
    match = (
        "'dog' is 0 in the data and 2 in the model. .*dataset.with_format.None..align_labels_with_mapping.*cast_column"
    )
    with pytest.raises(DataError, match=f"train_dataset counts .*{match}"):
        merge_pretrained(base, [source], train_dataset=wrong, config=MEAN)
    for name in ("eval_dataset", "test_dataset"):
        with pytest.raises(DataError, match=f"{name} counts .*{match}"):
            merge_pretrained(base, [source], train_dataset=right, config=MEAN, **{name: wrong})
    merger = GraspMerger.from_pretrained(base, config=MEAN)
    with pytest.raises(DataError, match=match):
        merger.merge_source(source, train_dataset=wrong)
    with pytest.raises(DataError, match=match):
        merger.rank([source], train_dataset=wrong)
    with pytest.raises(DataError, match=match):
        merger.evaluate(wrong)
    assert not merger.report.steps
    assert merger.merge_source(source, train_dataset=right).moved


def test_both_kinds_of_advice_work() -> None:
    model, wrong = tiny_model("bert"), named(OTHER_ORDER)
    mapped = wrong.with_format(None).align_labels_with_mapping(model.config.label2id, "labels")
    check_class_names(model, mapped, "train_dataset")
    plain = [OTHER_ORDER[int(label)] for label in wrong["labels"]]
    assert [LABELS[int(label)] for label in mapped["labels"]] == plain
    check_class_names(model, wrong.cast_column("labels", Value("int64")), "train_dataset")


@pytest.mark.parametrize("names", [LABELS, ["Bird", "CAT", " dog"], ["0", "1", "2"], LABELS[:2] + ["dog"]])
def test_the_same_classes_in_another_spelling_are_no_problem(
    names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    check_class_names(tiny_model("bert"), named(names), "train_dataset")
    check_class_names(
        tiny_model("bert", labels=["LABEL_0", "LABEL_1", "LABEL_2"]), named(OTHER_ORDER), "train_dataset"
    )
    check_class_names(tiny_model("gpt2"), named(OTHER_ORDER), "train_dataset")
    check_class_names(tiny_model("bert"), tiny_data("bert", 4), "train_dataset")
    assert not caplog.records


def test_other_names_are_matched_by_number_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "grasp_hf"):
        check_class_names(tiny_model("bert"), named(["bird", "chat", "dog"]), "train_dataset")
    (record,) = caplog.records
    assert "classes that the model does not name: chat. " in record.message and "by their numbers" in record.message


def test_a_transform_that_returns_the_ids_of_the_model_is_seen(caplog: pytest.LogCaptureFixture) -> None:
    model, raw = tiny_model("bert"), named(OTHER_ORDER, "label")

    def mapping(batch: dict[str, Any]) -> dict[str, Any]:
        labels = [LABELS.index(OTHER_ORDER[label]) for label in batch["label"]]
        return {"input_ids": torch.tensor(batch["input_ids"]), "labels": torch.tensor(labels)}

    def keeping(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": torch.tensor(batch["input_ids"]), "labels": torch.tensor(batch["label"])}

    check_class_names(model, raw.with_transform(mapping), "train_dataset")
    with pytest.raises(DataError, match="in another order than the model"):
        check_class_names(model, raw.with_transform(keeping), "train_dataset")
    assert not caplog.records


def test_classes_of_tokens_are_compared_too() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.id2label, config.label2id = {0: "O", 1: "B-PER"}, {"O": 0, "B-PER": 1}
    features = Features({"labels": Sequence(ClassLabel(names=["B-PER", "O"]))})
    data = Dataset.from_dict({"labels": [[0, 1]]}, features=features)
    with pytest.raises(DataError, match="in another order than the model"):
        check_class_names(BertForTokenClassification(config), data, "train_dataset")
