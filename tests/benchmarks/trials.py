"""Tries rules for the default on real data: which sources to refuse, and how far to fine-tune.

Run it with `python -m tests.benchmarks.trials lora:nyt dinov2:noto` after `python -m tests.benchmarks.sources`. An
argument is the kind of the sources and the domain of the labels. All models are small enough to stay in memory, so
this tries many rules quickly without a merger. Rules choose by the losses on the labels, calibrated as in
`grasp_hf.validation.losses`. A score is loss, accuracy and calibrated loss on `TEST` test samples.

`rules`: sources are averaged sequentially, by increasing loss (`loss`) or in a random order (`given`). A source stays

- `first`: if it is the first;
- `all`: always;
- `harm`: unless the mean loss rises by more than its standard error, `harm*2`: by more than twice that;
- `rise`: unless the loss rises;
- `help`: only if the loss falls by more than its standard error.

`merged` is the score of the merge, `end` the score after fine-tuning, and `half` the score of the mean of the weights
before and after.

`others`: more rules with `harm`, by loss. `base`: the average begins with the base model. `partial`: the target moves
a part of the way to the source, only in layers whose gradients on the labels agree in target and source (a cosine
above `AGREE`, as in the paper).

`means`: the average of `harm`, by loss, weights every model equally (`mean`), each parameter by its Fisher information
in each model (`fisher`), or for each source by the one of both with the lower loss (`better`).

`line`: the merge of `harm`, by loss, is fine-tuned on all labels (`whole`), or on two halves of them whose models are
averaged (`halves`). It is scored along the line between the weights before and after. `least` is the point where the
loss of each half in the other half's model is lowest. Among the points where that loss is at most one or two of its
standard errors higher, `farthest` is the last and `middle` the middle one; `no worse` keeps only points where the
loss, calibrated or not, is at most that of the start. The loss is calibrated or plain. `base-line`: the same from the
base model.

The results are in `tests/benchmarks/results/trials.json`. `--table` prints their means, and differences to the first
row, for all `--parts` and `--kinds`.
"""

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoProcessor, PreTrainedModel

from grasp_hf.comparison.results import interval
from grasp_hf.record.text import markdown_table
from grasp_hf.tensors.units import Unit, movable_tensors, partition
from grasp_hf.validation.losses import SCALES
from tests.benchmarks.compare import write_record
from tests.benchmarks.packages import cache_folder
from tests.benchmarks.running_fisher import RunningFisher
from tests.benchmarks.sources import KINDS, Kind, source_folder
from tests.benchmarks.training import collator_for

RESULTS = Path(__file__).parent / "results" / "trials.json"
TEST, BATCH = 400, 16
EPOCHS = {64: 8, 256: 6}
RULES = ("harm", "harm*2", "first", "all", "rise", "help")
PARTS, AGREE = (0.25, 0.5, 1.0), 0.3
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
POINTS = {"merged", "half", "end", *map(str, SHARES)}

State = dict[str, Tensor]
Score = tuple[float, float, float]
LINES = ("line", "base-line")
ALL = ("rules", "others", "means", *LINES)
MEANS = ("mean", "fisher", "better")
FIRST = {"rules": ("harm, loss", "half"), "means": ("mean", "half")}
MEASURES = ("loss", "accuracy", "calibrated loss")


