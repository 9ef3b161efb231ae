"""The ranking of sources against plain autograd, and the order that a merge takes from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.cli import main
from grasp_hf.errors import SourceNotFoundError
from grasp_hf.merging.ranking import RankedSource, UnitGain, ranking_table
from grasp_hf.tensors.units import movable_tensors
from tests.support.models import (
    LABELS,
    NO_TUNING,
    perturbed,
    saved,
    saved_adapter,
    tiny_data,
    tiny_model,
    write_images,
)

STILL: dict[str, Any] = {**NO_TUNING, "method": "blend", "gate": False, "batch_size": 5, "num_batches": 3}


def expected_gains(kind: str, sources: list[dict[str, torch.Tensor]]) -> list[tuple[float, float]]:
    """Return gain and cosine of each source, from one gradient of the mean loss over all 12 samples."""
    target = tiny_model(kind).eval()
    target(**tiny_data(kind, 12)[:12]).loss.backward()
    names = [name for name, p in target.named_parameters() if p.grad is not None]
    gradient = torch.cat([target.get_parameter(name).grad.flatten() for name in names])
    found = []
    for tensors in sources:
        ends = torch.cat([tensors[name].flatten() for name in names])
        way = ends - torch.cat([target.get_parameter(name).detach().flatten() for name in names])
        found.append((-float(gradient @ way), -float(torch.cosine_similarity(gradient, way, dim=0))))
    return found


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "resnet"])
def test_gain_and_cosine_equal_those_of_plain_autograd(kind: str, tmp_path: Path) -> None:
    """12 samples in batches of 5, 5 and 2: the mean is over samples, not over batches."""
    models = [perturbed(tiny_model(kind), seed, scale) for seed, scale in ((1, 0.02), (2, 0.05), (3, 0.2))]
    sources = [saved(model, tmp_path / str(number)) for number, model in enumerate(models)]
    target = tiny_model(kind).train()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    rows = GraspMerger(target, GraspConfig(**STILL)).rank(sources, train_dataset=tiny_data(kind, 12))
    assert [row.gain for row in rows] == sorted((row.gain for row in rows if row.gain is not None), reverse=True)
    expected = dict(zip(sources, expected_gains(kind, [movable_tensors(model) for model in models]), strict=True))
    for row in rows:
        assert (row.gain, row.cosine) == pytest.approx(expected[row.reference], rel=1e-3, abs=1e-5)
        assert sum(unit.gain for unit in row.units) == pytest.approx(row.gain)
        assert row.seconds > 0 and row.num_bytes > 0
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert target.training and all(p.grad is None for p in target.parameters())


def test_the_gain_is_the_slope_of_the_loss_on_the_way(tmp_path: Path) -> None:
    source, target, data = (
        perturbed(tiny_model("vit"), 1),
        tiny_model("vit").double().eval(),
        tiny_data("vit", 12)[:12],
    )
    batch = {**data, "pixel_values": data["pixel_values"].double()}
    folder = saved(source, tmp_path / "source")
    (row,) = GraspMerger(tiny_model("vit"), GraspConfig(**STILL)).rank([folder], train_dataset=tiny_data("vit", 12))
    step = 1e-4
    with torch.no_grad():
        loss = float(target(**batch).loss)
        for name, parameter in target.named_parameters():
            parameter.add_(step * (source.get_parameter(name).double() - parameter))
        assert row.gain == pytest.approx((loss - float(target(**batch).loss)) / step, rel=1e-2)


def test_the_gain_of_an_adapter_is_that_of_its_layers(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    adapter = saved_adapter(tiny_model("vit"), base, tmp_path / "adapter", target_modules=["q_proj"])
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(unit="layer", **STILL))
    (row,) = merger.rank([adapter], train_dataset=tiny_data("vit", 12))
    assert [unit.name for unit in row.units] == ["vit.layers.0", "vit.layers.1"] and row.kind == "adapter"


def test_sources_with_problems_come_last_and_do_not_stop_the_ranking(tmp_path: Path) -> None:
    good = saved(perturbed(tiny_model("vit"), 1), tmp_path / "good")
    other = saved(tiny_model("resnet"), tmp_path / "other")
    merger = GraspMerger(tiny_model("vit"), GraspConfig(**{**STILL, "order": "rank"}))
    rows = merger.rank([other, "./nowhere", good], train_dataset=tiny_data("vit", 12))
    assert [row.reference for row in rows] == [good, other, "./nowhere"]
    assert rows[0].problem is None and "different architecture" in str(rows[1].problem)
    table = " ".join(ranking_table(rows).split())  # long lines are wrapped
    places = [
        table.index(text) for text in ("| 1 | good", f"- '{other}' cannot be merged", "- './nowhere' is neither")
    ]
    assert places == sorted(places)
    with pytest.raises(IncompatibleSourceError, match="(?s)nothing was merged.*different architecture.*nowhere"):
        merger.merge([other, "./nowhere", good], train_dataset=tiny_data("vit", 12))
    with pytest.raises(SourceNotFoundError, match="nothing was merged.*\n- './nowhere' is neither"):
        merger.merge(["./nowhere", good], train_dataset=tiny_data("vit", 12))


def test_no_line_of_a_ranking_is_wider_than_a_terminal() -> None:
    name = "an-organisation-with-a-long-name/a-model-with-a-name-that-is-even-longer-than-its-organisation"
    unit = UnitGain("a_model.with.very.many.nested.modules.and.a.layer.11", 1.2345e-5, 0.5)
    rows = [
        RankedSource(name, "sha", "adapter", gain=gain, cosine=-0.1234, units=[unit]) for gain in (1.2345e-5, -3.0)
    ]
    problem = RankedSource(name, problem=f"'{name}' cannot be merged:\n- " + "a long problem " * 20)
    by_loss = RankedSource(name, "sha", "adapter", loss=12.3456)
    lines = [*ranking_table([*rows * 60, problem]).splitlines(), *ranking_table([by_loss] * 120).splitlines()]
    assert max(map(len, lines)) <= 100
    assert "| 1   | an-organisation-w…" in lines[2] and "+1.234e-05" in lines[2] and "+1.23e-05" in lines[2]


def test_a_source_with_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    broken = tiny_model("vit", seed=1)
    broken.get_parameter("vit.layernorm.bias").data[3] = float("nan")
    source = saved(broken, tmp_path / "broken")
    (row,) = GraspMerger(tiny_model("vit"), GraspConfig(**STILL)).rank([source], train_dataset=tiny_data("vit", 12))
    assert row.gain is None
    assert row.problem == f"'{source}': vit.layernorm.bias holds NaN or infinite weights; expected finite ones"


def test_a_merge_takes_the_sources_with_the_largest_gains_in_their_order(tmp_path: Path) -> None:
    sources = [saved(perturbed(tiny_model("vit"), seed), tmp_path / str(seed)) for seed in (1, 2, 3, 4)]
    data = tiny_data("vit", 12)
    ranked = GraspMerger(tiny_model("vit"), GraspConfig(**STILL)).rank(sources, train_dataset=data)
    merger = GraspMerger(tiny_model("vit"), GraspConfig(**{**STILL, "order": "rank", "top": 2}))
    report = merger.merge(sources, train_dataset=data)
    assert [step.source for step in report.steps] == [row.reference for row in ranked[:2]]
    assert [row["reference"] for row in report.run.ranking] == [row.reference for row in ranked]
    # The record for others names local folders by their last part.
    assert [row["reference"] for row in report.without_paths().run.ranking] == [
        Path(row.reference).name for row in ranked
    ]


def test_a_merge_ranks_by_the_fine_tuned_base_as_the_command_does(tmp_path: Path) -> None:
    """The base is fine-tuned for the ranking and restored; a fine-tuned model is measured as it is."""
    sources = [saved(perturbed(tiny_model("vit"), seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    data, tuned = tiny_data("vit", 12), {**STILL, "initial_epochs": 2, "training_arguments": {"learning_rate": 0.01}}
    first = GraspMerger(tiny_model("vit"), GraspConfig(**tuned))
    first.merge([], train_dataset=data)
    expected = {row.reference: row.gain for row in first.rank(sources, train_dataset=data)}
    settings = {**tuned, "initial_epochs": 0, "final_epochs": 2, "order": "rank"}
    merger = GraspMerger(tiny_model("vit"), GraspConfig(**settings))
    before = {name: value.clone() for name, value in merger.model.state_dict().items()}
    found = {row.reference: row.gain for row in merger.rank(sources, train_dataset=data)}
    assert found == pytest.approx(expected) and not merger.report.finetuned
    for name, value in merger.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    report = merger.merge(sources, train_dataset=data)
    assert {row["reference"]: row["gain"] for row in report.run.ranking} == pytest.approx(expected)
    still = GraspMerger(tiny_model("vit"), GraspConfig(**STILL)).rank(sources, train_dataset=data)
    assert {row.reference: row.gain for row in still} != pytest.approx(expected, rel=1e-2)


def test_the_command_prints_a_table_and_writes_every_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model("vit"), tmp_path / "base")
    for seed in (1, 2):
        saved(perturbed(tiny_model("vit"), seed), tmp_path / f"fine-{seed}")
    write_images(tmp_path / "images", {"train": 4})
    recipe: dict[str, Any] = {"base_model": "base", "data": {"path": "imagefolder", "data_dir": "images"}, **STILL}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "sources": ["fine-1", "fine-2"]}))
    assert main(["rank", str(file), "--json", str(tmp_path / "ranking.json"), "num_batches=1", "unit=module"]) == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    written = json.loads((tmp_path / "ranking.json").read_text())
    assert lines[0] == ["", "source", "gain", "cosine", "best unit"]
    assert [line[1] for line in lines[2:]] == [Path(row["reference"]).name for row in written]
    assert all(len(row["units"]) == 20 for row in written) and len(LABELS) == 3
    saved(tiny_model("resnet"), tmp_path / "fine-2")
    assert main(["rank", str(file)]) == 1
