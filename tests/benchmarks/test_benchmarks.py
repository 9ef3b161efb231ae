"""The benchmarks run on tiny models, whose numbers are not asserted; their data is split as documented."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from pandas import DataFrame, read_csv
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, default_data_collator

from grasp_hf.comparison.results import OURS, Comparison, Result
from grasp_hf.comparison.run import model_identities
from grasp_hf.config.recipe import Recipe
from grasp_hf.data.samples import Samples
from grasp_hf.record.entries import ChangeReport
from grasp_hf.tensors.units import Unit
from grasp_hf.validation.losses import SCALES, SampleLosses
from tests.benchmarks import compare as comparing
from tests.benchmarks import emoji, flips, memory, rank, settings, smollm, sotu, unrelated
from tests.benchmarks.packages import complete, fetch
from tests.benchmarks.sources import KINDS, source_folder
from tests.benchmarks.training import score
from tests.benchmarks.trials import MEANS, Laboratory, agreeing, harms, merge_by_means
from tests.support.models import perturbed, saved, tiny_data, tiny_model, write_images


@pytest.mark.parametrize(
    ("benchmark", "names", "keys"),
    [
        (
            "memory",
            ["grasp_hf run, LoRA"],
            ["anon", "seconds"],
        ),
        ("speed", ["copy alignment", "rank", "rank from disk", "average"], ["seconds", "baseline seconds", "ratio"]),
    ],
)
def test_a_benchmark_runs_the_requested_measurements(
    benchmark: str, names: list[str], keys: list[str], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        f"tests.benchmarks.{benchmark}",
        "--model",
        "tiny",
        "--json",
        str(tmp_path / "out.json"),
    ]
    extra = ["--sources", "3"] if benchmark == "speed" else []
    run = subprocess.run([*command, *extra, "--only", *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written["measurements"]) == names
    assert all(row[key] > 0 for row in written["measurements"].values() for key in keys)
    assert all(name in run.stdout for name in names)


@pytest.mark.parametrize("name", [name for name in memory.MEASUREMENTS if name != "grasp_hf 32 sources"])
def test_each_measurement_of_memory_runs(name: str, tmp_path: Path) -> None:
    memory.save_models(tmp_path, "tiny")
    memory.MEASUREMENTS[name](tmp_path)


def test_an_archive_with_another_checksum_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "open('archive.tgz', 'w').write('changed')"]
    known, got = (hashlib.sha256(content).hexdigest() for content in (b"known", b"changed"))
    with pytest.raises(ValueError, match=f"expected sha256 {known}, got {got}"), complete(tmp_path / "home") as new:
        fetch(new, "archive.tgz", known, *command)
    assert list(tmp_path.iterdir()) == []


def painted(svg: str) -> Image.Image:
    """Return an image in a colour that depends on the drawing."""
    colour = hashlib.md5(svg.encode()).digest()
    return Image.new("RGB", (emoji.SIDE, emoji.SIDE), (colour[0], colour[1], colour[2]))


def test_an_emoji_is_in_one_split_in_all_styles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"emoji-{index}" for index in range(80)]
    classes = {label: names[index::8] for index, label in enumerate(emoji.CLASSES)} | {"Flags": ["a-flag"]}
    classes[emoji.CLASSES[0]].append("a-copy")
    assert emoji.split_of("a-copy") == "test"  # its drawing is also in train, so it must not be in test

    def packed(folder: Path, *_: str) -> None:
        package = folder / "package"
        package.mkdir(parents=True)
        icons = {
            name: {"body": name} for name in [*names, "a-flag", "emoji-0-dark-skin-tone", "another-name", "unknown"]
        } | {"emoji-1": {"body": "", "hidden": True}}
        icons["a-copy"] = icons[next(name for name in names if emoji.split_of(name) == "train")]
        if folder.name == "twemoji":  # this style has an emoji under its other name only
            del icons["emoji-2"]
        aliases = {"another-name": {"parent": "emoji-2"}}
        (package / "icons.json").write_text(
            json.dumps({"icons": icons, "aliases": aliases, "width": 32, "height": 32})
        )
        (package / "metadata.json").write_text(json.dumps({"categories": classes}))

    monkeypatch.setattr(emoji, "fetch", packed)
    monkeypatch.setattr(emoji, "render", painted)
    home = emoji.emoji(tmp_path)
    found = {
        split: [{file.stem for file in (home / style / split).glob("*/*.png")} for style in emoji.STYLES]
        for split in ("source", "train", "test")
    }
    for split, styles in found.items():
        assert styles[0] and all(styles[0] == names for names in styles), split
    parts = [styles[0] for styles in found.values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) and set().union(*parts) == set(names) - {"emoji-1"}
    assert {folder.name for folder in home.glob("*/*/*")} == set(emoji.CLASSES)


def test_a_drawing_keeps_its_own_shape() -> None:
    icons = {"icons": {"kite": {"body": "<path/>", "height": 25}}, "width": 36, "height": 36}
    [(name, svg)] = emoji.drawings(icons, {"kite": "Activities"}, {})
    assert name == "kite"
    assert 'width="64" height="64" viewBox="0 0 36 25"><path/></svg>' in svg


def test_every_fourth_address_of_an_era_is_for_testing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    years = range(1790, 2022)

    def packed(folder: Path, *_: str) -> None:
        (data := folder / "package/sotu/data").mkdir(parents=True)
        for year in years:
            words = " ".join(f"{year}w{index}" for index in range(2 * sotu.WORDS + 5))
            (data / f"{year}_someone.json").write_text(json.dumps({"year": year, "text": words}))

    monkeypatch.setattr(sotu, "fetch", packed)
    home = sotu.sotu(tmp_path)
    assert [year for era in sotu.ERAS.values() for year in era] == list(years)
    for era, mine in sotu.ERAS.items():
        tables = {split: read_csv(home / era / f"{split}.csv") for split in ("train", "test")}
        assert set(tables["test"]["year"]) == set(mine[3::4])
        assert set(tables["train"]["year"]) == set(mine) - set(mine[3::4])
        for table in tables.values():
            assert table["year"].value_counts().eq(2).all()  # two passages; the last five words are dropped
            for year, text in zip(table["year"], table["text"], strict=True):
                assert len(text.split()) == sotu.WORDS and all(w.startswith(f"{year}w") for w in text.split())


def test_texts_of_a_document_stay_in_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentences(name: str, words: int) -> str:
        return " ".join(f"{name}w{index}" for index in range(words))

    def packed(folder: Path, archive: str, *_: str) -> None:
        if archive == smollm.VADER:
            ratings = folder / "hutto_ICWSM_2014"
            ratings.mkdir()
            for domain, file in smollm.RATED.items():
                several = domain in ("products", "editorials")
                names = [f"{n}_{k}" for n in range(1, 9) for k in (1, 2)] if several else [str(n) for n in range(1, 9)]
                lines = [f"{name}\t1.0\t{sentences(f'{domain}{name}', 25)}" for name in names]
                (ratings / f"{file}_GroundTruth.txt").write_text("\n".join([*lines, "99\t1.0\ttoo short"]))
            packages = folder / "vaderSentiment-3.3.2" / "additional_resources"
            packages.mkdir(parents=True)
            shutil.make_archive(str(packages / "hutto_ICWSM_2014"), "gztar", folder, "hutto_ICWSM_2014")
        elif archive == smollm.STDLIB:
            for name in ("sotu", "moby-dick"):
                (folder / "package" / name / "data").mkdir(parents=True)
            documents = {f"moby-dick/data/chapter_{number}": f"c{number}" for number in range(8)}
            documents |= {f"sotu/data/{year}_x": f"y{year}" for year in (*range(1790, 1800), *range(1990, 2000))}
            for path, name in documents.items():
                text = sentences("repeated", smollm.WORDS) + " " + sentences(name, 2 * smollm.WORDS + 3)
                (folder / "package" / f"{path}.json").write_text(json.dumps({"text": text}))
            (folder / "package/moby-dick/data/file_list.json").write_text("[]")
        else:
            (folder / "package" / "docs").mkdir(parents=True)
            for number in range(8):
                (folder / f"package/docs/page{number}.md").write_text(sentences(f"p{number}", smollm.WORDS))

    monkeypatch.setattr(smollm, "fetch", lambda folder, archive, sha256, *command: packed(folder, archive))
    home = smollm.smollm(tmp_path)
    found = {
        domain: {split: read_csv(home / domain / f"{split}.csv") for split in ("train", "test")}
        for domain in (*smollm.SOURCES, *smollm.TARGETS)
    }
    texts = [text for splits in found.values() for table in splits.values() for text in table["text"]]
    assert len(texts) == len({*texts}) and sum("repeated" in text for text in texts) == 1
    assert {domain: [len(table) for table in splits.values()] for domain, splits in found.items()} == {
        "new-speeches": [16, 4],  # two whole passages of each of ten addresses
        "old-speeches": [16 + 1, 4],  # and the passage that all addresses repeat
        "products": [6, 2],  # two sentences of 25 words are a passage of 40
        "tweets": [6, 2],
        "novel": [12, 4],
        "manual": [6, 2],
        "editorials": [6, 2],
        "films": [6, 2],
    }
    for splits in found.values():
        assert not {*splits["train"]["document"]} & {*splits["test"]["document"]}
    for domain in ("tweets", "films"):
        assert found[domain]["train"]["text"].str.split().str.len().eq(25).all()
    assert {*found["novel"]["test"]["document"]} == {"chapter_3", "chapter_7"}


def test_both_classes_of_an_unrelated_task_are_equally_frequent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ("the men of England", "a tax of 5 dollars", "a taxi", "mydollar and Spainless")
    for era, years in sotu.ERAS.items():
        (tmp_path / era).mkdir()
        rows = [(year, text) for year in years for text in texts]
        DataFrame(rows, columns=["year", "text"]).to_csv(tmp_path / era / "train.csv", index=False)
    monkeypatch.setattr(unrelated, "sotu", lambda cache: tmp_path)
    found = {task: unrelated.passages(tmp_path, task, "train") for task in unrelated.TASKS}
    assert all(labels.count(0) == labels.count(1) > 0 for _, labels in found.values())
    for task, kept in {"country": {texts[0]}, "money": {texts[1]}, "digits": {texts[1]}}.items():
        assert {text for text, label in zip(*found[task], strict=True) if label} == kept
    assert len(found["before-1850"][0]) == 2 * 60 * len(texts)  # 60 years before 1850 and 63 after it


def test_the_parties_of_presidents_share_no_year() -> None:
    assert not unrelated.DEMOCRATIC & unrelated.REPUBLICAN
    terms = {
        1864: 1,
        1880: 1,
        1886: 0,
        1910: 1,
        1918: 0,
        1930: 1,
        1945: 0,
        1958: 1,
        1965: 0,
        1974: 1,
        1979: 0,
        2011: 0,
    }
    assert {year: unrelated.TASKS["party"](year, "") for year in terms} == terms
    # Before 1857 one of the parties is missing; Johnson changed his; in the other years two presidents spoke.
    assert [unrelated.TASKS["party"](year, "") for year in (1850, 1866, 1953, 1961, 1981)] == [None] * 5


@torch.no_grad()
def test_the_score_of_a_language_model_weights_every_token_equally() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1)).eval()
    learned = sotu.ByteLevelBPETokenizer(vocab={f"t{index}": index for index in range(20)}, merges=[])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, pad_token="t0")
    samples = [[1, 2, 3, 4, 5, 6], [7, 8], *([[9, 10, 11]] * 100)]  # more than a batch
    losses = [
        cross_entropy(model(torch.tensor([sample])).logits[0, :-1], torch.tensor(sample[1:]), reduction="sum")
        for sample in samples
    ]
    expected = float(sum(losses)) / sum(len(sample) - 1 for sample in samples)
    assert score(model, tokenizer, [{"input_ids": sample} for sample in samples]) == pytest.approx(expected, rel=1e-4)


def test_every_source_has_a_folder_of_its_own() -> None:
    folders = [source_folder(Path(), name, domain) for name, kind in KINDS.items() for domain in kind.domains]
    assert len(folders) == len(set(folders)) == 7 + 7 + 7 + 7 + 6 + 6 + 6


def test_a_trial_finds_the_units_whose_gradients_agree() -> None:
    units = [
        Unit("same", ("same.weight", "same.mean")),
        Unit("apart", ("apart.weight", "apart.bias")),
        Unit("still", ("still.mean",)),
    ]
    target = {
        "same.weight": torch.tensor([[1.0, 0.0]]),
        "apart.weight": torch.tensor([1.0]),
        "apart.bias": torch.tensor([1.0]),
    }
    source = {
        "same.weight": torch.tensor([[1.0, 3.0]]),
        "apart.weight": torch.tensor([1.0]),
        "apart.bias": torch.tensor([-0.6]),
    }
    assert agreeing(units, target, source) == {"same.weight", "same.mean"}  # cosines 1 / sqrt(10) and 0.24


@pytest.mark.parametrize(("errors", "harmful"), [(1.0, True), (2.0, True), (4.0, False), (-1.0, True)])
def test_a_rise_by_more_standard_errors_is_harm(errors: float, harmful: bool) -> None:
    rises = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0])  # mean 1, standard error sqrt(0.5 / 5)
    assert harms(torch.zeros(5), rises, errors) == harmful
    assert not harms(rises, torch.zeros(5), errors)


def test_a_trial_of_means_weights_a_source_by_the_lower_loss() -> None:
    lab = object.__new__(Laboratory)
    lab.net, lab.collate = tiny_model("bert").eval(), default_data_collator
    labels = list(tiny_data("bert", 16, seed=1))
    states = {
        name: dict(perturbed(tiny_model("bert"), seed, scale=0.03).state_dict()) for seed, name in enumerate("abc")
    }
    merges = {rule: merge_by_means(lab, states, ["a", "b", "c"], labels, rule) for rule in MEANS}
    weight = "classifier.weight"
    mean = torch.stack([state[weight] for state in states.values()]).mean(0)
    torch.testing.assert_close(merges["mean"][0][weight], mean)
    low, high = torch.stack([state[weight] for state in states.values()]).aminmax(dim=0)
    found = merges["fisher"][0][weight]
    assert ((low - 1e-6 <= found) & (found <= high + 1e-6)).all() and not torch.allclose(found, mean, atol=1e-3)
    assert [weighted for _, _, weighted in merges.values()][:2] == [[], ["b", "c"]]
    assert {*merges["better"][2]} <= {"b", "c"} and all(taken == ["a", "b", "c"] for _, taken, _ in merges.values())
    first = {rule: merge_by_means(lab, states, ["a", "b"], labels, rule)[0] for rule in MEANS}
    losses = {rule: float(lab.losses(state, labels, SCALES).mean()) for rule, state in first.items()}
    assert losses["better"] == min(losses.values()) and losses["mean"] != losses["fisher"]


# --- the tables of comparisons

ERA = "2005-2021"


def losses(method: str, values: list[float]) -> list[Result]:
    return [Result(method, 64, seed, {}, {"loss": value}, 1.0) for seed, value in enumerate(values)]


def cells(table: str) -> list[list[str]]:
    """Return the rows of a Markdown table, the one below the head left out."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return rows[:1] + rows[2:]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache with models and with two recorded runs of `sotu`."""
    cache = tmp_path / "cache"
    for domain in sotu.ERAS:
        folder = cache / "sotu" / "sources" / f"gpt2-{domain}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(domain)
        (folder / "config.json").write_text("{}")
    shutil.copytree(folder, cache / "models" / "gpt2-sotu")
    monkeypatch.setattr(comparing, "RESULTS", tmp_path)
    monkeypatch.chdir(cache)
    models = model_identities(comparing.recipe_of("sotu", ERA, 64))
    assert len({*models.values()}) == len(models) == 7  # the base and six sources, without that of the target
    found = losses("source:a", [3.0, 5.0]) + losses("source:b", [5.0, 7.0]) + losses("ties", [2.0, 1.0])
    (tmp_path / "sotu.json").write_text(json.dumps({"settings": {}, "results": []}))
    comparison = Comparison([*found, *losses(OURS, [1.5, 1.5])], {"models": models, "digests": {"train": "x"}})
    comparison.save(comparing.comparison_folder("sotu", ERA, 64, cache))
    comparing.save("sotu", cache)
    return cache


