"""A configuration file is larger than any model needs."""

import sys
from pathlib import Path

from tests.hostile.kit import Damage, main

SAYS = "tokenizer.json has 3,000 MB, expected at most 100 MB"
ERROR = r"has [\d,]+ MB, expected at most \d+ MB"


def grown(name: str, size: int) -> Damage:
    def change(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.truncate(size)

    return change


INPUTS = {
    "config.json": grown("config.json", 40_000_000),
    "tokenizer.json": grown("tokenizer.json", 3_000_000_000),
    "tokenizer_config.json": grown("tokenizer_config.json", 400_000_000),
    "README.md": grown("README.md", 10**9),
    "generation_config.json": grown("generation_config.json", 10**9),
    "vocab.txt": grown("vocab.txt", 10**9),
    "tokenizer.model": grown("tokenizer.model", 10**9),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
