"""A regular expression in `adapter_config.json` takes time that doubles with each character of a module's name."""

import sys

from tests.hostile.kit import keys, main

MODEL = "adapter"
FILE = "adapter_config.json"
SAYS = (
    "target_modules: the expression … takes longer than 3 s to find its modules; list the names of the modules instead"
)
ERROR = r"takes longer than 3 s to find its modules|more than 100,000 characters"
SLOW = r"((([a-z]+)*|[a-z._0-9]*)*)*!"
INPUTS = {
    "target_modules": keys(FILE, target_modules=SLOW),
    "a key of rank_pattern": keys(FILE, rank_pattern={SLOW: 2}),
    "exclude_modules": keys(FILE, exclude_modules=SLOW),
    "of many characters": keys(FILE, target_modules="a?" * 100_000),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