def test_recorded_results_of_the_same_models_are_restored(kept: Path) -> None:
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    before = Comparison.load(folder)
    shutil.rmtree(folder)
    comparing.restore("sotu", kept)
    restored = Comparison.load(folder)
    assert restored.setting == before.setting and len(restored.results) == len(before.results)
    assert all(result in restored.results for result in before.results)
    part = Comparison(before.results[3:], before.setting)
    part.save(folder)
    comparing.restore("sotu", kept)
    after = Comparison.load(folder)
    assert len(after.results) == 8 and all(result in after.results for result in before.results)


def test_the_record_holds_no_scores_of_single_samples(kept: Path) -> None:
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    known = Comparison.load(folder)
    ones = torch.ones(40)
    known.results = [
        Result.of(method, 64, 0, {"final": SampleLosses(ones, 2 * ones, ones, None)}, 1.0) for method in ("ties", OURS)
    ]
    known.save(folder)
    assert all(result.samples["final"] for result in Comparison.load(folder).results)
    comparing.save("sotu", kept)
    rows = json.loads((kept.parent / "sotu.json").read_text())["results"]
    assert rows and not any("samples" in row for row in rows)
    shutil.rmtree(folder)
    comparing.restore("sotu", kept)
    restored = {result.method: result for result in Comparison.load(folder).results if result.seed == 0}
    assert restored["ties"].final == {"loss": 0.5} and restored["ties"].samples == {}


