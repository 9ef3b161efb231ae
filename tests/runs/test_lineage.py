"""Merges after their first run: sources are appended to them, and they are reproduced from their records."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification

from grasp_hf import GraspConfig, GraspMerger, MergeReport, merge_pretrained
from grasp_hf.cli import main
from grasp_hf.errors import ConfigError, IncompatibleSourceError, PushError
from grasp_hf.merging.step import Step
from grasp_hf.runs.lineage import append_recipe, reproduce
from tests.support.hub.server import HubServer
from tests.support.models import NO_TUNING, perturbed, saved, saved_adapter, tiny_data, tiny_model, write_images

TOKEN = "hf_alice"
LORA: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
SMALL: dict[str, Any] = {
    **NO_TUNING,
    "method": "blend",
    "initial_epochs": 1,
    "finetune_epochs": 1,
    "num_batches": 2,
    "batch_size": 4,
    "gate": False,
}
AVERAGE = GraspConfig(method="average", **NO_TUNING)
QUICK = {**SMALL, "initial_epochs": 1}
DATA = {"path": "imagefolder", "data_dir": "images"}


@pytest.fixture(scope="session", autouse=True)
def shas(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Add a base, three fine-tunes and an adapter of it to the Hub."""
    root = tmp_path_factory.mktemp("models")
    made = {"base": hub.add_repo("org/line-base", saved(perturbed(tiny_model("vit"), seed=70), root / "base"))}
    for number in (1, 2, 3):
        fine = saved(perturbed(tiny_model("vit"), seed=70 + number), root / f"{number}")
        made[str(number)] = hub.add_repo(f"org/line-{number}", fine)
    adapter = saved_adapter(tiny_model("vit"), "org/line-base", root / "adapter", **LORA)
    made["lora"] = hub.add_repo("org/line-lora", adapter)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a test an empty cache, so all its files are downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def state(merger: GraspMerger) -> dict[str, Tensor]:
    return merger.model.state_dict()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def data() -> dict[str, Any]:
    return {"train_dataset": tiny_data("vit", 12), "eval_dataset": tiny_data("vit", 6, seed=1)}


def asked_of(hub: HubServer, since: int) -> set[str]:
    """Return the models that were requested since request number `since`."""
    found = (re.match(r"(?:/api/models)?/(org/[\w-]+)", path) for _, path in hub.requests[since:])
    return {match[1] for match in found if match}


@pytest.mark.parametrize(("method", "third"), [("average", "org/line-3"), ("copy", "org/line-lora")])
def test_an_appended_source_gives_what_one_run_gives(
    method: str, third: str, hub: HubServer, shas: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GraspConfig(**{**SMALL, "method": method, "threshold": 0.0, "seed": 5})
    sources = ["org/line-1", "org/line-2", third]
    whole = GraspMerger.from_pretrained("org/line-base", config=config)
    whole.merge(sources, **data())

    repo_id = f"org/line-{method}-{third[9:]}"
    first = GraspMerger.from_pretrained("org/line-base", config=config)
    first.merge(sources[:2], **data())
    first.push_to_hub(repo_id, token=TOKEN)
    repo = hub.repos[repo_id]
    sha = repo.resolve("main")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))  # as on another machine
    since = len(hub.requests)
    appended = GraspMerger.from_pretrained(repo_id, config=config)
    assert asked_of(hub, since) == {repo_id}
    finetuned: list[tuple[float, int]] = []
    monkeypatch.setattr(Step, "finetune", counted(Step.finetune, finetuned))
    appended.merge([third], **data())
    assert [call for call in finetuned if call[0]] == [(1, config.seed + 3)], (
        "the first run did the initial fine-tuning"
    )
    needed = {repo_id, third, *(["org/line-base"] if third == "org/line-lora" else [])}
    assert asked_of(hub, since) == needed, "earlier sources are not needed"

    assert_equal(state(appended), state(whole))
    report = appended.report
    assert (report.continues, report.continued_steps) == (f"{repo_id}@{sha}", 2)
    assert (report.base, report.base_sha, report.start) == ("org/line-base", shas["base"], whole.report.start)
    assert [timeless(step) for step in report.steps] == [timeless(step) for step in whole.report.steps]
    assert [(step.source, step.sha) for step in report.steps] == [(name, shas[name[9:]]) for name in sources]

    appended.push_to_hub(repo_id, token=TOKEN)
    assert repo.tags == {"v1": sha, "v2": repo.resolve("main")}
    card = ModelCard.load(repo_id)
    assert card.data.base_model == ["org/line-base", *sources]
    assert [card.text.count(f"* [{name}](") for name in sources] == [1, 1, 1]
    assert f"{repo_id}@{sha}" in card.text and f"{third}@{shas[third[9:]]}" in card.text
    again = GraspMerger.from_pretrained(repo_id, config=config)
    assert len(again.report.steps) == again.report.continued_steps == 3
    assert again.report.continues == f"{repo_id}@{repo.resolve('main')}"


