"""Trials behind the default: which rule turns sources away, and how far to go with fine-tuning, on real sentiment.

Run it with `python -m tests.benchmarks.trials nyt amazonHL movie` after `python -m tests.benchmarks.sources --kinds
lora`. All models are small enough to be kept in memory, so that many rules are tried quickly, outside the engine. The
target domain gives labels, the sources are the adapters of the six others. For each rule sources are averaged one after
the other, the one with the lowest loss on the labels first or in a random order; a source stays

- `all`: always;
- `harm`: unless the mean loss of the labels rises by more than its standard error;
- `rise`: unless it rises;
- `help`: only if it falls by more than its standard error.

Losses are calibrated, as in `grasp_hf.evidence`. `merged` and `tuned` are loss and accuracy on 500 test texts before
and after fine-tuning. With `--line` the merge of `harm` is fine-tuned on all labels, and on two halves of them whose models
are averaged, and scored half-way and at the end. Results stand in `tests/benchmarks/results/trials.jsonl`.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pandas import read_csv
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from grasp_hf.evidence import SCALES
from tests.benchmarks.packages import cache_folder
from tests.benchmarks.sentiment import DOMAINS, LABELS
from tests.benchmarks.sources import source_folder

RESULTS = Path(__file__).parent / "results" / "trials.jsonl"
POOL, TEST, TOKENS, BATCH = 2000, 500, 32, 16
STEPS = {64: 32, 256: 96}
RULES = ("all", "harm", "rise", "help")

State = dict[str, Tensor]
Samples = list[tuple[list[int], int]]


def samples(cache: Path, domain: str, split: str, limit: int) -> Samples:
    """Return texts as token ids, with the index of their label."""
    tokenizer = AutoTokenizer.from_pretrained(cache / "models" / "minilm")
    table = read_csv(cache / "sentiment" / domain / f"{split}.csv", keep_default_na=False)[:limit]
    ids = tokenizer(list(table["text"]), truncation=True, max_length=TOKENS)["input_ids"]
    return list(zip(ids, [LABELS.index(label) for label in table["label"]], strict=True))


def batch(rows: Samples) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs and labels of samples."""
    width = max(len(ids) for ids, _ in rows)
    inputs = {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
    }
    return inputs, torch.tensor([label for _, label in rows])


class Laboratory:
    """A network whose weights are exchanged for those of states."""

    def __init__(self, cache: Path) -> None:
        """Load the base model."""
        self.net: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(cache / "models" / "minilm")
        self.parameters = dict(self.net.named_parameters())

    @torch.no_grad()
    def put(self, state: State) -> None:
        """Let the network hold `state`."""
        for name, value in state.items():
            self.parameters[name].copy_(value)

    @torch.no_grad()
    def logits(self, state: State, rows: Samples) -> tuple[Tensor, Tensor]:
        """Return logits `(n, classes)` and labels `(n,)`."""
        self.put(state)
        self.net.eval()
        order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
        found = torch.zeros(len(rows), len(LABELS))
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            found[chosen] = self.net(**batch([rows[index] for index in chosen])[0]).logits
        return found, torch.tensor([label for _, label in rows])

    def calibrated(self, state: State, rows: Samples) -> Tensor:
        """Return the loss of each sample at the scale of the logits that makes their sum least."""
        logits, labels = self.logits(state, rows)
        scaled = [cross_entropy(logits * scale, labels, reduction="none") for scale in SCALES]
        return min(scaled, key=lambda values: float(values.sum()))

    def score(self, state: State, rows: Samples) -> tuple[float, float]:
        """Return loss and accuracy."""
        logits, labels = self.logits(state, rows)
        return float(cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).float().mean())

    def tuned(self, state: State, rows: Samples, steps: int, rate: float, seed: int) -> State:
        """Return the state after fine-tuning with AdamW and a linear schedule."""
        self.put(state)
        self.net.train()
        torch.manual_seed(seed)
        shuffled, queue = random.Random(seed), list[int]()
        adam = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: max(0.0, 1 - step / steps))
        for _ in range(steps):
            if len(queue) < min(BATCH, len(rows)):
                more = list(range(len(rows)))
                shuffled.shuffle(more)
                queue += more
            chosen, queue = queue[:BATCH], queue[BATCH:]
            inputs, labels = batch([rows[index] for index in chosen])
            adam.zero_grad()
            cross_entropy(self.net(**inputs).logits, labels).backward()
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            adam.step()
            schedule.step()
        return {name: value.detach().clone() for name, value in self.parameters.items()}


