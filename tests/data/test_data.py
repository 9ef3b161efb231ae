"""Files become training samples: splits, labels by name, processors, and complete merges on each kind of data."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoTokenizer, BertTokenizer, PreTrainedModel

from grasp_hf import GraspConfig, Recipe
from grasp_hf.data.digests import fingerprint
from grasp_hf.data.section import DataSection
from grasp_hf.data.splits import (
    Content,
    choose_label_names,
    encode_labels,
    find_label_names,
    load_splits,
    require_column,
)
from grasp_hf.data.tasks import prepare_images, tokenize_texts
from grasp_hf.errors import ConfigError, DataError
from grasp_hf.record.redaction import without_secrets
from grasp_hf.runs.prepare import prepare
from grasp_hf.sources.rows import label_names
from tests.support.models import LABELS, perturbed, saved, tiny_model, tiny_tokenizer, write_images

ROWS = {"text": ["red small", "green large", "blue red"], "label": ["bird", "cat", "dog"]}


def write_texts(folder: Path, kind: str, rows: dict[str, dict[str, list]]) -> dict[str, Any]:
    """Write one file per split, or a folder of `save_to_disk`, and return the `data:` section for it."""
    if kind == "folder":
        DatasetDict({split: Dataset.from_dict(columns) for split, columns in rows.items()}).save_to_disk(
            folder / "set"
        )
        return {"path": "set"}
    for split, columns in rows.items():
        split_set = Dataset.from_dict(columns)
        {"csv": split_set.to_csv, "json": split_set.to_json, "parquet": split_set.to_parquet}[kind](
            folder / f"{split}.{kind}"
        )
    return {"path": kind, "data_files": {split: f"{split}.{kind}" for split in rows}}


def section(folder: Path, data: dict[str, Any]) -> DataSection:
    return DataSection.from_recipe(Recipe(sources=["a"], data=data, folder=folder))


def typed(column: str, values: list, names: list[str]) -> Dataset:
    split = Dataset.from_dict({column: values}, features=Features({column: ClassLabel(names=names)}))
    return split.add_column("id", list(range(len(values))))


def repeated(times: int) -> dict[str, list]:
    return {column: values * times for column, values in ROWS.items()}


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "folder"])
def test_text_files(kind: str, tmp_path: Path) -> None:
    data = write_texts(tmp_path, kind, {"train": repeated(2), "validation": ROWS})
    splits = load_splits(section(tmp_path, data))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 3}
    assert splits["validation"].to_dict() == ROWS
    assert find_label_names(splits["train"], "label") == ["bird", "cat", "dog"]


def test_one_file_is_the_training_split(tmp_path: Path) -> None:
    write_texts(tmp_path, "csv", {"train": ROWS})
    assert list(load_splits(section(tmp_path, {"path": "csv", "data_files": "train.csv"}))) == ["train"]
    Dataset.from_dict(ROWS).save_to_disk(tmp_path / "one")
    splits = load_splits(section(tmp_path, {"path": "one"}))
    assert {name: split.to_dict() for name, split in splits.items()} == {"train": ROWS}


def test_an_image_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train": 2, "validation": 1, "test": 1})
    splits = load_splits(section(tmp_path, {"path": "imagefolder", "data_dir": "images"}))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 3, "test": 3}
    assert find_label_names(splits["train"], "label") == LABELS
    assert splits["train"][0]["image"].size == (8, 8)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "folder"])
def test_inputs_without_labels_are_files_or_a_split(kind: str, tmp_path: Path) -> None:
    bare = {"text": ["blue", "small red"]}
    data = write_texts(tmp_path, kind, {"train": ROWS, **({"extra": bare} if kind == "folder" else {})})
    if kind != "folder":
        write_texts(tmp_path, kind, {"more": bare})
    data["unlabeled"] = "extra" if kind == "folder" else f"more.{kind}"
    splits = load_splits(section(tmp_path, data))
    assert splits["unlabeled"]["text"][:] == bare["text"] and len(splits["train"]) == 3
    encoded = encode_labels(splits, "label", ["bird", "cat", "dog"])
    assert "labels" in encoded["train"].column_names and "labels" not in encoded["unlabeled"].column_names
    tokens, _ = tokenize_texts(encoded, section(tmp_path, data), tiny_tokenizer(), generates=False)
    assert set(tokens["unlabeled"].column_names) >= {"input_ids"} and len(tokens["unlabeled"]) == 2


def test_unlabelled_images_lose_the_names_of_their_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train": 2})
    write_images(tmp_path / "more", {"some": 3})
    data = {"path": "imagefolder", "data_dir": "images", "unlabeled": "more"}
    splits = load_splits(section(tmp_path, data))
    assert splits["unlabeled"].column_names == ["image"] and len(splits["unlabeled"]) == 9


def test_unlabelled_inputs_that_cannot_be_loaded(tmp_path: Path) -> None:
    data = write_texts(tmp_path, "csv", {"train": ROWS})
    with pytest.raises(DataError, match=r"data.unlabeled: '.*gone.csv' cannot be loaded"):
        load_splits(section(tmp_path, {**data, "unlabeled": "gone.csv"}))
    saved_data = write_texts(tmp_path, "folder", {"train": ROWS})
    with pytest.raises(DataError, match="data.unlabeled: data set '.*' has no split 'extra'"):
        load_splits(section(tmp_path, {**saved_data, "unlabeled": "extra"}))
    with pytest.raises(ConfigError, match="data.unlabeled: got 3, expected the name of a split"):
        section(tmp_path, {**data, "unlabeled": 3})


def test_data_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data set 'csv' cannot be loaded: .*missing.csv"):
        load_splits(section(tmp_path, {"path": "csv", "data_files": "missing.csv"}))
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="data set 'parquet' cannot be loaded: "):
        load_splits(section(tmp_path, {"path": "parquet", "data_files": "broken.parquet"}))


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (
            {"path": "csv", "data_files": {"train": "a.csv", "test": "b.csv"}},
            "data.data_files.train=… data.data_files.te",
        ),
        ({"path": "csv", "data_files": "a.csv"}, "data.data_files=…"),
        ({"path": "imagefolder", "data_dir": "images"}, "data.data_dir=…"),
        ({"path": "/not/here"}, "data.path=…"),
    ],
)
def test_files_that_are_gone(data: dict[str, Any], advice: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot be loaded: .*; set its location with {advice}"):
        load_splits(section(tmp_path, data))


def test_no_training_split(tmp_path: Path) -> None:
    data = write_texts(tmp_path, "json", {"validation": ROWS, "test": ROWS})
    with pytest.raises(DataError, match="data set 'json' has no split 'train'; found validation, test"):
        load_splits(section(tmp_path, data))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("csv", "data set 'csv' cannot be loaded: .*validation.* no data"),
        ("json", "data set 'json' cannot be loaded: "),
        ("folder", "data set '.*set' cannot be loaded: "),
    ],
)
def test_an_empty_split(kind: str, message: str, tmp_path: Path) -> None:
    data = write_texts(tmp_path, kind, {"train": ROWS, "validation": {"text": [], "label": []}})
    with pytest.raises(DataError, match=message):
        load_splits(section(tmp_path, data))


def test_the_names_of_labels() -> None:
    assert find_label_names(typed("label", [0, 1, 0], ["z", "a"]), "label") == ["z", "a"]
    assert find_label_names(Dataset.from_dict({"label": ["z", "a", "z"]}), "label") == ["a", "z"]
    assert find_label_names(Dataset.from_dict({"label": [0, 4, 2]}), "label") == 5


def test_a_missing_column_lists_those_found() -> None:
    with pytest.raises(DataError, match="no column 'class' for labels; found text, label"):
        find_label_names(Dataset.from_dict(ROWS), "class")


@pytest.mark.parametrize("values", [["a", None], [1, None], [0.0, 1.0], [-1, 0]])
def test_rows_without_a_usable_label(values: list) -> None:
    with pytest.raises(
        DataError, match="column 'label' holds (rows without a label|.*; expected class names or class ids)"
    ):
        find_label_names(Dataset.from_dict({"label": values}), "label")


def test_the_names_that_a_model_takes_on() -> None:
    known = ["dog", "bird", "cat"]
    assert choose_label_names(["bird", "cat", "dog"], known) == known
    assert choose_label_names(["bird"], known) == known
    assert choose_label_names(["bird", "cow"], known) == ["bird", "cow"]
    assert choose_label_names(3, known) == known
    assert choose_label_names(4, known) == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]


@pytest.mark.parametrize("kind", ["ClassLabel", "names", "ids"])
def test_labels_are_mapped_by_name(kind: str) -> None:
    if kind == "ClassLabel":
        split = typed("animal", [0, 1, 2, 1], ["bird", "cat", "dog"])
    else:
        names = ["bird", "cat", "dog", "cat"]
        split = Dataset.from_dict({"animal": names if kind == "names" else [1, 2, 0, 2], "id": [0, 1, 2, 3]})
    encoded = encode_labels(DatasetDict(train=split), "animal", ["dog", "bird", "cat"])["train"]
    assert encoded.column_names == ["id", "labels"]
    assert encoded["labels"][:] == [1, 2, 0, 2]


def test_a_column_that_is_called_labels_already() -> None:
    splits = DatasetDict(train=Dataset.from_dict({"labels": ["b", "a"], "id": [0, 1]}))
    assert encode_labels(splits, "labels", ["a", "b"])["train"]["labels"][:] == [1, 0]
    both = DatasetDict(train=Dataset.from_dict({"label": ["b", "a"], "labels": [7, 7]}))
    assert encode_labels(both, "label", ["a", "b"])["train"]["labels"][:] == [1, 0]


def test_a_label_that_training_does_not_know() -> None:
    splits = DatasetDict(
        train=Dataset.from_dict({"label": ["a", "b"], "id": [0, 1]}),
        validation=Dataset.from_dict({"label": ["a", "c", "d"], "id": [0, 1, 2]}),
    )
    message = "split 'validation' has labels that the model does not know: c, d; expected some of a, b"
    with pytest.raises(DataError, match=message):
        encode_labels(splits, "label", ["a", "b"])
    ids = DatasetDict(
        train=Dataset.from_dict({"label": [0, 1], "id": [0, 1]}), test=Dataset.from_dict({"label": [2], "id": [0]})
    )
    with pytest.raises(DataError, match="split 'test' has labels that the model does not know: 2"):
        encode_labels(ids, "label", ["a", "b"])


def test_a_test_split_whose_labels_are_hidden() -> None:
    # Public benchmarks write -1, a value that a ClassLabel accepts but has no name for.
    names = ["a", "b"]
    splits = DatasetDict(train=typed("label", [0, 1], names), test=typed("label", [-1, -1], names))
    with pytest.raises(DataError, match="split 'test'.*label"):
        encode_labels(splits, "label", names)


def test_tokens_of_a_sentence(tmp_path: Path) -> None:
    splits = DatasetDict(
        train=Dataset.from_dict({"text": ["red small blue", "large"], "labels": [1, 0], "id": [8, 9]})
    )
    part = section(tmp_path, {"path": "csv", "data_files": "x.csv", "max_length": 2})
    encoded, collator = tokenize_texts(splits, part, tiny_tokenizer(), generates=False)
    assert encoded["train"]["input_ids"][:] == [[3, 6], [7]]
    assert encoded["train"]["labels"][:] == [1, 0]
    assert {"id", "text"}.isdisjoint(encoded["train"].column_names)
    batch = collator([encoded["train"][i] for i in (0, 1)])
    assert batch["input_ids"].tolist() == [[3, 6], [7, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_tokens_of_a_language_model(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": ["red small blue", "large red"], "labels": [1, 0]}))
    part = section(tmp_path, {"path": "csv", "data_files": "x.csv"})
    encoded, collator = tokenize_texts(splits, part, tiny_tokenizer(), generates=True)
    batch = collator([encoded["train"][i] for i in (0, 1)])
    assert batch["labels"].tolist() == [[3, 6, 5], [7, 3, -100]]


def test_texts_that_have_nothing_to_predict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = section(tmp_path, {"path": "csv", "data_files": "x.csv"})
    splits = DatasetDict(train=Dataset.from_dict({"text": ["", "red small", "large", "blue red"]}))
    encoded, _ = tokenize_texts(splits, part, tiny_tokenizer(), generates=True)
    assert encoded["train"]["input_ids"][:] == [[3, 6], [5, 3]]
    assert "split 'train': 2 texts of fewer than two tokens are left out" in caplog.text
    splits["validation"] = Dataset.from_dict({"text": ["", "red"]})
    with pytest.raises(DataError, match="split 'validation' has no text of two tokens or more"):
        tokenize_texts(splits, part, tiny_tokenizer(), generates=True)


def test_texts_are_cut_where_the_model_has_no_more_positions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "grasp_hf")
    part = section(tmp_path, {"path": "csv", "data_files": "x.csv"})
    splits = DatasetDict(
        train=Dataset.from_dict({"text": ["red small blue", "large"], "labels": [1, 0], "id": [1, 2]}),
        test=Dataset.from_dict({"labels": [1], "text": ["red"]}),
    )
    encoded, _ = tokenize_texts(splits, part, tiny_tokenizer(), generates=False, positions=2)
    assert encoded["train"]["input_ids"][:] == [[3, 6], [7]] and encoded["test"]["input_ids"][:] == [[3]]
    assert "split 'train': 1 of 2 texts fill all 2 tokens; longer texts are cut" in caplog.text


def test_a_length_that_leaves_no_token_for_the_text(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\nblue\n")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    splits = DatasetDict(train=Dataset.from_dict({"text": ["red blue"], "labels": [1]}))
    for length in (1, 2):
        part = section(tmp_path, {"path": "csv", "data_files": "x.csv", "max_length": length})
        message = (
            f"data.max_length: got {length} tokens per text, of which the tokenizer adds 2 itself; expected at lea"
        )
        with pytest.raises(DataError, match=message):
            tokenize_texts(splits, part, tokenizer, generates=False)
    part = section(tmp_path, {"path": "csv", "data_files": "x.csv", "max_length": 3})
    assert tokenize_texts(splits, part, tokenizer, generates=False)[0]["train"]["input_ids"][:] == [[2, 5, 3]]


@pytest.mark.parametrize("key", ["data_files", "unlabeled"])
def test_data_that_git_has_not_fetched(key: str, tmp_path: Path) -> None:
    data = write_texts(tmp_path, "csv", {"train": ROWS})
    (tmp_path / "more.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    data |= {"unlabeled": "more.csv"} if key == "unlabeled" else {"data_files": ["train.csv", "more.csv"]}
    with pytest.raises(DataError, match=r"more.csv: got a git-LFS pointer, not the file itself; run `git lfs pull`"):
        load_splits(section(tmp_path, data))


def test_a_saved_data_set_gets_no_files_beside_it(tmp_path: Path) -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": ["red small", "large"], "label": ["a", "b"]}))
    splits.save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    part = section(tmp_path, {"path": "saved"})
    labelled = encode_labels(load_splits(part), "label", ["a", "b"])
    encoded, _ = tokenize_texts(labelled, part, tiny_tokenizer(), generates=False)
    assert encoded["train"][1]["input_ids"] == [7] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["csv", "imagefolder"])
def test_a_file_format_needs_the_location_of_its_files(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"data.data_dir or data.data_files: missing.*'{kind}'"):
        section(tmp_path, {"path": kind})


@pytest.mark.parametrize("left", [0, 30])
def test_a_picture_that_cannot_be_read_is_named(left: int, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"train": 2})
    broken = next(folder.rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:left])
    splits = load_splits(section(tmp_path, {"path": "imagefolder", "data_dir": "images"}))
    names = splits["train"].features["label"].names
    encoded, _ = prepare_images(
        encode_labels(splits, "label", names), "image", lambda images, **_: {"pixel_values": images}
    )
    with pytest.raises(DataError, match=f"the picture '.*{broken.name}' cannot be read"):
        encoded["train"][:]


def test_a_row_without_text() -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": ["red", None], "labels": [1, 0]}))
    with pytest.raises(DataError, match="split 'train'.*'text'"):
        require_column(splits, "text", Content.TEXTS)


def quick(**changes: Any) -> GraspConfig:
    return GraspConfig(initial_epochs=0, finetune_epochs=1, num_batches=2, batch_size=4, **changes)


def merged(folder: Path, data: dict[str, Any], **fields: Any) -> tuple[PreTrainedModel, Any]:
    """Merge `other` into `base` of the folder, save the result, and check that the saved model gives equal logits."""
    recipe = Recipe(
        sources=["other"],
        base_model="base",
        data=data,
        config=quick(gate=False, final_epochs=0),
        folder=folder,
        **fields,
    )
    merger, sources, task_data = prepare(recipe)
    assert task_data.collator is not None
    collate = task_data.collator

    @torch.no_grad()
    def loss(model: PreTrainedModel, samples: Any) -> Any:
        return pytest.approx(float(model.eval()(**collate(list(samples))).loss), abs=1e-6)

    held_out = task_data.validation
    start = loss(merger.model, held_out)
    (step,) = merger.merge(sources, **task_data.keywords()).steps
    assert {unit.decision for unit in step.units} == {"moved"}
    assert step.before["loss"] == start != step.after["loss"]
    assert step.after["loss"] == loss(merger.model, held_out)
    assert merger.evaluate(task_data.test, data_collator=task_data.collator)["loss"] == loss(
        merger.model, task_data.test
    )
    merger.save_pretrained(folder / "merged")
    loaded = type(merger.model).from_pretrained(folder / "merged")
    batch = collate([task_data.train[i] for i in range(3)])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, merger.model.eval()(**batch).logits)
    return merger.model, task_data


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_merge_on_images(kind: str, tmp_path: Path) -> None:
    labels = ["dog", "bird", "cat"]  # the folders are in the order bird, cat, dog
    base = tiny_model(kind, labels=labels)
    saved(base, tmp_path / "base")
    saved(perturbed(base, seed=1), tmp_path / "other")
    write_images(tmp_path / "images", {"train": 4, "validation": 2, "test": 1}, size=11)
    model, data = merged(tmp_path, {"path": "imagefolder", "data_dir": "images"})
    assert label_names(model.config) == labels
    side = 8 if kind == "vit" else 16
    sample = data.train[0]
    assert sample["pixel_values"].shape == (3, side, side) and sample["labels"] == 1
    assert -1 <= sample["pixel_values"].min() and sample["pixel_values"].max() < -0.4, "birds are dark"
    assert [data.test[i]["labels"] for i in range(3)] == [1, 2, 0]


def test_a_merge_on_texts(tmp_path: Path) -> None:
    base = tiny_model("bert")
    saved(base, tmp_path / "base")
    saved(perturbed(base, seed=1), tmp_path / "other")
    data = write_texts(tmp_path, "csv", {"train": repeated(4), "validation": repeated(2), "test": ROWS})
    model, prepared = merged(tmp_path, data)
    assert label_names(model.config) == LABELS
    assert prepared.train[1]["input_ids"] == [4, 7] and prepared.train[1]["labels"] == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("red small")["input_ids"] == [3, 6]


@pytest.mark.parametrize("task", [None, "text-generation"])
def test_a_merge_of_language_models(task: str | None, tmp_path: Path) -> None:
    base = tiny_model("gpt2")
    saved(base, tmp_path / "base")
    saved(perturbed(base, seed=1), tmp_path / "other")
    texts = {"text": ROWS["text"] * 4}
    data = write_texts(tmp_path, "json", {"train": texts, "validation": texts, "test": texts})
    model, prepared = merged(tmp_path, data, task=task)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert prepared.train.column_names == ["input_ids", "attention_mask"]


def prepared_base(folder: Path, labels: list[str], rows: dict[str, list]) -> Any:
    """Return the model that `prepare` makes from a tiny BERT with `labels` for data with `rows`."""
    saved(tiny_model("bert", labels=labels), folder / "base")
    data = write_texts(folder, "json", {"train": rows})
    recipe = Recipe(sources=["base", "other"], data=data, config=quick(), folder=folder)
    merger, sources, _ = prepare(recipe)
    assert sources == ["other"]
    return merger.model


def test_the_head_stays_where_the_names_are_the_same(tmp_path: Path) -> None:
    model = prepared_base(tmp_path, ["dog", "bird", "cat"], ROWS)
    assert torch.equal(model.get_parameter("classifier.weight"), tiny_model("bert").get_parameter("classifier.weight"))


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]])
def test_a_fresh_head_where_the_names_differ(labels: list[str], tmp_path: Path) -> None:
    model = prepared_base(tmp_path, labels, ROWS)
    old = tiny_model("bert", labels=labels)
    assert model.config.id2label == {0: "bird", 1: "cat", 2: "dog"}
    assert model.config.label2id == {"bird": 0, "cat": 1, "dog": 2}
    assert model.num_labels == 3 and model.get_parameter("classifier.weight").shape == (3, 16)
    assert not torch.equal(model.get_parameter("classifier.weight"), old.get_parameter("classifier.weight")), (
        "the head of other labels must not stay"
    )
    assert torch.equal(model.get_parameter("bert.pooler.dense.weight"), old.get_parameter("bert.pooler.dense.weight"))


@pytest.mark.parametrize("values", [[["a"], ["a", "b"]], [{"x": 1}, {"x": 2}]])
def test_several_labels_per_row(values: list) -> None:
    with pytest.raises(DataError, match="column 'label' holds .* values; expected one class per row"):
        find_label_names(Dataset.from_dict({"label": values}), "label")


def test_texts_that_are_numbers() -> None:
    with pytest.raises(DataError, match=r"column 'text' of split 'train' holds Value.*; expected texts"):
        require_column(DatasetDict(train=Dataset.from_dict({"text": [1, 2]})), "text", Content.TEXTS)


def test_splits_that_are_not_used_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict(ROWS)
    DatasetDict(train=rows, dev=rows).save_to_disk(str(tmp_path / "data"))
    assert list(load_splits(DataSection(path=str(tmp_path / "data")))) == ["train"]
    assert (
        "the splits ['dev'] are not used; evaluation data is read from splits named 'validation' and 'test'"
        in caplog.text
    )


def test_a_class_id_that_only_the_test_split_holds(tmp_path: Path) -> None:
    texts = ROWS["text"][:2]
    splits: dict[str, dict[str, list]] = {
        name: {"text": texts, "label": [0, last]} for name, last in {"train": 1, "test": 2}.items()
    }
    saved(tiny_model("bert"), tmp_path / "base")
    merger, _, _ = prepare(Recipe(sources=["base"], data=write_texts(tmp_path, "csv", splits), folder=tmp_path))
    assert label_names(merger.model.config) == LABELS


def test_class_ids_need_enough_outputs(tmp_path: Path) -> None:
    model = prepared_base(tmp_path, LABELS, {"text": ROWS["text"], "label": [0, 1, 3]})
    assert label_names(model.config) == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]


def test_class_ids_begin_at_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ids from 1 are refused, because each would mean another class; ids without a rare first class are accepted."""
    for folder, last in ((tmp_path / "a", 3), (tmp_path / "b", 2)):
        rows: dict[str, list] = {"text": ROWS["text"], "label": [1, 2, last]}
        if last == 3:
            with pytest.raises(
                DataError, match="column 'label' holds class ids up to 3 but no 0; expected ids from 0"
            ):
                prepared_base(folder, LABELS, rows)
        else:
            assert label_names(prepared_base(folder, LABELS, rows).config) == LABELS and not caplog.text
    prepared_base(tmp_path / "c", LABELS, {"text": ROWS["text"], "label": [0, 1, 1]})
    assert "gets a new head" in caplog.text and "those of the data are LABEL_0, LABEL_1" in caplog.text


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2"])
def test_a_base_without_tokenizer_or_processor(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "base")
    data = write_texts(tmp_path, "csv", {"train": ROWS})
    recipe = Recipe(sources=["base"], data=data, folder=tmp_path)
    with pytest.raises(
        DataError,
        match="base' holds no tokenizer or image processor, .* cannot be prepared without one; add its files",
    ):
        prepare(recipe)


