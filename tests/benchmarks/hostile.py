"""Fuzzes what a stranger can send: `python -m tests.benchmarks.hostile --inputs 100000`.

Small good models, adapters, tokenizers, cards, recipes and records are changed at random, byte by byte or value by
value, and read as a merge reads them. Each input must be read or get an error of this package, in 10 s and 2 GB, and the
target must stay as it was. The seed of an input that fails is printed; `--only SEED` repeats it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import string
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from safetensors.torch import load_file, save_file

from grasp_hf import GraspConfig, GraspError, GraspMerger
from grasp_hf.config.recipe import Recipe
from grasp_hf.hub.download import locate
from grasp_hf.hub.reference import SourceRef
from grasp_hf.models.processors import load_processing_class
from grasp_hf.record.card import declared_license, model_card, trained_on_test
from grasp_hf.record.saving import read_record
from grasp_hf.runs.lineage import append_recipe
from grasp_hf.sources.headers import header_tensors
from grasp_hf.sources.load import load_source
from tests.hostile.kit import BYTES, SECONDS, peak_bytes
from tests.support.models import NO_TUNING, perturbed, saved, saved_adapter, tiny_data, tiny_model

AVERAGE = GraspConfig(method="average", **NO_TUNING)
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**70, 10**30, -(2**40), 0.5, -0.5, 1e308, 1e-300),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "1",
        "-1",
        "null",
        "a" * 3_000,
        "\x00",
        "\x1b[31m",
        "../../x",
        "/etc/passwd",
    ),
    *(
        "~none/x",
        "(",
        "((a+)+)+$",
        "http://user:pw@host/x",
        "grün\u202e",
        "\ud800",
        [],
        {},
        [[]],
        [1],
        ["a"],
        [None],
        {"": 0},
    ),
    *({"a": {"b": [1, {"c": None}]}}, ["a"] * 2_000, list(range(500)), {str(number): number for number in range(500)}),
]
KEYS = [
    *(
        "num_labels",
        "id2label",
        "label2id",
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "architectures",
        "model_type",
    ),
    *(
        "auto_map",
        "quantization_config",
        "text_config",
        "dtype",
        "tie_word_embeddings",
        "r",
        "lora_alpha",
        "peft_type",
    ),
    *("target_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "use_dora", "bias"),
    *(
        "base_model_name_or_path",
        "target_parameters",
        "megatron_config",
        "trainable_token_indices",
        "init_lora_weights",
    ),
    *("sources", "base_model", "data", "method", "order", "training_arguments", "lora", "trust_remote_code", "top"),
    *(
        "steps",
        "run",
        "units",
        "model",
        "vocab",
        "added_tokens",
        "normalizer",
        "decoder",
        "pre_tokenizer",
        "post_processor",
    ),
    *("__metadata__", "data_offsets", "shape", "weight_map", "merge_method", "models", "parameters", "slices"),
]
TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"null",
        b"1e999",
        b"NaN",
        b"-",
        b"\\u0000",
        b"\xff",
        b"\x00",
        b"\n",
        b"&a ",
        b"*a",
    ),
    *(
        b"!!python/object:os.system ",
        b"<<: ",
        b"- ",
        b"---\n",
        b"license: ",
        b"0x",
        b"99999999999999999999",
        b"{{",
        b"}}",
    ),
]


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Return a JSON value in which something is replaced, removed, added or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        places = [*_places(value)]
        container, key = chance.choice(places) if places else (None, None)
        if container is None:
            return deepcopy(chance.choice(VALUES))
        kind = chance.random()
        if kind < 0.6:
            container[key] = deepcopy(chance.choice(VALUES))
        elif kind < 0.75:
            del container[key]
        elif isinstance(container, dict):
            new = chance.choice([*KEYS, str(chance.choice(VALUES))])
            container[new] = deepcopy(chance.choice([*VALUES, container[key]]))
        else:
            container.insert(chance.randrange(len(container) + 1), deepcopy(chance.choice([*VALUES, container[key]])))
    return deepcopy(chance.choice(VALUES)) if chance.random() < 0.02 else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each list or dictionary in a value, with each of its keys; of a long list only the first entries."""
    keys = [*value] if isinstance(value, dict) else [*range(min(len(value), 20))] if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key])


