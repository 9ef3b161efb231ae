"""`GraspConfig.paper()` against the procedure of the paper, written separately in `tests/support/paper.py`."""

from pathlib import Path

import pytest
import torch
from transformers import default_data_collator

import tests.support.paper
from grasp_hf import GraspConfig, GraspMerger
from tests.support.models import KINDS, perturbed, tiny_data, tiny_model
from tests.support.paper import merge_as_in_paper
from tests.support.plain import shuffled_batches

SEED = 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learning_rate", [5e-5, 5e-3])
def test_three_sources_in_a_row_agree_with_the_reference(
    kind: str, learning_rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With a larger learning rate than that of the paper, the best epoch is not always the first.
    def adamw(parameters: object, lr: float, weight_decay: float) -> torch.optim.AdamW:
        assert lr == 5e-5
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)  # type: ignore[arg-type]

    monkeypatch.setattr(tests.support.paper, "AdamW", adamw)
    for index in range(4):
        perturbed(tiny_model(kind), seed=index).save_pretrained(tmp_path / str(index))
    load = type(tiny_model(kind)).from_pretrained
    train, held_out = tiny_data(kind, 70, seed=1), tiny_data(kind, 21, seed=2)

    config = GraspConfig.paper(seed=SEED, batch_size=16, training_arguments={"learning_rate": learning_rate})
    merger = GraspMerger.from_pretrained(str(tmp_path / "0"), config=config)
    batches = {k: shuffled_batches(train, 16, config.num_batches, SEED + k, drop_last=True) for k in (1, 2, 3)}
    expected = merge_as_in_paper(
        load(tmp_path / "0"),
        [lambda i=i: load(tmp_path / str(i)) for i in (1, 2, 3)],  # type: ignore[misc]
        list(train),
        list(held_out),
        default_data_collator,
        alignment_batches=batches.__getitem__,
        batch_size=16,
        seed=SEED,
    )

    for k in (1, 2, 3):
        merger.merge([str(tmp_path / str(k))], train_dataset=train, eval_dataset=held_out)
        step = merger.report.steps[-1]
        cosines = {unit.name: unit.score for unit in step.units}
        assert cosines == pytest.approx(expected[k].cosines, abs=1e-6)
        assert [u.name for u in step.units if u.decision == "moved"] == [
            name for name in cosines if name in expected[k].copied
        ]
        for name, value in merger.model.state_dict().items():
            torch.testing.assert_close(value, expected[k].after_finetune[name], atol=1e-6, rtol=0)
    moved = [step.moved for step in merger.report.steps]
    assert 0 < sum(moved) < 3 * len(expected[1].cosines), (
        "the threshold must decide something for this test to mean it"
    )
