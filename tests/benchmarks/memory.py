"""Measures the peak of private memory in one step of a merge, in units of P, the bytes of the model's weights.

Run it with `python -m tests.benchmarks.memory`. `alignment` measures one source against the target and merges it if
the validation samples favour it. The `step` of the paper also fine-tunes for one epoch with AdamW. The `run` of
grasp_hf fine-tunes, merges a source and fine-tunes again, twice. `activations` is the memory that one plain pass
forward and backward needs in addition to weights and gradients; the other numbers include it. Each measurement runs in
its own process, on a ViT-base whose images are so small that activations hardly count.

Private memory is `RssAnon` of Linux: pages that only this process can free. The memory of the interpreter before the
models are loaded is subtracted. A mapped safetensors file is page cache and not counted; the column `mapped` shows it.
With a GPU, the column `device` is the peak of its allocator; the paper's code then stays on the CPU.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from grasp_hf import GraspConfig, GraspMerger
from tests.support.paper import Batch, Example, alignment, finetune, transfer

BASE: dict[str, Any] = {"image_size": 32, "patch_size": 16, "num_labels": 10}
TINY = BASE | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SIZES = {"base": BASE, "tiny": TINY}
# Otherwise glibc keeps freed tensors, and the peak depends on the order of earlier allocations.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def save_models(folder: Path, size: str) -> int:
    """Save two random models as `folder/source` and `folder/target`, and an adapter of the target as `folder/adapter`.

    Returns:
        The bytes of one model's weights.
    """
    config = ViTConfig(**SIZES[size])
    for name in ("source", "target"):
        model = ViTForImageClassification(config)
        model.save_pretrained(folder / name)
    settings = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(model, settings)
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "target")
    adapter.save_pretrained(str(folder / "adapter"))
    adapter.unload()
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load_private(folder: Path) -> PreTrainedModel:
    """Load a model with weights in private memory, as those of a trained target or of `torch.load` are."""
    model = ViTForImageClassification.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def make_examples(n: int) -> list[Example]:
    """Return `n` random images with labels."""
    return [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(n)]


def collate(examples: list[Example]) -> Batch:
    """Stack examples into a batch."""
    return {key: torch.stack([torch.as_tensor(example[key]) for example in examples]) for key in examples[0]}


def activations(folder: Path) -> None:
    """Run one plain forward and backward pass."""
    load_private(folder / "target").train()(**collate(make_examples(2))).loss.backward()


def published_alignment(folder: Path) -> None:
    """Measure one source on one batch with the paper's code."""
    target, source = load_private(folder / "target"), load_private(folder / "source")
    alignment(source, target, [collate(make_examples(2))])


def published_step(folder: Path) -> None:
    """Measure, copy and fine-tune for one epoch with the paper's code, which keeps the source in memory.

    From the second epoch on, the paper's code needs 1 P more than this, because it copies a new best state while it
    still holds the old one.
    """
    target, source = load_private(folder / "target"), load_private(folder / "source")
    cosines = alignment(source, target, [collate(make_examples(2))])
    transfer(source, target, cosines, threshold=0.3)
    finetune(target, make_examples(6), make_examples(2), epochs=1, seed=0, collate=collate, batch_size=2)


def merger_of(target: PreTrainedModel, **settings: Any) -> GraspMerger:
    """Return the merger of a target that counts as a source itself."""
    merger = GraspMerger(target, GraspConfig(batch_size=2, **settings))
    merger.report.starts_from_source = True
    return merger


def grasp_hf_alignment(folder: Path, method: str = "blend") -> None:
    """Measure one source on four batches and merge it, with `grasp_hf`."""
    merger = merger_of(load_private(folder / "target"), method=method, num_batches=4)
    merger.merge_source(str(folder / "source"), train_dataset=make_examples(6), eval_dataset=make_examples(2))


def grasp_hf_copy_alignment(folder: Path) -> None:
    """Measure one source on four batches and merge it, with `method: copy`."""
    grasp_hf_alignment(folder, method="copy")


def grasp_hf_run(folder: Path, **training_arguments: Any) -> None:
    """Merge two sources and fine-tune for two epochs, with the defaults of `grasp_hf`."""
    merger = merger_of(load_private(folder / "target"), final_epochs=2, training_arguments=training_arguments)
    source = str(folder / "source")
    merger.merge([source, source], train_dataset=make_examples(6), eval_dataset=make_examples(2))


def grasp_hf_adafactor(folder: Path) -> None:
    """Merge two sources and fine-tune with Adafactor instead of AdamW."""
    grasp_hf_run(folder, optim="adafactor")


