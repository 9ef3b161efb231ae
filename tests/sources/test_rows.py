"""The rows of heads and vocabularies are matched by their names, not by their numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2ForCTC,
)

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.sources.rows import class_tensors, label_names, match_labels, match_rows, token_tensors
from grasp_hf.tensors.units import head_tensors, movable_tensors
from tests.support.models import LABELS, NO_TUNING, perturbed, saved, saved_adapter, tiny_data, tiny_model

STILL: dict[str, Any] = {**NO_TUNING, "gate": False, "batch_size": 8, "num_batches": 2}
COPY_ALL: dict[str, Any] = {**STILL, "method": "copy", "threshold": -1.0}
METHODS: list[dict[str, Any]] = [COPY_ALL, {**STILL, "method": "average"}]


def merged(base: str, source: str, kind: str, config: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
    """Merge one source into `base`; return the tensors and the step."""
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**config), **kwargs)
    data = words_data() if kind == "bert" else tiny_data(kind, 16)
    step = merger.merge([source], train_dataset=data).steps[0]
    return movable_tensors(merger.model), step


def test_names_are_matched_and_ambiguous_ones_are_not() -> None:
    match = match_labels(["a", "b", "c"], ["c", "x", "a"])
    assert (list(match.target), list(match.source)) == ([0, 2], [2, 0]) and not match.is_identity
    assert match_labels(["a", "b"], ["a", "b"]).is_identity
    assert match_labels(["a", "a"], ["a", "a"]).is_identity
    assert list(match_labels(["a", "b"], ["b", "a", "a"]).target) == [1]
    assert not match_labels(["a", "b"], ["a", "b", "c"]).is_identity
    # A token whose id is above the last row of a tensor has no match.
    assert list(match_rows({"x": 0, "y": 5}, {"y": 1, "x": 2}, (3, 3)).target) == [0]


def test_filling_keeps_the_rows_without_counterpart() -> None:
    target, source, out = torch.zeros(3, 2), torch.arange(6.0).view(3, 2), torch.empty(3, 2)
    match_labels(["a", "b", "c"], ["c", "x", "a"]).fill_(out, target, source)
    assert out.tolist() == [[4, 5], [0, 0], [0, 1]]


@pytest.mark.parametrize("config", METHODS, ids=["copy", "average"])
@pytest.mark.parametrize("kind", ["vit", "bert", "resnet"])
def test_classes_in_another_order_are_permuted(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    base = saved(tiny_model(kind), tmp_path / "base")
    fine = perturbed(tiny_model(kind, labels=["dog", "bird", "cat"]), 1)
    source = saved(fine, tmp_path / "source")
    tensors, step = merged(base, source, kind, config)
    head = "classifier.1" if kind == "resnet" else "classifier"
    for part in ("weight", "bias"):
        assert torch.equal(tensors[f"{head}.{part}"], fine.get_parameter(f"{head}.{part}")[[1, 2, 0]])
    assert step.notes == ["head: classes matched by name, 3 of 3: got dog, bird, cat, expected bird, cat, dog"]
    assert step.other_units == 0


def test_a_permuted_head_measures_like_its_twin_in_order(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    fine = perturbed(tiny_model("vit"), 1)
    in_order = saved(fine, tmp_path / "in-order")
    other: Any = tiny_model("vit", labels=["dog", "bird", "cat"])
    other.load_state_dict(fine.state_dict())
    with torch.no_grad():
        for parameter in other.classifier.parameters():
            parameter.copy_(parameter[[2, 0, 1]])
    permuted = saved(other, tmp_path / "permuted")
    for method in ("blend", "copy"):
        config = {**STILL, "method": method}
        (first, one), (second, two) = (merged(base, source, "vit", config) for source in (in_order, permuted))
        assert [unit.score for unit in one.units] == pytest.approx([unit.score for unit in two.units])
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("config", [*METHODS, {**STILL, "method": "blend"}], ids=["copy", "average", "blend"])
def test_of_partly_shared_classes_only_the_shared_rows_move(config: dict[str, Any], tmp_path: Path) -> None:
    base = saved(tiny_model("bert"), tmp_path / "base")
    fine = perturbed(tiny_model("bert", labels=["cow", "dog", "bird", "ant", "bee"]), 1)
    tensors, step = merged(base, saved(fine, tmp_path / "source"), "bert", config)
    before = tiny_model("bert")
    assert "only shared classes move, 2 of 3" in step.notes[0]
    for part in ("weight", "bias"):
        now, was, theirs = (
            rows[f"classifier.{part}"]
            for rows in (tensors, dict(before.named_parameters()), dict(fine.named_parameters()))
        )
        torch.testing.assert_close(now[1], was[1], atol=1e-7, rtol=1e-6)  # a blend of equal rows is rounded
        if config["method"] == "blend":
            take = {unit.name: unit.coefficient for unit in step.units}["classifier"]
            torch.testing.assert_close(now[[0, 2]], torch.lerp(was[[0, 2]], theirs[[2, 1]], take))
        else:
            assert torch.equal(now[1], was[1])
            assert torch.equal(now[[0, 2]], theirs[[2, 1]])


def test_the_low_rank_update_of_a_head_is_permuted(tmp_path: Path) -> None:
    base = saved(tiny_model("vit", labels=["dog", "bird", "cat"]), tmp_path / "base")
    adapter = saved_adapter(
        tiny_model("vit", labels=["dog", "bird", "cat"]), base, tmp_path / "adapter", target_modules=["classifier"]
    )
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    tensors, step = merged(base, adapter, "vit", {**STILL, "method": "average"}, new_head=True, **names)
    plain, _ = merged(base, adapter, "vit", {**STILL, "method": "average"})
    assert torch.equal(tensors["classifier.weight"], plain["classifier.weight"][[1, 2, 0]])
    assert "classes matched by name, 3 of 3" in step.notes[0]


SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
}


def test_the_tensors_with_a_row_per_class() -> None:
    def found(model: PreTrainedModel) -> set[str] | None:
        tensors = movable_tensors(model)
        return class_tensors({name: tensors[name] for name in head_tensors(model)}, len(label_names(model.config)))

    assert found(tiny_model("bert")) == {"classifier.weight", "classifier.bias"}
    names: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {}}
    roberta = RobertaForSequenceClassification(RobertaConfig(**SMALL, **names))
    assert found(roberta) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    wide: dict[str, Any] = {
        "id2label": {index: str(index) for index in range(16)}
    }  # as many as the layer before is wide
    assert found(RobertaForSequenceClassification(RobertaConfig(**SMALL, **wide))) is None
    assert found(tiny_model("gpt2")) is None


def test_a_head_whose_class_rows_cannot_be_told_stays(tmp_path: Path) -> None:
    labels = [str(index) for index in range(16)]

    def roberta(names: list[str]) -> RobertaForSequenceClassification:
        torch.manual_seed(0)
        return RobertaForSequenceClassification(RobertaConfig(**SMALL, id2label=dict(enumerate(names))))

    base = saved(roberta(labels), tmp_path / "base")
    source = saved(perturbed(roberta(labels[::-1]), 1), tmp_path / "source")
    tensors, step = merged(base, source, "bert", COPY_ALL)
    assert step.notes[0].startswith("head stays: its rows cannot be assigned to classes: got 15, 14, ")
    for name, value in roberta(labels).named_parameters():
        assert torch.equal(tensors[name], value) == name.startswith("classifier"), name


def test_a_head_of_two_layers_moves_whole_and_only_its_last_is_permuted(tmp_path: Path) -> None:
    def distilbert(names: list[str]) -> DistilBertForSequenceClassification:
        torch.manual_seed(0)
        config = DistilBertConfig(
            vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32, id2label=dict(enumerate(names))
        )
        return DistilBertForSequenceClassification(config)

    base = saved(distilbert(LABELS), tmp_path / "base")
    fine: Any = perturbed(distilbert(LABELS[::-1]), 1)
    tensors, _ = merged(base, saved(fine, tmp_path / "source"), "bert", COPY_ALL)
    assert torch.equal(tensors["pre_classifier.weight"], fine.pre_classifier.weight)
    assert torch.equal(tensors["classifier.weight"], fine.classifier.weight.flip(0))


WORDS = ("[PAD]", "[UNK]", "[EOS]", "red", "green", "blue", "small", "large")


def tokenizer(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


def text_model(folder: Path, words: tuple[str, ...], seed: int, rows: int | None = None, cls: Any = None) -> str:
    """Write a small BERT whose embeddings have a row per word, with its tokenizer."""
    torch.manual_seed(seed)
    config = {**SMALL, "vocab_size": rows or len(words), "id2label": dict(enumerate(LABELS)), "label2id": {}}
    (cls or BertForSequenceClassification)(BertConfig(**config)).save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return str(folder)


def words_data() -> Any:
    return tiny_data("bert", 16).map(lambda sample: {"input_ids": sample["input_ids"] % len(WORDS)})


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForMaskedLM])
@pytest.mark.parametrize("config", METHODS, ids=["copy", "average"])
def test_tokens_are_matched_by_their_strings(config: dict[str, Any], cls: Any, tmp_path: Path) -> None:
    base = text_model(tmp_path / "base", WORDS, seed=0, cls=cls)
    theirs = ("[PAD]", "huge", "[UNK]", "blue", "[EOS]", "green", "red", "tiny", "pale", "small")
    source = text_model(tmp_path / "source", theirs, seed=1, cls=cls)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**config))
    data = (
        words_data()
        if cls is BertForSequenceClassification
        else words_data().map(lambda s: {"labels": s["input_ids"]})
    )
    step = merger.merge([source], train_dataset=data).steps[0]
    assert step.notes == ["vocabulary: 7 of 8 tokens matched by their strings"]
    fine, before = (dict(cls.from_pretrained(folder).named_parameters()) for folder in (source, base))
    now = dict(merger.model.named_parameters())
    names = token_tensors(merger.model)
    assert names == {name for name in now if "word_embeddings" in name or name == "cls.predictions.bias"}
    for name in names:
        for row, word in enumerate(WORDS):
            expected = fine[name][theirs.index(word)] if word in theirs else before[name][row]
            assert torch.equal(now[name][row], expected), (name, word)
    assert torch.equal(
        now["bert.embeddings.position_embeddings.weight"], fine["bert.embeddings.position_embeddings.weight"]
    )


def test_tokens_of_the_same_number_in_another_order_never_move_by_index(tmp_path: Path) -> None:
    base = text_model(tmp_path / "base", WORDS, seed=0)
    source = text_model(tmp_path / "source", (*WORDS[:3], *WORDS[:2:-1]), seed=1)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**COPY_ALL))
    step = merger.merge([source], train_dataset=words_data()).steps[0]
    fine: Any = BertForSequenceClassification.from_pretrained(source)
    rows = fine.bert.embeddings.word_embeddings.weight
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(merger.model.get_parameter(name), rows[[0, 1, 2, 7, 6, 5, 4, 3]])
    assert step.notes == ["vocabulary: 8 of 8 tokens matched by their strings"]


def test_rows_of_padding_stay(tmp_path: Path) -> None:
    base = text_model(tmp_path / "base", WORDS, seed=0, rows=16)
    source = text_model(tmp_path / "source", WORDS, seed=1)
    tensors, _ = merged(base, source, "bert", {**STILL, "method": "average"})
    name = "bert.embeddings.word_embeddings.weight"
    before, fine = (
        dict(BertForSequenceClassification.from_pretrained(f).named_parameters())[name] for f in (base, source)
    )
    assert torch.equal(tensors[name], torch.cat([fine, before[8:]]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, "it holds no tokenizer, .* same_tokenizer: true"),
        (("rot", "blau"), "shares no token with the"),
        ("FutureModel", r"its tokenizer \(tokenizer.json, tokenizer_config.json\) cannot be read: .*newer version"),
    ],
)
def test_a_vocabulary_that_cannot_be_compared_is_refused(words: Any, message: str, tmp_path: Path) -> None:
    base = text_model(tmp_path / "base", WORDS, seed=0)
    source = Path(text_model(tmp_path / "source", WORDS, seed=1))
    if words == "FutureModel":
        text = (source / "tokenizer.json").read_text()
        (source / "tokenizer.json").write_text(text.replace('"WordLevel"', '"FutureModel"'))
    else:
        for path in source.glob("tokenizer*"):
            path.unlink()
    if isinstance(words, tuple):
        only = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}))
        PreTrainedTokenizerFast(tokenizer_object=only).save_pretrained(source)
    with pytest.raises(IncompatibleSourceError, match=f"'{source}' cannot be merged:\n- .*{message}"):
        merged(base, str(source), "bert", COPY_ALL)


def test_a_target_without_a_tokenizer_needs_none_in_the_source(tmp_path: Path) -> None:
    source = Path(text_model(tmp_path / "source", WORDS, seed=1))
    for path in source.glob("tokenizer*"):
        path.unlink()
    config = BertConfig(**{**SMALL, "vocab_size": len(WORDS)}, id2label=dict(enumerate(LABELS)))
    merger = GraspMerger(BertForSequenceClassification(config), GraspConfig(**COPY_ALL))
    step = merger.merge([str(source)], train_dataset=words_data()).steps[0]
    name = "bert.embeddings.word_embeddings.weight"
    fine: Any = BertForSequenceClassification.from_pretrained(source)
    assert torch.equal(merger.model.get_parameter(name), fine.get_parameter(name))
    assert step.notes == ["vocabulary: tokens matched by their numbers, because the target's tokenizer is unknown"]


def test_classes_without_names_are_matched_by_their_numbers_and_the_report_says_so(tmp_path: Path) -> None:
    labels = [f"LABEL_{number}" for number in range(3)]
    source = saved(tiny_model("vit", seed=1, labels=labels), tmp_path / "source")
    merger = GraspMerger(tiny_model("vit", labels=labels), GraspConfig(method="average", **NO_TUNING))
    assert merger.merge([source]).steps[0].notes == [
        "head: classes matched by their numbers, because they have no names"
    ]


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = Path(text_model(tmp_path / "base", WORDS, seed=0))
    for path in base.glob("tokenizer*"):
        path.write_text("{")
    merger = GraspMerger.from_pretrained(str(base))
    assert merger.processing_class is None
    assert f"'{base}': its tokenizer (tokenizer.json, tokenizer_config.json) cannot be read: " in caplog.text


def test_the_tokens_of_a_speech_model_are_matched_by_their_strings(tmp_path: Path) -> None:
    """Every fine-tuned CTC model has its own vocabulary, and its head has no label names."""
    convolutions: dict[str, Any] = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
    convolutions |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
    sizes = {key: value for key, value in SMALL.items() if key not in ("vocab_size", "max_position_embeddings")}
    models: list[PreTrainedModel] = []
    for name, letters in (("base", "abcdef"), ("source", "fedcba")):
        torch.manual_seed(len(models))
        models.append(Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=8, **convolutions, **sizes)))
        models[-1].save_pretrained(tmp_path / name)
        words = {token: row for row, token in enumerate(("<pad>", "<unk>", *letters))}
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path / name)
    settings = GraspConfig(method="average", **NO_TUNING)
    merger = GraspMerger.from_pretrained(str(tmp_path / "base"), config=settings)
    step = merger.merge([str(tmp_path / "source")]).steps[0]
    head, theirs = (model.get_parameter("lm_head.weight") for model in (merger.model, models[1]))
    assert torch.equal(head[:8], theirs[[0, 1, 7, 6, 5, 4, 3, 2]])
    assert "tokens matched by their strings" in step.notes[0]
