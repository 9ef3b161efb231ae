"""Models on the Hub: their commits, files and tokens, and the files that are pushed back."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, AutoTokenizer

from grasp_hf import GraspConfig, GraspMerger, Recipe, merge_pretrained
from grasp_hf.errors import ConfigError, DownloadError, GraspError, IncompatibleSourceError, SourceNotFoundError
from grasp_hf.hub.download import commit_of, locate, look_up
from grasp_hf.hub.licenses import strictest
from grasp_hf.hub.reference import SourceRef
from grasp_hf.runs.plan import plan, plan_table
from grasp_hf.tensors.units import movable_tensors
from tests.support.hub.server import HubServer
from tests.support.models import (
    MEASURE_ONLY,
    NO_TUNING,
    copied,
    perturbed,
    saved,
    saved_adapter,
    tiny_data,
    tiny_model,
)

TOKEN = "hf_alice"
LORA: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
COPY_ALL = GraspConfig(**{**vars(MEASURE_ONLY), "method": "copy", "threshold": -1.0, "gate": False})


@pytest.fixture(scope="session")
def shas(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Publish a base, two versions of a fine-tune, an adapter, and incomplete repositories."""
    root = tmp_path_factory.mktemp("models")
    base = saved(tiny_model("vit"), root / "base")
    made = {"base": hub.add_repo("org/hub-base", base)}
    for version in (1, 2):
        folder = saved(perturbed(tiny_model("vit"), seed=version), root / f"v{version}")
        made[f"v{version}"] = hub.add_repo("org/hub-fine", folder, tag=f"v{version}")
    made["private"] = hub.add_repo("org/hub-private", root / "v1", private=True)
    adapter = saved_adapter(tiny_model("vit"), "org/hub-base", root / "adapter", **LORA)
    made["adapter"] = hub.add_repo("org/hub-lora", adapter)
    (root / "empty").mkdir()
    (root / "empty" / "config.json").write_text((root / "base" / "config.json").read_text())
    made["empty"] = hub.add_repo("org/hub-empty", root / "empty")
    both = copied(base, root / "both")
    torch.save(load_file(both / "model.safetensors"), both / "pytorch_model.bin")
    (both / "onnx").mkdir()
    (both / "onnx" / "model.safetensors").write_bytes(b"another export")
    made["both"] = hub.add_repo("org/hub-both", both)
    (both / "model.safetensors").unlink()
    made["pickled"] = hub.add_repo("org/hub-pickled", both)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a test its own cache, so that it downloads every file."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def downloads(hub: HubServer, since: int) -> list[str]:
    """Return the paths of all files requested from request number `since` on."""
    return [
        path for method, path in hub.requests[since:] if method == "GET" and ("/resolve/" in path or "/lfs" in path)
    ]


def test_a_revision_picks_the_weights(hub: HubServer, shas: dict[str, str]) -> None:
    merger = GraspMerger.from_pretrained("org/hub-base", config=COPY_ALL)
    assert (merger.report.base, merger.report.base_sha) == ("org/hub-base", shas["base"])
    references = {"org/hub-fine@v1": "v1", f"org/hub-fine@{shas['v2']}": "v2", "org/hub-fine": "v2"}
    for reference, version in references.items():
        step = merger.merge([reference], train_dataset=tiny_data("vit", 8)).steps[-1]
        assert (step.source, step.sha, step.kind) == (reference, shas[version], "full")
        expected = movable_tensors(perturbed(tiny_model("vit"), seed=int(version[1])))
        moved = [unit.name for unit in step.units if unit.decision == "moved"]
        assert "classifier" in moved
        weights = movable_tensors(merger.model)
        assert torch.equal(weights["classifier.weight"], expected["classifier.weight"])
        assert torch.equal(weights["vit.layers.1.mlp.fc1.weight"], expected["vit.layers.1.mlp.fc1.weight"])


def test_the_revision_of_the_base(hub: HubServer, shas: dict[str, str]) -> None:
    for merger in (
        GraspMerger.from_pretrained("org/hub-fine@v1"),
        GraspMerger.from_pretrained("org/hub-fine", revision="v1"),
    ):
        assert merger.report.base_sha == shas["v1"]
        expected = perturbed(tiny_model("vit"), seed=1)
        assert torch.equal(
            merger.model.get_parameter("classifier.weight"), expected.get_parameter("classifier.weight")
        )


