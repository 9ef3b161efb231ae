"""Six tasks that have nothing to do with sentiment, for sources of which none should help.

The samples are the State of the Union passages of `sotu.py`. A task divides them in two classes, by the year of the
address or by the words of the passage. Both classes of a task are equally frequent. The sources are adapters of MiniLM
and are trained as those of `sentiment`. They hold no label names, so that the names of MiniLM's head count for them:
`negative` and `positive`. The names say nothing about these classes, but without them `compare` would refuse the
sources, and a merge would leave their heads out. The targets are those of `sentiment`.
"""

import re
from collections.abc import Callable, Collection
from itertools import chain
from pathlib import Path

from datasets import Dataset
from pandas import concat, read_csv
from transformers import PreTrainedTokenizerBase

from tests.benchmarks.sentiment import LIMIT, TEST, TOKENS
from tests.benchmarks.sotu import ERAS, sotu

# Years in which all addresses are by presidents of one party. Andrew Johnson was elected with the other party.
DEMOCRATIC = {
    *chain(range(1857, 1861), range(1885, 1889), range(1893, 1897), range(1913, 1921), range(1933, 1953)),
    *chain(range(1962, 1970), range(1978, 1981), range(1993, 2001), range(2009, 2017), [2021]),
}
REPUBLICAN = {
    *chain(range(1861, 1865), range(1869, 1885), range(1889, 1893), range(1897, 1913), range(1921, 1933)),
    *chain(range(1954, 1961), range(1970, 1978), range(1982, 1993), range(2001, 2009), range(2017, 2021)),
}
COUNTRIES = re.compile(
    r"\b(Britain|England|British|Spain|Spanish|France|French|Mexic\w+|German\w*|Russia\w*|Soviet|China|Chinese|Japan\w*"
    r"|Cuba\w*|Iraq\w*|Iran\w*|Vietnam\w*|Korea\w*|Ital\w+|Canad\w+|Brazil\w*|Turk\w+|Europe\w*|Africa\w*|Asia\w*)\b"
)
MONEY = re.compile(r"\$|\b(dollars?|treasury|budget|tax(es|ation)?|revenues?|appropriations?|coins?|currency)\b", re.I)


def _years(first: Collection[int], second: Collection[int]) -> Callable[[int, str], int | None]:
    """Return a task that tells two sets of years apart, and uses no passage of another year."""
    return lambda year, text: 0 if year in first else 1 if year in second else None


TASKS: dict[str, Callable[[int, str], int | None]] = {
    "party": _years(DEMOCRATIC, REPUBLICAN),
    "before-1850": _years(range(1790, 1850), range(1850, 1913)),
    "before-1969": _years(range(1913, 1969), range(1969, 2022)),
    "country": lambda year, text: int(bool(COUNTRIES.search(text))),
    "money": lambda year, text: int(bool(MONEY.search(text))),
    "digits": lambda year, text: int(bool(re.search(r"\d", text))),
}


def passages(cache: Path, task: str, split: str) -> tuple[list[str], list[int]]:
    """Return as many passages of each class of a task, and their classes: `LIMIT` for training and `TEST` for testing."""
    table = concat([read_csv(sotu(cache) / era / f"{split}.csv") for era in ERAS])
    table["label"] = [TASKS[task](year, text) for year, text in zip(table["year"], table["text"], strict=True)]
    table = table.dropna(subset="label").sample(frac=1, random_state=0)
    most = (LIMIT if split == "train" else TEST) // 2
    table = table.groupby("label").head(min(most, *table["label"].value_counts()))
    return list(table["text"]), [int(label) for label in table["label"]]


def examples(cache: Path, task: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the passages of a task and a split as token ids with labels."""
    texts, labels = passages(cache, task, split)
    return Dataset.from_dict({**tokenizer(texts, truncation=True, max_length=TOKENS), "labels": labels})
