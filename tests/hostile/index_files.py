"""The index of the weight files lists something else than files in its own folder."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.hostile.kit import Damage, main

SAYS = "model.safetensors.index.json lists '../good/model.safetensors', expected only files in its own folder"
ERROR = r"index\.json (cannot be read|lists|holds)|is not complete"


def index(content: Any) -> Damage:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def names(*files: Any) -> Damage:
    return index({"weight_map": {str(number): file for number, file in enumerate(files)}})


INPUTS = {
    "null": index("null"),
    "a list": index([]),
    "no map": index({}),
    "map is a list": index({"weight_map": ["one.safetensors"]}),
    "deep": index("[" * 100_000),
    "numbers": names(1, 2),
    "null and text": names(None, "one.safetensors"),
    "another folder": names("../good/model.safetensors"),
    "the root": names("/etc/passwd"),
    "zero byte": names("one\0.safetensors"),
    "long name": names("a" * 5_000),
    "a folder": names("."),
    "missing": names("two.safetensors"),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
