"""Fine-tuning with the Trainer restores the best weights and changes nothing else on the model."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LevitConfig,
    LevitForImageClassification,
    PreTrainedModel,
    default_data_collator,
)

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import ConfigError, NonFiniteError
from grasp_hf.models.finetune import attach_lora, check_finetuning, finetune_, training_arguments
from tests.support.models import KINDS, NO_TUNING, perturbed, saved, tiny_data, tiny_model


def tuned(
    model: PreTrainedModel,
    directory: Path,
    epochs: float = 3,
    samples: int = 24,
    wrong_labels: bool = False,
    **arguments: Any,
) -> None:
    """Fine-tune a model; with `wrong_labels` in the evaluation data, its loss rises after an early best epoch."""
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
    """The Trainer loads its best checkpoint by the names in files and skips most of a ViT's weights."""
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
    tuned(model, tmp_path, epochs=1)
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
    """With a learning rate of 0 the parameters do not change in any number of epochs."""
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
    tuned(whole, tmp_path, samples=8, **common)
    tuned(parts, tmp_path, samples=8, per_device_train_batch_size=2, gradient_accumulation_steps=4, **common)
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


def low_rank(model: PreTrainedModel, directory: Path, lora: dict[str, Any], **arguments: Any) -> None:
    kind = model.config.model_type
    config = GraspConfig(batch_size=8, lora=lora, training_arguments={"learning_rate": 1e-2, **arguments})
    finetune_(
        model,
        tiny_data(kind, 24, seed=1),
        tiny_data(kind, 12, seed=2),
        default_data_collator,
        config,
        epochs=2,
        seed=3,
        directory=directory,
    )


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "resnet"])
def test_an_adapter_is_trained_and_becomes_part_of_the_weights(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    next(model.parameters()).requires_grad_(False)
    data = tiny_data(kind, 24, seed=1)[:24]
    loss = float(model.eval()(**data).loss)
    lora = {"r": 2, **({"target_modules": ["convolution"]} if kind == "resnet" else {})}
    low_rank(model, tmp_path, lora)
    assert float(model.eval()(**data).loss) < loss
    # The same objects: a reference to a parameter from before still refers to the model's parameter.
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert model.state_dict().keys() == before.keys() and not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    for name in changed:
        if "classifier" not in name:
            difference = (parameters[name] - before[name]).detach()
            assert name.endswith("weight") and difference.ndim >= 2, name
            assert torch.linalg.matrix_rank(difference.flatten(1), rtol=1e-3) <= 2, name
    assert any("classifier" in name for name in changed) == (kind != "gpt2")


def test_an_interrupted_adapter_leaves_the_model_whole(tmp_path: Path) -> None:
    model = tiny_model("vit")
    modules, before = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight.* learning_rate"):
        low_rank(model, tmp_path, {"r": 2}, learning_rate=1e30)
    assert dict(model.named_modules()) == modules and model.state_dict().keys() == before.keys()
    with pytest.raises(KeyboardInterrupt, match="adapted"), attach_lora(model, {"r": 2}, seed=0):
        raise KeyboardInterrupt("adapted")
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    model = tiny_model("vit")
    modules = dict(model.named_modules())
    with pytest.raises(
        ConfigError, match="lora: cannot be applied to a ViTForImageClassification: No modules were targeted"
    ):
        low_rank(model, tmp_path, {"target_modules": ["nowhere"]})
    assert dict(model.named_modules()) == modules


def test_a_merge_with_low_rank_fine_tuning_repeats_bit_for_bit(tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("vit"), 1), tmp_path / "source")
    data = {"train_dataset": tiny_data("vit", 24, seed=1), "eval_dataset": tiny_data("vit", 12, seed=2)}
    models = [tiny_model("vit") for _ in range(2)]
    for model in models:
        config = GraspConfig(**{**NO_TUNING, "initial_epochs": 1, "finetune_epochs": 1}, batch_size=8, lora={"r": 2})
        assert len(GraspMerger(model, config).merge([source, source], **data).steps) == 2
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_statistics_of_a_trained_head_stay_with_it(tmp_path: Path) -> None:
    """PEFT trains a copy of the head; the head of a LeViT holds a normalisation layer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1]}
    model = LevitForImageClassification(LevitConfig(image_size=64, key_dim=[8, 8, 8], **sizes))
    modules = dict(model.named_modules())
    with attach_lora(model, {"r": 2}, seed=0) as trained:
        trained.train()
        for _ in range(3):
            trained(pixel_values=torch.randn(4, 3, 64, 64) + 1)
        inside = trained.eval()(pixel_values=torch.ones(2, 3, 64, 64)).logits
    assert dict(model.named_modules()) == modules
    torch.testing.assert_close(
        model.eval()(pixel_values=torch.ones(2, 3, 64, 64)).logits, inside, atol=1e-4, rtol=1e-4
    )


def test_checkpointing_leaves_no_hook_behind(tmp_path: Path) -> None:
    model = tiny_model("vit")
    low_rank(model, tmp_path, {"r": 2}, gradient_checkpointing=True)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("samples", "published", "normalizes", "asked", "drops"),
    [
        (17, False, False, {}, False),
        (17, False, True, {}, True),  # the last batch would be a single sample
        (18, False, True, {}, False),
        (1, False, True, {}, False),
        (18, False, False, {"dataloader_drop_last": True}, True),
        (7, False, False, {"dataloader_drop_last": True}, False),  # there is no full batch
        (18, True, False, {}, True),
        (18, True, False, {"per_device_train_batch_size": 32}, False),
    ],
)
def test_a_last_batch_is_dropped_only_if_it_must_be_and_another_remains(
    samples: int, published: bool, normalizes: bool, asked: dict[str, Any], drops: bool, tmp_path: Path
) -> None:
    config = (GraspConfig.paper if published else GraspConfig)(batch_size=8, training_arguments=asked)
    found = training_arguments(
        config, epochs=1, seed=0, directory=tmp_path, samples=samples, evaluates=False, normalizes_batches=normalizes
    )
    assert found.dataloader_drop_last is drops


def test_halves_of_the_samples_that_end_in_a_batch_of_one_can_be_trained_on() -> None:
    model = tiny_model("resnet")
    images = torch.randn(18, 3, 4, 4, generator=torch.Generator().manual_seed(1))  # 1 x 1 in the last stage
    data = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(pixel_values=images[:1])
    merger = GraspMerger(model, GraspConfig(**{**NO_TUNING, "initial_epochs": 2}, batch_size=8))
    merger.merge([], train_dataset=data)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_configuration_stays(kind: str, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    """The Trainer sets `use_cache` in the configuration, and PEFT sets `tie_word_embeddings`."""
    model = tiny_model(kind)
    before = model.config.to_dict()
    data = tiny_data(kind, 16, seed=1)
    config = GraspConfig(batch_size=8, lora=lora)
    check_finetuning(model, data, None, default_data_collator, config, tmp_path)
    assert model.config.to_dict() == before
    finetune_(model, data, None, default_data_collator, config, epochs=1, seed=3, directory=tmp_path)
    assert model.config.to_dict() == before


def masked_data(samples: int) -> Dataset:
    tokens = tiny_data("bert", samples).remove_columns("labels")
    return tokens.add_column("labels", [[int(token) for token in row] for row in tokens["input_ids"]]).with_format(
        "torch"
    )


def test_of_tied_weights_an_adapter_trains_no_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=16, intermediate_size=32, **sizes))
    data = masked_data(16)
    with attach_lora(model, {"r": 2}, seed=0) as trained:
        optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.01)
        start = float(trained.eval()(**data[:]).loss)
        for _ in range(5):
            loss = trained(**data[:]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        inside = trained(**data[:])
    assert float(inside.loss) < start
    torch.testing.assert_close(model.eval()(**data[:]).logits, inside.logits, atol=1e-4, rtol=1e-4)
    config = GraspConfig(batch_size=8, lora={"r": 2})
    finetune_(model, data, None, default_data_collator, config, epochs=1, seed=3, directory=tmp_path)
    model.eval().save_pretrained(tmp_path / "saved")
    again = BertForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(**data[:]).logits, model(**data[:]).logits)


@pytest.mark.parametrize(
    "lora", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["c_attn", "lm_head"]}, {"target_modules": ["wte"]}]
)
def test_an_adapter_of_tied_weights_is_refused(lora: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    modules, before = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"lora: it would train a copy of (lm_head|transformer.wte), whose weights are"
    ):
        low_rank(model, tmp_path, lora)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_best_epochs_statistics_come_back_with_an_adapter(tmp_path: Path) -> None:
    model = tiny_model("resnet")
    states: list[tuple[float, dict[str, torch.Tensor]]] = []

    def remember(module: PreTrainedModel, inputs: Any, output: Any) -> None:
        if not module.training:
            states.append((float(output.loss), {k: v.clone() for k, v in module.named_buffers()}))

    def wrong(sample: dict[str, Any]) -> dict[str, Any]:
        return {"labels": (sample["labels"] + 1) % 3}

    with model.register_forward_hook(remember):
        finetune_(
            model,
            tiny_data("resnet", 24, seed=1),
            tiny_data("resnet", 12, seed=2).map(wrong),
            default_data_collator,
            GraspConfig(
                batch_size=8,
                lora={"r": 2, "target_modules": ["convolution"]},
                training_arguments={"learning_rate": 1e-2, "per_device_eval_batch_size": 12},
            ),
            epochs=4,
            seed=3,
            directory=tmp_path,
        )
    losses = [loss for loss, _ in states]
    best = losses.index(min(losses))
    assert len(states) == 4 and best < 3, "the test means something only if the last epoch is not the best"
    found = [values for name, values in states[best][1].items() if name.endswith("running_mean")]
    now = [values for name, values in model.named_buffers() if name.endswith("running_mean")]
    assert len(found) == len(now) > 0 and all(torch.equal(one, other) for one, other in zip(found, now, strict=True))


def test_a_model_without_classes_has_no_accuracy_to_choose_the_best_epoch(tmp_path: Path) -> None:
    several = tiny_data("bert", 12).map(lambda sample: {"labels": [1.0, 0.0, 1.0]})
    numbers = tiny_data("bert", 12).map(lambda sample: {"labels": 0.5})
    config = GraspConfig(batch_size=8, training_arguments={"metric_for_best_model": "accuracy"})
    for data, classes in ((several, 3), (numbers, 1)):
        model = tiny_model("bert", labels=["a", "b", "c"][:classes])
        with pytest.raises(
            ConfigError, match="has no accuracy to choose the best epoch by; set metric_for_best_model"
        ):
            check_finetuning(model, data, data, default_data_collator, config, tmp_path)


def test_an_interrupt_leaves_no_noise_on_the_embeddings(tmp_path: Path) -> None:
    def stopped(samples: list[Any]) -> Any:
        raise KeyboardInterrupt("at the first batch")

    model = tiny_model("bert")
    config = GraspConfig(batch_size=8, training_arguments={"neftune_noise_alpha": 5.0})
    with pytest.raises(KeyboardInterrupt, match="at the first batch"):
        finetune_(model, tiny_data("bert", 16), None, stopped, config, epochs=1, seed=3, directory=tmp_path)
    assert not any(module._forward_hooks for module in model.modules())


def test_training_does_not_change_later_random_numbers(tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    model = tiny_model("bert")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    tuned(model, tmp_path, epochs=1)
    assert drawn() == expected