def test_an_adapter_by_id(hub: HubServer, shas: dict[str, str]) -> None:
    merger = GraspMerger.from_pretrained("org/hub-base", config=COPY_ALL)
    step = merger.merge(["org/hub-lora"], train_dataset=tiny_data("vit", 8)).steps[0]
    assert (step.kind, step.sha, step.moved, len(step.units)) == ("adapter", shas["adapter"], 3, 3)


def test_reading_an_adapter_asks_the_hub_nothing(hub: HubServer, tmp_path: Path) -> None:
    # PEFT would request the vocabulary of the base from the main branch, without a token.
    hub.add_repo("org/hub-bert", saved(tiny_model("bert"), tmp_path / "bert"), private=True)
    adapter = saved_adapter(tiny_model("bert"), "org/hub-bert", tmp_path / "lora", target_modules=["query"])
    merger = GraspMerger.from_pretrained("org/hub-bert", token=TOKEN, config=COPY_ALL)
    since = len(hub.requests)
    merger.merge([adapter], train_dataset=tiny_data("bert", 8))
    assert hub.requests[since:] == []


@pytest.mark.parametrize("find", [locate, look_up])
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("org/hub-missing", "'org/hub-missing': no such model on the Hub, or it is private: check the spelling"),
        ("org/hub-private", "'org/hub-private': no such model on the Hub, or it is private: .* pass a token"),
        ("org/hub-fine@v3", "'org/hub-fine' has no revision 'v3': expected a branch, tag or sha"),
        ("org/hub-empty", "'org/hub-empty' holds no weights: expected one of model.safetensors.*found: .*config.json"),
        ("org/hub--bad", "'org/hub--bad' is not a Hub id"),
    ],
)
def test_a_missing_model_is_explained(
    find: Any, reference: str, message: str, hub: HubServer, shas: dict[str, str]
) -> None:
    with pytest.raises(SourceNotFoundError, match=message):
        find(reference)


def test_a_missing_source_is_named_in_a_merge(hub: HubServer, shas: dict[str, str]) -> None:
    merger = GraspMerger.from_pretrained("org/hub-base", config=COPY_ALL)
    with pytest.raises(
        SourceNotFoundError, match="^while merging source 2/2 'org/hub-fine@v3': 'org/hub-fine' has no"
    ):
        merger.merge(["org/hub-fine@v1", "org/hub-fine@v3"], train_dataset=tiny_data("vit", 8))
    assert [step.source for step in merger.report.steps] == ["org/hub-fine@v1"]


def test_a_repository_without_weights_is_not_called_pickled(
    hub: HubServer, shas: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SourceNotFoundError, match="holds no weights"):
        locate("org/hub-empty")
    assert "pickled" not in caplog.text