class Laboratory:
    """A network that takes the weights of different states."""

    def __init__(self, kind: Kind, cache: Path) -> None:
        """Load the base model."""
        base = kind.base(cache)
        self.processor = AutoProcessor.from_pretrained(base)
        self.net: PreTrainedModel = kind.auto.from_pretrained(base)
        self.collate = collator_for(self.net, self.processor)
        self.base = self.state()

    def draw(self, samples: Sequence[Any], count: int, seed: int) -> list[Any]:
        """Return `count` random samples."""
        return [samples[index] for index in random.Random(seed).sample(range(len(samples)), min(count, len(samples)))]

    def state(self) -> State:
        """Return a copy of the network's weights and statistics."""
        return {name: value.clone() for name, value in self.net.state_dict().items()}

    @torch.no_grad()
    def logits(self, state: State, samples: list[Any]) -> tuple[Tensor, Tensor]:
        """Return logits `(n, classes)` and labels `(n,)`."""
        self.net.load_state_dict(state)
        self.net.eval()
        found, labels = [], []
        for start in range(0, len(samples), 64):
            batch = self.collate(samples[start : start + 64])
            found.append(self.net(**batch).logits)
            labels.append(batch["labels"])
        return torch.cat(found), torch.cat(labels)

    def losses(self, state: State, samples: list[Any], scales: Sequence[float] = (1.0,)) -> Tensor:
        """Return the loss of each sample, at the scale of the logits with the lowest sum of losses."""
        logits, labels = self.logits(state, samples)
        scaled = [cross_entropy(logits * scale, labels, reduction="none") for scale in scales]
        return min(scaled, key=lambda values: float(values.sum()))

    def score(self, state: State, samples: list[Any]) -> Score:
        """Return the numbers that `MEASURES` names."""
        logits, labels = self.logits(state, samples)
        return measure(logits, labels)

    def gradients(self, state: State, samples: list[Any]) -> State:
        """Return the gradient of the loss, summed over batches, of each parameter that has one."""
        self.net.load_state_dict(state)
        self.net.eval()
        self.net.zero_grad()
        for start in range(0, len(samples), BATCH):
            self.net(**self.collate(samples[start : start + BATCH])).loss.backward()
        return {name: value.grad.clone() for name, value in self.net.named_parameters() if value.grad is not None}

    def tuned(self, state: State, samples: list[Any], rate: float, seed: int, epochs: int) -> State:
        """Return the state after fine-tuning with AdamW and a linear schedule."""
        self.net.load_state_dict(state)
        self.net.train()
        torch.manual_seed(seed)
        steps = epochs * math.ceil(len(samples) / BATCH)
        adam = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: max(0.0, 1 - step / steps))
        for _ in range(epochs):
            for chosen in torch.randperm(len(samples)).split(BATCH):
                adam.zero_grad()
                self.net(**self.collate([samples[index] for index in chosen.tolist()])).loss.backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
                adam.step()
                schedule.step()
        return self.state()


def measure(logits: Tensor, labels: Tensor) -> Score:
    """Return the numbers that `MEASURES` names; the calibrated loss is that of the best scale of the logits."""
    calibrated = min(float(cross_entropy(logits * scale, labels)) for scale in SCALES)
    return float(cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).float().mean()), calibrated


def interpolate(start: State, end: State, fraction: float) -> State:
    """Return a point of the line between two states; integers are those of the start."""
    return {
        name: torch.lerp(value, end[name], fraction) if value.is_floating_point() else value
        for name, value in start.items()
    }


def source_states(kind: str, cache: Path, target: str) -> dict[str, State]:
    """Return the weights of every source except the target's; adapters are merged into the base."""
    found = {}
    for domain in KINDS[kind].domains:
        folder = source_folder(cache, kind, domain)
        if domain == target or not folder.exists():
            continue
        if KINDS[kind].lora:
            base = KINDS[kind].auto.from_pretrained(KINDS[kind].base(cache))
            model: Any = PeftModel.from_pretrained(base, folder).merge_and_unload()
        else:
            model = KINDS[kind].auto.from_pretrained(folder)
        found[domain] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return found


def agreeing(units: Sequence[Unit], a: State, b: State) -> set[str]:
    """Return the tensors of units whose gradients have a cosine above `AGREE`; without a gradient there is none."""
    found = set()
    for unit in units:
        names = [name for name in unit.tensors if name in a and name in b]
        if names:
            one, other = (torch.cat([gradient[name].flatten() for name in names]) for gradient in (a, b))
            if cosine_similarity(one, other, dim=0) > AGREE:
                found |= {*unit.tensors}
    return found


def harms(before: Tensor, after: Tensor, errors: float = 1.0) -> bool:
    """Return whether the mean rises by more than `errors` of its standard errors."""
    difference = after - before
    return float(difference.mean()) > errors * float(difference.std()) / math.sqrt(len(difference))


def merge_by_rule(
    lab: Laboratory, states: dict[str, State], order: list[str], labels: list[Any], rule: str
) -> tuple[State, list[str]]:
    """Return the merge by a rule, and the names of its sources."""
    kind, _, part = rule.partition(" ")
    state, taken = states[order[0]], [order[0]]
    losses = lab.losses(state, labels, SCALES)
    units = partition(lab.net, "layer")
    for name in [] if rule == "first" else order[1:]:
        if kind == "partial":
            own = agreeing(units, lab.gradients(state, labels), lab.gradients(states[name], labels))
            candidate = state | interpolate({key: state[key] for key in own}, states[name], float(part))
        else:
            candidate = interpolate(state, states[name], 1 / (len(taken) + 1))
        found = lab.losses(candidate, labels, SCALES)
        errors = {"all": math.inf, "harm*2": 2.0, "rise": 0.0, "help": -1.0}.get(rule, 1.0)
        if not harms(losses, found, errors):
            state, losses = candidate, found
            taken.append(name)
    return state, taken