def mutate_bytes(content: bytes, chance: random.Random, most: int | None = None) -> bytes:
    """Return bytes in which some are flipped, inserted, removed, repeated or cut, among the first `most`."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        end = min(len(found), most or len(found))
        place, kind = chance.randrange(end + 1), chance.random()
        if kind < 0.4 and place < len(found):
            found[place] ^= 1 << chance.randrange(8)
        elif kind < 0.6:
            found[place:place] = chance.choice(TOKENS)
        elif kind < 0.75:
            del found[place : place + chance.choice((1, 1, 4, 100))]
        elif kind < 0.85:
            found[place:place] = found[place : place + chance.choice((8, 100, 1_000))]
        elif kind < 0.92:
            found[place : place + 8] = chance.randrange(2**64).to_bytes(8, "little")
        else:
            del found[place:]
    return bytes(found)


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


class Fuzzer:
    """Good files, and for each kind of input a function that changes and reads one.

    Args:
        root: Folder for the files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bert, self.gpt2 = root / "bert", root / "gpt2"
        saved(perturbed(tiny_model("bert"), 1), self.bert)
        saved(perturbed(tiny_model("gpt2"), 1), self.gpt2)
        self.base, self.base_gpt2 = (
            saved(tiny_model("bert"), root / "base"),
            saved(tiny_model("gpt2"), root / "base-gpt2"),
        )
        self.adapter = root / "adapter"
        saved_adapter(tiny_model("bert"), self.base, self.adapter, target_modules=["query", "value"])
        self.mergers = {
            name: GraspMerger.from_pretrained(name, config=AVERAGE) for name in (self.base, self.base_gpt2)
        }
        self.before = {
            name: {key: tensor.clone() for key, tensor in merger.model.state_dict().items()}
            for name, merger in self.mergers.items()
        }
        self.record = self._make_record()
        self.card = (self.record / "README.md").read_text()
        self.work = root / "work"
        self.kinds: dict[str, tuple[int, Callable[[random.Random], None]]] = {  # with how often each comes
            "safetensors headers": (12, self._read_header),
            "safetensors bodies": (6, self._read_body),
            "model configs": (10, self._read_config),
            "adapter configs": (4, self._read_adapter),
            "adapter weights": (2, self._read_adapter_weights),
            "weight indexes": (4, self._read_index),
            "tokenizers": (8, self._read_tokenizer),
            "cards": (12, self._read_card),
            "recipes": (14, self._read_recipe),
            "references": (14, self._read_reference),
            "records": (10, self._read_record),
            "recorded recipes": (4, self._read_recorded_recipe),
        }

    def _make_record(self) -> Path:
        config = GraspConfig(method="average", order="loss", initial_epochs=1, final_epochs=1, batch_size=8)
        source = saved(perturbed(tiny_model("resnet"), 1), self.root / "resnet")
        merger = GraspMerger.from_pretrained(saved(tiny_model("resnet"), self.root / "base-resnet"), config=config)
        data = {"train_dataset": tiny_data("resnet", 12), "eval_dataset": tiny_data("resnet", 6, seed=2)}
        merger.merge([source, source], **data)
        merger.save_pretrained(self.root / "merged")
        self.merged = merger.model
        return self.root / "merged"

    def unchanged(self) -> bool:
        """Whether the targets have the weights that they began with."""
        return all(
            torch.equal(merger.model.state_dict()[key], tensor)
            for name, merger in self.mergers.items()
            for key, tensor in self.before[name].items()
        )

    @contextmanager
    def copy(self, folder: Path) -> Iterator[Path]:
        """Yield a copy of a folder, and remove it at the end."""
        shutil.copytree(folder, self.work)
        try:
            yield self.work
        finally:
            shutil.rmtree(self.work, ignore_errors=True)

    def load(self, folder: Path, base: str) -> None:
        """Read a source as a merge does."""
        merger, scratch = self.mergers[base], self.root / "scratch"
        scratch.mkdir(exist_ok=True)
        source = locate(str(folder))
        load_source(
            source, merger.model, base=merger.base, directory=scratch, processing_class=merger.processing_class
        )

    def _read_header(self, chance: random.Random) -> None:
        with self.copy(self.bert) as folder:
            path = folder / "model.safetensors"
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            if chance.random() < 0.5:
                header = to_json(mutate_value(json.loads(content[8 : 8 + size]), chance))
                content = len(header).to_bytes(8, "little") + header + content[8 + size :]
            else:
                content = mutate_bytes(content, chance, most=8 + size)
            path.write_bytes(content)
            header_tensors(locate(str(folder)))
            self.load(folder, self.base)

    def _read_body(self, chance: random.Random) -> None:
        with self.copy(self.bert) as folder:
            path = folder / "model.safetensors"
            if chance.random() < 0.5:
                tensors = load_file(path)
                name = chance.choice(sorted(tensors))
                dtype = chance.choice(
                    (torch.int32, torch.bool, torch.float64, torch.bfloat16, torch.uint8, torch.complex64)
                )
                tensors[name] = chance.choice(
                    (tensors[name].to(dtype), tensors[name] * 1e30, tensors[name][:0].clone())
                )
                save_file(tensors, path)
            else:
                content = bytearray(path.read_bytes())
                for _ in range(chance.choice((1, 4, 64))):
                    content[chance.randrange(6_000, len(content))] ^= 1 << chance.randrange(8)
                path.write_bytes(content)
            self.load(folder, self.base)

    def _read_config(self, chance: random.Random) -> None:
        with self.copy(self.bert) as folder:
            self._mutate(folder / "config.json", chance)
            self.load(folder, self.base)

    def _read_adapter(self, chance: random.Random) -> None:
        with self.copy(self.adapter) as folder:
            self._mutate(folder / "adapter_config.json", chance)
            self.load(folder, self.base)

    def _read_adapter_weights(self, chance: random.Random) -> None:
        with self.copy(self.adapter) as folder:
            path = folder / "adapter_model.safetensors"
            path.write_bytes(mutate_bytes(path.read_bytes(), chance))
            self.load(folder, self.base)

    def _read_index(self, chance: random.Random) -> None:
        with self.copy(self.bert) as folder:
            (folder / "model.safetensors").rename(folder / "one.safetensors")
            index = {"metadata": {"total_size": 1}, "weight_map": {"classifier.weight": "one.safetensors", "b": "two"}}
            path = folder / "model.safetensors.index.json"
            path.write_bytes(to_json(index))
            self._mutate(path, chance)
            self.load(folder, self.base)

    def _read_tokenizer(self, chance: random.Random) -> None:
        with self.copy(self.gpt2) as folder:
            self._mutate(folder / chance.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json")), chance)
            if chance.random() < 0.3:
                self.load(folder, self.base_gpt2)
            else:
                load_processing_class(locate(str(folder)))

    def _read_card(self, chance: random.Random) -> None:
        folder = self.root / "card"
        folder.mkdir(exist_ok=True)
        text = self.card.encode()
        if chance.random() < 0.4:
            metadata = mutate_value({"license": "mit", "tags": ["a"], "model-index": [{"name": "x"}]}, chance)
            text = b"---\n" + yaml.safe_dump(metadata).encode("utf-8", "replace") + b"---\norg/animals\n"
        (folder / "README.md").write_bytes(mutate_bytes(text, chance))
        declared_license(folder)
        trained_on_test(folder, "org/animals")

    def _read_recipe(self, chance: random.Random) -> None:
        path = self.root / "recipe.yaml"
        recipe: dict[str, Any] = {
            "base_model": "org/base",
            "sources": ["org/a@v1", "org/b"],
            "data": {"path": "csv", "data_files": {"train": "train.csv"}},
            **{"method": "blend", "order": "loss", "top": 2, "seed": 3, "training_arguments": {"learning_rate": 1e-5}},
        }
        if chance.random() < 0.3:
            recipe = {
                "models": [{"model": "org/a+org/b", "parameters": {"weight": 0.5}}, {"model": "org/c"}],
                **{
                    "base_model": "org/base",
                    "merge_method": "linear",
                    "parameters": {"normalize": True},
                    "dtype": "bfloat16",
                },
            }
        if chance.random() < 0.6:
            text = yaml.safe_dump(mutate_value(recipe, chance), allow_unicode=True).encode("utf-8", "surrogatepass")
        else:
            text = mutate_bytes(yaml.safe_dump(recipe).encode(), chance)
        path.write_bytes(text)
        Recipe.from_yaml(path, [mutate_text("top=2", chance)] if chance.random() < 0.2 else [])

    def _read_reference(self, chance: random.Random) -> None:
        known = ("org/name@v1", "org/name/sub@refs/pr/1", "~/models", "./a/b", str(self.bert), "a//b", "org/name")
        text = mutate_text(chance.choice(known), chance)
        if chance.random() < 0.5:
            SourceRef.parse(text)
        else:
            locate(text)

    def _read_record(self, chance: random.Random) -> None:
        folder = self.root / "record"
        folder.mkdir(exist_ok=True)
        shutil.copy(self.record / "grasp_report.json", folder)
        self._mutate(folder / "grasp_report.json", chance)
        record = read_record(folder)
        if record is not None:
            shown = record.without_paths()
            assert str(record) and shown.configuration()
            if record.run.config and chance.random() < 0.2:
                model_card(self.merged, shown, "org/merged")

    def _read_recorded_recipe(self, chance: random.Random) -> None:
        with self.copy(self.record) as folder:
            path = folder / "grasp_config.yaml"
            if chance.random() < 0.6:
                values = mutate_value(yaml.safe_load(path.read_text()), chance)
                text = yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
            else:
                text = mutate_bytes(path.read_bytes(), chance)
            path.write_bytes(text)
            append_recipe(str(folder), [str(self.bert)], ["data.path=csv", "data.data_files.train=a.csv"])

    @staticmethod
    def _mutate(path: Path, chance: random.Random) -> None:
        """Change a JSON file, value by value or byte by byte."""
        content = path.read_bytes()
        if chance.random() < 0.75:
            content = to_json(mutate_value(json.loads(content), chance))
        else:
            content = mutate_bytes(content, chance)
        path.write_bytes(content)


def mutate_text(text: str, chance: random.Random) -> str:
    """Return a text with characters of any kind in it."""
    pool = [
        *string.printable,
        "\x00",
        "\x1b",
        "\u202e",
        "\ud800",
        "é",
        "a" * 300,
        "/",
        "@",
        "~",
        "..",
        "%",
        "*",
        "a" * 5_000,
    ]
    letters = [*text]
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(letters) + 1)
        letters[place : place + chance.choice((0, 1))] = chance.choice(pool)
    return "".join(letters)