def counted(finetune: Callable[..., Any], calls: list[tuple[float, int]]) -> Callable[..., Any]:
    def wrapped(self: Step, epochs: float, seed: int) -> Any:
        calls.append((epochs, seed))
        return finetune(self, epochs, seed)

    return wrapped


def timeless(step: Any) -> Any:
    return replace(step, seconds=0.0, peak_memory=0)


def test_a_second_append(hub: HubServer) -> None:
    config = GraspConfig(**{**SMALL, "method": "copy", "threshold": 0.0, "initial_epochs": 0, "finetune_epochs": 0})
    whole = GraspMerger.from_pretrained("org/line-base", config=config)
    whole.merge(["org/line-1", "org/line-2", "org/line-3"], **data())
    merger = GraspMerger.from_pretrained("org/line-base", config=config)
    for number in (1, 2, 3):
        merger.merge([f"org/line-{number}"], **data())
        merger.push_to_hub("org/line-grows", token=TOKEN)
        merger = GraspMerger.from_pretrained("org/line-grows", config=config)
    assert_equal(state(merger), state(whole))
    assert list(hub.repos["org/line-grows"].tags) == ["v1", "v2", "v3"]


def test_the_coefficients_of_an_appended_blend_start_from_the_pushed_merge(hub: HubServer) -> None:
    config = GraspConfig(**{**SMALL, "unit": "module", "initial_epochs": 0, "finetune_epochs": 0})
    merger = GraspMerger.from_pretrained("org/line-base", config=config)
    merger.merge(["org/line-1", "org/line-2"], **data())
    sums = [unit.coefficient + (unit.keep or 0) for unit in merger.report.steps[1].units]
    assert any(total != 1 for total in sums), "the coefficients do not sum to 1"
    merger.push_to_hub("org/line-blended", token=TOKEN)
    appended = GraspMerger.from_pretrained("org/line-blended", config=config)
    before = {name: value.clone() for name, value in state(appended).items()}
    step = appended.merge(["org/line-3"], **data()).steps[-1]
    source = perturbed(tiny_model("vit"), seed=73).state_dict()
    takes = {unit.name: unit.coefficient for unit in step.units}
    for name, value in state(appended).items():
        take = takes[name if name in takes else name.rpartition(".")[0]]
        expected = before[name] + take * (source[name] - before[name])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_an_appended_average_is_the_mean_of_all(hub: HubServer, tmp_path: Path) -> None:
    models = [perturbed(tiny_model("vit"), seed=70 + number).state_dict() for number in (1, 2, 3)]
    mean = {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}
    # The merge starts from the first source, or from a base that is not a source.
    for base, sources in (("org/line-1", ["org/line-2"]), ("org/line-base", ["org/line-1", "org/line-2"])):
        merger = GraspMerger.from_pretrained(base, config=AVERAGE)
        merger.report.starts_from_source = base == "org/line-1"
        merger.merge(sources)
        for saved_to in (tmp_path / base, "org/line-mean"):
            if isinstance(saved_to, Path):
                merger.save_pretrained(saved_to)
            else:
                merger.push_to_hub(saved_to, token=TOKEN)
            appended = GraspMerger.from_pretrained(str(saved_to), config=AVERAGE)
            appended.merge(["org/line-3"])
            for name, value in state(appended).items():
                torch.testing.assert_close(value, mean[name], rtol=0, atol=1e-6)
            whole = GraspMerger.from_pretrained(base, config=AVERAGE)
            whole.report.starts_from_source = base == "org/line-1"
            whole.merge([*sources, "org/line-3"])
            assert_equal(state(appended), state(whole))