def grasp_hf_low_rank(folder: Path) -> None:
    """Merge two sources and fine-tune by a LoRA adapter that is merged into the weights."""
    merger = merger_of(load_private(folder / "target"), final_epochs=2, lora={"r": 8})
    source = str(folder / "source")
    merger.merge([source, source], train_dataset=make_examples(6), eval_dataset=make_examples(2))


def peft_merge(folder: Path) -> None:
    """Merge an adapter of rank 8 on all linear layers into its base with PEFT; the base is a mapped file."""
    base = ViTForImageClassification.from_pretrained(folder / "target")
    PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()


def grasp_hf_adapter(folder: Path) -> None:
    """Measure and merge the same adapter with `grasp_hf`, whose target is in private memory."""
    merger = GraspMerger.from_pretrained(str(folder / "target"), config=GraspConfig(batch_size=2, num_batches=4))
    merger.report.starts_from_source = True
    for parameter in merger.model.parameters():
        parameter.data = parameter.data.clone()
    merger.merge_source(str(folder / "adapter"), train_dataset=make_examples(6), eval_dataset=make_examples(2))


def grasp_hf_many(folder: Path, sources: int) -> None:
    """Measure and merge `sources` sources sequentially."""
    merger = merger_of(load_private(folder / "target"), final_epochs=0, num_batches=2)
    source = str(folder / "source")
    merger.merge([source] * sources, train_dataset=make_examples(6), eval_dataset=make_examples(2))


MEASUREMENTS: dict[str, Callable[[Path], None]] = {
    "activations": activations,
    "published alignment": published_alignment,
    "published step": published_step,
    "grasp_hf alignment": grasp_hf_alignment,
    "grasp_hf copy alignment": grasp_hf_copy_alignment,
    "grasp_hf run of 2": grasp_hf_run,
    "grasp_hf run, Adafactor": grasp_hf_adafactor,
    "grasp_hf run, LoRA": grasp_hf_low_rank,
    "PEFT merges an adapter": peft_merge,
    "grasp_hf adapter": grasp_hf_adapter,
    "grasp_hf 2 sources": lambda folder: grasp_hf_many(folder, 2),
    "grasp_hf 32 sources": lambda folder: grasp_hf_many(folder, 32),
}


def resident() -> dict[str, int]:
    """Return the bytes of private (`RssAnon`) and file-mapped (`RssFile`) memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[field].split()[0]) * 1024 for name, field in (("anon", "RssAnon"), ("mapped", "RssFile"))}


class Peak(threading.Thread):
    """A thread that samples `resident()` every 2 ms and keeps the largest increases since its start, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base, self.peak = resident(), {"anon": 0, "mapped": 0}
        self.done = threading.Event()

    def run(self) -> None:
        """Sample until `done` is set."""
        while not self.done.wait(0.002):
            now = resident()
            self.peak = {name: max(self.peak[name], now[name] - self.base[name]) for name in now}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run one measurement in this process, after the same on tiny models, which loads all code."""
    MEASUREMENTS[name](folder / "warm-up")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sampler = Peak()
    sampler.start()
    start = time.perf_counter()
    MEASUREMENTS[name](folder)
    seconds = time.perf_counter() - start
    sampler.done.set()
    sampler.join()
    device = {"device": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
    return {**sampler.peak, **device, "seconds": seconds}


def measure_apart(name: str, folder: Path) -> dict[str, float]:
    """Run one measurement in a new process."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--measure", name, "--folder", str(folder)]
    run = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Print the table, and with `--json` write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder / "warm-up", "tiny")
        weights = save_models(folder, args.model)
        results = {name: measure_apart(name, folder) for name in args.only}
    if "activations" in results:
        results["activations"]["anon"] -= 2 * weights
    print(f"P = {weights / 1e6:.1f} MB ({args.model}), {torch.get_num_threads()} threads")
    columns = {"anon": "private", "mapped": "mapped", "device": "device"}
    shown = {key: title for key, title in columns.items() if all(key in row for row in results.values())}
    print(f"{'':26}" + "".join(f"{title:>10}" for title in shown.values()) + f"{'time':>10}")
    for name, row in results.items():
        cells = "".join(f"{row[key] / weights:8.2f} P" for key in shown)
        print(f"{name:26}{cells}{row['seconds']:8.1f} s")
    if args.json:
        numbers = {"model": args.model, "weights_bytes": weights, "measurements": results}
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