def rule_rows(
    lab: Laboratory,
    states: dict[str, State],
    orders: dict[str, list[str]],
    labels: list[Any],
    test: list[Any],
    rate: float,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each rule and order."""
    known: dict[frozenset[str], dict[str, Score]] = {}
    for name, order in orders.items():
        for rule in RULES:
            state, taken = merge_by_rule(lab, states, order, labels, rule)
            if frozenset(taken) not in known:
                known[frozenset(taken)] = score_before_and_after(lab, state, labels, test, rate, seed)
            yield {"way": f"{rule}, {name}", "taken": taken, **known[frozenset(taken)]}


def other_rows(
    lab: Laboratory,
    states: dict[str, State],
    order: list[str],
    labels: list[Any],
    test: list[Any],
    rate: float,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for the average that begins with the base, and one for each of `PARTS`."""
    found = {"base": merge_by_rule(lab, states | {"base": lab.base}, ["base", *order], labels, "harm")}
    found |= {f"partial {part}": merge_by_rule(lab, states, order, labels, f"partial {part}") for part in PARTS}
    for rule, (state, taken) in found.items():
        yield {"way": f"{rule}, loss", "taken": taken, **score_before_and_after(lab, state, labels, test, rate, seed)}


def merge_by_means(
    lab: Laboratory, states: dict[str, State], order: list[str], labels: list[Any], rule: str
) -> tuple[State, list[str], list[str]]:
    """Return the merge by one of `MEANS`, the names of its sources, and those weighted by Fisher information."""
    state, taken, weighted = states[order[0]], [order[0]], []
    losses = lab.losses(state, labels, SCALES)
    batches = [lab.collate(labels[start : start + BATCH]) for start in range(0, len(labels), BATCH)]
    tensors, units = movable_tensors(lab.net), partition(lab.net, "layer")
    total, own = ({name: torch.zeros_like(tensor) for name, tensor in tensors.items()} for _ in range(2))
    running = RunningFisher(total, own)
    for name in order[1:]:
        share, source = 1 / (len(taken) + 1), {key: states[name][key] for key in tensors}
        candidates = {} if rule == "fisher" else {"mean": interpolate(state, states[name], share)}
        if rule != "mean":
            lab.net.load_state_dict(state)
            start = {key: tensor.detach().clone() for key, tensor in tensors.items()}
            shares = {unit.name: share for unit in units}
            mixes = running.measure(lab.net, source, start, units, shares, batches, seed=0)
            running.put_(tensors, start, source, units, mixes)
            candidates["fisher"] = lab.state()
        found = {way: lab.losses(candidate, labels, SCALES) for way, candidate in candidates.items()}
        way = min(found, key=lambda way: float(found[way].mean()))
        if not harms(losses, found[way]):
            state, losses = candidates[way], found[way]
            taken.append(name)
            weighted += [name] * (way == "fisher")
            if rule != "mean":
                running.add()
    return state, taken, weighted


def score_before_and_after(
    lab: Laboratory, state: State, labels: list[Any], test: list[Any], rate: float, seed: int
) -> dict[str, Score]:
    """Return the scores of a merge before and after fine-tuning, and half-way between."""
    end = lab.tuned(state, labels, rate, seed, EPOCHS[len(labels)])
    points = {"merged": state, "half": interpolate(state, end, 0.5), "end": end}
    return {point: lab.score(state, test) for point, state in points.items()}


def line_rows(
    lab: Laboratory, start: State, labels: list[Any], test: list[Any], rate: float, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each way of fine-tuning."""
    epochs = EPOCHS[len(labels)]
    whole = lab.tuned(start, labels, rate, seed, epochs)
    yield {"way": "whole"} | {str(share): lab.score(interpolate(start, whole, share), test) for share in SHARES}
    halves = labels[::2], labels[1::2]
    ends = [lab.tuned(start, half, rate, seed + k, epochs) for k, half in enumerate(halves)]
    chosen = {}
    line_of = {
        kind: [
            torch.cat([lab.losses(interpolate(start, ends[k], share), halves[1 - k], scales) for k in (0, 1)])
            for share in SHARES
        ]
        for kind, scales in {"calibrated": SCALES, "plain": (1.0,)}.items()
    }
    better = {
        share
        for number, share in enumerate(SHARES)
        if any(judged[number].mean() <= judged[0].mean() for judged in line_of.values())
    }
    for kind, judged in line_of.items():
        lowest = min(judged, key=lambda losses: float(losses.mean()))
        chosen[f"least, {kind}"] = next(s for s, losses in zip(SHARES, judged, strict=True) if losses is lowest)
        for errors, name in ((1.0, ""), (2.0, ", 2 errors")):
            as_good = [s for s, losses in zip(SHARES, judged, strict=True) if not harms(lowest, losses, errors)]
            chosen[f"middle, {kind}{name}"] = as_good[len(as_good) // 2]
            chosen[f"farthest, {kind}{name}"] = max(as_good)
            chosen[f"farthest, {kind}{name}, no worse"] = max({*as_good} & better)
    mean = interpolate(ends[0], ends[1], 0.5)
    scores = {str(share): lab.score(interpolate(start, mean, share), test) for share in SHARES}
    yield {"way": "halves", "chosen": chosen} | scores


def trial_rows(
    cache: Path, kind: str, target: str, size: int, seed: int, rate: float, parts: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one set of labels."""
    lab, states = Laboratory(KINDS[kind], cache), source_states(kind, cache, target)
    test, pool = (KINDS[kind].examples(cache, target, split, lab.processor) for split in ("test", "train"))
    test, labels = lab.draw(test, TEST, 0), lab.draw(pool, size, seed)
    given = list(states)
    random.Random(seed + 99).shuffle(given)
    by_loss = sorted(states, key=lambda name: float(lab.losses(states[name], labels, SCALES).mean()))
    common = {"kind": kind, "target": target, "labels": size, "seed": seed, "rate": rate}
    if "rules" in parts:
        probabilities = [lab.logits(state, test)[0].softmax(-1) for state in states.values()]
        _, answers = lab.logits(states[given[0]], test)
        mean = torch.stack(probabilities).mean(0)
        yield common | {"part": "rules", "way": "ensemble", "merged": measure(mean.log(), answers)}
        orders = {"loss": by_loss, "given": given}
        for row in rule_rows(lab, states, orders, labels, test, rate, seed):
            yield common | {"part": "rules"} | row
    if "others" in parts:
        for row in other_rows(lab, states, by_loss, labels, test, rate, seed):
            yield common | {"part": "rules"} | row
    if "means" in parts:
        for rule in MEANS:
            state, taken, weighted = merge_by_means(lab, states, by_loss, labels, rule)
            row = {"part": "means", "way": rule, "taken": taken, "weighted": weighted}
            yield common | row | score_before_and_after(lab, state, labels, test, rate, seed)
    if "line" in parts:
        start, taken = merge_by_rule(lab, states, by_loss, labels, "harm")
        for row in line_rows(lab, start, labels, test, rate, seed):
            yield common | {"part": "line", "taken": taken} | row
    if "base-line" in parts:
        for row in line_rows(lab, lab.base, labels, test, rate, seed):
            yield common | {"part": "base-line"} | row


def table(rows: list[dict[str, Any]], part: str, number: int) -> str:
    """Return the table of means of a measure by way and point, with differences to the row of `FIRST`."""
    runs: dict[tuple[str, str], dict[tuple[Any, ...], float]] = {}
    lines: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == part:
            run = tuple(row[key] for key in ("kind", "target", "labels", "seed", "rate"))
            for point, score in row.items():
                if point in POINTS and isinstance(score, list):
                    runs.setdefault((row["way"], point), {})[run] = score[number]
            lines.setdefault(run, {})[row["way"]] = row
    for run, ways in lines.items() if part in LINES else ():
        for rule, share in ways.get("halves", {}).get("chosen", {}).items():
            for way, row in ways.items():
                if str(share) in row:
                    runs.setdefault((way, rule), {})[run] = row[str(share)][number]
    first = runs.get(FIRST.get(part, ("whole", "farthest, plain, 2 errors, no worse")))
    if not first:
        return "nothing yet"
    return markdown_table(
        [
            {
                "way": way,
                "point": point,
                "runs": str(len(values)),
                "mean": f"{statistics.fmean(values.values()):.4f}",
                "difference": interval([values[run] - first[run] for run in values if run in first], signed=True),
            }
            for (way, point), values in runs.items()
        ]
    )


def save(row: dict[str, Any]) -> None:
    """Add a row to the results file."""
    record = json.loads(RESULTS.read_text())
    record["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
    record["results"].append(row)
    write_record(RESULTS, record)


def main() -> None:
    """Run trials, append their rows to the results, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="KIND:DOMAIN")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--sizes", nargs="+", type=int, choices=EPOCHS, default=[64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--parts", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--table", action="store_true", help="also print the means of all results of --parts")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="kinds in the table (default: all)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for seed in args.seeds:
        for size in args.sizes:
            for name in args.targets:
                kind, _, target = name.partition(":")
                for row in trial_rows(args.cache, kind, target, size, seed, args.rate, args.parts):
                    print(row, flush=True)
                    save(row)
    if args.table:
        rows = json.loads(RESULTS.read_text())["results"]
        rows = [row for row in rows if row["kind"] in args.kinds]
        parts = {"rules" if part == "others" else part for part in args.parts}
        for part in (part for part in ("rules", "means", *LINES) if part in parts):
            for number, measure in enumerate(MEASURES):
                print(f"\n{part}, {measure}\n\n{table(rows, part, number)}")


if __name__ == "__main__":
    main()
