"""Fine-tuning by the Trainer: the best weights come back, nothing is left on the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, default_data_collator

from grasp_hf import GraspConfig
from grasp_hf.errors import ConfigError, NonFiniteError
from grasp_hf.finetune import finetune_
from tests.models import KINDS, tiny_data, tiny_model


def tuned(
    model: PreTrainedModel,
    directory: Path,
    epochs: float = 3,
    samples: int = 24,
    wrong_labels: bool = False,
    **arguments: Any,
) -> None:
    """Fine-tune; judged by `wrong_labels`, learning is getting worse, so that the first epoch is the best."""
    kind = model.config.model_type
    held_out = tiny_data(kind, 12, seed=2)
    if wrong_labels:
        held_out = held_out.map(lambda sample: {"labels": (sample["labels"] + 1) % 3})
    finetune_(
        model,
        tiny_data(kind, samples, seed=1),
        held_out,
        default_data_collator,
        GraspConfig(batch_size=8, training_arguments=arguments),
        epochs=epochs,
        seed=3,
        directory=directory,
    )


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
def test_the_best_epochs_weights_come_back_whole(kind: str, tmp_path: Path) -> None:
    """Transformers loads its best checkpoint by names that a ViT has on disk only, and leaves most of the last weights."""
    model = tiny_model(kind)
    states: list[tuple[float, dict[str, torch.Tensor]]] = []

    def remember(module: PreTrainedModel, inputs: Any, output: Any) -> None:
        if not module.training:
            states.append((float(output.loss), {k: v.clone() for k, v in module.state_dict().items()}))

    with model.register_forward_hook(remember):
        tuned(model, tmp_path, epochs=4, wrong_labels=True, learning_rate=1e-2, per_device_eval_batch_size=12)
    losses = [loss for loss, _ in states]
    best = losses.index(min(losses))
    assert len(states) == 4 and best < 3, "the test means something only if the last epoch is not the best"
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[best][1][name]), name


def test_names_on_disk_are_the_originals_again_after_fine_tuning(tmp_path: Path) -> None:
    model = tiny_model("vit")
    model.save_pretrained(tmp_path / "before")
    model = type(model).from_pretrained(tmp_path / "before")
    tuned(model, tmp_path / "work", epochs=1)
    model.save_pretrained(tmp_path / "after")
    with (
        safe_open(tmp_path / "before/model.safetensors", "pt") as a,
        safe_open(tmp_path / "after/model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())
    again = type(model).from_pretrained(tmp_path / "after")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_no_epochs_change_nothing(tmp_path: Path) -> None:
    model, untouched = tiny_model("resnet"), tiny_model("resnet")
    tuned(model, tmp_path, epochs=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name])


def test_the_users_arguments_win(tmp_path: Path) -> None:
    """With a rate of 0 and no decay the parameters cannot move, whatever the epochs say."""
    model, untouched = tiny_model("vit"), tiny_model("vit")
    tuned(model, tmp_path, learning_rate=0.0)
    for (name, value), other in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = tiny_model("bert"), tiny_model("bert")
    for model in (whole, parts):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    common: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0}
    tuned(whole, tmp_path / "a", samples=8, **common)
    tuned(parts, tmp_path / "b", samples=8, per_device_train_batch_size=2, gradient_accumulation_steps=4, **common)
    for (name, value), other in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(value, other[1], atol=1e-6, rtol=0, msg=name)


def test_mixed_precision_leaves_no_autocast_on_the_model(tmp_path: Path) -> None:
    model = tiny_model("bert")
    tuned(model, tmp_path, epochs=1, bf16=True, use_cpu=True)
    assert "forward" not in vars(model)
    assert model(**tiny_data("bert", 2)[:2]).logits.dtype == torch.float32


def test_unknown_training_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training_arguments.learning_rat: unknown key, did you mean learning_rate"):
        tuned(tiny_model("vit"), tmp_path, learning_rat=0.1)
    with pytest.raises(ConfigError, match="training_arguments: sometimes is not a valid SaveStrategy"):
        tuned(tiny_model("vit"), tmp_path, save_strategy="sometimes")


def test_a_loss_that_explodes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="try a lower learning_rate"):
        tuned(tiny_model("resnet"), tmp_path, epochs=2, learning_rate=1e38, max_grad_norm=0.0)