def between(start: State, end: State, share: float) -> State:
    """Return a point of the line between two states."""
    return {name: torch.lerp(start[name], end[name], share) for name in start}


def sources(cache: Path, target: str) -> dict[str, State]:
    """Return the weights of every adapter but the target's, merged into the base."""
    found = {}
    for domain in (domain for domain in DOMAINS if domain != target):
        base = AutoModelForSequenceClassification.from_pretrained(cache / "models" / "minilm")
        merged = PeftModel.from_pretrained(base, source_folder(cache, "lora", domain)).merge_and_unload()
        found[domain] = {name: value.detach().clone() for name, value in merged.named_parameters()}
    return found


def stays(rule: str, before: Tensor, after: Tensor) -> bool:
    """Whether a source stays, by the losses without it and with it."""
    difference = after - before
    mean, error = float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
    return {"all": True, "harm": mean <= error, "rise": mean <= 0, "help": mean <= -error}[rule]


def merged(
    lab: Laboratory, states: dict[str, State], order: list[str], labels: Samples, rule: str
) -> tuple[State, list[str]]:
    """Return the mean of the sources that stay, and their names."""
    state, taken = states[order[0]], [order[0]]
    losses = lab.calibrated(state, labels)
    for name in order[1:]:
        candidate = between(state, states[name], 1 / (len(taken) + 1))
        found = lab.calibrated(candidate, labels)
        if stays(rule, losses, found):
            state, losses = candidate, found
            taken.append(name)
    return state, taken


def trial(cache: Path, target: str, size: int, seed: int, rate: float, line: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each rule and order, or for each way of fine-tuning."""
    lab, states, test = Laboratory(cache), sources(cache, target), samples(cache, target, "test", TEST)
    pool = samples(cache, target, "train", POOL)
    labels = [pool[index] for index in random.Random(seed).sample(range(len(pool)), size)]
    by_loss = sorted(states, key=lambda name: float(lab.calibrated(states[name], labels).mean()))
    given = list(states)
    random.Random(seed + 99).shuffle(given)
    common = {"target": target, "labels": size, "seed": seed, "rate": rate}
    if line:
        state, taken = merged(lab, states, by_loss, labels, "harm")
        whole = lab.tuned(state, labels, STEPS[size], rate, seed)
        halves = [lab.tuned(state, labels[k::2], STEPS[size] // 2, rate, seed + k) for k in (0, 1)]
        for way, end in {"whole": whole, "halves": between(halves[0], halves[1], 0.5)}.items():
            for share in (0.0, 0.5, 1.0):
                yield common | {"way": way, "share": share, "tuned": lab.score(between(state, end, share), test)}
        return
    known: dict[frozenset[str], dict[str, Any]] = {}
    for name, order in {"loss": by_loss, "given": given}.items():
        for rule in RULES:
            state, taken = merged(lab, states, order, labels, rule)
            if frozenset(taken) not in known:
                tuned = lab.tuned(state, labels, STEPS[size], rate, seed)
                known[frozenset(taken)] = {"merged": lab.score(state, test), "tuned": lab.score(tuned, test)}
            yield common | {"order": name, "rule": rule, "taken": taken} | known[frozenset(taken)]


def main() -> None:
    """Run trials, append their rows to the results, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=DOMAINS)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--sizes", nargs="+", type=int, choices=STEPS, default=[64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--line", action="store_true", help="ways of fine-tuning instead of rules")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for target in args.targets:
        for size in args.sizes:
            for seed in args.seeds:
                for row in trial(args.cache, target, size, seed, args.rate, args.line):
                    print(row, flush=True)
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