def test_a_private_repository_needs_a_token(
    hub: HubServer, shas: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in ("hf_bob", "hf_nobody"):
        with pytest.raises(SourceNotFoundError, match="'org/hub-private'"):
            locate("org/hub-private", token=token)
    assert locate("org/hub-private", token=TOKEN).sha == shas["private"]
    merger = GraspMerger.from_pretrained("org/hub-private", token=TOKEN, config=COPY_ALL)
    assert torch.equal(
        merger.model.get_parameter("classifier.weight"),
        perturbed(tiny_model("vit"), seed=1).get_parameter("classifier.weight"),
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert look_up("org/hub-private")[0].sha == shas["private"]


def test_only_safetensors_are_downloaded_where_there_are_both(
    hub: HubServer, shas: dict[str, str], cache: Path
) -> None:
    since = len(hub.requests)
    source = locate("org/hub-both")
    names = {path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert not any("pytorch_model.bin" in path or "onnx" in path for path in downloads(hub, since))


def test_pickled_weights_where_there_are_no_others(
    hub: HubServer, shas: dict[str, str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merger = GraspMerger.from_pretrained("org/hub-pickled")
    assert torch.equal(
        merger.model.get_parameter("classifier.weight"), tiny_model("vit").get_parameter("classifier.weight")
    )
    assert (
        "org/hub-pickled has no safetensors weights; its pickled weights are loaded with weights_only" in caplog.text
    )


def test_a_look_up_and_a_plan_download_no_weights(hub: HubServer, shas: dict[str, str], cache: Path) -> None:
    since = len(hub.requests)
    references = ["org/hub-fine@v1", "org/hub-lora", "org/hub-both", "org/hub-pickled", "org/hub-missing"]
    rows = plan(Recipe(sources=references, base_model="org/hub-base"))
    asked = downloads(hub, since)
    assert asked and not any(path.endswith(".bin") for path in asked)
    headers = [exchange for exchange in hub.exchanges[since:] if "/lfs/" in exchange.path]
    assert headers and all(exchange.range == "bytes=0-100000" for exchange in headers)
    assert not [path for path in cache.rglob("*") if path.suffix in (".safetensors", ".bin")]

    assert [row.role for row in rows] == ["base"] + ["source"] * 5
    assert [row.kind for row in rows] == ["full", "full", "adapter", "full", "full", ""]
    assert [row.sha for row in rows] == [*(shas[n] for n in ("base", "v1", "adapter", "both", "pickled")), None]
    assert [row.architecture for row in rows] == ["vit", "vit", "LORA", "vit", "vit", ""]
    assert [len(row.problems) for row in rows] == [0, 0, 0, 0, 0, 1]
    assert rows[5].problems[0].startswith("no such model on the Hub")  # the row names the reference
    assert rows[0].data_problems == [
        "data.path: missing, expected imagefolder, csv, json, parquet, a folder or a Hub id"
    ]
    assert not any(row.data_problems for row in rows[1:])
    for row in rows[:5]:
        source = locate(row.reference)
        assert row.num_bytes == source.num_bytes > 0


def test_the_hub_out_of_reach(hub: HubServer, shas: dict[str, str], cache: Path) -> None:
    hub.fail("/api/models/org/hub-fine", 500, times=50)
    try:
        for find in (locate, look_up):
            with pytest.raises(DownloadError, match="'org/hub-fine' could not be downloaded, and no complete copy"):
                find("org/hub-fine")
    finally:
        hub.failures.clear()
    locate("org/hub-fine")
    hub.fail("/api/models/org/hub-fine", 500, times=50)
    try:
        assert locate("org/hub-fine").sha == shas["v2"], "the cached copy is used"
        assert look_up("org/hub-fine")[0].sha == shas["v2"]
    finally:
        hub.failures.clear()


def test_a_plan_shows_the_licence_of_the_merge_and_pickled_weights(
    hub: HubServer, cache: Path, tmp_path: Path
) -> None:
    for name, licence in {"free": "mit", "shared": "cc-by-sa-4.0", "pickled": "cc-by-nc-4.0"}.items():
        folder = Path(saved(perturbed(tiny_model("vit"), seed=20), tmp_path / name))
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        if name == "pickled":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        hub.add_repo(f"org/plan-{name}", folder)
    recipe = Recipe(sources=["org/plan-shared", "org/plan-pickled"], base_model="org/plan-free", config=COPY_ALL)
    rows = plan(recipe)
    text = plan_table(rows, recipe)
    declared, warnings = strictest({row.reference: row.license for row in rows})
    assert declared == "other" and any("org/plan-shared" in text and "org/plan-pickled" in text for text in warnings)
    assert f"\nlicence of the merge: other\n- {warnings[0]}" in text
    assert (
        "- org/plan-pickled: its weights are pickled, so their shapes are unknown until the merge reads them" in text
    )
    assert text.count("its weights are pickled") == 1


def test_without_a_network_the_cache_is_used(
    hub: HubServer, shas: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate("org/hub-fine")
    look_up("org/hub-base")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    since = len(hub.requests)
    assert locate("org/hub-fine").sha == shas["v2"]
    for reference in ("org/hub-base", "org/hub-lora"):  # the cache has the configuration, and nothing
        for find in (locate, look_up):
            with pytest.raises(
                DownloadError,
                match=f"'{reference}' could not be downloaded, and no complete copy is cached"
                "(: HF_HUB_OFFLINE is set; unset it|; run it again)",
            ):
                find(reference)
    assert look_up("org/hub-fine")[0].sha == shas["v2"]
    assert hub.requests[since:] == []


def merger_of_three(local: str) -> GraspMerger:
    merger = GraspMerger.from_pretrained("org/hub-base", config=COPY_ALL)
    sources = ["org/hub-fine@v1", "org/hub-lora", "org/hub-fine@v2", local, "org/hub-base"]
    merger.merge(sources, train_dataset=tiny_data("vit", 8))
    return merger


@pytest.mark.parametrize("private", [None, True])
def test_a_pushed_model_is_loaded_unchanged(
    private: bool | None, hub: HubServer, shas: dict[str, str], tmp_path: Path
) -> None:
    local = saved(perturbed(tiny_model("vit"), seed=9), tmp_path / "here")
    merger = merger_of_three(local)
    repo_id = f"org/hub-merged-{private}"
    url = merger.push_to_hub(repo_id, private=private, token=TOKEN)
    assert url.startswith(f"{hub.url}/{repo_id}/commit/")
    assert hub.repos[repo_id].private is bool(private)

    token = TOKEN if private else None
    if private:
        with pytest.raises(OSError, match=repo_id):
            AutoModelForImageClassification.from_pretrained(repo_id)
    loaded = AutoModelForImageClassification.from_pretrained(repo_id, token=token)
    pixels = tiny_data("vit", 4)[:]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, merger.model.eval()(pixels).logits)
    assert GraspMerger.from_pretrained(repo_id, token=token).processing_class is not None

    card = ModelCard.load(repo_id, token=token)
    assert card.data.base_model == ["org/hub-base", "org/hub-fine", "org/hub-lora"]
    assert card.data.base_model_relation == "merge"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert {"merge", "grasp", "grasp_hf"} <= set(card.data.tags)
    assert f'ViTForImageClassification.from_pretrained("{repo_id}")' in card.text
    for sha in (shas["v1"], shas["v2"], shas["adapter"]):
        assert f"@{sha}" in card.text


def pushed_texts(hub: HubServer, repo_id: str) -> dict[str, bytes]:
    """Return the text files of a merge on the Hub."""
    tree = hub.repos[repo_id].commits[hub.repos[repo_id].resolve("main")]
    texts = {name: (hub.root / entry.key).read_bytes() for name, entry in tree.items() if entry.sha256 is None}
    assert {"README.md", "config.json", "grasp_config.yaml", "grasp_report.json"} <= set(texts)
    return texts


def test_pushed_files_name_no_folder_of_this_machine(hub: HubServer, shas: dict[str, str], tmp_path: Path) -> None:
    local = saved(perturbed(tiny_model("vit"), seed=9), tmp_path / "here")
    base = saved(tiny_model("vit"), tmp_path / "base")
    merger = GraspMerger.from_pretrained(base, config=COPY_ALL)
    merger.merge([local, "org/hub-fine@v1"], train_dataset=tiny_data("vit", 8))
    merger.push_to_hub("org/hub-local", token=TOKEN)
    assert ModelCard.load("org/hub-local").data.base_model == ["org/hub-fine"]
    texts = pushed_texts(hub, "org/hub-local")
    assert [name for name, text in texts.items() if str(tmp_path).encode() in text] == []


def test_a_push_to_a_branch(hub: HubServer, shas: dict[str, str]) -> None:
    merger = GraspMerger.from_pretrained("org/hub-fine@v1", config=COPY_ALL)
    merger.push_to_hub("org/hub-branch", token=TOKEN, revision="trial")
    repo = hub.repos["org/hub-branch"]
    assert "model.safetensors" in repo.commits[repo.branches["trial"]]
    assert "model.safetensors" not in repo.commits[repo.branches["main"]]
    merger.push_to_hub("org/hub-branch", token=TOKEN, revision="trial")
    assert locate("org/hub-branch@trial").sha == repo.branches["trial"]


def test_the_tokenizer_is_pushed_too(hub: HubServer, tmp_path: Path) -> None:
    merger = GraspMerger.from_pretrained(saved(tiny_model("bert"), tmp_path / "bert"))
    merger.push_to_hub("alice/hub-bert", token=TOKEN)
    assert AutoTokenizer.from_pretrained("alice/hub-bert")("red small")["input_ids"] == [3, 6]


@pytest.mark.parametrize("token", [None, "hf_bob", "hf_nobody"])
def test_a_push_without_write_access(token: str | None, hub: HubServer, shas: dict[str, str]) -> None:
    merger = GraspMerger.from_pretrained("org/hub-base")
    with pytest.raises(GraspError, match="org/hub-forbidden"):
        merger.push_to_hub("org/hub-forbidden", token=token)
    assert "org/hub-forbidden" not in hub.repos


def test_no_file_and_no_message_contains_the_token(
    hub: HubServer, shas: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    merger = GraspMerger.from_pretrained("org/hub-private", token=TOKEN, config=COPY_ALL)
    merger.merge(["org/hub-fine@v1"], train_dataset=tiny_data("vit", 8), token=TOKEN)
    with pytest.raises(IncompatibleSourceError, match="adapter") as caught:
        merger.merge(["org/hub-lora"], train_dataset=tiny_data("vit", 8), token=TOKEN)
    merger.save_pretrained(tmp_path / "merged")
    merger.push_to_hub("org/hub-silent", token=TOKEN)
    assert caplog.records
    assert TOKEN not in caplog.text and TOKEN not in str(caught.value)
    files = [path for path in (tmp_path / "merged").rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []
    tree = hub.repos["org/hub-silent"].commits[hub.repos["org/hub-silent"].resolve("main")]
    assert [name for name, entry in tree.items() if TOKEN.encode() in (hub.root / entry.key).read_bytes()] == []


@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_the_index_of_a_repository_says_which_files_are_the_model(
    subfolder: str, hub: HubServer, cache: Path, tmp_path: Path
) -> None:
    name = f"org/hub-shards{subfolder}"
    folder = tmp_path / "model" / subfolder
    perturbed(tiny_model("vit"), seed=3).save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    save_file({"classifier.bias": torch.zeros(3)}, folder / "model-00001-of-00099.safetensors")
    hub.add_repo(name, tmp_path / "model")
    source = locate(f"{name}/{subfolder}".rstrip("/"))
    assert [path.name for path in source.weight_files] == shards
    assert sorted(path.name for path in source.folder.glob("*.safetensors")) == shards
    assert look_up(f"{name}/{subfolder}".rstrip("/"))[1].weights == [  # type: ignore[union-attr]
        f"{subfolder}/{shard}".lstrip("/") for shard in shards
    ]
    merger = GraspMerger(tiny_model("vit"), GraspConfig(method="average", **NO_TUNING))
    merger.merge([f"{name}/{subfolder}".rstrip("/")])
    theirs = movable_tensors(perturbed(tiny_model("vit"), seed=3))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in movable_tensors(merger.model).items())


def test_a_repository_without_one_of_its_shards(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    tiny_model("vit").save_pretrained(tmp_path / "model", max_shard_size="8KB")
    lost = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    lost.unlink()
    hub.add_repo("org/hub-lost-shard", tmp_path / "model")
    with pytest.raises(
        SourceNotFoundError, match=f"'org/hub-lost-shard' is not complete: .* lists {lost.name}, which"
    ):
        locate("org/hub-lost-shard")


def test_private_models_are_merged_in_one_call_with_a_token(hub: HubServer, tmp_path: Path) -> None:
    folder = saved(perturbed(tiny_model("vit"), seed=4), tmp_path / "model")
    for name in ("base", "source"):
        hub.add_repo(f"org/hub-own-{name}", folder, private=True)
    config = GraspConfig(method="average", **NO_TUNING)
    model = merge_pretrained("org/hub-own-base", ["org/hub-own-source"], config=config, token=TOKEN)
    assert torch.equal(
        model.get_parameter("classifier.weight"),
        perturbed(tiny_model("vit"), seed=4).get_parameter("classifier.weight"),
    )


def test_an_adapter_of_a_revision_of_a_private_base(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/hub-own-vit", saved(tiny_model("vit"), tmp_path / "base"), tag="v1", private=True)
    adapter = saved_adapter(tiny_model("vit"), "org/hub-own-vit", tmp_path / "lora", **LORA)
    config = Path(adapter, "adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": "main"}))
    merger = GraspMerger.from_pretrained("org/hub-own-vit@v1", token=TOKEN, config=COPY_ALL)
    moved = {unit.name for unit in merger.merge([adapter], train_dataset=tiny_data("vit", 8)).steps[0].units}
    assert moved == {"vit.layers.0", "vit.layers.1", "classifier"}
    recipe = Recipe(
        sources=[adapter], base_model="org/hub-own-vit@v1", config=GraspConfig(method="average", **NO_TUNING)
    )
    assert [row.problems for row in plan(recipe, token=TOKEN)] == [[], []]


def test_a_branch_that_moves_after_the_ranking_changes_nothing(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        hub.add_repo(
            f"org/hub-moving-{number}", saved(perturbed(tiny_model("vit"), seed=number), tmp_path / f"{number}")
        )
    later = saved(perturbed(tiny_model("vit"), seed=9), tmp_path / "later")
    shas = {number: hub.repos[f"org/hub-moving-{number}"].resolve("main") for number in (1, 2)}
    ordered = GraspMerger._ordered

    def moved(self: GraspMerger, *args: Any, **kwargs: Any) -> list[str]:
        found = ordered(self, *args, **kwargs)
        hub.add_repo("org/hub-moving-2", later)
        return found

    monkeypatch.setattr(GraspMerger, "_ordered", moved)
    config = GraspConfig(**{**vars(COPY_ALL), "order": "loss"})
    merger = GraspMerger(tiny_model("vit"), config)
    sources = [f"org/hub-moving-{number}" for number in (1, 2)]
    report = merger.merge(sources, train_dataset=tiny_data("vit", 8))
    assert {(step.source, step.sha) for step in report.steps} == set(zip(sources, shas.values(), strict=True))
    assert {row["sha"] for row in report.run.ranking} == {*shas.values()}


def test_without_a_network_the_model_card_may_be_missing(
    hub: HubServer, shas: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.snapshot_download("org/hub-both", allow_patterns=["*.safetensors", "*.json"], cache_dir=cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate("org/hub-both").sha == shas["both"]
    assert commit_of(SourceRef("org/hub-both", "main")) == shas["both"]


def test_a_read_only_cache(hub: HubServer, shas: dict[str, str], cache: Path) -> None:
    locate("org/hub-base")

    refs = cache / "models--org--hub-base" / "refs"
    written = (refs / "main").stat().st_mtime_ns
    assert locate("org/hub-base").sha == shas["base"]
    assert (refs / "main").stat().st_mtime_ns == written, "the file is not written again"
    shutil.rmtree(refs)
    refs.write_text("")  # a file, so that not even root can write below it
    assert look_up("org/hub-base")[0].sha == shas["base"]


def test_a_card_with_several_licences(hub: HubServer, tmp_path: Path, cache: Path) -> None:
    folder = copied(saved(tiny_model("vit"), tmp_path / "model"), tmp_path / "licences")
    (folder / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n")
    hub.add_repo("org/hub-licences", folder)
    config = GraspConfig(method="average", **NO_TUNING)
    recipe = Recipe(sources=["org/hub-licences"], base_model="org/hub-licences", config=config)
    rows = plan(recipe)
    assert [row.license for row in rows] == ["mit, apache-2.0"] * 2
    assert "licence of the merge: other" in plan_table(rows, recipe)


def test_a_merge_in_a_subfolder_is_continued_by_its_whole_name(hub: HubServer, tmp_path: Path) -> None:
    merger = GraspMerger(tiny_model("vit"), GraspConfig(method="average", **NO_TUNING))
    merger.merge([saved(perturbed(tiny_model("vit"), seed=1), tmp_path / "one")])
    merger.save_pretrained(tmp_path / "repo" / "sub")
    sha = hub.add_repo("org/hub-nested", tmp_path / "repo")
    again = GraspMerger.from_pretrained("org/hub-nested", subfolder="sub", config=merger.config)
    assert again.report.continues == f"org/hub-nested/sub@{sha}"


def test_a_local_folder_may_have_a_subfolder_but_no_revision(tmp_path: Path) -> None:
    saved(tiny_model("vit"), tmp_path / "model")
    saved(perturbed(tiny_model("vit"), seed=1), tmp_path / "model" / "inner")
    merger = GraspMerger.from_pretrained(str(tmp_path / "model"), subfolder="inner")
    assert torch.equal(
        merger.model.get_parameter("classifier.weight"),
        perturbed(tiny_model("vit"), seed=1).get_parameter("classifier.weight"),
    )
    with pytest.raises(ConfigError, match="^revision: .* is a folder, which has no revisions; leave out 'v1'"):
        GraspMerger.from_pretrained(str(tmp_path / "model"), revision="v1")


def test_a_merge_continued_from_a_folder_is_pushed_without_its_path(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clients").mkdir()
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        saved(perturbed(tiny_model("vit"), seed=number), Path("clients", f"{number}"))
    config = GraspConfig(**{**vars(COPY_ALL), "order": "loss"})
    merger = GraspMerger(tiny_model("vit"), config)
    merger.merge(["clients/1", "clients/2"], train_dataset=tiny_data("vit", 8))
    merger.save_pretrained("clients/merged")
    again = GraspMerger.from_pretrained("clients/merged", config=config)
    again.merge(["clients/1", "clients/2"], train_dataset=tiny_data("vit", 8))
    assert again.report.continues == "clients/merged" and len(again.report.run.ranking) == 2
    again.push_to_hub("org/hub-from-folder", token=TOKEN)
    texts = pushed_texts(hub, "org/hub-from-folder")
    assert [name for name, text in texts.items() if b"clients" in text] == []