def test_a_column_of_texts_that_is_not_there(tmp_path: Path) -> None:
    saved(tiny_model("bert"), tmp_path / "base")
    data = write_texts(tmp_path, "csv", {"train": ROWS}) | {"text": "sentence"}
    with pytest.raises(DataError, match="split 'train' has no column 'sentence' for texts; found text, label"):
        prepare(Recipe(sources=["base"], data=data, folder=tmp_path))


def test_a_column_of_images_that_is_not_there(tmp_path: Path) -> None:
    saved(tiny_model("vit"), tmp_path / "base")
    write_images(tmp_path / "images", {"train": 1})
    data = {"path": "imagefolder", "data_dir": "images", "image": "picture"}
    with pytest.raises(DataError, match="split 'train' has no column 'picture' for images; found image, label"):
        prepare(Recipe(sources=["base"], data=data, folder=tmp_path))
    with pytest.raises(DataError, match="no column 'animal' for labels; found image, label"):
        prepare(Recipe(sources=["base"], data={**data, "label": "animal"}, folder=tmp_path))


def test_texts_for_a_model_of_images(tmp_path: Path) -> None:
    saved(tiny_model("vit"), tmp_path / "base")
    data = write_texts(tmp_path, "csv", {"train": ROWS})
    with pytest.raises(DataError, match="split 'train' has no column 'image' for images; found text, label"):
        prepare(Recipe(sources=["base"], data=data, folder=tmp_path))


