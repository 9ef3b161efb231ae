"""A saved and a pushed merge is a whole repository: modules, templates, processors and code stay beside the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
)

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.hub.download import locate
from tests.support.hub.server import HubServer
from tests.support.models import NO_TUNING, saved, tiny_model, tiny_tokenizer

MEAN = GraspConfig(method="average", **NO_TUNING)
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
PROMPTS = {"prompts": {"query": "query: "}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
SENTENCE_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
)


def sentence_model(folder: Path, seed: int, pooling: str = "mean") -> str:
    """Write a model as sentence-transformers writes it, and return its folder."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, num_hidden_layers=1, max_position_embeddings=16, **size)).save_pretrained(
        folder
    )
    tiny_tokenizer().save_pretrained(folder)
    pooling_config: dict[str, Any] = {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
    }
    dense: dict[str, Any] = {
        "in_features": 16,
        "out_features": 4,
        "bias": False,
        "activation_function": "torch.nn.Identity",
    }
    files: dict[str, Any] = dict(
        zip(
            SENTENCE_FILES,
            (MODULES, {"max_seq_length": 16}, PROMPTS, pooling_config, dense),
            strict=False,
        )
    )
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file({"linear.weight": torch.ones(4, 16)}, folder / "2_Dense" / "model.safetensors")
    (folder / "notes.json").write_text("{}")
    (folder / "train.txt").write_text("private")
    return str(folder)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_sentence_transformers_folder_stays_one(tmp_path: Path) -> None:
    base, other = (sentence_model(tmp_path / name, seed) for seed, name in enumerate(("base", "other")))
    merger = GraspMerger.from_pretrained(base, task="feature-extraction", config=MEAN)
    step = merger.merge([base, other]).steps[1]
    assert not any("modules" in note for note in step.notes)
    merger.save_pretrained(tmp_path / "merged")
    for name in SENTENCE_FILES:
        assert (tmp_path / "merged" / name).read_bytes() == Path(base, name).read_bytes()
    assert not {"notes.json", "train.txt"} & files_in(tmp_path / "merged"), "other files are the user's own"
    model: Any = AutoModel.from_pretrained(tmp_path / "merged")
    old: Any = AutoModel.from_pretrained(base)
    assert not torch.equal(model.pooler.dense.weight, old.pooler.dense.weight)


