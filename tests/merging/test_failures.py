"""An error at any stage restores the target bit for bit, and no source stays in memory."""

import gc
import re
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import grasp_hf.merging.run
import grasp_hf.tensors.mixing
from grasp_hf import GraspConfig, GraspMerger, gradient_alignment
from grasp_hf.data.samples import Samples
from grasp_hf.errors import ConfigError, DataError, IncompatibleSourceError, OutputExistsError
from grasp_hf.merging.checks import check_finetuning
from grasp_hf.sources.load import LoadedSource
from tests.support.models import NO_TUNING, copied, perturbed, saved, tiny_data, tiny_model

CONFIG: dict[str, Any] = {**NO_TUNING, "finetune_epochs": 1, "batch_size": 8, "num_batches": 3}


class FailingData(torch.utils.data.Dataset):
    """Samples that raise an error after `after` reads."""

    def __init__(self, samples: list[dict], after: int, error: BaseException) -> None:
        self.samples, self.left, self.error = samples, after, error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.samples[index]


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that counts the loaded sources that are still in memory."""
    seen: list[weakref.ref[LoadedSource]] = []
    original = grasp_hf.merging.run.load_source

    def load(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        seen.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(grasp_hf.merging.run, "load_source", load)
    return lambda: sum(reference() is not None for reference in seen)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("method", ["blend", "copy"])
@pytest.mark.parametrize(
    ("train_reads", "held_out_reads"),
    [(0, 99), (12, 99), (30, 99), (40, 99), (999, 3), (999, 15), (999, 27)],
    ids=["first", "measuring", "measuring-late", "fine-tuning", "before", "gate", "epoch"],
)
def test_an_error_at_any_stage_restores_the_target(
    train_reads: int,
    held_out_reads: int,
    method: Any,
    kind: type[BaseException],
    tmp_path: Path,
    alive: Callable[[], int],
) -> None:
    source = saved(perturbed(tiny_model("resnet"), 1), tmp_path / "source")
    target = perturbed(tiny_model("resnet"), 2).eval()
    before = state_of(target)
    merger = GraspMerger(target, GraspConfig(method=method, threshold=-1.0, gate=False, **CONFIG))
    train = FailingData(list(tiny_data("resnet", 16)), train_reads, kind("here"))
    held_out = FailingData(list(tiny_data("resnet", 12)), held_out_reads, kind("here"))
    with pytest.raises(kind, match="here") as caught:
        merger.merge_source(source, train_dataset=train, eval_dataset=held_out)
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not target.training and merger.report.steps == []
    assert all(parameter.grad is None for parameter in target.parameters())
    assert caught.value.__notes__ == [f"while merging source '{source}'"]
    gc.collect()
    assert alive() == 0, "the exception is still alive here, and must not keep the source in memory"


def test_models_of_other_shapes_are_refused_before_anything_is_measured() -> None:
    source, target = tiny_model("vit", labels=["a", "b"]), tiny_model("vit")
    before = state_of(target)
    with pytest.raises(
        IncompatibleSourceError, match=r"cannot be compared:\n- classifier.weight: got shape \(2, 16\)"
    ):
        gradient_alignment(source, target, tiny_data("vit", 4))
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name])


def test_labels_that_the_model_does_not_have_are_refused() -> None:
    data = tiny_data("vit", 8).map(lambda sample: {"labels": sample["labels"] + 4})
    with pytest.raises(DataError, match="labels from 4 to 6; expected 0 to 2"):
        GraspMerger(tiny_model("vit")).merge([], train_dataset=data)


def test_samples_that_are_not_prepared_are_refused() -> None:
    data = tiny_data("vit", 8).remove_columns("pixel_values").add_column("text", ["red"] * 8)
    with pytest.raises(DataError, match="a batch holds labels, expected pixel_values; prepare the data set"):
        GraspMerger(tiny_model("vit")).merge([], train_dataset=data)


def test_a_reference_instead_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="sources: got 'org/a', expected a list"):
        GraspMerger(tiny_model("vit")).merge("org/a", train_dataset=tiny_data("vit", 8))


def test_frozen_models_are_not_fine_tuned() -> None:
    model = tiny_model("vit").requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        GraspMerger(model, GraspConfig(initial_epochs=1)).merge([], train_dataset=tiny_data("vit", 8))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("dataloader_num_workers", -1, "num_workers"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps: expected at least 1"),
        ("use_liger_kernel", True, "use_liger_kernel needs the package liger-kernel"),
    ],
)
def test_bad_training_arguments_are_named_before_the_first_source(name: str, value: Any, problem: str) -> None:
    merger = GraspMerger(tiny_model("bert"), GraspConfig(final_epochs=1, training_arguments={name: value}))
    with pytest.raises(ConfigError, match=f"training_arguments: .*{problem}"):
        merger.merge(["org/nowhere"], train_dataset=tiny_data("bert", 8))


def test_a_generator_of_sources_and_a_configuration_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config: got a dict, expected a GraspConfig"):
        GraspMerger(tiny_model("vit"), {"method": "average"})  # type: ignore[arg-type]
    sources = (saved(perturbed(tiny_model("vit"), seed), tmp_path / str(seed)) for seed in (1, 2))
    report = GraspMerger(tiny_model("vit"), GraspConfig(method="average", **NO_TUNING)).merge(sources)
    assert [step.name for step in report.steps] == ["1", "2"]


def test_accuracy_cannot_choose_the_epoch_of_a_language_model() -> None:
    merger = GraspMerger(tiny_model("gpt2"), GraspConfig.paper())
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no accuracy .* metric_for_best_model: loss"):
        merger.merge([], train_dataset=tiny_data("gpt2", 8), eval_dataset=tiny_data("gpt2", 8))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputExistsError, match="cannot be written: .* is a file; name another folder"):
        GraspMerger(tiny_model("vit")).save_pretrained(tmp_path / "file/merged")


@pytest.fixture
def terminal() -> Iterator[None]:
    """Make Ctrl-C an interrupt, as in a terminal; a background process of a shell ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("terminal")