def test_runs_that_the_cache_lacks_stay_in_the_record(kept: Path) -> None:
    record = json.loads((kept.parent / "sotu.json").read_text())
    shutil.rmtree(comparing.comparison_folder("sotu", ERA, 64, kept))
    other = Comparison(losses(OURS, [2.0]), {"models": {}, "digests": {}})
    other.save(comparing.comparison_folder("sotu", ERA, 256, kept))
    comparing.save("sotu", kept)
    comparing.save("sotu", kept)
    now = json.loads((kept.parent / "sotu.json").read_text())
    assert [*now["settings"]] == [f"sotu-{ERA}-64-0", f"sotu-{ERA}-64-1", f"sotu-{ERA}-256-0"]
    assert now["results"][:-1] == record["results"] and now["results"][-1]["final"] == {"loss": 2.0}
    assert (kept.parent / "sotu.json").read_text().count("\n{") == len(now["results"])  # one line for each result


def test_recorded_results_of_other_models_are_not_restored(kept: Path) -> None:
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    shutil.rmtree(folder)
    (kept / "sotu" / "sources" / "gpt2-1790-1860" / "model.safetensors").write_text("trained anew")
    comparing.restore("sotu", kept)
    assert not folder.exists()
    own = Comparison(
        losses(OURS, [9.0]), {"models": model_identities(comparing.recipe_of("sotu", ERA, 64)), "digests": {}}
    )
    own.save(folder)
    comparing.restore("sotu", kept)
    assert Comparison.load(folder) == own


