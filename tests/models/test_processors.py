"""Tokenizers and processors: which files are read, and what is said about those that cannot be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import DataError, IncompatibleSourceError
from grasp_hf.hub.reference import Source, SourceRef
from grasp_hf.models.processors import load_processing_class, read_processing_class, required_processing_class
from tests.support.models import NO_TUNING, saved, tiny_model


def source_in(folder: Path | str) -> Source:
    return Source(SourceRef(str(folder)), Path(folder), None, "full")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer.json", '{"model": {"type": "FutureModel"}}', "cannot be read: "),
        ("tokenizer.json", "", "cannot be read: "),
        ("tokenizer.json", "[]", "cannot be read: "),
        ("tokenizer_config.json", "[1]", "cannot be read: "),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "tokenizer.json: got a git-LFS pointer"),
    ],
)
def test_files_that_no_library_can_read(
    file: str, content: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_in(saved(tiny_model("bert"), tmp_path / "a"))
    (source.folder / file).write_text(content)
    for read in (read_processing_class, required_processing_class):
        with pytest.raises(IncompatibleSourceError, match=f"^'{source.ref}': .*{reason}"):
            read(source)
    assert load_processing_class(source) is None and reason in caplog.text


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gpt_neox"])
def test_a_tokenizer_without_its_vocabulary_is_not_made_up(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    (tmp_path / "vocab-of-another-library.txt").write_text("red\nblue\n")
    with pytest.raises(
        IncompatibleSourceError, match="cannot be read: it knows no word, because the file of its voca"
    ):
        read_processing_class(source_in(tmp_path))


def test_no_files_at_all(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    assert read_processing_class(source_in(tmp_path)) is None
    with pytest.raises(DataError, match="holds no tokenizer or image processor"):
        required_processing_class(source_in(tmp_path))


def test_an_image_processor_that_cannot_be_read(tmp_path: Path) -> None:
    source = source_in(saved(tiny_model("vit"), tmp_path / "a"))
    for path in source.folder.glob("*processor*"):
        path.write_text(json.dumps({"image_processor_type": "FutureProcessor"}))
    with pytest.raises(IncompatibleSourceError, match=r"its processor \(.*processor.*json\) cannot be read: "):
        read_processing_class(source)


def test_a_tokenizer_that_needs_sentencepiece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    monkeypatch.setattr("grasp_hf.models.processors.find_spec", lambda name: None)
    with pytest.raises(
        IncompatibleSourceError, match=r"may need sentencepiece: pip install 'grasp_hf\[sentencepiece\]'"
    ):
        read_processing_class(source_in(tmp_path))


def test_a_source_with_an_unreadable_tokenizer_is_a_row_of_the_plan_and_an_error_of_the_merge(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "good", "newer")):
        saved(tiny_model("gpt2", seed), tmp_path / name)
    file = tmp_path / "newer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"WordLevel"', '"FutureLevel"'))
    recipe = "base_model: ./base\nsources: [./good, ./newer]\nmethod: average\norder: given\nfinal_epochs: 0\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    for command in (["plan", "recipe.yaml"], ["merge", "recipe.yaml", "--output", "merged"]):
        run = subprocess.run(
            [sys.executable, "-c", "from grasp_hf.cli import run; run()", *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        printed = run.stdout + run.stderr
        assert run.returncode == 1 and "Traceback" not in printed
        assert "newer" in printed and "its tokenizer (tokenizer.json, tokenizer_config.json) cannot be read" in printed


def test_a_model_whose_tokenizer_is_a_sentencepiece_file_alone(tmp_path: Path) -> None:
    """Its tokens are matched by their strings, and the merged model keeps them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    for seed, name in enumerate(("base", "fine")):
        (tmp_path / name).mkdir()
        (tmp_path / "texts.txt").write_text("red green blue small large birds and cats and dogs\n" * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "texts.txt"),
            model_prefix=str(tmp_path / name / "spiece"),
            vocab_size=22,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        (tmp_path / name / "spiece.vocab").unlink()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
        torch.manual_seed(seed)
        size: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        T5ForConditionalGeneration(T5Config(vocab_size=122, **size)).save_pretrained(tmp_path / name)
    merger = GraspMerger.from_pretrained(str(tmp_path / "base"), config=GraspConfig(method="average", **NO_TUNING))
    assert merger.merge([str(tmp_path / "fine")]).steps[0].notes == []
    merger.save_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    expected = sentencepiece.SentencePieceProcessor(str(tmp_path / "base" / "spiece.model")).encode("red cats")
    assert tokenizer("red cats")["input_ids"] == [*expected, 1]
