"""The tokenizer of a source cannot be read, so that its tokens cannot be matched with the target's."""

import sys
from pathlib import Path

from tests.hostile.kit import Damage, keys, main, raw, text

MODEL = "gpt2"
SAYS = "its tokenizer (tokenizer.json) cannot be read: …"
ERROR = r"its tokens cannot be matched|shares no token|its tokenizer|expected no control characters"


def replaced(old: str, new: str) -> Damage:
    def change(folder: Path) -> None:
        file = folder / "tokenizer.json"
        content = file.read_text()
        assert old in content
        file.write_text(content.replace(old, new))

    return change


INPUTS = {
    "null": text("tokenizer.json", "null"),
    "a list": text("tokenizer.json", "[]"),
    "deep": text("tokenizer.json", "[" * 100_000),
    "bytes": raw("tokenizer.json", b"\xff\xfe\x00"),
    "of the future": replaced('"WordLevel"', '"FutureLevel"'),
    "no model": keys("tokenizer.json", model=None),
    "negative ids": replaced('"red": 3', '"red": -3'),
    "ids beyond 32 bits": replaced('"red": 3', f'"red": {2**40}'),
    "vocabulary is a list": replaced('"vocab": {', '"vocab": [1], "other": {'),
    "settings are a list": text("tokenizer_config.json", "[]"),
    "a key that a terminal would obey": keys(
        "tokenizer_config.json", added_tokens_decoder={"9": {"content": "x", "\x1b]0;title\x07": True}}
    ),
    "settings are deep": text("tokenizer_config.json", "[" * 100_000),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
