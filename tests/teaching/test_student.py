"""Teaching through the whole merge: every kind of task learns from unlabelled inputs, or says why it does not."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
)

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.data.samples import Samples
from grasp_hf.models.logits import scale_logits_
from grasp_hf.teaching.student import TARGETS, TaughtSamples, taught_loss, with_targets
from tests.support.models import saved

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
LENGTHS = (3, 5, 4, 6)
CONFIG: dict[str, Any] = {"batch_size": 8, "final_epochs": 3, "training_arguments": {"learning_rate": 0.01}}


def padded(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad token ids with 0 and labels of tokens with -100; other labels become one tensor."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch: dict[str, list[Any]] = {"input_ids": [], "attention_mask": []}
    for sample in samples:
        short = longest - len(sample["input_ids"])
        batch["input_ids"].append([*sample["input_ids"], *[0] * short])
        batch["attention_mask"].append([1] * len(sample["input_ids"]) + [0] * short)
        for name in ("labels", "start_positions", "end_positions"):
            if name in sample:
                value = sample[name]
                is_token_label = isinstance(value, list) and isinstance(value[0], int)
                batch.setdefault(name, []).append([*value, *[-100] * short] if is_token_label else value)
    return {name: torch.tensor(values) for name, values in batch.items()}


def texts(number: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 40, (LENGTHS[index % 4],), generator=generator).tolist() for index in range(number)]


def labels_of(kind: str, text: list[int]) -> Any:
    """Return labels that a text determines."""
    if kind == "classes":
        return int(text[0] >= 20)
    if kind == "tokens":
        return [-100, *[int(token >= 20) for token in text[1:]]]
    if kind == "several":
        return [float(text[0] >= 20), float(text[1] >= 20), 1.0]
    return float(text[0]) / 20


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "tokens":
        two: dict[str, Any] = {"num_labels": 2}
        return BertForTokenClassification(BertConfig(**SMALL, **two))
    problem = {"several": "multi_label_classification", "number": "regression"}.get(kind)
    names: dict[str, Any] = {"num_labels": {"classes": 2, "several": 3, "number": 1}[kind], "problem_type": problem}
    return BertForSequenceClassification(BertConfig(**SMALL, **names))


def data_of(kind: str, number: int, seed: int, *, labelled: bool = True) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"input_ids": text} for text in texts(number, seed)]
    return [{**row, "labels": labels_of(kind, row["input_ids"])} for row in rows] if labelled else rows


@pytest.mark.parametrize("kind", ["classes", "tokens", "several", "number"])
def test_sources_teach_on_unlabelled_inputs(kind: str, tmp_path: Path) -> None:
    base = model_of(kind)
    sources = []
    for seed in (1, 2):
        expert = GraspMerger(
            deepcopy(base), GraspConfig(gate=False, initial_epochs=25, seed=seed, **{**CONFIG, "final_epochs": 0})
        )
        expert.merge([], train_dataset=data_of(kind, 120, seed), data_collator=padded)
        sources.append(saved(expert.model, tmp_path / str(seed)))
    data: dict[str, Any] = {"train_dataset": data_of(kind, 24, 5), "data_collator": padded}
    held_out = data_of(kind, 200, 9)
    losses = {}
    for name, unlabeled in {"taught": data_of(kind, 60, 6, labelled=False), "alone": None}.items():
        merger = GraspMerger(deepcopy(base), GraspConfig(**CONFIG))
        report = merger.merge(sources, unlabeled_dataset=unlabeled, **data)
        losses[name] = merger.judge(held_out, data_collator=padded).loss
        teacher = report.run.final.teacher if report.run.final else None
        if unlabeled is None:
            assert teacher is None
        else:
            assert teacher is not None and teacher.used and (teacher.labels, teacher.unlabeled) == (24, 60)
            assert [*teacher.worth][:2] == ["1", "2"], "a folder is named by its last part"
    untrained = GraspMerger(deepcopy(base), GraspConfig()).judge(held_out, data_collator=padded).loss
    assert losses["taught"] < untrained / 2
    assert losses["taught"] != losses["alone"]


def test_labels_of_unlabelled_inputs_are_not_read(tmp_path: Path) -> None:
    source = saved(model_of("classes"), tmp_path / "source")
    found = []
    for labelled in (False, True):
        merger = GraspMerger(model_of("classes"), GraspConfig(**CONFIG))
        rows = data_of("classes", 40, 6, labelled=labelled)
        merger.merge([source], train_dataset=data_of("classes", 16, 5), unlabeled_dataset=rows, data_collator=padded)
        found.append({name: tensor.clone() for name, tensor in merger.model.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_where_a_teacher_makes_no_sense_the_plain_path_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**SMALL))
    source = saved(model, tmp_path / "source")
    rows = [{"input_ids": text} for text in texts(12, 1)]
    train = [{**row, "start_positions": 0, "end_positions": 1} for row in rows]
    merger = GraspMerger(model, GraspConfig(**CONFIG))
    report = merger.merge([source], train_dataset=train, unlabeled_dataset=rows, data_collator=padded)
    assert report.run.final is not None and report.run.final.teacher is None
    assert "not taught on unlabelled inputs: a BertForQuestionAnswering does not" in str(report)


def test_the_loss_of_a_target_is_the_mean_of_label_and_teacher() -> None:
    """Half the cross-entropy of the label and half the divergence from the teacher have the gradient of one target."""
    torch.manual_seed(0)
    logits = torch.randn(6, 3, requires_grad=True)
    truth, teacher = torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 3).softmax(-1)
    target = (nn.functional.one_hot(truth, 3) + teacher) / 2
    (ours,) = torch.autograd.grad(taught_loss("softmax")({"logits": logits}, target), logits)
    kl = nn.functional.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
    (expected,) = torch.autograd.grad((nn.functional.cross_entropy(logits, truth) + kl) / 2, logits)
    assert torch.allclose(ours, expected, atol=1e-6)
    assert taught_loss("softmax")({"logits": logits}, truth) == nn.functional.cross_entropy(logits, truth)


def test_a_batch_holds_the_targets_at_the_places_of_their_tokens() -> None:
    labelled = data_of("tokens", 2, 1)
    unlabeled = data_of("tokens", 4, 2, labelled=False)
    targets = [torch.full((len(row["input_ids"]) - 1, 2), 0.5) for row in labelled]
    more = [torch.full((len(row["input_ids"]), 2), 0.25) for row in unlabeled]
    samples = TaughtSamples(labelled, targets, unlabeled, more)
    assert len(samples) == 4 + 4, "the labelled samples come twice"
    batch = with_targets(padded)([samples[index] for index in range(len(samples))])
    assert TARGETS not in batch and batch["labels"].shape == (8, 6, 2)
    first, last = batch["labels"][0], batch["labels"][-1]
    assert first[0].tolist() == [0, 0] and first[1].tolist() == [0.5, 0.5], "the first token has no label"
    assert last.sum() == 0.5 * len(unlabeled[-1]["input_ids"])
    assert set(padded(labelled)) == set(with_targets(padded)(labelled)), "other samples are collated as before"


def test_the_scale_of_logits_goes_into_a_linear_head_or_nowhere() -> None:
    model = model_of("classes").eval()
    batch = padded(data_of("classes", 6, 1))
    logits = model(**batch).logits.detach()
    assert scale_logits_(model, 0.5, batch)
    assert torch.allclose(model(**batch).logits, 0.5 * logits, atol=1e-6)

    class Squashed(nn.Linear):
        """A head that is not linear."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).tanh()

    model.classifier = Squashed(16, 2)
    before = model.classifier.weight.clone()
    assert not scale_logits_(model, 0.5, batch) and torch.equal(model.classifier.weight, before)


def test_texts_without_labels_train_a_language_model() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16))
    merger = GraspMerger(model, GraspConfig(**CONFIG))
    rows = [{"input_ids": text, "labels": text} for text in texts(8, 1) if len(text) == 4]
    with merger.open_run(Samples(rows, None, [*rows, *rows])) as run:
        assert len(run.samples.train) == 3 * len(rows) and run.samples.unlabeled is None
