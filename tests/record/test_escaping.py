"""The text of a stranger stays text: in the card, in its metadata, in the plan and in a terminal."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.cli import main
from grasp_hf.record.card import declared_license, model_card
from grasp_hf.record.text import code, code_block, escape_markdown, markdown_table
from tests.support.models import NO_TUNING, perturbed, saved, tiny_model
from tests.support.reports import report_of, step

ATTACKS = [
    "# heading",
    "a\n\n# heading\n\n- item",
    "![image](https://example.org/a.png)",
    "[link](javascript:alert(1))",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "https://example.org and www.example.org",
    "a | b | c",
    "`` ` ``` code",
    "```\n# heading\n```",
    "~~~\ncode",
    "**bold** *it* \\*",
    "a\x1b[31mred\x07\x00\u202e",
    "---\nlicense: mit\n---",
    "&lt;b&gt; $x$ {{ 7 * 7 }} {% raw %}",
    "x" * 100_000,
]
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PLAIN = {"text", "softbreak", "code_inline"}


def kinds(markdown: str) -> set[str]:
    """Return the kinds of all tokens that a renderer of Markdown with tables and links finds."""
    tokens = PARSER.parse(markdown)
    texts = [re.sub(r"`[^`]*`|\]\([^)]*\)", "", token.content) for token in tokens if token.type == "inline"]
    assert not any(re.search(r"https?://|www\.", text) for text in texts), "GitHub would turn it into a link"
    return {token.type for token in tokens} | {child.type for token in tokens for child in token.children or []}


def inline_blocks(markdown: str) -> int:
    """Return the number of headings, paragraphs and cells."""
    return sum(token.type == "inline" for token in PARSER.parse(markdown))


@pytest.mark.parametrize("text", ATTACKS)
def test_the_text_of_a_stranger_is_shown_as_it_is(text: str) -> None:
    escaped = escape_markdown(text)
    assert kinds(f"- {escaped}") <= PLAIN | {
        f"{name}_{end}" for name in ("bullet_list", "list_item", "paragraph") for end in ("open", "close")
    } | {"inline", "text_special"}
    assert kinds(f"so {code(text)} it is") <= PLAIN | {"paragraph_open", "paragraph_close", "inline"}
    table = markdown_table([{"a": escaped, "b": "1"}])
    assert "\n" not in escaped and kinds(table) - kinds(markdown_table([{"a": "x", "b": "1"}])) <= {"text_special"}
    block = PARSER.parse(code_block(f"key: |\n  {text}\n", "yaml") + "\nend")
    assert [token.type for token in block] == ["fence", "paragraph_open", "inline", "paragraph_close"]


@pytest.mark.parametrize("text", ATTACKS)
def test_a_card_is_built_alike_whatever_a_record_holds(text: str) -> None:
    model = tiny_model("bert")

    def card(name: str, note: str, licence: str) -> ModelCard:
        report = report_of(step(name, sha=None, notes=[note], license=licence), recipe={"data": {"path": note}})
        report.base, report.base_sha = name, None
        report.run.config["accepted_bases"] = [note]
        return model_card(model, report, "org/merged")

    plain, hostile = card("fine", "a note", "my licence"), card(text, text, text)
    assert kinds(hostile.text) - {"text_special"} <= kinds(plain.text)
    assert inline_blocks(hostile.text) == inline_blocks(plain.text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", str(hostile))
    assert hostile.data.to_dict()["license"] == plain.data.to_dict()["license"] == "other"


def hostile_source(folder: Path) -> str:
    """Save a model whose labels and licence attack."""
    labels = ["bird", "cat", "a\x1b]0;title\x07\n# heading <script>", "[x](http://evil) ![y](http://evil/a.png) " * 50]
    path = Path(saved(perturbed(tiny_model("bert", labels=labels), 1), folder))
    licence = {"license": "mit\n# heading\n![x](https://evil/a.png)`\x1b[31m", "x": 1}
    (path / "README.md").write_text(f"---\n{yaml.safe_dump(licence)}---\n")
    return str(path)


def test_labels_and_licence_of_a_source_stay_text(tmp_path: Path, capsys: Any) -> None:
    base, source = saved(tiny_model("bert"), tmp_path / "base"), hostile_source(tmp_path / "fine")
    recipe = tmp_path / "recipe.yaml"
    settings = {**NO_TUNING, "method": "average"}
    recipe.write_text(yaml.safe_dump({"base_model": base, "sources": [source], **settings}))
    assert main(["plan", str(recipe), "--verbose"]) == 0
    assert main(["merge", str(recipe), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "classes" in printed.out and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", printed.out + printed.err)
    card = (tmp_path / "out" / "README.md").read_text()
    assert kinds(ModelCard(card).text) & {"image", "html_inline", "html_block"} == set()
    assert "evil" in card and ModelCard(card).data.to_dict()["license"] == "other" and "\x1b" not in card
    headings = [line for line in ModelCard(card).text.splitlines() if line.startswith("#")]
    assert not any("heading" in line for line in headings)


def test_a_licence_is_one_short_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: 'mit`\n\n\n  b'\n---\n")
    assert declared_license(tmp_path) == "mit' b"
    (tmp_path / "README.md").write_text(f"---\nlicense: {'a' * 5_000}\n---\n")
    assert declared_license(tmp_path) == "a" * 100 + " …"


def test_a_merge_of_hostile_names_is_saved_with_a_card(tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "# x](http://evil) `y` $z$ <b>"
    base, source = saved(tiny_model("bert"), tmp_path / "base"), saved(perturbed(tiny_model("bert"), 1), folder)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**NO_TUNING, method="average"))
    merger.merge([source])
    merger.save_pretrained(tmp_path / "out")
    assert "could not be made" not in caplog.text
    assert kinds((tmp_path / "out" / "README.md").read_text()) & {"html_inline", "image"} == set()