def test_a_cache_of_earlier_models_takes_no_recorded_results(kept: Path) -> None:
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    stale = Comparison(
        losses(OURS, [9.0]), {**Comparison.load(folder).setting, "models": {"models/gpt2-sotu": "earlier"}}
    )
    stale.save(folder)
    comparing.restore("sotu", kept)
    assert Comparison.load(folder) == stale


def test_the_table_shows_means_and_paired_differences_of_all_runs(kept: Path) -> None:
    assert cells(comparing.tables("sotu", [ERA])[0]) == [
        ["sotu: loss", "kind", "64 labels (2 runs)"],
        ["source (mean of all)", "control", "5.000 (-3.500 ± 12.706)"],  # 4 and 6 against 1.5 twice
        ["TIES", "existing", "1.500 (+0.000 ± 6.353)"],
        ["grasp_hf, as in the recipe", "ours", "1.500"],
    ]


def test_by_loss_keeps_only_the_loss() -> None:
    both = Result(OURS, 64, 0, {}, {"loss": 0.5, "accuracy": 0.9}, 1.0)
    failed = Result("fusion", 64, 0, {}, {}, 1.0, "out of memory")
    found = comparing.by_loss(Comparison([both, failed], {}))
    assert found.measure == "loss" and found.runs(OURS, 64) == {0: 0.5} and found.methods(64) == [OURS]