def main() -> None:
    """Run as many inputs as asked for, and print what they got."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--first", type=int, default=0, help="seed of the first input; each input has the next one")
    parser.add_argument("--only", type=int, help="repeat the input with this seed, and print its error")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)

    def too_long(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"more than {SECONDS:.0f} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that a file of a random name lands there
        fuzzer = Fuzzer(Path(folder))
        names, often = [*fuzzer.kinds], [weight for weight, _ in fuzzer.kinds.values()]
        read, refused, failed, seconds = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        slowest, grown, began = 0.0, 0, time.perf_counter()
        seeds = [options.only] if options.only is not None else range(options.first, options.first + options.inputs)
        for number, seed in enumerate(seeds):
            if time.perf_counter() - began > options.seconds:
                break
            chance = random.Random(seed)
            (name,) = chance.choices(names, often)
            start, memory = time.perf_counter(), peak_bytes()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                fuzzer.kinds[name][1](chance)
                read[name] += 1
            except GraspError as error:
                refused[name] += 1
                message = str(error)
                if len(message) > 21_000 or re.search(
                    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]|:pw@", message
                ):
                    failed[name] += 1
                    print(f"{seed} {name}: a message that cannot be shown: {message[:300]!r}")
                if options.only is not None:
                    print(message)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed[name] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    f"{seed} {name}: {type(error).__name__}: {str(error)[:200]!r} at {where.filename}:{where.lineno}",
                    flush=True,
                )
                if options.only is not None:
                    traceback.print_exc()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            taken, more = time.perf_counter() - start, peak_bytes() - memory
            seconds[name] += taken  # type: ignore[assignment]
            slowest, grown = max(slowest, taken), max(grown, more)
            if taken > SECONDS or more > BYTES:
                failed[name] += 1
                print(f"{seed} {name}: {taken:.1f} s, {more / 1e9:.2f} GB")
            if number % 500 == 499 and not fuzzer.unchanged():
                raise SystemExit(f"the target has changed, in one of the 500 inputs before seed {seed}")
        if not fuzzer.unchanged():
            raise SystemExit("the target has changed")
        print("| input | tried | read | refused | failed | ms each |\n|---|---:|---:|---:|---:|---:|")
        for name in names:
            tried = read[name] + refused[name] + failed[name]
            each = 1e3 * seconds[name] / max(tried, 1)
            print(f"| {name} | {tried:,} | {read[name]:,} | {refused[name]:,} | {failed[name]:,} | {each:.1f} |")
        total = read.total() + refused.total() + failed.total()
        print(
            f"\n{total:,} inputs, {failed.total():,} failed; slowest {slowest:.1f} s, largest growth of the memory "
            f"{grown / 1e6:.0f} MB, peak {peak_bytes() / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s"
        )


if __name__ == "__main__":
    main()