def test_a_merged_embedding_model_gives_its_own_means(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base, other = (sentence_model(tmp_path / name, seed) for seed, name in enumerate(("base", "other")))
    merger = GraspMerger.from_pretrained(base, task="feature-extraction", config=MEAN)
    merger.merge([base, other])
    merger.save_pretrained(tmp_path / "merged")
    inputs = tiny_tokenizer()(["query: red small"], return_tensors="pt")
    with torch.no_grad():
        hidden = merger.model.eval()(**inputs).last_hidden_state.mean(1).sum(1)
    found = sentence_transformers.SentenceTransformer(str(tmp_path / "merged")).encode(
        ["red small"], prompt_name="query"
    )
    assert torch.allclose(torch.tensor(found), hidden[:, None].expand(1, 4), atol=1e-5)


def test_modules_of_a_source_that_differ_are_noted(tmp_path: Path) -> None:
    base = sentence_model(tmp_path / "base", 0)
    other = sentence_model(tmp_path / "other", 1, pooling="cls")
    save_file({"linear.weight": torch.zeros(4, 16)}, tmp_path / "other" / "2_Dense" / "model.safetensors")
    merger = GraspMerger.from_pretrained(base, task="feature-extraction", config=MEAN)
    assert merger.merge([other]).steps[0].notes == [
        "modules: those of the target stay, and the source has others: 1_Pooling/config.json, 2_Dense/model.safetensors"
    ]


def test_a_pushed_sentence_model_stays_one(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    hub.add_repo("org/sentences", sentence_model(tmp_path / "base", 0))
    merger = GraspMerger.from_pretrained("org/sentences", task="feature-extraction", config=MEAN)
    merger.merge([sentence_model(tmp_path / "other", 1)])
    merger.push_to_hub("org/sentences-merged")
    source = locate("org/sentences-merged")
    assert {*SENTENCE_FILES} <= files_in(source.folder)
    for name in SENTENCE_FILES:
        assert (source.folder / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_a_language_model_keeps_its_templates_and_its_settings_of_generation(tmp_path: Path) -> None:
    base = Path(saved(tiny_model("gpt2"), tmp_path / "base"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0] }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(base)
    settings = json.loads((base / "generation_config.json").read_text()) | {"temperature": 0.3, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(settings))
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= files_in(base)
    merger = GraspMerger.from_pretrained(str(base), config=MEAN)
    merger.merge([str(base)])
    merger.save_pretrained(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (found["temperature"], found["do_sample"]) == (0.3, True)


def test_a_model_of_pictures_and_texts_keeps_both_processors(tmp_path: Path) -> None:
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    text = size | {"vocab_size": 8, "max_position_embeddings": 16, "eos_token_id": 2}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=size | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    )
    clip.save_pretrained(tmp_path / "base")
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(pictures, tiny_tokenizer()).save_pretrained(tmp_path / "base")
    merger = GraspMerger.from_pretrained(str(tmp_path / "base"), task="zero-shot-image-classification", config=MEAN)
    merger.merge([str(tmp_path / "base")])
    merger.save_pretrained(tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert type(processor).__name__ == "CLIPProcessor"
    assert processor.image_processor.crop_size["height"] == 8
    assert processor.tokenizer("red small")["input_ids"] == tiny_tokenizer()("red small")["input_ids"]


def test_a_tokenizer_that_cannot_be_read_stays_beside_the_weights(tmp_path: Path) -> None:
    base = Path(saved(tiny_model("gpt2"), tmp_path / "base"))
    text = (base / "tokenizer.json").read_text().replace('"WordLevel"', '"FutureModel"')
    (base / "tokenizer.json").write_text(text)
    merger = GraspMerger.from_pretrained(str(base), config=MEAN)
    merger.merge([str(base)])
    merger.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == text


@pytest.mark.parametrize("trusted", [True, False])
def test_code_stays_only_where_it_is_trusted_and_nothing_names_code_that_is_missing(
    trusted: bool, tmp_path: Path
) -> None:
    """A tokenizer may come with code of its own beside a class of transformers."""
    base = Path(saved(tiny_model("bert"), tmp_path / "base"))
    (base / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    own = True\n"
    )
    for name, mapping in (
        ("config.json", {"AutoModelForTokenClassification": "modeling_own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}),
    ):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | {"auto_map": mapping}))
    merger = GraspMerger.from_pretrained(
        str(base), config=GraspConfig(method="average", trust_remote_code=[str(base)] if trusted else [], **NO_TUNING)
    )
    merger.merge([str(base)])
    merger.save_pretrained(tmp_path / "merged")
    assert hasattr(merger.processing_class, "own") == trusted
    assert ("tokenization_own.py" in files_in(tmp_path / "merged")) == trusted
    for name in ("config.json", "tokenizer_config.json"):
        assert ("auto_map" in json.loads((tmp_path / "merged" / name).read_text())) == trusted
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged", trust_remote_code=trusted)
    assert tokenizer("red small")["input_ids"] == tiny_tokenizer()("red small")["input_ids"]


def test_a_merge_into_its_own_folder_keeps_the_files_of_its_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merger = GraspMerger.from_pretrained(sentence_model(tmp_path / "base", 0), task="feature-extraction", config=MEAN)
    merger.merge([str(tmp_path / "base")])
    merger.save_pretrained(tmp_path / "merged")
    again = GraspMerger.from_pretrained(str(tmp_path / "merged"), config=MEAN, task="feature-extraction")
    again.merge([sentence_model(tmp_path / "other", 1)])
    again.save_pretrained(tmp_path / "merged")
    assert {*SENTENCE_FILES} <= files_in(tmp_path / "merged") and not [
        record for record in caplog.records if record.levelname == "WARNING"
    ]