def test_ranks_are_means_over_runs_with_a_sign_test(kept: Path) -> None:
    assert cells(comparing.overall({"sotu": [ERA]}))[1:] == [
        ["TIES", "existing", "1.5", "1 / 1 (p = 1.000)", "1.5", "1 / 1 (p = 1.000)", "1.00"],
        ["grasp_hf, as in the recipe", "ours", "1.5", "–", "1.5", "–", "1.00"],
        ["source (mean of all)", "control", "3.0", "2 / 0 (p = 0.500)", "3.0", "2 / 0 (p = 0.500)", "–"],
    ]


def test_the_best_other_row_is_named_with_its_difference_to_ours(kept: Path) -> None:
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    known = Comparison.load(folder)
    known.results += losses("dare", [1.75, 1.0]) + losses("base-line", [2.0, 2.5])
    known.results += losses("variant:no gate", [0.0, 0.0]) + losses(
        "fisher", [0.0]
    )  # neither counts: a row of ours, and a row without every run
    known.save(folder)
    comparing.save("sotu", kept)
    assert cells(comparing.leaders({"sotu": [ERA]})) == [
        ["measure", "ours", "best other row", "best row with our gate"],
        ["sotu, 64 labels: loss (2 runs)", "1.500", "DARE (+0.125 ± 4.765)", "base model (-0.750 ± 3.177)"],
    ]


def test_ours_without_the_gate_is_compared_with_other_rows_without_it(kept: Path) -> None:
    assert comparing.ungated({"sotu": [ERA]}) == "ours without the gate: nothing yet"
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    known = Comparison.load(folder)
    known.results += losses(f"variant:{comparing.UNGATED}", [1.75, 1.25]) + losses("ties-line", [0.0, 0.0])
    known.save(folder)
    comparing.save("sotu", kept)
    assert cells(comparing.ungated({"sotu": [ERA]})) == [
        ["ours without the gate, against", "kind", "better / worse", "by loss"],
        ["TIES", "existing", "1 / 1 (p = 1.000)", "1 / 1 (p = 1.000)"],
        ["source (mean of all)", "control", "2 / 0 (p = 0.500)", "2 / 0 (p = 0.500)"],
    ]