def test_an_interrupted_average_is_complete_after_the_present_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An average without data keeps no copy of the weights, so Ctrl-C waits for the end of the source."""
    sources = [saved(perturbed(tiny_model("vit"), seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    config = GraspConfig(method="average", **NO_TUNING)
    original, calls = grasp_hf.tensors.mixing.mix_, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 50:  # in the middle of the second source
            signal.raise_signal(signal.SIGINT)
        original(*args)

    expected = GraspMerger(tiny_model("vit"), config)
    expected.merge(sources[:2])
    monkeypatch.setattr(grasp_hf.tensors.mixing, "mix_", interrupted)
    merger = GraspMerger(tiny_model("vit"), config)
    with pytest.raises(KeyboardInterrupt, match=re.escape(sources[1])):
        merger.merge(sources)
    assert [step.source for step in merger.report.steps] == sources[:2]
    for name, value in state_of(expected.model).items():
        assert torch.equal(merger.model.state_dict()[name], value), name
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    bad = copied(sources[2], tmp_path / "bad") / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-100])
    with pytest.raises(IncompatibleSourceError, match=f"{re.escape(str(bad.parent))}.*{bad.name}"):
        merger.merge([str(bad.parent)])
    for name, value in state_of(expected.model).items():
        assert torch.equal(merger.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"report_to": "wandb"}, "wandb"),
        ({"report_to": "nowhere"}, "nowhere is not supported"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"deepspeed": "settings.json"}, "deepspeed"),
    ],
)
@pytest.mark.parametrize("epochs", [{"initial_epochs": 1}, {"finetune_epochs": 1}, {"final_epochs": 1}])
def test_an_argument_that_the_trainer_refuses_is_named_before_the_first_source(
    arguments: dict[str, Any], problem: str, epochs: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("bitsandbytes", "wandb", "deepspeed"):
        monkeypatch.setitem(sys.modules, package, None)  # its import fails, even if it is installed
    merger = GraspMerger(tiny_model("vit"), GraspConfig(**{**NO_TUNING, **epochs}, training_arguments=arguments))
    before = state_of(merger.model)
    with pytest.raises(ConfigError, match=rf"^training_arguments: .*{problem}"):
        merger.merge(["no/such-source"], train_dataset=tiny_data("vit", 8))
    assert all(torch.equal(before[name], value) for name, value in merger.model.state_dict().items())


def test_a_missing_package_is_named_by_a_single_fine_tuning_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    merger = GraspMerger(tiny_model("vit"), GraspConfig(training_arguments={"optim": "adamw_bnb_8bit"}))
    with pytest.raises(ConfigError, match=r"^training_arguments: .*bitsandbytes"):
        merger.finetuned_alone(1, tiny_data("vit", 8), train_dataset=tiny_data("vit", 8))


@pytest.mark.parametrize("lora", [None, {"r": 2}, {"r": 2, "init_lora_weights": "pissa"}])
def test_the_check_of_the_trainer_changes_nothing(lora: dict[str, Any] | None) -> None:
    merger = GraspMerger(tiny_model("vit"), GraspConfig(lora=lora))
    before, modes = state_of(merger.model), {module: module.training for module in merger.model.modules()}
    torch.manual_seed(7)
    with merger.open_run(Samples(tiny_data("vit", 8))) as run, run.step() as step:
        check_finetuning(step, 1)
        assert not run.labels.learned
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert {module: module.training for module in merger.model.modules()} == modes
    for name, value in merger.model.state_dict().items():
        assert torch.equal(before[name], value), name
