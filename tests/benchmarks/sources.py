"""Sources as others would publish them: MiniLM fine-tuned on the sentiment of one domain, as an adapter or in full.

Run it with `python -m tests.benchmarks.sources`; it fetches what `tests.benchmarks.data` fetches, first. Every source
starts from the same model with the same untrained head, and has a seed of its own. A line tells its accuracy on the
test texts of its domain; a source that the cache holds already is left as it is.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from pandas import read_csv
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tests.benchmarks.data import DOMAINS, LABELS, cache_folder, complete, minilm, sentiment

LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier"],
    "task_type": "SEQ_CLS",
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 1e-3, "num_train_epochs": 3},
    "full": {"learning_rate": 5e-5, "num_train_epochs": 2},
}
LIMIT, TOKENS = 2000, 64


def source_folder(cache: Path, kind: str, domain: str) -> Path:
    """Return where the source of a kind, `lora` or `full`, for a domain is or will be."""
    return cache / "sentiment" / "sources" / f"{kind}-{domain}"


def examples(file: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the first `LIMIT` texts of a file as token ids with labels."""
    table = read_csv(file, keep_default_na=False)[:LIMIT]
    tokens = tokenizer(list(table["text"]), truncation=True, max_length=TOKENS)
    return Dataset.from_dict({**tokens, "labels": [LABELS.index(label) for label in table["label"]]})


def train(kind: str, domain: str, cache: Path, folder: Path) -> float:
    """Save a source in `folder`; return its accuracy on the test texts of its domain."""
    base = minilm(cache)
    seed = list(DOMAINS).index(domain)
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(**LORA))
    else:
        tokenizer.save_pretrained(folder)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **KINDS[kind],
    )
    trainer = Trainer(
        model,
        arguments,
        processing_class=tokenizer,
        train_dataset=examples(sentiment(cache) / domain / "train.csv", tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    test = trainer.predict(examples(sentiment(cache) / domain / "test.csv", tokenizer))
    return float(np.mean(np.argmax(test.predictions, -1) == test.label_ids))


def main() -> None:
    """Train the sources that the cache lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for kind in args.kinds:
        for domain in args.domains:
            folder = source_folder(args.cache.absolute(), kind, domain)
            if folder.exists():
                print(f"{folder.name:16} is already there", flush=True)
                continue
            start = time.perf_counter()
            with complete(folder) as new:
                right = train(kind, domain, args.cache.absolute(), new)
            print(f"{folder.name:16} {right:.3f} {time.perf_counter() - start:6.0f} s", flush=True)


if __name__ == "__main__":
    main()