def row(target: str, method: str, seed: int, loss: float, accuracy: float, seconds: float) -> dict[str, Any]:
    """Return a row of a benchmark's record."""
    result = Result(method, 64, seed, {}, {"loss": loss, "accuracy": accuracy}, seconds)
    return {"target": target, "labels": 64, **asdict(result)}


def test_the_summary_has_five_rows_over_both_sets_of_targets(kept: Path) -> None:
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    known = Comparison.load(folder)
    known.results += losses("best-source", [2.5, 2.5]) + losses("base", [4.5])  # the base has only one of two seeds
    known.save(folder)
    comparing.save("sotu", kept)
    rows = []
    for target, seeds in {"noto": (0, 1), "twemoji": (0,)}.items():
        for seed in seeds:
            rows += [
                row(target, "source:a", seed, 9.0, 0.1, 1.0),
                row(target, OURS, seed, 1.0, 0.6, 4.0),
                row(target, "best-source", seed, 2.0 + seed, 0.5, 1.0),
            ]
    (kept.parent / "emoji.json").write_text(json.dumps({"settings": {}, "results": rows}))
    table = cells(comparing.summary(["sotu", "emoji"]))
    assert table[0] == [
        "method",
        "development targets: accuracy (2 runs)",
        "development targets: loss (4 runs)",
        "untouched targets: accuracy (1 run)",
        "untouched targets: loss (1 run)",
        "time, of ours",
    ]
    assert table[1] == ["grasp_hf, default", "0.600", "1.250", "0.600", "1.000", "1.00"]
    assert table[2] == [
        "best source on the labels, fine-tuned",
        "0.500 (-0.100 ± 0.000)",
        "2.500 (-1.250 ± 0.796)",  # 1, 1, 1 and 2: a deviation of 0.5, and 3.182 of Student's t
        "0.500 (-0.100)",
        "2.000 (-1.000)",
        "0.36",  # 2 and 3 seconds of 2 and 12
    ]
    assert [line[0] for line in table[3:]] == [*comparing.SUMMARY.values()][2:]
    assert all(line[1:-1] == ["–"] * 4 for line in table[3:])
    assert [cell.partition(":")[0] for cell in cells(comparing.summary(["sotu"]))[0][1:]] == [
        "development targets",
        "time, of ours",
    ]


