"""A rank in `adapter_config.json` is far larger than the matrices in the file, and PEFT would allocate it."""

import sys

from tests.hostile.kit import keys, main

MODEL = "adapter"
FILE = "adapter_config.json"
SAYS = "r: got 5000000, but its file holds ranks of at most 2"
ERROR = r"its file holds ranks of at most 2"
INPUTS = {
    "r": keys(FILE, r=5_000_000),
    "r beyond 64 bits": keys(FILE, r=10**30),
    "r is infinite": lambda folder: (folder / FILE).write_text(
        (folder / FILE).read_text().replace('"r": 2', '"r": Infinity')
    ),
    "rank_pattern": keys(FILE, rank_pattern={"query": 5_000_000}),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
