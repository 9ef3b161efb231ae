"""The Fisher information of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from grasp_hf.comparison.fisher import _draw_labels, fisher_
from grasp_hf.errors import DataError, NonFiniteError
from grasp_hf.models.batches import Batch
from grasp_hf.tensors.mapped import MappedTensors
from tests.support.models import perturbed, tiny_data, tiny_model

Tensors = dict[str, Tensor]
CLASSES = 3


def batches_of(kind: str, samples: int = 8, size: int = 4) -> list[Batch]:
    rows = tiny_data(kind, samples, seed=1).with_format("torch")
    return [rows[start : start + size] for start in range(0, samples, size)]


def sure(model: PreTrainedModel, label: int, logit: float = 12.0) -> PreTrainedModel:
    """Change `model` so that it is sure of one class and no other label is drawn; return it. Its gradients are small."""
    with torch.no_grad():
        model.get_parameter("classifier.bias").copy_(torch.where(torch.arange(CLASSES) == label, logit, -2.0))
    return model


def naive_fisher(model: PreTrainedModel, batches: list[Batch], label: int) -> Tensors:
    """Return the sum over batches of the squared gradient with that label, in double precision."""
    found = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        labels = torch.full_like(batch["labels"], label)
        (len(labels) * model(**{**batch, "labels": labels}).loss).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.double() ** 2
    return found


def test_a_sure_model_has_the_squared_gradients_of_its_own_label(tmp_path: Path) -> None:
    model, batches = sure(tiny_model("bert").eval(), 1), batches_of("bert")
    buffer = MappedTensors(tmp_path / "buffer", dict(model.named_parameters()))
    fisher_(buffer, model, batches, buffer, seed=0)
    expected = naive_fisher(model, batches, label=1)
    assert max(float(values.max()) for values in expected.values()) > 0
    for name, values in expected.items():
        torch.testing.assert_close(buffer[name].double(), values, rtol=1e-3, atol=1e-12)


def test_a_fisher_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    model = tiny_model("bert").eval()
    buffer = MappedTensors(tmp_path / "buffer", dict(model.named_parameters()))
    model.get_parameter("classifier.weight").register_hook(lambda gradient: gradient * 1e30)
    with pytest.raises(NonFiniteError, match="Fisher information of classifier.weight"):
        fisher_(buffer, model, batches_of("bert"), buffer, seed=0)


def test_labels_that_are_not_classes_are_an_error(tmp_path: Path) -> None:
    model = tiny_model("bert").eval()
    buffer = MappedTensors(tmp_path / "buffer", dict(model.named_parameters()))
    batches = [{**batch, "labels": batch["labels"].float()[:, None].expand(-1, 3)} for batch in batches_of("bert")]
    with pytest.raises(DataError, match="expected one class id"):
        fisher_(buffer, model, batches, buffer, seed=0)


def test_labels_of_an_encoder_decoder_are_drawn_for_the_prefix_that_they_are_learned_with() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 12, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    sizes |= {"decoder_start_token_id": 0, "pad_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    perturbed(model, 1, scale=0.5)
    tokens = torch.randint(1, 12, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens[0], "labels": tokens[1]}
    with torch.no_grad():
        drawn = _draw_labels(model, batch)
        assert not torch.equal(drawn["labels"], batch["labels"])
        assert torch.equal(model(**drawn).logits, model(**batch).logits)
        given = _draw_labels(model, {**batch, "decoder_input_ids": tokens[0]})
    assert torch.equal(given["decoder_input_ids"], tokens[0])
