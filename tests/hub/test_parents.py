"""An adapter of a quantized model: its float parent is found on the card, proposed, and accepted in one word."""

import json
from pathlib import Path
from typing import Any

import pytest

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError, Recipe
from grasp_hf.hub.parents import float_parent, is_same_repository
from grasp_hf.runs.plan import plan
from tests.support.hub.server import HubServer
from tests.support.models import NO_TUNING, saved, saved_adapter, tiny_model

LORA: dict[str, Any] = {"target_modules": ["q_proj"], "init_lora_weights": False}
MEAN: dict[str, Any] = {"method": "average", **NO_TUNING}


@pytest.fixture(scope="session")
def quantized(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Publish a float model, quantized copies with several cards, and a fine-tune whose card names the same model."""
    root = tmp_path_factory.mktemp("quantized")
    hub.add_repo("org/parents-float", saved(tiny_model("vit"), root / "float"))
    cards = {
        "bnb-4bit": "base_model: org/parents-float",
        "of-quantized": "base_model: [org/parents-bnb-4bit]",
        "of-two": "base_model: [org/parents-float, org/parents-fine]",
        "of-itself": "base_model: org/parents-of-itself",
        "of-other": "base_model: org/elsewhere",
        "odd": "base_model: {a: [1]}",
        "silent": "license: mit",
    }
    for name, card in cards.items():
        folder = root / name
        folder.mkdir()
        config = json.loads((root / "float" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
        hub.add_repo(f"org/parents-{name}", folder)
    fine = Path(saved(tiny_model("vit"), root / "fine"))
    (fine / "README.md").write_text("---\nbase_model: org/parents-float\n---\n")
    hub.add_repo("org/parents-fine", fine)
    return root


def test_the_card_of_a_quantized_model_names_its_float_parent(quantized: Path) -> None:
    for name in ("bnb-4bit", "of-quantized"):
        assert float_parent(f"org/parents-{name}") == "org/parents-float"
    assert float_parent("org/parents-of-other") == "org/elsewhere"
    for name in ("float", "fine", "of-two", "of-itself", "odd", "silent", "nowhere"):
        assert float_parent(f"org/parents-{name}") is None, name
    assert float_parent("") is None and float_parent("/no/such/folder") is None
    assert float_parent(str(quantized / "bnb-4bit")) is None
    assert is_same_repository("org/parents-float", "org/parents-float")
    assert not is_same_repository("org/parents-float", "org/parents-fine")
    assert not is_same_repository("org/parents-nowhere", "org/parents-neither")


@pytest.mark.parametrize("name", ["bnb-4bit", "of-quantized"])
def test_an_adapter_of_a_quantized_base_is_accepted_in_one_word(quantized: Path, name: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tiny_model("vit"), f"org/parents-{name}", tmp_path / "adapter", **LORA)
    words = f"an adapter of 'org/parents-{name}', which was quantized from 'org/parents-float'"
    match = rf"{words}, as its card says; .*accepted_bases=\['quantized'\]"
    with pytest.raises(IncompatibleSourceError, match=match):
        GraspMerger.from_pretrained("org/parents-float", config=GraspConfig(**MEAN)).merge([adapter])
    (_, row) = plan(Recipe(sources=[adapter], base_model="org/parents-float", config=GraspConfig(**MEAN)))
    assert len(row.problems) == 1 and words in row.problems[0]
    config = GraspConfig(accepted_bases=["quantized"], **MEAN)
    step = GraspMerger.from_pretrained("org/parents-float", config=config).merge([adapter]).steps[0]
    assert step.moved == 2
    (_, row) = plan(Recipe(sources=[adapter], base_model="org/parents-float", config=config))
    assert row.problems == []


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "of-other",
            r"quantized from 'org/elsewhere', .* start from 'org/elsewhere'; or, if both .*\['org/parents-of-other'\]",
        ),
        (
            "fine",
            r"an adapter of 'org/parents-fine', expected .*; if both are the same model, .*\['org/parents-fine'\]",
        ),
        ("silent", r"an adapter of 'org/parents-silent', expected .*\['org/parents-silent'\]"),
        ("nowhere", r"an adapter of 'org/parents-nowhere', expected .*\['org/parents-nowhere'\]"),
    ],
)
def test_the_word_accepts_no_other_base(quantized: Path, name: str, match: str, tmp_path: Path) -> None:
    adapter = saved_adapter(tiny_model("vit"), f"org/parents-{name}", tmp_path / "adapter", **LORA)
    config = GraspConfig(accepted_bases=["quantized"], **MEAN)
    with pytest.raises(IncompatibleSourceError, match=match):
        GraspMerger.from_pretrained("org/parents-float", config=config).merge([adapter])
