"""Files of strangers are measured before a library reads them, and before they are downloaded."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from grasp_hf.errors import IncompatibleSourceError
from grasp_hf.hub.download import locate, look_up
from grasp_hf.hub.limits import check_folder, check_sizes
from grasp_hf.record.card import declared_license, trained_on_test
from grasp_hf.sources.rows import match_labels
from tests.support.hub.server import HubServer
from tests.support.models import copied, saved, tiny_model


def test_a_hundred_thousand_classes_are_matched_in_a_second() -> None:
    names = [f"class {number}" for number in range(100_000)]
    began = time.perf_counter()
    match = match_labels(names, [*names[::-1], "class 7"])
    assert time.perf_counter() - began < 1
    assert len(match.target) == 99_999 and 7 not in match.target
    assert dict(zip(match.target, match.source, strict=True))[3] == 99_996


def test_a_large_configuration_is_not_downloaded(hub: HubServer, tmp_path: Path) -> None:
    folder = Path(saved(tiny_model("bert"), tmp_path / "model"))
    (folder / "tokenizer.json").write_bytes(b" " * 101_000_000)
    hub.add_repo("org/large-tokenizer", folder)
    since = len(hub.requests)
    for look in (locate, look_up):
        with pytest.raises(
            IncompatibleSourceError, match=r"'org/large-tokenizer': tokenizer.json has 101 MB, expected"
        ):
            look("org/large-tokenizer")
    assert not [path for _, path in hub.requests[since:] if "/resolve/" in path]


def test_counts_are_checked_after_the_download_too(hub: HubServer, tmp_path: Path) -> None:
    folder = Path(saved(tiny_model("bert"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_labels": 10**9}))
    hub.add_repo("org/many-labels", folder)
    for look in (locate, look_up):
        with pytest.raises(
            IncompatibleSourceError, match=r"config.json holds num_labels: 1,000,000,000, expected at most"
        ):
            look("org/many-labels")


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 126, "num_experts": 512, "vocab_size": 262_144, "max_position_embeddings": 10_485_760},
        {"id2label": {str(n): f"c{n}" for n in range(21_843)}, "label2id": {f"c{n}": n for n in range(21_843)}},
        {"block_size": 131_072, "moe_layer_size": 50_000, "num_experts_per_tok": 8, "label_smoothing": 0.1},
        {"text_config": {"num_hidden_layers": 96, "layer_types": ["full_attention"] * 96}},
        {"pad_token_id": 10**6, "rope_theta": 5e8, "layer_norm_eps": 1e-12},
    ],
)
def test_the_numbers_of_large_models_are_allowed(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    check_folder("org/large", tmp_path)


def test_the_sizes_of_large_models_are_allowed() -> None:
    sizes = {"tokenizer.json": 34_400_000, "model.safetensors.index.json": 9_000_000, "model.safetensors": 10**11}
    check_sizes("org/large", {**sizes, "pytorch_model.bin": 10**11, "README.md": 3_000_000, "a/vocab.json": 10**7})


METADATA = "\n".join(f"  - type: test{number}\n    value: {number}" for number in range(50_000))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"model-index:\n{METADATA}\nlicense: mit\ntags: [a]", "mit"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nlicense: *b", None),
        ("license: &l [mit, *l]", None),
        ("license: [" + "[" * 500, None),
        ("license: {a: b}", "{'a': 'b'}"),
        ("license:\n- mit\n- apache-2.0\nother: 1", "mit, apache-2.0"),
        ("'license': mit", "mit"),
        ("license: 'a\n  b'", "a b"),
        ("license: \x00", None),
        ("tags:\n  license: mit", None),
    ],
)
def test_only_the_licence_of_a_card_is_parsed(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# A model\nlicense: gpl\n")
    began = time.perf_counter()
    assert declared_license(tmp_path) == expected
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("line", ["trained on " * 20_000, "trained " * 50_000 + "on " * 50_000, "x." * 100_000])
def test_a_card_of_long_lines_is_searched_in_seconds(line: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"org/animals\n{line}\nIt was trained on the test split.\n")
    began = time.perf_counter()
    trained_on_test(tmp_path, "org/animals")
    assert time.perf_counter() - began < 10


def test_as_many_labels_as_allowed_can_be_read_in_seconds(tmp_path: Path) -> None:
    folder = copied(saved(tiny_model("bert"), tmp_path / "model"), tmp_path / "many")
    config = json.loads((folder / "config.json").read_text())
    names = {str(number): f"c{number}" for number in range(100_000)}
    labels = {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    (folder / "config.json").write_text(json.dumps({**config, **labels}))
    began = time.perf_counter()
    check_folder("many", folder)
    assert time.perf_counter() - began < 1
    assert AutoConfig.from_pretrained(folder).num_labels == 100_000
