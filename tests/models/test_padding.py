"""Padding: one token for model, tokenizer and saved files, and no influence on any prediction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from grasp_hf import GraspConfig, GraspMerger, Recipe
from grasp_hf.data.section import DataSection
from grasp_hf.data.tasks import LanguageModelCollator, tokenize_texts
from grasp_hf.errors import DataError, IncompatibleSourceError
from grasp_hf.models.padding import check_padding, max_tokens, unify_padding_
from grasp_hf.runs.plan import plan
from grasp_hf.runs.prepare import prepare
from tests.support.models import NO_TUNING, WORDS

SPECIAL = ("[BOS]", "[PAD]", "[EOS]", "[UNK]")
TEXTS = ["red", "green blue small", "large red", "blue green red small large red", "small", "green green"]
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "d_inner", "hidden_dim", "ffn_dim"), 32),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 16),
    "head_dim": 8,
    "d_kv": 8,
    "vocab_size": 12,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def tokenizer(pad: str | None = "[PAD]", **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that ends each text with [EOS]; without `pad` it has no padding token."""
    found = Tokenizer(models.WordLevel({word: row for row, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    found.post_processor = processors.TemplateProcessing("$A [EOS]", None, [("[EOS]", 2)])
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"} | ({"pad_token": pad} if pad else {})
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=found, model_input_names=inputs, **names | options)


def model_of(kind: str, auto: Any = AutoModelForSequenceClassification, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    labels = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    sizes = {name: size for name, size in SIZES.items() if "position" not in name or kind not in ("xlnet", "t5")}
    model = auto.from_config(AutoConfig.for_model(kind, **sizes | {"pad_token_id": 1} | labels | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


# Model, padding token of its config and of its tokenizer, and side of the padding.
FAMILIES = {
    "bert": ("bert", 1, "[PAD]", "right"),
    "roberta": ("roberta", 1, "[PAD]", "right"),
    "mpnet": ("mpnet", 1, "[PAD]", "right"),
    "distilbert": ("distilbert", 1, "[PAD]", "right"),
    "deberta": ("deberta-v2", 1, "[PAD]", "right"),
    "xlnet": ("xlnet", 1, "[PAD]", "left"),
    "bart": ("bart", 1, "[PAD]", "right"),
    "t5": ("t5", 1, "[PAD]", "right"),
    "gpt2 without a token": ("gpt2", None, None, "right"),
    "llama without a token": ("llama", None, None, "left"),
    "llama without a token in the tokenizer": ("llama", 3, None, "right"),
    "llama with a token that its tokenizer does not know": ("llama", 11, "[PAD]", "right"),
    "llama with two tokens": ("llama", 3, "[PAD]", "right"),
    "opt with a word for padding": ("opt", 4, "[PAD]", "right"),
    "bloom": ("bloom", 1, "[PAD]", "left"),
    "qwen3": ("qwen3", None, "[PAD]", "left"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_sees_alone_and_in_batches_what_the_merge_has_seen(family: str, tmp_path: Path) -> None:
    kind, own, pad, side = FAMILIES[family]
    model_of(kind, pad_token_id=own).save_pretrained(tmp_path / "base")
    tokenizer(pad, padding_side=side).save_pretrained(tmp_path / "base")
    rows = {"text": TEXTS, "label": [0, 1] * 3}
    Dataset.from_dict(rows).to_csv(tmp_path / "train.csv")
    config = GraspConfig(method="average", **NO_TUNING | {"final_epochs": 1}, gate=False, batch_size=6)
    data = {"path": "csv", "data_files": "train.csv"}
    recipe = Recipe(sources=["base", "base"], data=data, config=config, task="text-classification", folder=tmp_path)
    merger, sources, samples = prepare(recipe)
    merger.merge([str(tmp_path / source) for source in sources], **samples.keywords())
    merger.save_pretrained(tmp_path / "merged")

    assert samples.collator is not None
    names = {"input_ids", "attention_mask"}
    batch = samples.collator([{key: row[key] for key in names} for row in samples.train])
    with torch.no_grad():
        seen = merger.model.eval()(**batch).logits
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    token = AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id
    assert loaded.config.pad_token_id == token is not None
    assert token < 12
    run: Any = pipeline("text-classification", str(tmp_path / "merged"), top_k=None, function_to_apply="none")
    for size in (1, 2):
        for scores, expected in zip(run(TEXTS, batch_size=size), seen, strict=True):
            found = torch.tensor(
                [{score["label"]: score["score"] for score in scores}[name] for name in ("neg", "pos")]
            )
            assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("own", "pad", "options", "expected"),
    [
        (1, "[PAD]", {}, 1),
        (None, "[PAD]", {}, 1),
        (3, "[PAD]", {}, 3),  # a model computes with the token of its config
        (2, "[PAD]", {}, 2),
        (0, "[PAD]", {}, 1),  # the start of a text is no padding
        (5, "[PAD]", {}, 1),  # neither is a word
        (99, "[PAD]", {}, 1),
        (3, None, {}, 3),
        (None, None, {}, 2),
        (None, None, {"eos_token": None}, None),
        (None, "[NEW]", {}, 2),  # a token that was added after the model was trained has no embedding
    ],
)
def test_the_token_of_config_and_tokenizer(
    own: int | None, pad: str | None, options: Any, expected: int | None
) -> None:
    model = model_of("llama", AutoModelForCausalLM, pad_token_id=None, vocab_size=9)
    model.config.pad_token_id = own
    used = tokenizer(pad, **options)
    unify_padding_(model, used)
    assert used.pad_token_id == expected
    assert model.config.pad_token_id == (own if expected is None else expected)
    if expected is not None:
        assert model.generation_config is not None and model.generation_config.pad_token_id == expected


def test_a_model_that_generates_other_tokens_than_it_reads_keeps_their_padding() -> None:
    model = model_of("gpt2", AutoModelForCausalLM, pad_token_id=None)
    assert model.generation_config is not None
    model.generation_config.pad_token_id = 11
    unify_padding_(model, tokenizer())
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (1, 11)


def test_a_language_model_without_a_token_runs_in_batches_after_a_merge_without_data(tmp_path: Path) -> None:
    model = model_of("gpt2", AutoModelForCausalLM, pad_token_id=None)
    model.save_pretrained(tmp_path / "base")
    tokenizer(None, padding_side="left").save_pretrained(tmp_path / "base")
    merger = GraspMerger.from_pretrained(str(tmp_path / "base"), config=GraspConfig(method="average", **NO_TUNING))
    merger.merge([str(tmp_path / "base")])
    merger.save_pretrained(tmp_path / "merged")
    run = pipeline("text-generation", str(tmp_path / "merged"))
    texts = [run(TEXTS[:4], batch_size=size, max_new_tokens=3, do_sample=False) for size in (1, 2)]
    assert len(texts[0]) == 4 and texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "camembert", "esm"])
def test_a_model_whose_positions_begin_after_the_padding_token_keeps_it(kind: str) -> None:
    model = model_of(kind, position_embedding_type="absolute")
    used = tokenizer("[UNK]", additional_special_tokens=["[PAD]"])
    unify_padding_(model, used)
    assert (used.pad_token, used.pad_token_id, model.config.pad_token_id) == ("[PAD]", 1, 1)
    with pytest.raises(
        IncompatibleSourceError, match=f"'{type(model).__name__}': the padding token of its config has t"
    ):
        unify_padding_(model, tokenizer("[UNK]"))


def test_positions_that_another_padding_token_would_move_are_refused(tmp_path: Path) -> None:
    model_of("roberta", pad_token_id=4).save_pretrained(tmp_path)  # 4 is a word of the tokenizer
    tokenizer().save_pretrained(tmp_path)
    message = (
        rf"^'{tmp_path}': the padding token of its config has the id 4, and that of its tokenizer, '\[PAD\]', has"
    )
    with pytest.raises(IncompatibleSourceError, match=message):
        GraspMerger.from_pretrained(str(tmp_path))
    base, _ = plan(Recipe(base_model=str(tmp_path), sources=[str(tmp_path)], config=GraspConfig(method="average")))
    assert len(base.problems) == 1
    assert base.problems[0].startswith("the padding token of its config has the id 4")


@pytest.mark.parametrize(
    ("kind", "limit"), [("roberta", 14), ("mpnet", 14), ("bert", 16), ("gpt2", 16), ("t5", None), ("xlnet", None)]
)
def test_texts_are_cut_at_the_last_position(kind: str, limit: int | None) -> None:
    model, used = model_of(kind), tokenizer()
    assert max_tokens(model) == limit
    splits = DatasetDict(train=Dataset.from_dict({"text": ["red " * 40], "labels": [0]}))
    cut, collator = tokenize_texts(splits, DataSection(path="x"), used, generates=False, positions=max_tokens(model))
    assert len(cut["train"][0]["input_ids"]) == (limit or 41)
    model(**collator([cut["train"][0]]))


def batch_of(texts: list[str], used: Any) -> dict[str, Any]:
    return dict(used(texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize(
    ("kind", "auto", "side", "same"),
    [
        ("gpt2", AutoModelForSequenceClassification, "right", True),
        ("gpt2", AutoModelForSequenceClassification, "left", False),
        ("gpt2", AutoModelForCausalLM, "left", False),
        ("llama", AutoModelForCausalLM, "left", True),
        ("xlnet", AutoModelForSequenceClassification, "left", True),
        ("xlnet", AutoModelForSequenceClassification, "right", False),
        ("fnet", AutoModelForSequenceClassification, "right", False),
    ],
)
def test_padding_that_changes_predictions_is_refused(kind: str, auto: Any, side: str, same: bool) -> None:
    model, used = model_of(kind, auto), tokenizer(padding_side=side)
    batch = batch_of(TEXTS, used)
    alone = model(**batch_of(TEXTS[:1], used)).logits[0]
    together = model(**batch).logits[0]
    length = len(alone)
    if auto is AutoModelForCausalLM:
        together = together[-length:] if side == "left" else together[:length]
    assert torch.allclose(alone, together, atol=1e-5) == same
    if same:
        check_padding(model, batch)
    else:
        with pytest.raises(
            DataError, match=f"padding changes what the {type(model).__name__} predicts: its logits for a"
        ):
            check_padding(model, batch)
    check_padding(model, batch_of(TEXTS[:1], used))


def test_the_card_shows_a_pipeline_that_cuts_long_texts_where_the_merge_cut_them(tmp_path: Path) -> None:
    model_of("roberta").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    texts = ["red green " * 20, "small", "large blue " * 3]
    Dataset.from_dict({"text": texts, "label": [0, 1, 0]}).to_csv(tmp_path / "train.csv")
    for length in (128, 6):
        data = {"path": "csv", "data_files": "train.csv", "max_length": length}
        config = GraspConfig(method="average", **NO_TUNING)
        recipe = Recipe(sources=["base"], data=data, config=config, task="text-classification", folder=tmp_path)
        merger, _, samples = prepare(recipe)
        merger.save_pretrained(tmp_path / "merged")
        card = (tmp_path / "merged" / "README.md").read_text()
        call = f'pipeline("text-classification", model="merged", truncation=True, max_length={min(length, 14)})'
        assert call in card
        assert samples.collator is not None
        batch = samples.collator([{"input_ids": row["input_ids"]} for row in samples.train])
        with torch.no_grad():
            seen = merger.model.eval()(**batch).logits
        options: dict[str, Any] = {"truncation": True, "max_length": min(length, 14)}
        run: Any = pipeline(
            "text-classification", str(tmp_path / "merged"), top_k=None, function_to_apply="none", **options
        )
        for scores, expected in zip(run(texts, batch_size=2), seen, strict=True):
            found = {score["label"]: score["score"] for score in scores}
            assert torch.allclose(torch.tensor([found["neg"], found["pos"]]), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "same"), [("bert", False), ("roberta", False), ("gpt2", True), ("llama", True)])
def test_padding_without_a_mask(kind: str, same: bool) -> None:
    """A model that looks to the right sees it; a single token at the end may belong to the text."""
    model, used = model_of(kind), tokenizer()
    ids = batch_of(TEXTS, used)["input_ids"]
    if same:
        check_padding(model, {"input_ids": ids})
    else:
        with pytest.raises(DataError, match="padding changes what .*, give an attention_mask, or set batch_size to 1"):
            check_padding(model, {"input_ids": ids})
    check_padding(model, {"input_ids": torch.tensor([[4, 5, 1], [4, 1, 1], [4, 5, 6]])})


def test_a_merge_begins_with_the_check(tmp_path: Path) -> None:
    model_of("gpt2").save_pretrained(tmp_path)
    used = tokenizer(padding_side="left")
    used.save_pretrained(tmp_path)
    rows = [dict(used(text)) | {"labels": 0} for text in TEXTS]
    for size in (6, 1):
        config = GraspConfig(method="average", **NO_TUNING | {"final_epochs": 1}, batch_size=size, gate=False)
        merger = GraspMerger.from_pretrained(str(tmp_path), config=config)
        data = Dataset.from_list(rows)
        if size == 1:
            merger.merge([str(tmp_path)], train_dataset=data)
            continue
        with pytest.raises(DataError, match="train_dataset: padding changes what .*, or set batch_size to 1"):
            merger.merge([str(tmp_path)], train_dataset=data)


def without_end(used: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    used.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", None, [])
    return used


@pytest.mark.parametrize("make", [tokenizer, lambda: without_end(tokenizer())])
def test_an_empty_text(make: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    """A text without any token is left out, as no pipeline takes it; one with an end of the text stays."""
    used = make()
    number = len(used("")["input_ids"])
    splits = DatasetDict(train=Dataset.from_dict({"text": ["red", "", "  "], "labels": [0, 1, 1]}))
    kept, collator = tokenize_texts(splits, DataSection(path="x"), used, generates=False)
    assert kept["train"]["labels"][:] == [0, 1, 1][: 3 if number else 1]
    assert ("split 'train': 2 texts of fewer than one token are left out" in caplog.text) == (number == 0)
    model_of("bert")(**collator([kept["train"][len(kept["train"]) - 1]]))
    if number == 0:
        empty = DatasetDict(train=Dataset.from_dict({"text": [""], "labels": [0]}))
        with pytest.raises(DataError, match="split 'train' has no text of one token or more"):
            tokenize_texts(empty, DataSection(path="x"), used, generates=False)


def test_empty_texts_of_a_prepared_data_set_are_named(tmp_path: Path) -> None:
    model = model_of("bert")
    used = without_end(tokenizer())
    rows = [dict(used(text)) | {"labels": 0} for text in ("", "red green")]
    merger = GraspMerger(model, GraspConfig(method="average", batch_size=2, **NO_TUNING), processing_class=used)
    model_of("bert").save_pretrained(tmp_path)
    used.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="train_dataset: a text has no tokens; remove empty texts"):
        merger.merge([str(tmp_path)], train_dataset=Dataset.from_list(rows))


def test_a_tokenizer_without_any_token_for_padding_is_named() -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": ["red"], "labels": [0]}))
    with pytest.raises(
        DataError, match="has neither a padding token nor a token for the end of a text, so no batch can"
    ):
        tokenize_texts(splits, DataSection(path="x"), tokenizer(None, eos_token=None), generates=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_language_model_learns_the_end_of_a_text_also_if_it_is_the_padding(side: str) -> None:
    used = tokenizer("[EOS]", padding_side=side)
    batch = LanguageModelCollator(used)([used("red"), used("red red")])
    assert batch["input_ids"].tolist() == [[4, 2, 2], [4, 4, 2]]
    assert batch["labels"].tolist() == [[4, 2, -100], [4, 4, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