def test_only_rows_can_be_printed_before_fine_tuning(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(sys, "argv", ["compare", "sotu", "--table", "--merged", "--show", "ranks"]):
        with pytest.raises(SystemExit):
            comparing.main()
    assert "--merged: expected --show rows" in capsys.readouterr().err


def test_the_table_of_the_ranking_has_a_row_for_each_predictor() -> None:
    found = {(predictor, effect): [0.5, 0.7] for predictor in rank.PREDICTORS for effect in rank.EFFECTS}
    assert cells(rank.table(found | {("gain", "copied"): [0.25]}))[:3] == [
        ["predictor", "copied", "averaged", "fine-tuned"],
        ["gain", "+0.25", "+0.60 ± 1.27", "+0.60 ± 1.27"],
        ["cosine", "+0.60 ± 1.27", "+0.60 ± 1.27", "+0.60 ± 1.27"],
    ]


def test_the_table_before_fine_tuning_has_final_scores_of_methods_without_any(kept: Path) -> None:
    folder = comparing.comparison_folder("sotu", ERA, 64, kept)
    known = Comparison.load(folder)
    known.results += [Result("dare", 64, seed, {"loss": 4.0}, {"loss": 1.0}, 1.0) for seed in (0, 1)]
    known.save(folder)
    comparing.save("sotu", kept)
    rows = {row[0]: row[2] for row in cells(comparing.tables("sotu", [ERA], merged=True)[0])}
    assert rows["DARE"] == "4.000 (-2.500 ± 0.000)" and rows["TIES"] == "1.500 (+0.000 ± 6.353)"


def test_only_a_finished_run_replaces_the_recorded_one(kept: Path) -> None:
    folder, path = comparing.comparison_folder("sotu", ERA, 64, kept), kept.parent / "sotu.json"
    before = json.loads(path.read_text())
    other = {"models": {"models/gpt2-sotu": "trained anew"}, "digests": {}}
    anew = Comparison([Result(name, 64, 1, {}, {"loss": 9.0}, 1.0) for name in ("ties", OURS)], other)
    Comparison(anew.results[:1], other).save(folder)
    comparing.save("sotu", kept)
    assert json.loads(path.read_text()) == before
    anew.save(folder)
    comparing.save("sotu", kept)
    now = json.loads(path.read_text())
    assert now["settings"] == before["settings"] | {f"sotu-{ERA}-64-1": other}
    assert [row for row in now["results"] if row["seed"] == 0] == [
        row for row in before["results"] if row["seed"] == 0
    ]
    assert [row["final"]["loss"] for row in now["results"] if row["seed"] == 1] == [9.0, 9.0]


def test_a_recorded_run_of_other_models_does_not_stop_the_restoring_of_the_others(kept: Path) -> None:
    folder, path = comparing.comparison_folder("sotu", ERA, 64, kept), kept.parent / "sotu.json"
    before, record = Comparison.load(folder), json.loads(path.read_text())
    record["settings"][f"sotu-{ERA}-64-0"] = {"models": {"models/gpt2-sotu": "another"}, "digests": {}}
    path.write_text(json.dumps(record))
    shutil.rmtree(folder)
    comparing.restore("sotu", kept)
    assert Comparison.load(folder).results == [result for result in before.results if result.seed == 1]


def test_a_setting_is_compared_with_the_default_of_the_same_run() -> None:
    run = {"benchmark": "sotu", "target": ERA, "labels": 64}
    rows: list[dict[str, Any]] = [
        {**run, "seed": seed, "setting": setting, "loss": loss, "seconds": seconds}
        for setting, found in {"default": [(2.0, 10.0), (3.0, 20.0)], "no gate": [(2.5, 5.0), (2.5, 10.0)]}.items()
        for seed, (loss, seconds) in enumerate(found)
    ]
    assert cells(settings.table(rows))[1:] == [
        ["default", "2", "2.500", "–", "1.0"],
        ["no gate", "2", "2.500", "+0.000 ± 6.353", "0.5"],
    ]
    assert cells(settings.table([row | {"accuracy": row["loss"] / 10} for row in rows]))[2] == (
        ["no gate", "2", "2.500", "+0.000 ± 6.353", "0.250", "+0.000 ± 0.635", "0.5"]
    )


@pytest.mark.parametrize(
    ("models", "loss", "stays"),
    [
        pytest.param(1, 2.0, True, id="same"),
        pytest.param(2, 2.0, False, id="other models"),
        pytest.param(1, 1.0, False, id="other version"),
    ],
)
def test_earlier_settings_stay_if_the_default_is_the_same(
    tmp_path: Path, models: int, loss: float, stays: bool
) -> None:
    path, run = tmp_path / "settings.json", {"benchmark": "sotu", "target": ERA, "labels": 64, "seed": 0}
    path.write_text(json.dumps({"settings": {}, "results": []}))
    first = [{**run, "setting": "default", "loss": 2.0}, {**run, "setting": "no gate", "loss": 3.0}]
    settings.save(first, {"models": 1, "variants": {"no gate": {"gate": False}}}, path)
    settings.save([{**run, "setting": "default", "loss": loss}], {"models": models, "variants": {}}, path)
    record = json.loads(path.read_text())
    kept = {"no gate": 3.0} if stays else {}
    assert {row["setting"]: row["loss"] for row in record["results"]} == {"default": loss} | kept
    variants = {"no gate": {"gate": False}} if stays else {}
    assert record["settings"] == {f"sotu-{ERA}-64-0": {"models": models, "variants": variants}}


def test_settings_have_a_table_for_each_benchmark_and_number_of_labels() -> None:
    rows = [
        {
            "benchmark": "sotu",
            "target": ERA,
            "labels": labels,
            "seed": 0,
            "setting": "default",
            "loss": 1,
            "seconds": 1,
        }
        for labels in (64, 256)
    ]
    found = settings.tables(rows)
    assert [line for line in found.splitlines() if line and line[0] != "|"] == ["sotu, 64 labels", "sotu, 256 labels"]
    assert found.count("| default ") == 2


def test_an_unknown_setting_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--only: got 'gate'; expected some of units: module, .*no gate"):
        settings.run("sotu", ERA, 64, 0, tmp_path, ["gate"])
    assert not list(tmp_path.iterdir())


# --- verdicts and seeds


def change(loss: float, half: float | None) -> ChangeReport:
    return ChangeReport(loss, half, 64, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(change(-0.2, 0.1), "helps", id="below 0"),
        pytest.param(change(0.2, 0.1), "harms", id="above 0"),
        pytest.param(change(-0.1, 0.1), "no measurable effect", id="the interval ends at 0"),
        pytest.param(change(0.1, 0.2), "no measurable effect", id="around 0"),
        pytest.param(change(-0.2, None), "no measurable effect", id="a single sample"),
        pytest.param(None, None, id="not validated"),
    ],
)
def test_the_verdict_follows_from_the_interval(given: ChangeReport | None, expected: str | None) -> None:
    assert flips.verdict(given) == expected


