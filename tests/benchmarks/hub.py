"""Measures the disk and the traffic of a merge of K sources from the Hub, against a download of all of them.

Run it with `python -m tests.benchmarks.hub`. `--xet` lets the clients use Xet; its bytes are not counted, because it
is not HTTP. The Hub is the loopback server of the tests, and the clients are the real ones. Each row is a process with
an empty `HF_HOME`, except that the user's cache holds the base model. The sources are BERTs of 21 MB that differ in
every weight. The numbers are in sizes of one source:

- `models`: the peak of `HF_HOME` in addition to the base model; in brackets, what stays after the process.
- `temporary`: the peak of the temporary directory: the target before the step, the best epoch, and both ends of the
  gate's line.
- `wire`: bytes that the server sent, configuration files included.

`--plan N` also prints the duration of `plan` for N sources. `--shards` also averages K = 2 sources in shards, with and
without evaluation data, at 50 MB/s, because an unlimited loopback delivers a shard before it can be observed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.support.hub.server import HubServer

SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SHARDED = {"vocab_size": 1024, "num_hidden_layers": 16}  # all its tensors have similar sizes
TOKEN = "hf_me"

MAKE = f"""
import json, sys, torch
from transformers import BertConfig, BertForSequenceClassification
torch.manual_seed(0)
sizes = {{"vocab_size": 8192, **{SIZES!r}, **json.loads(sys.argv[4])}}
model = BertForSequenceClassification(BertConfig(num_labels=3, **sizes))
for index in range(int(sys.argv[2])):
    model.save_pretrained(f"{{sys.argv[1]}}/{{sys.argv[3]}}-{{index}}", max_shard_size=sys.argv[5])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
"""
UPLOAD = """
import sys
from huggingface_hub import HfApi
for index in range(int(sys.argv[2])):
    HfApi().create_repo(f"me/{sys.argv[3]}-{index}")
    HfApi().upload_folder(repo_id=f"me/{sys.argv[3]}-{index}", folder_path=f"{sys.argv[1]}/{sys.argv[3]}-{index}")
"""
CACHE_BASE = "import sys; from grasp_hf.hub.download import locate; locate(f'me/{sys.argv[1]}-0')"
MERGE = """
import sys, torch
from grasp_hf import GraspConfig, GraspMerger
torch.manual_seed(0)
data = [{"input_ids": torch.randint(0, 8192, (8,)), "labels": index % 3} for index in range(4)]
config = GraspConfig(batch_size=2, order=sys.argv[3], prefetch=sys.argv[2] == "yes")
merger = GraspMerger.from_pretrained("me/model-0", config=config)
merger.merge([f"me/model-{index}" for index in range(1, int(sys.argv[1]) + 1)], train_dataset=data, eval_dataset=data)
"""
AVERAGE = """
import sys, torch
from grasp_hf import GraspConfig, GraspMerger
data = [{"input_ids": torch.arange(8), "labels": index % 3} for index in range(4)] if sys.argv[2] == "data" else None
config = GraspConfig(method="average", order="given", final_epochs=0, prefetch=sys.argv[1] == "yes")
GraspMerger.from_pretrained("me/sharded-0", config=config).merge(["me/sharded-1", "me/sharded-2"], eval_dataset=data)
"""
SNAPSHOT = """
import sys
from huggingface_hub import snapshot_download
for index in range(1, int(sys.argv[1]) + 1):
    snapshot_download(f"me/model-{index}")