def test_an_appended_source_needs_the_units_of_the_merge(tmp_path: Path) -> None:
    merger = GraspMerger.from_pretrained("org/line-1", config=replace(AVERAGE, unit="tensor"))
    merger.merge(["org/line-2"])
    merger.save_pretrained(tmp_path / "merged")
    appended = GraspMerger.from_pretrained(str(tmp_path / "merged"), config=AVERAGE)
    for other in (appended, merger.with_config(AVERAGE)):
        before = {name: value.clone() for name, value in state(other).items()}
        for merge in (lambda source, other=other: other.merge([source]), other.merge_source):
            with pytest.raises(
                ConfigError, match="unit: got 'layer', but source 'org/line-2' was merged with other units"
            ):
                merge("org/line-3")
        assert_equal(state(other), before)
    assert appended.with_config(replace(AVERAGE, unit="tensor")).merge(["org/line-3"]).steps[-1].mean_coefficient == (
        pytest.approx(1 / 2)
    )


def test_an_adapter_of_a_missing_base(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(perturbed(tiny_model("vit"), seed=80), tmp_path / "base")
    adapter = saved_adapter(tiny_model("vit"), base, tmp_path / "lora", **LORA)
    merger = GraspMerger.from_pretrained(base, config=AVERAGE)
    merger.merge(["org/line-1"])
    merger.save_pretrained(tmp_path / "merged")
    (tmp_path / "base").rename(tmp_path / "moved")
    appended = GraspMerger.from_pretrained(str(tmp_path / "merged"), config=AVERAGE)
    before = {name: value.clone() for name, value in state(appended).items()}
    with pytest.raises(
        IncompatibleSourceError, match="needs the model that the merge started from, and that model cannot be found"
    ):
        appended.merge([adapter])
    assert_equal(state(appended), before)
    assert len(appended.merge(["org/line-2"]).steps) == 2, "other sources do not need the base"
    (tmp_path / "moved").rename(tmp_path / "base")
    assert appended.merge([adapter]).steps[-1].kind == "adapter"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory of a user who may push, with images and a recipe of two models of the Hub."""
    write_images(tmp_path / "images", {"train": 4, "validation": 2})
    write_recipe(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, **values: Any) -> str:
    recipe = {"base_model": "org/line-base", "sources": ["org/line-1", "org/line-lora"], "data": DATA, **SMALL}
    given = {key: value for key, value in {**recipe, **values}.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(given))
    return str(folder / "recipe.yaml")


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_mean(folder: Path, *numbers: int) -> None:
    """Check that the model in `folder` is the mean of those sources."""
    models = [perturbed(tiny_model("vit"), seed=70 + number).state_dict() for number in numbers]
    for name, value in AutoModelForImageClassification.from_pretrained(folder).state_dict().items():
        mean = torch.stack([model[name] for model in models]).mean(0)
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-6)


def test_a_merge_is_reproduced_from_its_record(
    hub: HubServer, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "recipe.yaml", "--output", "merged", "--push-to-hub", "org/line-cli"]) == 0
    capsys.readouterr()
    count = len(saved_tensors(world / "merged"))
    assert main(["reproduce", "merged"]) == 0
    assert capsys.readouterr().out.endswith(f"reproduced: all {count} tensors are equal, bit for bit\n")
    (world / "images").rename(world / "elsewhere")
    assert main(["reproduce", "org/line-cli", f"data.data_dir={world / 'elsewhere'}"]) == 0
    assert capsys.readouterr().out.endswith(f"reproduced: all {count} tensors are equal, bit for bit\n")

    assert main(["reproduce", "merged", "data.data_dir=elsewhere", "seed=7"]) == 1
    lines = capsys.readouterr().out.splitlines()
    told = next(line for line in lines if line.startswith("not reproduced: "))
    assert re.fullmatch(rf"not reproduced: \d+ of {count} tensors differ; the largest differences:", told)
    worst = re.findall(r"^- (\S+): differs by up to (\S+)$", "\n".join(lines), re.MULTILINE)
    assert len(worst) == 5 and {name for name, _ in worst} <= set(saved_tensors(world / "merged"))
    sizes = [float(size) for _, size in worst]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0


def test_different_tensors_are_named_with_their_differences(world: Path) -> None:
    recipe = {"base_model": None, "sources": ["org/line-1", "org/line-2"], "data": None, "method": "average"}
    write_recipe(world, **recipe, initial_epochs=0, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    tensors = saved_tensors(world / "merged")
    tensors["classifier.bias"][1] += 0.25
    tensors["vit.layernorm.weight"] = tensors["vit.layernorm.weight"].half()
    tensors["further"] = torch.ones(1)
    save_file(tensors, world / "merged" / "model.safetensors", metadata={"format": "pt"})
    replay = reproduce("merged")
    assert replay.tensors == len(tensors)
    assert replay.differences.keys() == {"classifier.bias", "vit.layernorm.weight", "further"}
    assert replay.differences["classifier.bias"] == pytest.approx(0.25)
    assert "- further: differs by up to inf" in str(replay)


def test_sources_are_appended_by_the_command_line(
    hub: HubServer, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copying: dict[str, Any] = {"method": "copy", "threshold": 0.0, "finetune_epochs": 0}
    write_recipe(world, **copying)
    assert main(["merge", "recipe.yaml", "--output", "merged", "--push-to-hub", "org/line-more"]) == 0
    assert main(["append", "merged", "org/line-3", "--output", "longer"]) == 0
    report = MergeReport.from_json(world / "longer" / "grasp_report.json")
    assert [step.source for step in report.steps] == ["org/line-1", "org/line-lora", "org/line-3"]
    assert (report.continues, report.continued_steps) == (str(world / "merged"), 2)
    capsys.readouterr()
    assert main(["reproduce", "longer"]) == 0
    assert "reproduced: all" in capsys.readouterr().out
    write_recipe(world, sources=["org/line-1", "org/line-lora", "org/line-3"], **copying)
    assert main(["merge", "recipe.yaml", "--output", "whole"]) == 0
    assert_equal(saved_tensors(world / "longer"), saved_tensors(world / "whole"))

    repo, since = hub.repos["org/line-more"], len(hub.requests)
    sha = repo.resolve("main")
    arguments = ["append", "org/line-more", "org/line-3", "--push-to-hub", "org/line-more"]
    assert main([*arguments, f"data.data_dir={world / 'images'}"]) == 0
    assert not asked_of(hub, since) & {"org/line-1", "org/line-lora"}, "earlier sources are not needed"
    assert repo.tags == {"v1": sha, "v2": repo.resolve("main")}
    pushed = hub.root / repo.commits[repo.resolve("main")]["model.safetensors"].key
    assert_equal(load_file(pushed), saved_tensors(world / "whole"))
    capsys.readouterr()
    assert main(["reproduce", "org/line-more"]) == 0
    assert "reproduced: all" in capsys.readouterr().out


def test_an_append_that_cannot_be_pushed_is_kept(
    hub: HubServer, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = {"method": "average", "order": "given", "data": None, "final_epochs": 0}
    write_recipe(world, **average, sources=["org/line-1"], initial_epochs=0, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    append = ["append", "merged", "org/line-2", "--push-to-hub"]
    capsys.readouterr()
    assert main([*append, "org/line/lost"]) == 1
    assert "error: 'org/line/lost' cannot be a repository on the Hub" in capsys.readouterr().err
    hub.fail("POST /api/models/org/line-lost/commit/main", 403, times=50)
    try:
        for folder in ("line-lost-not-pushed", "line-lost-not-pushed-2"):
            assert main([*append, "org/line-lost"]) == 1
            again = f"push it again with `grasp-hf push {folder} org/line-lost`"
            assert capsys.readouterr().err.endswith(f"; the merged model is in the folder '{folder}'; {again}\n")
            assert_mean(world / folder, 1, 2)
        assert main([*append, "org/line-lost", "--output", "longer"]) == 1
        assert "; the merged model is in the folder 'longer'" in capsys.readouterr().err
    finally:
        hub.failures.clear()
    assert len(hub.repos["org/line-lost"].commits) == 1, "the repository was made, and is empty"
    assert sorted(path.name for path in world.glob("line-*")) == ["line-lost-not-pushed", "line-lost-not-pushed-2"]
    assert main(["push", "line-lost-not-pushed", "org/line-lost"]) == 0
    tree = hub.repos["org/line-lost"].commits[hub.repos["org/line-lost"].resolve("main")]
    kept = MergeReport.from_json(world / "line-lost-not-pushed" / "grasp_report.json")
    pushed = MergeReport.from_json(hub.root / tree["grasp_report.json"].key)
    assert pushed == kept.without_paths() and len(pushed.steps) == 2, "the pushed record is that of the merge"
    weights = load_file(hub.root / tree["model.safetensors"].key)
    assert_equal(weights, saved_tensors(world / "line-lost-not-pushed"))
    assert main(["push", saved(tiny_model("vit"), world / "base"), "org/line-lost"]) == 1
    assert "is not a merge by grasp_hf" in capsys.readouterr().err
    assert main([*append, "org/line-lost"]) == 0


def test_an_append_to_a_version_that_is_not_the_last_overwrites_nothing(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = GraspConfig(method="average", **NO_TUNING)
    first = GraspMerger.from_pretrained("org/line-base", config=config)
    first.merge(["org/line-1"])
    first.push_to_hub("org/line-both", token=TOKEN)
    repo = hub.repos["org/line-both"]
    ours, theirs = (GraspMerger.from_pretrained("org/line-both", config=config) for _ in range(2))
    theirs.merge(["org/line-2"])
    theirs.push_to_hub("org/line-both", token=TOKEN)
    head, since = repo.resolve("main"), len(hub.requests)
    ours.merge(["org/line-3"])
    with pytest.raises(PushError, match=f"^'org/line-both' has a newer version (?s:.)*got {head}; append to the new"):
        ours.push_to_hub("org/line-both", token=TOKEN)
    ours.save_pretrained(tmp_path / "kept")
    with pytest.raises(PushError, match="^'org/line-both' has a newer version "):
        GraspMerger.from_pretrained(str(tmp_path / "kept")).push_to_hub("org/line-both", token=TOKEN)
    assert main(["push", str(tmp_path / "kept"), "org/line-both"]) == 1
    printed = capsys.readouterr().err
    assert (
        "pull request (--create-pr); the merged model is in the folder " in printed and "push it again" not in printed
    )
    assert repo.resolve("main") == head and not [path for method, path in hub.requests[since:] if method == "PUT"]
    assert repo.tags.keys() == {"v1", "v2"}
    ours.push_to_hub("org/line-both", token=TOKEN, create_pr=True)
    ours.push_to_hub("org/line-both", token=TOKEN, revision="other")
    assert repo.resolve("main") == head
    theirs.merge(["org/line-3"])
    theirs.push_to_hub("org/line-both", token=TOKEN)
    assert repo.tags["v3"] == repo.resolve("main"), "the merger knows the version of its last push"
    theirs.push_to_hub("org/line-both", token=TOKEN)
    assert repo.tags.keys() == {"v1", "v2", "v3"}


def test_texts_that_were_moved(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model("bert"), world / "bert")
    saved(perturbed(tiny_model("bert"), seed=1), world / "fine")
    rows = [f"{word} {size},{word}" for word in ("red", "green", "blue") for size in ("small", "large")]
    (world / "a.csv").write_text("\n".join(["text,label", *rows]))
    data = {"path": "csv", "data_files": {"train": "a.csv"}}
    write_recipe(world, base_model="bert", sources=["fine"], data=data, method="average", order="given")
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    (world / "a.csv").rename(world / "b.csv")
    for command in (["reproduce", "merged"], ["append", "merged", "fine", "--output", "longer"]):
        capsys.readouterr()
        assert main(command) == 1
        assert "a.csv'; set its location with data.data_files.train=…\n" in capsys.readouterr().err
        assert main([*command, "data.data_files.train=b.csv"]) == 0


def test_an_average_that_starts_from_its_first_source(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"base_model": None, "sources": ["org/line-1", "org/line-2"], "data": None, "method": "average"}
    write_recipe(world, **recipe, initial_epochs=0, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    assert main(["reproduce", "merged"]) == 0
    assert main(["append", "merged", "org/line-3", "--output", "longer"]) == 0
    assert main(["reproduce", "longer"]) == 0
    assert capsys.readouterr().out.count("reproduced: all") == 2
    assert_mean(world / "merged", 1, 2)
    assert_mean(world / "longer", 1, 2, 3)
    appended = merge_pretrained(str(world / "merged"), ["org/line-3"], config=AVERAGE)
    longer = AutoModelForImageClassification.from_pretrained(world / "longer")
    assert_equal(appended.state_dict(), longer.state_dict())
    assert MergeReport.from_json(world / "longer" / "grasp_report.json").starts_from_source


def test_a_ranked_merge_is_reproduced_in_the_order_that_was_found(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(world, sources=["org/line-1", "org/line-2", "org/line-3"], order="rank", top=2, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    assert len(MergeReport.from_json(world / "merged" / "grasp_report.json").steps) == 2
    capsys.readouterr()
    assert main(["reproduce", "merged"]) == 0
    assert "reproduced: all" in capsys.readouterr().out


def test_appended_sources_are_ordered_by_the_earlier_rule(world: Path) -> None:
    write_recipe(world, sources=["org/line-1", "org/line-2"], order="rank", top=2, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    recipe = append_recipe("merged", ["org/line-3"])
    assert (recipe.config.order, recipe.config.top, recipe.sources) == ("rank", 2, ["org/line-3"])
    other = append_recipe("merged", ["org/line-3"], ["order=given", "top=null"])
    assert (other.config.order, other.config.top) == ("given", None)


def test_a_merge_that_was_appended_to_in_place_cannot_be_reproduced(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"sources": ["org/line-1", "org/line-2"], "data": None, "method": "average"}
    write_recipe(world, **recipe, initial_epochs=0, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    assert main(["append", "merged", "org/line-3", "--output", "merged"]) == 0
    assert_mean(world / "merged", 1, 2, 3)
    capsys.readouterr()
    assert main(["reproduce", "merged"]) == 1
    assert "which now holds another merge: got 3 earlier steps, expected 2" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["append", "reproduce"])
@pytest.mark.parametrize("merged", ["base", "org/line-base"])
def test_a_model_that_is_no_merge(command: str, merged: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model("vit"), world / "base")
    more = ["org/line-1", "--output", "out"] if command == "append" else []
    assert main([command, merged, *more]) == 1
    assert (
        f"error: '{merged}' is not a merge by grasp_hf: expected a grasp_config.yaml and a record in it"
        in capsys.readouterr().err
    )
    assert not (world / "out").exists()


def test_folders_that_do_not_exist_here(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model("vit"), world / "mine")
    recipe = {"sources": ["mine", "org/line-1"], "data": None, "method": "average"}
    write_recipe(world, **recipe, initial_epochs=0, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged", "--push-to-hub", "org/line-mine"]) == 0
    assert main(["reproduce", "merged"]) == 0
    (world / "mine").rename(world / "moved")
    capsys.readouterr()
    for merged, name in {"merged": str(world / "mine"), "org/line-mine": "mine"}.items():
        assert main(["reproduce", merged]) == 1
        expected = f"'{merged}' cannot be reproduced: these folders of its recipe do not exist here: {name}"
        assert expected in capsys.readouterr().err


def test_data_from_python(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merger = GraspMerger.from_pretrained("org/line-base", config=GraspConfig(**{**SMALL, "initial_epochs": 0}))
    merger.merge(["org/line-1"], **data())
    merger.save_pretrained(world / "merged")
    assert main(["reproduce", "merged"]) == 1
    assert "its record names no data, because the data was given from Python" in capsys.readouterr().err
    assert main(["append", "merged", "org/line-2", "--output", "longer"]) == 1
    assert "the record of 'merged' names no data, because the data was given from Python" in capsys.readouterr().err
    assert not any((world / "longer").glob("*"))
    other = ["data.path=imagefolder", "data.data_dir=images"]
    assert main(["reproduce", "merged", *other]) == 1
    assert "not reproduced: " in capsys.readouterr().out, "the samples are other ones, in the same number"


def test_other_data_than_the_recorded_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(world, sources=["org/line-1"], finetune_epochs=0, initial_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    write_images(world / "fewer", {"train": 3, "validation": 2})
    assert main(["reproduce", "merged", "data.data_dir=fewer"]) == 1
    assert "the train data is not the recorded data: got {'samples': 9," in capsys.readouterr().err
    shutil.copytree(world / "images", world / "altered")
    altered = sorted((world / "altered").rglob("*.png"))
    Image.open(altered[0]).transpose(Image.Transpose.ROTATE_90).save(altered[0])
    assert main(["reproduce", "merged", "data.data_dir=altered"]) == 1
    assert re.search(
        r"the \w+ data is not the recorded data: got {'digest': '\w+'}, expected", capsys.readouterr().err
    )
    assert main(["reproduce", "merged"]) == 0
    write_images(world / "others", {"train": 4, "validation": 2}, labels=["axe", "bow", "cup"])
    assert main(["append", "merged", "org/line-2", "--output", "longer", "data.data_dir=others"]) == 1
    assert "error: the data has other labels than 'merged'; start a new merge from it" in capsys.readouterr().err
    assert not (world / "longer" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments",
    [["org/line-1"], ["--output", "longer", "seed=1"], ["org/line-1", "--output", "longer", "sed=1"]],
)
def test_an_append_that_lacks_something(arguments: list[str], world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(world, data=None, method="average", **NO_TUNING)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    assert main(["append", "merged", *arguments]) == 1
    expected = (
        "sed: unknown key" if "sed=1" in arguments else "expected at least one source, and --output or --push-to"
    )
    assert expected in capsys.readouterr().err
    assert not (world / "longer").exists()


@pytest.mark.parametrize("local", [True, False])
def test_an_adapter_of_the_first_base_is_appended_by_the_command_line(local: bool, world: Path) -> None:
    name = "org/line-base"
    if local:
        name = saved(perturbed(tiny_model("vit"), seed=70), world / "base")
    adapter = saved_adapter(tiny_model("vit"), name, world / "lora", **LORA)
    recipe = {"base_model": name, "data": None, "method": "average", "initial_epochs": 0, "finetune_epochs": 0}
    write_recipe(world, **recipe, sources=["org/line-1"])
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    assert main(["append", "merged", adapter, "--output", "longer"]) == 0
    write_recipe(world, **recipe, sources=["org/line-1", adapter])
    assert main(["merge", "recipe.yaml", "--output", "whole"]) == 0
    assert_equal(saved_tensors(world / "longer"), saved_tensors(world / "whole"))


def test_a_full_source_is_appended_without_the_first_base(
    hub: HubServer, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("org/line-gone", saved(perturbed(tiny_model("vit"), seed=79), world / "gone"))
    recipe = {"base_model": "org/line-gone", "data": None, "method": "average"}
    write_recipe(world, **recipe, sources=["org/line-1"], initial_epochs=0, finetune_epochs=0)
    assert main(["merge", "recipe.yaml", "--output", "merged"]) == 0
    del hub.repos["org/line-gone"]
    assert main(["append", "merged", "org/line-2", "--output", "longer"]) == 0
    assert_mean(world / "longer", 1, 2)
    assert main(["append", "merged", "org/line-lora", "--output", "other"]) == 1
    assert "org/line-gone" in capsys.readouterr().err


def test_a_folder_is_not_mistaken_for_a_model_of_its_name_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    base = saved(perturbed(tiny_model("vit"), seed=80), tmp_path / "line-name")
    hub.add_repo("line-name", saved(perturbed(tiny_model("vit"), seed=81), tmp_path / "other"))
    adapter = saved_adapter(tiny_model("vit"), "line-name", tmp_path / "lora", **LORA)
    merger = GraspMerger.from_pretrained(base, config=AVERAGE)
    merger.merge(["org/line-1"])
    merger.push_to_hub("org/line-named", token=TOKEN)
    appended = GraspMerger.from_pretrained("org/line-named", config=AVERAGE)
    with pytest.raises(IncompatibleSourceError, match="it was the folder 'line-name', which does not exist here"):
        appended.merge([adapter])


def test_a_merge_of_another_dtype_cannot_be_reproduced(tmp_path: Path) -> None:
    merger = GraspMerger.from_pretrained("org/line-base", config=AVERAGE, dtype=torch.bfloat16)
    merger.merge(["org/line-1"])
    merger.save_pretrained(tmp_path / "merged")
    with pytest.raises(
        ConfigError, match="cannot be reproduced: got weights of type BF16, expected F32; .* made from Python"
    ):
        reproduce(str(tmp_path / "merged"))