def test_a_value_column_of_another_type_is_not_taken_for_labels() -> None:
    split = Dataset.from_dict({"label": [1.5]}, features=Features({"label": Value("float32")}))
    with pytest.raises(DataError, match=r"column 'label' holds \[1.5\]; expected class names or class ids from 0"):
        find_label_names(split, "label")


def test_no_secret_of_a_url_is_recorded() -> None:
    url = "https://me:word@host/data.csv?download=1&sig=abc&X-Amz-Security-Token=xyz#part"
    assert without_secrets({"data_files": {"train": [url, "here.csv"]}, "max_length": 3}) == {
        "data_files": {"train": ["https://host/data.csv?download=1#part", "here.csv"]},
        "max_length": 3,
    }


def test_a_secret_in_a_url_is_neither_in_the_record_nor_in_the_card(tmp_path: Path) -> None:
    write_texts(tmp_path, "csv", {"train": repeated(4)})
    (tmp_path / "train.csv").rename(tmp_path / "train.csv?sig=abc")
    saved(tiny_model("bert"), tmp_path / "base")
    data = {"path": "csv", "data_files": {"train": f"file://{tmp_path}/train.csv?sig=abc"}}
    merger, _, _ = prepare(Recipe(sources=["base"], data=data, folder=tmp_path))
    merger.save_pretrained(tmp_path / "merged")
    for name in ("README.md", "grasp_config.yaml", "grasp_report.json"):
        assert "sig=abc" not in (tmp_path / "merged" / name).read_text(), name
    assert "/train.csv" in (tmp_path / "merged" / "grasp_config.yaml").read_text()


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("zip://x.csv::https://user:pw@host/f.zip", "zip://x.csv::https://host/f.zip"),
        ("https://host/f.csv#access_token=abc&page=2", "https://host/f.csv#page=2"),
        ("hf://datasets/org/name@main/f.csv", "hf://datasets/org/name@main/f.csv"),
    ],
)
def test_secrets_in_addresses_that_are_chained_or_end_in_a_fragment(url: str, public: str) -> None:
    assert without_secrets(url) == public


@pytest.mark.parametrize("key", ["name", "revision", "data_files", "data_dir"])
def test_a_key_that_has_no_meaning_for_a_saved_data_set(key: str, tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_dict({"text": ["a"], "label": [0]})).save_to_disk(tmp_path / "saved")
    section = DataSection(path=str(tmp_path / "saved"))
    assert len(load_splits(section)["train"]) == 1
    with pytest.raises(DataError, match=f"save_to_disk wrote it, and data.{key} has no meaning then; remove this key"):
        load_splits(DataSection(**cast(Any, {"path": section.path, key: "x"})))


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_fingerprint_includes_the_labels_of_either_column(column: str) -> None:
    fingerprints = [
        fingerprint(Dataset.from_dict({"text": ["a", "b"], column: labels})) for labels in ([0, 1], [1, 0])
    ]
    assert fingerprints[0] != fingerprints[1]
    assert fingerprints[0] == fingerprint(Dataset.from_dict({"text": ["a", "b"], column: [0, 1]}))
