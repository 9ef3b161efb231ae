"""Does a merge that is killed at any moment go on, and end with the same bits?

Run it with `python -m tests.benchmarks.crash`; `--table` prints the record and runs nothing. Each case is a real process
that kills itself with SIGKILL, is started again until it ends, and is compared with a process that was not disturbed.
Half of the moments are random changes of a name or openings of a file in its folders, counted by Python's audit events,
which the package does not see. The other half are random times. The seed draws them.

The cases `merge` call `GraspMerger.merge(resume_from=…)` on tiny models, by every method. The case `command` runs
`grasp-hf merge` with sources on a loopback Hub, saves over an earlier merge, and pushes. A row counts

- `identical`: runs that end with the weights and the record of the undisturbed one;
- `read again`: weight files that a killed and resumed run has downloaded more often than the undisturbed one;
- `torn`: moments after a kill at which the output folder was neither the earlier nor the new merge.

`--cost` instead measures what the state costs: a BERT of 21 MB, three sources, 64 labels and the default settings, with
and without a state, each in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grasp_hf.record.text import markdown_table
from tests.benchmarks.compare import RESULTS, write_record
from tests.support.hub.server import HubServer

RECORD = RESULTS / "crash.json"
TOKEN = "hf_me"
MERGES: dict[str, dict[str, Any]] = {
    "weighted": {},
    "weighted, taught": {"taught": True},
    "weighted, with evaluation data": {"evaluates": True},
    "blend": {"method": "blend", "evaluates": True},
    "copy, ranked, fine-tuned between": {"method": "copy", "order": "rank", "finetune_epochs": 1, "initial_epochs": 1},
    "average, with LoRA": {"method": "average", "lora": {"r": 2}},
    "average, without labels": {"method": "average", "order": "given", "final_epochs": 0},
    "one adapter": {"output": "adapter", "rank": 3},
}
PRELOADED = ["tests.support.resumable", "grasp_hf.cli", "datasets"]

Start = Callable[[Path, int], Any]  # starts a process in a folder, which kills itself at a change; 0 never


def start_merge(asked: dict[str, Any], folder: Path, kill_at: int) -> Any:
    """Start a merge by the public verb."""
    from tests.support.resumable import watched

    return _process(watched, folder, asked, kill_at)


def start_command(arguments: list[str], folder: Path, kill_at: int) -> Any:
    """Start the command line."""
    return _process(run_command, folder, arguments, kill_at)


def run_command(folder: Path, arguments: list[str], kill_at: int) -> None:
    """Run the command line in `folder`, and kill this process at that change of a name below the folder."""
    from grasp_hf.cli import main
    from tests.support.resumable import count_changes

    os.chdir(folder)
    with open(folder.parent / f"{folder.name}.log", "a") as log:
        sys.stdout = sys.stderr = log
        changes = count_changes(str(folder), kill_at)
        code = main(arguments)
    (folder.parent / f"{folder.name}.changes").write_text(str(changes()))
    sys.exit(code)


def _process(target: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def kill_and_resume(start: Start, folder: Path, moment: float, changes: int, seconds: float, *, by_time: bool) -> int:
    """Kill a process at a moment in (0, 1) of its run, and start it again until it ends; return the number of kills."""
    if by_time:
        process = start(folder, 0)
        process.join(moment * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    else:
        process = start(folder, max(1, round(moment * changes)))
        process.join()
    kills = int(process.exitcode == -signal.SIGKILL)
    process = start(folder, 0)
    process.join()
    if process.exitcode != 0:
        log = folder.parent / f"{folder.name}.log"
        printed = log.read_text()[-3000:] if log.exists() else ""
        raise SystemExit(f"{folder}: the resumed process ended with {process.exitcode}\n{printed}")
    return kills


def run_merges(moments: int, seed: int, directory: Path) -> list[dict[str, Any]]:
    """Return a row for each of `MERGES`."""
    from tests.support.resumable import write_world

    rows = []
    for name, asked in MERGES.items():
        draw = random.Random(f"{seed} {name}")

        def start(folder: Path, kill_at: int, asked: dict[str, Any] = asked) -> Any:
            return start_merge(asked, folder, kill_at)

        def fresh(number: int, asked: dict[str, Any] = asked, name: str = name) -> Path:
            folder = directory / f"{list(MERGES).index(name)}-{number}"
            write_world(folder, adapters=3 if "output" in asked else 1)
            return folder

        whole = fresh(0)
        began = time.monotonic()
        start(whole, 0).join()
        seconds = time.monotonic() - began
        changes, expected = int((whole / "changes.txt").read_text()), read_result(whole)
        row: Counter[str] = Counter()
        for number in range(1, moments + 1):
            folder = fresh(number)
            by_time = number % 2 == 0
            row["killed"] += kill_and_resume(start, folder, draw.random(), changes, seconds, by_time=by_time)
            row["moments"] += 1
            row["identical"] += read_result(folder) == expected
            shutil.rmtree(folder)
        rows.append({"case": f"merge: {name}", "changes": changes, **row})
        print(rows[-1], flush=True)
    return rows


def read_result(folder: Path) -> Any:
    """Return what a merge has written, with the name of its folder left out."""
    return json.loads((folder / "result.json").read_text().replace(folder.name, "FOLDER"))


def run_commands(moments: int, seed: int, directory: Path, hub: HubServer) -> list[dict[str, Any]]:
    """Return the row of the case `command`."""
    from tests.support.models import LABELS, perturbed, saved, saved_adapter, tiny_model, write_images

    base = tiny_model("vit", labels=LABELS)
    for name, model in {"base": base, **{f"fine-{n}": perturbed(tiny_model("vit"), n) for n in (1, 2)}}.items():
        hub.add_repo(f"me/{name}", saved(model, directory / name))
    adapter = saved_adapter(tiny_model("vit"), "me/base", directory / "lora", target_modules=["q_proj"])
    hub.add_repo("me/lora", adapter)
    write_images(directory / "images", {"train": 6, "validation": 3, "test": 2})
    recipe = {
        "base_model": "me/base",
        "sources": ["me/fine-1", "me/lora", "me/fine-2"],
        "data": {"path": "imagefolder", "data_dir": str(directory / "images")},
        "batch_size": 4,
        "final_epochs": 2,
        "training_arguments": {"use_cpu": True},
    }
    (directory / "recipe.yaml").write_text(json.dumps(recipe))
    draw, row = random.Random(seed), Counter[str]()
    earlier = directory / "earlier"

    def start_in(repo: str) -> Start:
        arguments = ["merge", str(directory / "recipe.yaml"), "--output", "merged", "--push-to-hub", repo]
        return lambda folder, kill_at: start_command(arguments, folder, kill_at)

    def fresh(name: str) -> Path:
        folder = directory / name
        folder.mkdir()
        if (earlier / "merged").exists():
            shutil.copytree(earlier / "merged", folder / "merged")
        return folder

    def downloads(since: int) -> Counter[str]:
        whole = (own for own in hub.exchanges[since:] if own.method == "GET" and own.range is None)  # not the headers
        return Counter(own.path for own in whole if "/lfs/" in own.path)

    start_command(
        ["merge", str(directory / "recipe.yaml"), "--output", "merged", "seed=1"], fresh("earlier"), 0
    ).join()
    old = contents(earlier / "merged")
    whole, since, began = fresh("whole"), len(hub.requests), time.monotonic()
    start_in("me/whole")(whole, 0).join()
    seconds, once = time.monotonic() - began, downloads(since)
    changes, new = int((directory / "whole.changes").read_text()), contents(whole / "merged")
    for number in range(moments):
        folder, start, since = fresh(f"run-{number}"), start_in(f"me/run-{number}"), len(hub.requests)
        moment, by_time = draw.random(), number % 2 == 0

        def watched(folder: Path, kill_at: int, start: Start = start) -> Any:
            if row["seen"] % 2:  # the second start: the folder is as the kill has left it
                row["torn"] += contents(folder / "merged") not in (old, new)
            row["seen"] += 1
            return start(folder, kill_at)

        row["killed"] += kill_and_resume(watched, folder, moment, changes, seconds, by_time=by_time)
        row["moments"] += 1
        repo = hub.repos[f"me/run-{number}"]
        pushed = "model.safetensors" in repo.commits[repo.branches["main"]]
        row["identical"] += contents(folder / "merged") == new and pushed
        row["left over"] += len([path for path in folder.iterdir() if path.name != "merged"])
        again = downloads(since)
        row["read again"] += sum(max(0, count - once[path]) for path, count in again.items())
    del row["seen"]
    found = {"case": "command: Hub sources, over an earlier merge, pushed", "changes": changes, **row}
    print(found, flush=True)
    return [found]


def contents(folder: Path) -> dict[str, Any]:
    """Return the weights of a merge as bytes, and its record without times."""
    from tests.support.resumable import without_times

    record = json.loads((folder / "grasp_report.json").read_text())
    return {"weights": (folder / "model.safetensors").read_bytes(), "record": without_times(record)}


def measure_cost(directory: Path, runs: int = 3) -> list[dict[str, Any]]:
    """Return a row without and one with a state: medians of the seconds of CPU and of the bytes written."""
    measured: dict[bool, list[list[float]]] = {False: [], True: []}
    for number in range(runs):
        for keeps in measured:
            process = _process(merge_larger, directory / f"{number}-{keeps}", keeps)
            process.join()
            measured[keeps].append(json.loads((directory / f"{number}-{keeps}" / "cost.json").read_text()))
    rows = []
    for keeps, found in measured.items():
        cpu, seconds, written = (statistics.median(values) for values in zip(*found, strict=True))
        row = {"cpu": round(cpu, 1), "seconds": round(seconds, 1), "written": round(written / 1e6)}
        rows.append({"case": "cost: with a state" if keeps else "cost: without", **row})
        print(rows[-1], flush=True)
    return rows


def merge_larger(folder: Path, keeps: bool) -> None:
    """Merge three sources of 21 MB, and write the seconds of CPU, the seconds, and the bytes written."""
    import torch
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification

    from grasp_hf import GraspConfig, GraspMerger
    from tests.support.models import perturbed, tiny_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024}
    sizes |= {"num_attention_heads": 4, "id2label": dict(enumerate("abc"))}
    config = BertConfig(**sizes)
    for number in range(4):
        perturbed(BertForSequenceClassification(config), number).save_pretrained(folder / f"{number}")
        tiny_tokenizer().save_pretrained(folder / f"{number}")
    tokens = torch.randint(0, 8192, (64, 32))
    data = Dataset.from_dict({"input_ids": tokens.numpy(), "labels": [n % 3 for n in range(64)]}).with_format("torch")
    merger = GraspMerger.from_pretrained(str(folder / "0"), config=GraspConfig(batch_size=16))
    begun, cpu, written = time.monotonic(), time.process_time(), _bytes_written()
    state = folder / "state" if keeps else None
    merger.merge([str(folder / name) for name in "123"], train_dataset=data, resume_from=state)
    found = [time.process_time() - cpu, time.monotonic() - begun, _bytes_written() - written]
    (folder / "cost.json").write_text(json.dumps(found))


def _bytes_written() -> int:
    """Return the bytes that this process has passed to calls that write; pages of mapped files are not among them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def tables() -> list[str]:
    """Return the record as tables."""
    rows = json.loads(RECORD.read_text())["results"] if RECORD.exists() else []
    kills = ("case", "changes", "moments", "killed", "identical", "read again", "torn")
    costs = {"case": "case", "cpu": "CPU s", "seconds": "s", "written": "MB written"}
    found = [{name: str(row.get(name, "–")) for name in kills} for row in rows if "moments" in row]
    cost = [{title: str(row[name]) for name, title in costs.items()} for row in rows if "cpu" in row]
    return [markdown_table(part) for part in (found, cost) if part]


def main() -> None:
    """Run the cases, or print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing, print the record")
    parser.add_argument("--moments", type=int, default=8, help="kills of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="measure what the state costs")
    parser.add_argument("--cases", nargs="+", choices=("merge", "command"), default=["merge", "command"])
    args = parser.parse_args()
    if args.table:
        print("", *tables(), sep="\n\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as name, HubServer(f"{name}/hub", users={TOKEN: "me"}) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": f"{name}/home", "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        directory = Path(name)
        if args.cost:
            rows, args.cases = measure_cost(directory), []
        if "merge" in args.cases:
            rows += run_merges(args.moments, args.seed, directory)
        if "command" in args.cases:
            rows += run_commands(args.moments, args.seed, directory, hub)
    kept = json.loads(RECORD.read_text())["results"] if RECORD.exists() else []
    names = {row["case"] for row in rows}
    write_record(RECORD, {"results": [row for row in kept if row["case"] not in names] + rows})


if __name__ == "__main__":
    main()