"""
PLAN = """
import sys, time
from grasp_hf import Recipe
from grasp_hf.runs.plan import plan
recipe = Recipe.from_dict({
    "base_model": "me/model-0", "method": "average", "order": "given", "final_epochs": 0,
    "sources": [f"me/model-{1 + index}" for index in range(int(sys.argv[1]))],
})
began = time.perf_counter()
rows = plan(recipe)
assert not any(row.problem_lines() for row in rows), rows
print(time.perf_counter() - began)
"""


def disk_usage(folder: Path) -> int:
    """Return the bytes of the files below `folder` on the disk; a file with several links counts once."""
    found = {}
    for directory, _, names in os.walk(folder):  # it skips folders that are removed meanwhile
        for name in names:
            try:
                stat = os.lstat(os.path.join(directory, name))
            except OSError:
                continue
            found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


class Bench:
    """A Hub with models, and processes that use it."""

    def __init__(self, hub: HubServer, root: Path, xet: bool) -> None:
        """Use a Hub, and keep all files below `root`."""
        self.hub, self.root, self.xet = hub, root, xet

    def run(self, code: str, *arguments: str, home: Path, temporary: Path | None = None) -> tuple[str, dict[str, int]]:
        """Run Python code in a new process; return its output, and the peaks of the two folders in bytes."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "TMPDIR": str(temporary or self.root),
        }
        peaks, done = {"models": 0, "temporary": 0}, threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                peaks["models"] = max(peaks["models"], disk_usage(home))
                peaks["temporary"] = max(peaks["temporary"], disk_usage(temporary) if temporary else 0)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        done.set()
        watcher.join()
        if result.returncode:
            raise RuntimeError(result.stderr[-3000:])
        return result.stdout, peaks

    def upload(self, folder: Path, count: int, name: str, sizes: dict[str, int], shards: str) -> list[int]:
        """Make `count` models and upload them; return the sizes in bytes of the shards of the second model."""
        home = Path(self.root, "maker")
        self.run(MAKE, str(folder), str(count), name, json.dumps(sizes), shards, home=home)
        self.run(UPLOAD, str(folder), str(count), name, home=home)
        return [path.stat().st_size for path in (folder / f"{name}-1").glob("*.safetensors")]

    def row(self, code: str, *arguments: str, base: str = "model") -> dict[str, float]:
        """Run one row with a home that holds only the base model, and return its numbers in bytes."""
        with tempfile.TemporaryDirectory(dir=self.root) as name:
            home, temporary = Path(name, "home"), Path(name, "tmp")
            temporary.mkdir()
            self.run(CACHE_BASE, base, home=home)
            before, since = disk_usage(home), len(self.hub.requests)
            _, peaks = self.run(code, *arguments, home=home, temporary=temporary)
            return {
                "models": peaks["models"] - before,
                "left": disk_usage(home) - before,
                "temporary": peaks["temporary"],
                "wire": self.hub.sent(since=since),
            }


def main() -> None:
    """Print the table, and with `--json` write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 8, 20], metavar="K")
    parser.add_argument("--xet", action="store_true", help="let the clients use Xet")
    parser.add_argument("--plan", type=int, metavar="N", help="also time a plan of N sources")
    parser.add_argument("--shards", action="store_true", help="also average two sources in shards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, HubServer(Path(name, "hub"), {TOKEN: "me"}, xet=args.xet) as hub:
        bench, count = Bench(hub, Path(name), args.xet), max(*args.sources, args.plan or 0) + 1
        models = Path(name, "models")
        (size,) = bench.upload(models, count, "model", {}, "1GB")
        print(f"sources of {size / 1e6:.1f} MB, {'Xet' if args.xet else 'without Xet'}; in sizes of one source")
        print(f"{'':36}{'models (left)':>18}{'temporary':>12}{'wire':>8}")
        rows: dict[str, Any] = {}

        def print_row(label: str, size: int, code: str, *arguments: str, base: str = "model") -> None:
            row = {key: value / size for key, value in bench.row(code, *arguments, base=base).items()}
            rows[label] = row
            models_cell = f"{row['models']:.2f} ({row['left']:.2f})"
            wire = "–" if args.xet else f"{row['wire']:.2f}"
            print(f"{label:36}{models_cell:>18}{row['temporary']:>12.2f}{wire:>8}", flush=True)

        for sources in args.sources:
            print_row(f"K = {sources}, merge", size, MERGE, str(sources), "yes", "given")
            print_row(f"K = {sources}, merge, order: loss", size, MERGE, str(sources), "yes", "loss")
            print_row(f"K = {sources}, merge, prefetch: false", size, MERGE, str(sources), "no", "given")
            print_row(f"K = {sources}, snapshot_download of all", size, SNAPSHOT, str(sources))
        if args.shards:
            sizes = bench.upload(models, 3, "sharded", SHARDED, "7MB")
            hub.fault("GET /lfs/", "slow", bytes_per_second=50_000_000, times=10_000)
            print(f"{sum(sizes) / 1e6:.1f} MB in {len(sizes)} shards of at most {max(sizes) / sum(sizes):.2f} sources")
            for data in ("data", "no data"):
                for prefetch in ("yes", "no"):
                    label = f"average, {data}{'' if prefetch == 'yes' else ', prefetch: false'}"
                    print_row(label, sum(sizes), AVERAGE, prefetch, data, base="sharded")
        if args.plan:
            with tempfile.TemporaryDirectory(dir=name) as home:
                began, since = time.perf_counter(), len(hub.requests)
                seconds = float(bench.run(PLAN, str(args.plan), home=Path(home))[0])
                total, requests = time.perf_counter() - began, len(hub.requests) - since
                rows[f"plan of {args.plan}"] = {"seconds": seconds, "with start-up": total, "requests": requests}
                sent = hub.sent(since=since) / 1e6
                print(f"plan of {args.plan} sources: {seconds:.1f} s, {requests} requests, {sent:.1f} MB received")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
