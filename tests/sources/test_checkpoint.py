"""A checkpoint is read without a second model; its tensors equal those of `from_pretrained` and use page cache."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.hub.reference import Source, SourceRef
from grasp_hf.sources.checkpoint import file_tensors, runtime_tensors
from grasp_hf.tensors.units import movable_tensors
from tests.support.models import KINDS, NO_TUNING, perturbed, saved, tiny_model


def read(folder: Path | str, kind: str, scratch: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of a file by their names in memory, and the problems and notes."""
    scratch.mkdir(exist_ok=True)
    raw = file_tensors(Source.inspect(SourceRef(str(folder)), Path(folder)))
    tensors, problems, notes = runtime_tensors(raw, tiny_model(kind), scratch)
    return tensors, problems + notes


@pytest.mark.parametrize("shards", ["1GB", "5KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "mixtral", "swin", "dinov2", "gpt_neox"])
def test_tensors_are_those_of_from_pretrained(kind: str, shards: str, tmp_path: Path) -> None:
    """Transformers renames most tensors of ViT, Swin and Dinov2 when it loads them, and fuses a Mixtral's experts."""
    model = perturbed(tiny_model(kind), 1)
    model.save_pretrained(tmp_path / "source", max_shard_size=shards)
    assert (len(list((tmp_path / "source").glob("*.safetensors"))) > 1) == (shards == "5KB")
    expected = movable_tensors(type(model).from_pretrained(tmp_path / "source"))
    tensors, problems = read(tmp_path / "source", kind, tmp_path / "scratch")
    assert problems == [] and list(tensors) == list(expected)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


@pytest.mark.parametrize("kind", ["vit", "gpt2", "mixtral"])
def test_tensors_lie_in_files(kind: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(kind), tmp_path / "source")
    tensors, _ = read(folder, kind, tmp_path / "scratch")
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path) in line:
            maps.append([int(address, 16) for address in line.split()[0].split("-")])
    for name, tensor in tensors.items():
        assert any(start <= tensor.data_ptr() < end for start, end in maps), name


def test_the_body_alone_and_the_names_of_old_checkpoints(tmp_path: Path) -> None:
    model: Any = perturbed(tiny_model("bert"), 1)
    body = Path(saved(model.bert, tmp_path / "body"))
    tensors = load_file(body / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old | {"embeddings.position_ids": torch.arange(16)}, body / "model.safetensors", {"format": "pt"})
    found, problems = read(body, "bert", tmp_path / "scratch")
    expected = {name: value for name, value in movable_tensors(model).items() if name.startswith("bert.")}
    assert problems == [] and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_pickled_weights_are_mapped(tmp_path: Path) -> None:
    folder = Path(saved(perturbed(tiny_model("bert"), 1), tmp_path / "source"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found, _ = read(folder, "bert", tmp_path / "scratch")
    assert all(
        torch.equal(found[name], value) for name, value in movable_tensors(perturbed(tiny_model("bert"), 1)).items()
    )
    assert "pytorch_model.bin" in Path("/proc/self/maps").read_text()


def test_a_tied_weight_may_have_either_name_or_both(tmp_path: Path) -> None:
    folder = Path(saved(perturbed(tiny_model("gpt2"), 1), tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["transformer.wte.weight"]
    rest = {name: value for name, value in tensors.items() if name != "transformer.wte.weight"}
    for held in ({"lm_head.weight": weight}, {"lm_head.weight": weight.clone(), "transformer.wte.weight": weight}):
        save_file(rest | held, folder / "model.safetensors", {"format": "pt"})
        found, problems = read(folder, "gpt2", tmp_path / "scratch")
        assert problems == [] and torch.equal(found["transformer.wte.weight"], weight)
        assert list(found) == list(movable_tensors(tiny_model("gpt2")))


def test_tensors_that_the_target_does_not_have(tmp_path: Path) -> None:
    folder = Path(saved(tiny_model("bert"), tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.bias"
    further = {name.replace(".1.", ".2."): tensors[name].clone(), "cls.predictions.bias": torch.zeros(50)}
    save_file(tensors | further, folder / "model.safetensors", {"format": "pt"})
    _, problems = read(folder, "bert", tmp_path / "scratch")
    assert problems == [
        "1 tensors of the source are not in the target: bert.encoder.layer.2.output.dense.bias",
        "1 tensors have no place in the target and are left out: cls.predictions.bias",
    ]


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BOTH: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "RobertaForSequenceClassification": ("roberta", {"vocab_size": 50, "max_position_embeddings": 20, **SMALL}),
    "DebertaV2ForSequenceClassification": ("deberta-v2", {"vocab_size": 50, **SMALL}),
    "AlbertForSequenceClassification": ("albert", {"vocab_size": 50, "embedding_size": 8, **SMALL}),
    "BartForConditionalGeneration": ("bart", {"vocab_size": 50, **BOTH}),
    "T5ForConditionalGeneration": ("t5", {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}),
    "LlamaForCausalLM": ("llama", {"vocab_size": 50, **SMALL}),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        {
            "vocab_size": 50,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "num_key_value_heads": 2,
            "head_dim": 8,
            **SMALL,
        },
    ),
    "ConvNextForImageClassification": ("convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "CLIPForImageClassification": (
        "clip",
        {"vision_config": {"image_size": 8, "patch_size": 4, **SMALL}, "text_config": {"vocab_size": 20, **SMALL}},
    ),
    "Wav2Vec2ForSequenceClassification": (
        "wav2vec2",
        {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, **SMALL},
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_models_of_many_kinds_arrive_whole_and_are_saved_whole(name: str, tmp_path: Path) -> None:
    kind, sizes = ZOO[name]
    config, cls = AutoConfig.for_model(kind, **sizes), getattr(transformers, name)
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "base")
    perturbed(cls(config), 1).save_pretrained(tmp_path / "source")
    settings = GraspConfig(method="average", **NO_TUNING)
    merger = GraspMerger.from_pretrained(str(tmp_path / "base"), config=settings)
    merger.merge([str(tmp_path / "source")])
    merger.save_pretrained(tmp_path / "merged")
    expected = movable_tensors(cls.from_pretrained(tmp_path / "source"))
    for tensors in (movable_tensors(merger.model), movable_tensors(cls.from_pretrained(tmp_path / "merged"))):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_weights_pickled_before_zip_files(tmp_path: Path) -> None:
    folder = Path(saved(perturbed(tiny_model("bert"), 1), tmp_path / "source"))
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert read(folder, "bert", tmp_path / "scratch")[0].keys() == movable_tensors(tiny_model("bert")).keys()


def test_a_deeper_body_without_a_head(tmp_path: Path) -> None:
    """The names in the files of a model without a head lack the prefix of the target's names."""
    config: Any = tiny_model("bert").config
    config.num_hidden_layers = 3
    model: Any = transformers.BertForSequenceClassification(config)
    _, problems = read(saved(model.bert, tmp_path / "body"), "bert", tmp_path / "scratch")
    assert problems[0].startswith("16 tensors of the source are not in the target: bert.encoder.layer.2.")


def test_positions_that_are_computed_and_never_saved(tmp_path: Path) -> None:
    config: Any = AutoConfig.for_model("marian", vocab_size=50, pad_token_id=0, decoder_start_token_id=0, **BOTH)
    torch.manual_seed(0)
    model = transformers.MarianMTModel(config)
    model.save_pretrained(tmp_path / "base")
    source = perturbed(deepcopy(model), 1)
    source.save_pretrained(tmp_path / "source")
    settings = GraspConfig(method="average", unit="module", **NO_TUNING)
    merger = GraspMerger.from_pretrained(str(tmp_path / "base"), config=settings)
    step = merger.merge([str(tmp_path / "source")]).steps[0]
    assert step.other_units == 2, "the positions of the encoder and of the decoder"
    for name, tensor in merger.model.named_parameters():
        expected = model if name.endswith("embed_positions.weight") else source
        assert torch.equal(tensor, expected.get_parameter(name)), name
