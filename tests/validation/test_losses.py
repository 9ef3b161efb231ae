"""Losses per sample and their differences, against single samples, closed forms and a jackknife."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from scipy.stats import ttest_rel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

from grasp_hf.errors import DataError
from grasp_hf.models.batches import batch_loss
from grasp_hf.record.entries import Reason
from grasp_hf.validation.changes import Change, detectable_difference, paired_change
from grasp_hf.validation.losses import SampleLosses, concatenate, sample_losses
from tests.support.models import tiny_data, tiny_model

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19, 20], [21, 22, 23, 24, 25, 26, 27, 28]]


def evaluate(model: Any, data: Any, batch_size: int = 5, collator: Any = default_data_collator) -> SampleLosses:
    return sample_losses(model, data, collator, Accelerator(), batch_size)


def padded(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch of texts of several lengths; the padding has no label."""
    length = {key: max(len(sample[key]) for sample in samples) for key in samples[0]}
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([sample[key] + [fill[key]] * (length[key] - len(sample[key])) for sample in samples])
        for key in samples[0]
    }


class Fixed:
    """A classifier whose logits are its input."""

    main_input_name = "inputs"
    config = SimpleNamespace(num_labels=2, is_encoder_decoder=False)

    def __call__(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the inputs as logits."""
        return {"loss": cross_entropy(inputs, labels), "logits": inputs}

    def can_generate(self) -> bool:
        """Return that the model writes no text."""
        return False


def of_logits(logits: Tensor, labels: Tensor) -> SampleLosses:
    return evaluate(
        Fixed(), [{"inputs": row, "labels": int(label)} for row, label in zip(logits, labels, strict=True)]
    )


def of_losses(losses: Any, terms: Any = None) -> SampleLosses:
    found = torch.as_tensor(losses, dtype=torch.float64)
    return SampleLosses(
        found, torch.ones_like(found) if terms is None else torch.as_tensor(terms).double(), found, None
    )


@pytest.mark.parametrize("kind", ["vit", "bert", "resnet"])
def test_a_classifier_has_one_loss_per_sample(kind: str) -> None:
    model, data = tiny_model(kind).eval(), tiny_data(kind, 12)
    found = evaluate(model, data)
    logits = torch.cat([model(**data[n : n + 1]).logits.detach() for n in range(12)])
    labels = data[:]["labels"]
    expected = -logits.double().log_softmax(-1)[range(12), labels]
    torch.testing.assert_close(found.losses, expected, atol=1e-6, rtol=0)
    assert found.losses.dtype == torch.float64 and found.terms.tolist() == [1] * 12
    assert found.correct is not None and found.correct.tolist() == (logits.argmax(-1) == labels).tolist()
    assert found.loss == pytest.approx(float(model(**data[:]).loss), abs=1e-6)
    assert found.evaluation() == {"loss": found.loss, "accuracy": int(found.correct.sum()) / 12}


def test_a_text_has_the_same_loss_in_a_batch_and_alone() -> None:
    model = tiny_model("gpt2").eval()
    samples = [{"input_ids": text, "attention_mask": [1] * len(text), "labels": text} for text in TEXTS]
    found = evaluate(model, samples, batch_size=3, collator=padded)
    alone = [float(model(**padded([sample])).loss) for sample in samples]
    assert found.terms.tolist() == [len(text) - 1 for text in TEXTS], "the first token is predicted from nothing"
    assert found.losses.tolist() == pytest.approx([a * (len(t) - 1) for a, t in zip(alone, TEXTS, strict=True)])
    assert found.loss == pytest.approx(float(model(**padded(samples)).loss)), "the mean over tokens, not over texts"
    assert found.loss != pytest.approx(sum(alone) / len(alone), abs=1e-4)
    assert found.evaluation() == {"loss": found.loss} and torch.equal(found.calibrated, found.losses)


def test_tokens_without_a_label_do_not_count() -> None:
    model = tiny_model("gpt2").eval()
    texts = [TEXTS[1], TEXTS[4]]
    samples = [{"input_ids": text, "labels": [-100] * 3 + text[3:]} for text in texts]
    silent = {"input_ids": TEXTS[3], "labels": [-100] * 5}
    found = evaluate(model, [*samples, silent], collator=padded)
    assert found.terms.tolist() == [3, 5, 0] and float(found.losses[2]) == 0
    assert found.loss == pytest.approx(float(model(**padded(samples)).loss))


@pytest.mark.parametrize("kind", ["language model", "tags"])
def test_a_batch_without_any_label_is_left_out_and_none_at_all_is_an_error(kind: str) -> None:
    torch.manual_seed(0)
    tags = BertForTokenClassification(BertConfig(**{**SMALL, "num_labels": 3})).eval()
    model = tags if kind == "tags" else tiny_model("gpt2").eval()
    samples = [{"input_ids": t, "labels": [n % 3 for n in t]} for t in TEXTS[:2]]
    silent = {"input_ids": TEXTS[3], "labels": [-100] * 5}
    found = evaluate(model, [silent, *samples], batch_size=1, collator=padded)
    assert torch.equal(found.losses, evaluate(model, samples, batch_size=1, collator=padded).losses)
    with pytest.raises(DataError, match="^none of the 2 samples has a labelled token"):
        evaluate(model, [silent, silent], batch_size=1, collator=padded)
    with pytest.raises(DataError, match="^a batch holds no labelled token"):
        batch_loss(model, padded([silent]))


def test_the_decoder_of_an_encoder_and_decoder_predicts_every_label() -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(num_layers=1, num_heads=2, **sizes)).eval()
    samples = [{"input_ids": t, "attention_mask": [1] * len(t), "labels": t[::-1][:4]} for t in TEXTS]
    found = evaluate(model, samples, batch_size=2, collator=padded)
    assert found.terms.tolist() == [3, 4, 2, 4, 4]
    alone = [float(model(**padded([sample])).loss) for sample in samples]
    assert found.losses.tolist() == pytest.approx([a * t for a, t in zip(alone, [3, 4, 2, 4, 4], strict=True)])
    assert found.loss == pytest.approx(float(model(**padded(samples)).loss))


def test_tags_of_tokens_are_evaluated_text_by_text() -> None:
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**{**SMALL, "num_labels": 3})).eval()
    samples = [
        {"input_ids": t, "attention_mask": [1] * len(t), "labels": [-100, *[n % 3 for n in t[1:]]]} for t in TEXTS
    ]
    found = evaluate(model, samples, batch_size=2, collator=padded)
    assert found.terms.tolist() == [2, 5, 1, 4, 7]
    own = [float(model(**padded([sample])).loss) for sample in samples]
    assert found.losses.tolist() == pytest.approx([a * t for a, t in zip(own, [2, 5, 1, 4, 7], strict=True)])
    assert found.loss == pytest.approx(float(model(**padded(samples)).loss))
    assert found.correct is None and float(found.calibrated.sum()) <= float(found.losses.sum())
    assert found.outputs is not None and found.outputs.samples.bincount().tolist() == [2, 5, 1, 4, 7]


def test_a_regression_is_evaluated_sample_by_sample() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**{**SMALL, "num_labels": 1})).eval()
    samples: list[dict[str, Any]] = [{"input_ids": torch.arange(n, n + 4), "labels": n / 3} for n in range(5)]
    found = evaluate(model, samples, batch_size=2)
    outputs = torch.cat([model(input_ids=s["input_ids"][None]).logits[0] for s in samples]).detach()
    squares = (outputs - torch.arange(5) / 3) ** 2
    assert found.terms.tolist() == [1] * 5
    assert found.losses.tolist() == pytest.approx(squares.tolist(), rel=1e-4)
    assert found.loss == pytest.approx(float(squares.mean())) and found.evaluation() == {"loss": found.loss}


def test_calibration_by_hand() -> None:
    """Three answers are right and one is wrong by the same margin, so the best prediction is 3/4, a margin of log 3."""
    for factor in (0.5, 1, 4):
        logits = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]]) * math.log(3) * factor
        found = of_logits(logits, torch.zeros(4, dtype=torch.long))
        assert found.calibrated.tolist() == pytest.approx([math.log(4 / 3)] * 3 + [math.log(4)])
        assert found.calibrated_loss == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
        right, wrong = (math.log1p(3**-factor), math.log1p(3**factor))
        assert found.losses.tolist() == pytest.approx([right] * 3 + [wrong])
        assert found.correct is not None and found.correct.tolist() == [True] * 3 + [False]


def test_calibration_never_raises_the_loss_and_removes_the_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    for noise in (0.5, 1.0):
        logits = torch.nn.functional.one_hot(labels, 3) + noise * torch.randn(40, 3, generator=generator)
        found = [of_logits(logits * scale, labels) for scale in (0.1, 0.5, 1, 2, 50)]
        assert all(losses.calibrated_loss <= losses.loss for losses in found)
        assert found[0].calibrated_loss < found[0].loss and found[4].calibrated_loss < found[4].loss / 2
        for losses in found[1:4:2]:
            torch.testing.assert_close(losses.calibrated, found[2].calibrated)


def test_the_change_of_samples_with_one_term_each_is_a_paired_t_test() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.rand(2, 30, generator=generator, dtype=torch.float64)
    found = paired_change(of_losses(before), of_losses(after))
    difference = after - before
    assert (found.samples, found.mean) == (30, pytest.approx(float(difference.mean())))
    assert found.standard_error == pytest.approx(float(difference.std(correction=1)) / math.sqrt(30))
    assert found.half_interval == pytest.approx(ttest_rel(after, before).confidence_interval(0.95).high - found.mean)
    back = paired_change(of_losses(after), of_losses(before))
    assert (back.mean, back.standard_error) == pytest.approx((-found.mean, found.standard_error))


def test_the_change_is_that_of_the_calibrated_losses() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = paired_change(of_logits(logits, labels), of_logits(logits * 4, labels))
    assert (found.mean, found.standard_error) == pytest.approx((0, 0), abs=1e-12)


def test_the_standard_error_of_ragged_texts_is_that_of_a_jackknife() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.randint(1, 30, (200,), generator=generator).double()
    before = terms * (2 + torch.rand(200, generator=generator, dtype=torch.float64))
    after = before + terms * (0.1 + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64))
    found = paired_change(of_losses(before, terms), of_losses(after, terms))
    ratios = torch.stack(
        [(after - before)[keep].sum() / terms[keep].sum() for keep in ~torch.eye(200, dtype=torch.bool)]
    )
    jackknife = math.sqrt(199 / 200 * float(((ratios - ratios.mean()) ** 2).sum()))
    assert found.mean == pytest.approx(float((after - before).sum() / terms.sum()))
    assert found.standard_error == pytest.approx(jackknife, rel=0.02)
    unweighted = float(((after - before) / terms).std()) / math.sqrt(200)
    assert abs(unweighted / jackknife - 1) > 0.05, "the test means something only if lengths matter"


def test_one_sample_shows_no_noise_and_no_effect() -> None:
    found = paired_change(of_losses([1.0]), of_losses([9.0]))
    assert (found.mean, found.standard_error, found.samples) == (8, 0, 1)
    assert found.verdict == Reason.NO_EFFECT and found.samples_to_see() is None
    report = found.report()
    assert report.half_interval is None and str(report) == "+8.000 ± ?"
    json.dumps(vars(report), allow_nan=False)


def test_the_number_of_samples_that_would_show_a_change() -> None:
    assert Change(0.1, 0.2, 25).samples_to_see() == math.ceil(25 * (1.96 * 2) ** 2) == 385
    assert Change(-0.1, 0.2, 25).samples_to_see() == 385
    assert Change(0.0, 0.2, 25).samples_to_see() is None
    assert Change(1e-19, 0.2, 25).samples_to_see() is None  # a rounding error
    close = Change(-0.23, 0.1, 5)  # between the normal interval and that of Student's t
    assert close.half_interval > 0.23 and close.samples_to_see() == 6
    difference = torch.tensor([0.0, 1.0, -0.5, 0.3] * 5, dtype=torch.float64)
    few = paired_change(of_losses(torch.zeros(20)), of_losses(difference))
    more = few.samples_to_see()
    assert more is not None and more > 20 and few.half_interval > abs(few.mean)
    for number, seen in ((more - 20, False), (more + 40, True)):
        many = difference.repeat(number // 20 + 1)[: number // 4 * 4]
        found = paired_change(of_losses(torch.zeros(len(many))), of_losses(many))
        assert (found.half_interval < abs(found.mean)) == seen


def test_two_sets_of_samples_as_one() -> None:
    a, b = of_losses([1.0, 2.0], [1, 2]), of_losses([3.0], [3])
    both = concatenate(a, b)
    assert (both.losses.tolist(), both.terms.tolist(), both.correct) == ([1, 2, 3], [1, 2, 3], None)
    assert both.loss == both.calibrated_loss == 1
    labels = torch.zeros(2, dtype=torch.long)
    c, d = of_logits(torch.tensor([[1.0, 0], [0, 1]]), labels), of_logits(torch.tensor([[1.0, 0], [2, 0]]), labels)
    correct = concatenate(c, d).correct
    assert correct is not None and correct.tolist() == [True, False, True, True]
    assert concatenate(c, d).evaluation()["accuracy"] == 0.75
    assert torch.equal(concatenate(c, d).calibrated, torch.cat([c.calibrated, d.calibrated]))


def test_the_detectable_difference_is_the_interval_of_two_models_that_disagree_on_half_of_the_samples() -> None:
    found = detectable_difference(768)
    assert found.startswith("768 samples: two models must differ by about 5 points ")
    assert "expected at least 100 samples (768 samples tell 5 points apart)" in found
    one_wins, none = torch.tensor([1.0, -1.0] * 192), torch.zeros(384)
    differences = torch.cat([one_wins, none])  # between right (1) and wrong (0)
    half = 100 * 1.96 * float(differences.std(correction=0)) / math.sqrt(768)
    assert half == pytest.approx(5, abs=0.01)
    assert "about 14 points" in detectable_difference(100) and "at least 50 samples" in detectable_difference(100, 50)