def merges(source: str, *outcomes: tuple[str | None, bool]) -> list[dict[str, Any]]:
    """Return a row for each seed: the verdict on a source, and whether it was accepted."""
    common = {"cell": "demo", "draw": False, "source": source}
    return [
        {**common, "seed": seed, "verdict": verdict, "accepted": accepted, "test": {"loss": 1.0 + seed}}
        for seed, (verdict, accepted) in enumerate(outcomes)
    ]


def test_flips_are_shares_of_all_pairs_of_seeds() -> None:
    rows = merges("a", ("helps", True), ("harms", False), ("no measurable effect", True))
    rows += merges("b", ("helps", True), ("helps", True), ("helps", False))
    assert flips.shares(rows) == {
        "helps and harms": pytest.approx(1 / 6),
        "another verdict": pytest.approx(3 / 6),
        "accepted once": pytest.approx(4 / 6),
    }
    assert flips.shares(merges("a", ("helps", True))) == {}
    assert flips.shares(merges("a", ("helps", True), (None, True))) == {}


def test_the_table_of_flips_has_a_row_for_each_source_and_one_for_all() -> None:
    rows = merges("a", ("helps", True), ("harms", False)) + merges("b", ("helps", True), ("helps", True))
    title, table = flips.tables(rows).split("\n\n")
    assert title == "demo, 2 seeds, the same labels; on the test samples: loss 1.500 (standard deviation 0.707)"
    assert cells(table) == [
        ["source", "verdicts", "accepted", "helps and harms", "another verdict", "accepted once"],
        ["a", "helps 1, harms 1", "1 of 2", "100 %", "100 %", "100 %"],
        ["b", "helps 2", "2 of 2", "0 %", "0 %", "0 %"],
        ["all", "helps 3, harms 1", "3 of 4", "50 %", "50 %", "50 %"],
    ]


def test_flips_of_other_cells_stay_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "flips.json"
    demo, other = merges("a", ("helps", True)), [row | {"cell": "emoji:noto"} for row in merges("a", ("harms", True))]
    for rows in (demo, other, merges("b", ("helps", False), ("harms", True))):
        flips.save(path, rows)
    record = json.loads(path.read_text())
    assert record["results"] == other + merges("b", ("helps", False), ("harms", True))
    assert [*record["settings"]] == ["demo", "emoji:noto"]


@pytest.mark.parametrize("validated", [False, True])
def test_a_draw_keeps_the_sizes_and_separates_labels_from_validation(validated: bool) -> None:
    def numbered(start: int, count: int) -> Dataset:
        return Dataset.from_dict({"number": [*range(start, start + count)]})

    data = Samples(numbered(0, 6), numbered(6, 4) if validated else None, numbered(10, 3))
    draws = [flips.drawn(data, 4, seed) for seed in (0, 0, 1)]
    numbers = [[sample["number"] for part in (draw.train, draw.validation or []) for sample in part] for draw in draws]
    assert numbers[0] == numbers[1] != numbers[2]
    for draw, own in zip(draws, numbers, strict=True):
        assert len(draw.train) == 4 and len({*own}) == len(own) == (8 if validated else 4)
        assert draw.test is data.test
    if validated:
        assert any(number >= 6 for number in numbers[0][:4] + numbers[2][:4])


def test_a_merge_yields_the_verdict_on_each_source(tmp_path: Path) -> None:
    saved(tiny_model("resnet"), tmp_path / "base")
    for name, scale in {"near": 0.05, "far": 3.0}.items():
        saved(perturbed(tiny_model("resnet"), 1, scale), tmp_path / name)
    write_images(tmp_path / "data", {"train": 12, "validation": 12, "test": 12})
    text = "base_model: base\nsources: [near, far]\ntask: image-classification\nfinal_epochs: 1\n"
    text += "data: {path: imagefolder, data_dir: data, image: image, label: label}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml", ["seed=3"])
    rows = flips.merge(recipe, None)
    assert {row["source"] for row in rows} == {"near", "far"} and {row["seed"] for row in rows} == {3}
    for row in rows:
        assert row["verdict"] == flips.verdict(change(row["loss"], row["half_interval"]))
        assert isinstance(row["accepted"], bool) and {"loss", "accuracy"} <= row["test"].keys()
    assert json.loads(json.dumps(rows)) == rows
