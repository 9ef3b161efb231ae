"""The sources of the benchmarks: each is the base model of a benchmark, fine-tuned on one domain.

Run it with `python -m tests.benchmarks.sources`; first it makes the data of `tests.benchmarks.data`. All sources of a
kind start from the same model with the same head, and each has its own seed. For each source a line shows its accuracy
(for a language model, its negative log-likelihood per token) on the test samples of its domain. Sources that are
already in the cache stay unchanged. `--tables` prints the scores of all sources on all domains instead.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoProcessor,
    set_seed,
)

from tests.benchmarks import emoji, sentiment, smollm, sotu, unrelated
from tests.benchmarks.packages import cache_folder, complete
from tests.benchmarks.sentiment import TOKENS
from tests.benchmarks.training import score, train_

__all__ = ["KINDS", "TOKENS", "source_folder"]


Examples = Callable[[Path, str, str, Any], Any]  # cache, domain, split and processor -> samples


@dataclass(frozen=True)
class Kind:
    """Sources that are trained in the same way.

    Attributes:
        benchmark: Folder in the cache.
        domains: Domains, with one source each; the position of a domain is the seed of its source.
        auto: Class that loads the model.
        base: Returns the folder of the model that the sources start from.
        examples: Returns the samples of a domain and a split.
        arguments: Arguments of `train_`.
        lora: Arguments of `peft.LoraConfig`; `None` trains the whole model.
        split: Split that the sources are trained on.
        targets: Further domains on which `--tables` scores the sources, each with the function that returns its samples.
    """

    benchmark: str
    domains: Sequence[str]
    auto: Any
    base: Callable[[Path], Path]
    examples: Examples
    arguments: dict[str, Any]
    lora: dict[str, Any] | None = None
    split: str = "train"
    targets: Mapping[str, Examples] = field(default_factory=dict)


LORA: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier"],
    "task_type": "SEQ_CLS",
}
LORA_OF_LANGUAGE_MODEL: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
TEXTS = (
    "sentiment",
    tuple(sentiment.DOMAINS),
    AutoModelForSequenceClassification,
    sentiment.minilm,
    sentiment.examples,
)
STYLES, NEWER = tuple(emoji.STYLES), tuple(style for style in emoji.STYLES if style != emoji.OLDEST)
IMAGES = AutoModelForImageClassification
LORA_TRAINING = {"learning_rate": 1e-3, "num_train_epochs": 3}
KINDS = {
    "lora": Kind(*TEXTS, LORA_TRAINING, LORA),
    "full": Kind(*TEXTS, {"learning_rate": 5e-5, "num_train_epochs": 2}),
    "gpt2": Kind(
        "sotu",
        tuple(sotu.ERAS),
        AutoModelForCausalLM,
        sotu.gpt2,
        sotu.examples,
        {"learning_rate": 1e-3, "num_train_epochs": 3},
    ),
    "dinov2": Kind(
        "emoji",
        STYLES,
        IMAGES,
        emoji.dinov2,
        emoji.examples,
        {"learning_rate": 5e-5, "head_rate": 1e-3, "num_train_epochs": 5},
        split="source",
    ),
    "resnet": Kind(
        "emoji",
        NEWER,
        IMAGES,
        emoji.resnet,
        emoji.examples,
        {"learning_rate": 1e-3, "num_train_epochs": 15},
        split="source",
    ),
    "smollm2": Kind(
        "smollm",
        smollm.SOURCES,
        AutoModelForCausalLM,
        smollm.smollm2,
        smollm.examples,
        {"learning_rate": 1e-3, "num_train_epochs": 1, "bf16": True, "use_cpu": True},
        LORA_OF_LANGUAGE_MODEL,
        targets=dict.fromkeys(smollm.TARGETS, smollm.examples),
    ),
    "unrelated": Kind(
        "unrelated",
        tuple(unrelated.TASKS),
        AutoModelForSequenceClassification,
        sentiment.minilm,
        unrelated.examples,
        LORA_TRAINING,
        LORA,
        targets=dict.fromkeys(sentiment.DOMAINS, sentiment.examples),
    ),
}


def source_folder(cache: Path, kind: str, domain: str) -> Path:
    """Return the folder for the source of a kind and a domain."""
    return cache / KINDS[kind].benchmark / "sources" / f"{kind}-{domain}"


def train(kind: Kind, domain: str, cache: Path, folder: Path) -> float:
    """Train a source, save it in `folder`, and return its score on the test samples of its domain."""
    base = kind.base(cache)
    seed = kind.domains.index(domain)
    set_seed(seed)
    processor = AutoProcessor.from_pretrained(base)
    model = kind.auto.from_pretrained(base)
    if kind.lora:
        model = get_peft_model(model, LoraConfig(**kind.lora))
    else:
        processor.save_pretrained(folder)
    train_(model, processor, kind.examples(cache, domain, kind.split, processor), seed, **kind.arguments)
    model.save_pretrained(folder)
    return score(model, processor, kind.examples(cache, domain, "test", processor))


def table(name: str, cache: Path) -> None:
    """Print the score of the base model and of every source of a kind on the test samples of every domain."""
    kind = KINDS[name]
    processor = AutoProcessor.from_pretrained(kind.base(cache))
    examples = {**dict.fromkeys(kind.domains, kind.examples), **kind.targets}
    tests = {domain: read(cache, domain, "test", processor) for domain, read in examples.items()}
    print(f"\n| {name} | {' | '.join(tests)} |\n|---|{'---|' * len(tests)}")
    folders = {"base": kind.base(cache), **{domain: source_folder(cache, name, domain) for domain in kind.domains}}
    for row, folder in folders.items():
        if (folder / "adapter_config.json").exists():
            model = PeftModel.from_pretrained(kind.auto.from_pretrained(kind.base(cache)), folder)
        else:
            model = kind.auto.from_pretrained(folder)
        scores = [f"{score(model, processor, test):.3f}" for test in tests.values()]
        print(f"| {row} | {' | '.join(scores)} |", flush=True)


def main() -> None:
    """Train the sources that the cache lacks, or print the tables of their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--domains", nargs="+", help="domains to train (default: all of every kind)")
    parser.add_argument("--tables", action="store_true", help="print the scores of all sources on all domains")
    args = parser.parse_args()
    cache = args.cache.absolute()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.kinds:
        if args.tables:
            table(name, cache)
            continue
        for domain in (domain for domain in KINDS[name].domains if domain in (args.domains or KINDS[name].domains)):
            folder = source_folder(cache, name, domain)
            if folder.exists():
                print(f"{folder.name:24} exists", flush=True)
                continue
            start = time.perf_counter()
            with complete(folder) as new:
                value = train(KINDS[name], domain, cache, new)
            print(f"{folder.name:24} {value:.3f} {time.perf_counter() - start:6.0f} s", flush=True)


if __name__ == "__main__":
    main()
