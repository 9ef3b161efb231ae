"""Existing methods of a comparison: each equals its formula, or a naive reference that keeps everything in memory."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft.utils.merge_utils import dare_linear, task_arithmetic
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, default_data_collator

from grasp_hf import GraspConfig
from grasp_hf.comparison.ensembles import LogitFusion, ensemble_losses, logit_fusion
from grasp_hf.comparison.inputs import MethodInputs, wide_like
from grasp_hf.comparison.mixtures import mixture_, pearl_
from grasp_hf.comparison.soups import average_, cocktail_, fisher_average_, greedy_soup_
from grasp_hf.comparison.task_vectors import TENTHS, dare_, gradfix_, task_arithmetic_, ties_
from grasp_hf.errors import ConfigError, DataError, IncompatibleSourceError, NonFiniteError
from grasp_hf.models.finetune import finetune_
from grasp_hf.tensors.mapped import MappedTensors
from grasp_hf.tensors.units import movable_tensors, partition
from tests.support.models import perturbed, tiny_data, tiny_model

Tensors = dict[str, Tensor]
KINDS = ("resnet", "bert")
SAMPLES, BATCH = 10, 4  # the last batch is smaller
METHODS: list[Callable[[MethodInputs], None]] = [
    average_,
    cocktail_,
    greedy_soup_,
    task_arithmetic_,
    ties_,
    dare_,
    fisher_average_,
    partial(mixture_, steps=2),
    gradfix_,
    partial(pearl_, epochs=1, mixing_epochs=1),
]


def copies(model: nn.Module) -> Tensors:
    """Return a copy of all parameters and statistics."""
    return {name: tensor.detach().clone() for name, tensor in movable_tensors(model).items()}


def floats(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def weights_of(model: nn.Module) -> Tensors:
    return dict(model.named_parameters())


def data_batches(kind: str) -> list[dict[str, Any]]:
    rows = list(tiny_data(kind, SAMPLES))
    return [default_data_collator(rows[start : start + BATCH]) for start in range(0, SAMPLES, BATCH)]


def fine_tune(
    model: PreTrainedModel,
    kind: str,
    directory: Path,
    epochs: float,
    seed: int,
    lora: dict[str, Any] | None = None,
    learning_rate: float = 0.01,
) -> None:
    """Train a tiny model, or an adapter of it, on its tiny data."""
    arguments = {"learning_rate": learning_rate, "use_cpu": True}
    config = GraspConfig(batch_size=BATCH, lora=lora, training_arguments=arguments)
    data = tiny_data(kind, SAMPLES)
    finetune_(model, data, None, default_data_collator, config, epochs=epochs, seed=seed, directory=directory)


def inputs_of(
    kind: str,
    sources: Sequence[Mapping[str, Tensor]],
    directory: Path,
    change: Callable[[Any], Any] = lambda model: model,
) -> MethodInputs:
    """Return the inputs of a method on a tiny model, which `change` may alter first."""
    model = change(tiny_model(kind).eval())
    batches = data_batches(kind)
    base = MappedTensors(directory / "base", movable_tensors(model)).copy_(movable_tensors(model))

    @torch.no_grad()
    def loss() -> float:
        return sum(float(model(**batch).loss) for batch in batches) / len(batches)

    @contextmanager
    def open_sources() -> Iterator[Sequence[Mapping[str, Tensor]]]:
        yield list(sources)

    return MethodInputs(
        model=model,
        base=base,
        stream_sources=lambda: iter(sources),
        open_sources=open_sources,
        batches=lambda count: itertools.islice(itertools.cycle(batches), count),
        batches_per_epoch=len(batches),
        loss=loss,
        buffer=lambda name: filled_with_nan(MappedTensors(directory / name, wide_like(base))),
        finetune=partial(fine_tune, model, kind, directory),
        seed=3,
    )


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def filled_with_nan(tensors: MappedTensors) -> MappedTensors:
    """Fill the tensors with NaN, because the contents of a buffer are undefined and must not matter."""
    for tensor in tensors.values():
        tensor.fill_(math.nan if tensor.is_floating_point() else -7)
    return tensors


def fine_tunes(kind: str, number: int = 3, scale: float = 0.05) -> list[Tensors]:
    """Return fine-tunes of the base, whose integer statistics differ from its own."""
    found = [copies(perturbed(tiny_model(kind), seed, scale)) for seed in range(1, number + 1)]
    for seed, tensors in enumerate(found, start=1):
        for tensor in tensors.values():
            if not tensor.is_floating_point():
                tensor.fill_(10 * seed)
    return found


def assert_close(model: nn.Module, expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    found = movable_tensors(model)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].detach(), tensor, rtol=1e-5, atol=tolerance, msg=partial(add, f"{name}: ")
        )


def chosen(inputs: MethodInputs, candidates: Iterable[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the first candidate with the lowest loss."""
    losses: list[tuple[float, Mapping[str, Tensor]]] = []
    before = copies(inputs.model)
    for candidate in candidates:
        place(inputs.model, candidate)
        losses.append((inputs.loss(), candidate))
    place(inputs.model, before)
    return min(losses, key=lambda pair: pair[0])[1]


def place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in movable_tensors(model).items():
            tensor.copy_(tensors[name])


@pytest.mark.parametrize("kind", KINDS)
def test_average_is_the_mean(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind)
    inputs = inputs_of(kind, sources, tmp_path)
    average_(inputs)
    assert_close(inputs.model, {n: torch.stack([s[n] for s in sources]).mean(0) for n in floats(sources[0])})


def test_average_counts_a_tensor_once_per_source_that_has_it(tmp_path: Path) -> None:
    whole, other = fine_tunes("bert", 2)
    part = {name: tensor.bfloat16() for name, tensor in other.items() if ".layer.1." in name}
    inputs = inputs_of("bert", [part, whole], tmp_path)
    average_(inputs)
    expected = {name: (tensor + part[name].float()) / 2 if name in part else tensor for name, tensor in whole.items()}
    assert 0 < len(part) < len(whole)
    assert_close(inputs.model, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_lm_cocktail_weights_the_sources_by_their_losses(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind, scale=0.5)
    inputs = inputs_of(kind, sources, tmp_path)
    base, losses = copies(inputs.model), []
    for source in sources:
        place(inputs.model, source)
        losses.append(inputs.loss())
    place(inputs.model, base)
    exponentials = [math.exp(-loss / 5) for loss in losses]
    weights = [value / sum(exponentials) for value in exponentials]
    assert max(weights) - min(weights) > 0.02
    expected = {n: sum((w * s[n] for w, s in zip(weights, sources, strict=True)), 0 * base[n]) for n in floats(base)}
    cocktail_(inputs)
    assert_close(inputs.model, expected)


def test_lm_cocktail_leaves_out_sources_without_a_finite_loss(tmp_path: Path) -> None:
    good, other = fine_tunes("bert", 2)
    broken = {name: torch.full_like(tensor, math.inf) for name, tensor in other.items()}
    part = {name: tensor for name, tensor in other.items() if ".layer.1." in name}
    inputs = inputs_of("bert", [broken, good], made(tmp_path / "good"))
    cocktail_(inputs)
    assert_close(inputs.model, good, tolerance=0)
    inputs = inputs_of("bert", [part], made(tmp_path / "part"))
    base = copies(inputs.model)
    cocktail_(inputs)
    assert_close(inputs.model, base | part, tolerance=0)
    with pytest.raises(NonFiniteError, match="^no source has a finite loss on the labels$"):
        cocktail_(inputs_of("bert", [broken], made(tmp_path / "broken")))


def test_many_half_precision_sources_of_a_half_precision_base_all_count(tmp_path: Path) -> None:
    name, ones = "classifier.bias", torch.ones(3).bfloat16()
    inputs = inputs_of("bert", [{name: ones}] * 300, tmp_path, lambda model: model.bfloat16())
    task_arithmetic_(inputs, weights=(1.0,))
    assert inputs.model.get_parameter(name).tolist() == [300.0] * 3  # a bfloat16 sum ends at 256
    averaged = inputs_of("bert", [{name: ones}] * 149 + [{name: 301 * ones}], tmp_path, lambda model: model.bfloat16())
    average_(averaged)
    assert averaged.model.get_parameter(name).tolist() == [3.0] * 3


def test_greedy_soup_takes_the_sources_that_lower_the_loss(tmp_path: Path) -> None:
    sources = fine_tunes("bert", 4, scale=0.3)
    sources[1]["classifier.bias"] = torch.tensor([50.0, 0.0, -50.0])
    inputs = inputs_of("bert", sources, tmp_path)
    reference, best = deepcopy(inputs.model), math.inf
    soup: list[Tensors] = []

    def loss_of(members: list[Tensors]) -> float:
        place(inputs.model, {n: torch.stack([m[n] for m in members]).mean(0) for n in members[0]})
        loss = inputs.loss()
        place(inputs.model, copies(reference))
        return loss

    for source in sorted(sources, key=lambda s: loss_of([s])):
        if (loss := loss_of([*soup, source])) <= best:
            best, soup = loss, [*soup, source]
    assert 1 < len(soup) < len(sources)  # the soup kept some sources and refused others
    greedy_soup_(inputs)
    assert_close(inputs.model, {n: torch.stack([m[n] for m in soup]).mean(0) for n in soup[0]})
    assert inputs.loss() == pytest.approx(best, rel=1e-5)


def test_greedy_soup_undoes_a_partial_source_that_it_refuses(tmp_path: Path) -> None:
    good = {name: tensor for name, tensor in fine_tunes("bert", 1, scale=0.01)[0].items() if ".layer.0." in name}
    harmful = {"classifier.bias": torch.tensor([50.0, 0.0, -50.0])} | {name: 1 + good[name] for name in [*good][:2]}
    inputs = inputs_of("bert", [harmful, good], tmp_path)
    base = copies(inputs.model)
    greedy_soup_(inputs)
    assert_close(inputs.model, base | good, tolerance=0)


@pytest.mark.parametrize("kind", KINDS)
def test_task_arithmetic_is_the_best_multiple_of_the_sum(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind)
    inputs = inputs_of(kind, sources, tmp_path)
    base, weights = copies(inputs.model), weights_of(inputs.model)

    def candidate(weight: float) -> Tensors:
        made = dict(base)
        for name, start in floats(base).items():
            vectors = [source[name] - start for source in sources]
            # Statistics move at most to the mean of the sources.
            share = torch.full((3,), weight if name in weights else min(weight, 1 / 3))
            made[name] = start + task_arithmetic(vectors, share)
        return made

    expected = chosen(inputs, map(candidate, TENTHS))
    task_arithmetic_(inputs)
    assert_close(inputs.model, expected)  # the base's integers among them
    task_arithmetic_(inputs, weights=(0.7,))
    assert_close(inputs.model, candidate(0.7))


def test_a_variance_stays_positive_whatever_the_weight(tmp_path: Path) -> None:
    sources = fine_tunes("resnet", 4)
    for source in sources:
        for name, tensor in source.items():
            if name.endswith("running_var"):
                tensor.fill_(0.25)  # 1 in the base: the sum of task vectors is -3
    inputs = inputs_of("resnet", sources, tmp_path)
    task_arithmetic_(inputs, weights=(1.0,))
    variances = [tensor for name, tensor in inputs.model.named_buffers() if name.endswith("running_var")]
    assert variances and all(torch.equal(v, torch.full_like(v, 0.25)) for v in variances)


def naive_ties(vectors: list[Tensor], density: float) -> Tensor:
    """TIES, one element at a time."""
    flat = [vector.flatten() for vector in vectors]
    trimmed = []
    for vector in flat:
        order = vector.abs().argsort(descending=True).tolist()
        kept = set(order[: int(density * len(order))])
        trimmed.append([float(vector[i]) if i in kept else 0.0 for i in range(len(order))])
    merged = []
    for column in zip(*trimmed, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [value for value in column if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged).view(vectors[0].shape)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_against_a_loop_over_elements(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind)
    inputs = inputs_of(kind, sources, tmp_path)
    base, weights = copies(inputs.model), weights_of(inputs.model)
    ties_(inputs, weights=(1.5,))
    expected = dict(base)
    for name, start in floats(base).items():
        vectors = [source[name] - start for source in sources]
        if name in weights:
            expected[name] = start + 1.5 * naive_ties(vectors, 0.2)
        else:
            expected[name] = start + torch.stack(vectors).mean(0)
    assert_close(inputs.model, expected)


def test_ties_chooses_its_weight_and_keeps_tensors_that_no_source_has(tmp_path: Path) -> None:
    part = {name: tensor for name, tensor in fine_tunes("bert", 1)[0].items() if ".layer.1." in name}
    inputs = inputs_of("bert", [part], tmp_path)
    base = copies(inputs.model)
    vectors = {name: naive_ties([tensor - base[name]], 0.2) for name, tensor in part.items()}
    grid = (0.2, 1.0, 2.0)
    expected = chosen(inputs, [base | {n: base[n] + w * v for n, v in vectors.items()} for w in grid])
    ties_(inputs, weights=grid)
    assert_close(inputs.model, expected)


@pytest.mark.parametrize("densities", [(0.1,), (0.1, 0.8), (0.8, 0.1)])
def test_dare_drops_and_rescales_and_chooses_density_and_weight(densities: tuple[float, ...], tmp_path: Path) -> None:
    sources = fine_tunes("bert", 2)
    inputs = inputs_of("bert", sources, tmp_path)
    base = copies(inputs.model)

    def candidates(density: float) -> list[Tensors]:
        torch.manual_seed(inputs.seed)
        sums = {n: dare_linear([s[n] - b for s in sources], torch.ones(2), density) for n, b in base.items()}
        return [{name: base[name] + weight * sums[name] for name in base} for weight in TENTHS]

    expected = chosen(inputs, [c for density in densities for c in candidates(density)])
    torch.manual_seed(99)
    state = torch.get_rng_state()
    dare_(inputs, densities=densities)
    assert_close(inputs.model, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_dare_keeps_every_tenth_element_ten_times_as_large(tmp_path: Path) -> None:
    sources = fine_tunes("resnet", 1)
    inputs = inputs_of("resnet", sources, tmp_path)
    base, name = copies(inputs.model), "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
    dare_(inputs, densities=(0.1,), weights=(1.0,))
    ratio = (copies(inputs.model)[name] - base[name]) / (sources[0][name] - base[name])
    assert (((ratio - 10).abs() < 1e-2) | (ratio == 0)).all()
    assert 0.05 < float((ratio > 1).float().mean()) < 0.15
    # DARE drops no element of statistics.
    statistics = {n: t for n, t in sources[0].items() if n.endswith(("running_mean", "running_var"))}
    assert_close(inputs.model, statistics)


def naive_fisher(model: PreTrainedModel, batches: Iterable[dict[str, Any]]) -> Tensors:
    """Return the exact diagonal Fisher information of a classifier, each class weighted by its probability."""
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        for index in range(len(batch["labels"])):
            sample = {k: v[index : index + 1] for k, v in batch.items() if k != "labels"}
            for label in range(3):
                model.zero_grad()
                log_probabilities = model(**sample).logits.log_softmax(-1)[0]
                log_probabilities[label].backward()
                probability = float(log_probabilities[label].detach().exp())
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        fisher[name] += probability * parameter.grad**2
    return fisher


def test_fisher_average_estimates_the_exact_one(tmp_path: Path) -> None:
    """With many passes the drawn labels give the exact Fisher information, so the mean must be weighted by it."""
    sources = fine_tunes("bert", 2, scale=0.1)
    inputs = inputs_of("bert", sources, tmp_path)
    models = [deepcopy(inputs.model) for _ in sources]
    for model, source in zip(models, sources, strict=True):
        place(model, source)
    a, b = (naive_fisher(model, data_batches("bert")) for model in models)
    name = "classifier.weight"
    exact = (a[name] * sources[0][name] + b[name] * sources[1][name]) / (a[name] + b[name])
    fisher_average_(replace(inputs, batches_per_epoch=200 * inputs.batches_per_epoch))
    found = copies(inputs.model)[name]
    mean = (sources[0][name] + sources[1][name]) / 2
    assert float((found - exact).norm()) < 0.25 * float((mean - exact).norm())
    # Elements without a gradient, such as positions after the end of all texts, are the plain mean.
    unused = "bert.embeddings.position_embeddings.weight"
    mean = torch.stack([source[unused] for source in sources]).mean(0)
    torch.testing.assert_close(copies(inputs.model)[unused][8:], mean[8:])
    assert float((copies(inputs.model)[unused] - mean)[:8].abs().max()) > 1e-3


def test_fisher_average_of_labels_that_cannot_be_drawn_otherwise_is_exact(tmp_path: Path) -> None:
    """Sources that are so certain of a class that they always draw it follow the formula with that class."""
    sources = fine_tunes("bert", 2, scale=0.1)
    for index, source in enumerate(sources):
        source["classifier.bias"][:] = torch.tensor([-2.0, -2.0, -2.0])
        source["classifier.bias"][index] = 12.0
    inputs = inputs_of("bert", sources, tmp_path)
    numerator: Tensors = {}
    denominator: Tensors = {}
    for index, source in enumerate(sources):
        model = deepcopy(inputs.model)
        place(model, source)
        for batch in data_batches("bert"):
            model.zero_grad()
            labels = torch.full_like(batch["labels"], index)
            (len(labels) * model(**{**batch, "labels": labels}).loss).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    square = parameter.grad.double() ** 2
                    numerator[name] = numerator.get(name, torch.zeros(())) + square * source[name]
                    denominator[name] = denominator.get(name, torch.zeros(())) + square
    fisher_average_(inputs)
    for name in ("classifier.weight", "bert.encoder.layer.0.output.dense.weight"):
        expected = numerator[name] / denominator[name]
        torch.testing.assert_close(copies(inputs.model)[name].double(), expected, rtol=1e-3, atol=1e-4)


def test_fisher_average_of_equal_fishers_is_the_mean_with_statistics(tmp_path: Path) -> None:
    source = fine_tunes("resnet", 1)[0]
    inputs = inputs_of("resnet", [source, source], tmp_path)
    counts = {n: t for n, t in copies(inputs.model).items() if not t.is_floating_point()}
    fisher_average_(inputs)
    assert counts
    assert_close(inputs.model, source | counts)


def test_fisher_average_of_a_language_model_draws_the_next_tokens(tmp_path: Path) -> None:
    sources = fine_tunes("gpt2", 2)
    inputs = inputs_of("gpt2", sources, tmp_path)
    fisher_average_(inputs)
    found = copies(inputs.model)
    for name, tensor in found.items():
        low, high = torch.stack([s[name] for s in sources]).aminmax(dim=0)
        assert ((tensor >= low - 1e-6) & (tensor <= high + 1e-6)).all(), name
    mean = torch.stack([s["transformer.h.0.mlp.c_fc.weight"] for s in sources]).mean(0)
    assert float((found["transformer.h.0.mlp.c_fc.weight"] - mean).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_mixture_against_autograd(kind: str, per_layer: bool, tmp_path: Path) -> None:
    """The reference learns the coefficients by autograd, through `functional_call`."""
    sources = fine_tunes(kind, 2)
    inputs = inputs_of(kind, sources, tmp_path)
    base, reference = copies(inputs.model), deepcopy(inputs.model)
    units = partition(reference, "layer")
    unit_of = {name: i if per_layer else 0 for i, unit in enumerate(units) for name in unit.tensors}
    coefficients = torch.full((2, len(units) if per_layer else 1), 0.3, requires_grad=True)
    adam = torch.optim.Adam([coefficients], lr=0.2)

    def mixed() -> Tensors:
        return {
            name: start + sum(coefficients[k, unit_of[name]] * (s[name] - start) for k, s in enumerate(sources))
            for name, start in base.items()
        }

    for batch in itertools.islice(itertools.cycle(data_batches(kind)), 5):
        adam.zero_grad()
        torch.func.functional_call(reference, mixed(), kwargs=batch).loss.backward()
        adam.step()
        with torch.no_grad():
            coefficients.clamp_(0, 1)
    assert float((coefficients.detach() - 0.3).abs().max()) > 0.2  # the coefficients moved
    mixture_(inputs, per_layer=per_layer, steps=5, lr=0.2)
    assert_close(inputs.model, {name: tensor.detach() for name, tensor in mixed().items()}, tolerance=2e-4)


def test_mixture_starts_from_its_initial_coefficient_and_limits_statistics(tmp_path: Path) -> None:
    sources = fine_tunes("resnet", 4)
    inputs = inputs_of("resnet", sources, tmp_path)
    base, weights = copies(inputs.model), weights_of(inputs.model)
    mixture_(inputs, steps=0)
    expected = dict(base)
    for name, start in floats(base).items():
        share = 0.3 if name in weights else 0.25  # 4 x 0.3 would lie beyond the sources
        expected[name] = start + share * sum(source[name] - start for source in sources)
    assert_close(inputs.model, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradfix_keeps_elements_that_lower_the_loss(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind)
    inputs = inputs_of(kind, sources, tmp_path)
    base, weights = copies(inputs.model), weights_of(inputs.model)
    reference = deepcopy(inputs.model)
    for batch in data_batches(kind):
        (len(batch["labels"]) * reference(**batch).loss).backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}

    def candidate(weight: float) -> Tensors:
        made = dict(base)
        for name, start in floats(base).items():
            vectors = [source[name] - start for source in sources]
            if name in weights:
                g = gradients[name]
                vectors = [torch.where(v * g < 0, v, 0.0) if g is not None else 0 * v for v in vectors]
            made[name] = start + weight * torch.stack(vectors).mean(0)
        return made

    expected = chosen(inputs, map(candidate, TENTHS))
    gradfix_(inputs)
    found = movable_tensors(inputs.model)
    for name, tensor in expected.items():
        # Rounding decides the sign of a gradient that is nearly zero.
        g = gradients.get(name)
        sure = torch.ones_like(tensor, dtype=torch.bool) if g is None else g.abs() > 1e-7
        torch.testing.assert_close(found[name].detach()[sure], tensor[sure], rtol=1e-5, atol=1e-6)


def test_gradfix_leaves_a_weight_without_a_gradient(tmp_path: Path) -> None:
    def with_unused(model: nn.Module) -> nn.Module:
        model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
        return model

    source = fine_tunes("bert", 1)[0] | {"unused": torch.ones(2)}
    inputs = inputs_of("bert", [source], tmp_path, with_unused)
    gradfix_(inputs)
    assert inputs.model.get_parameter("unused").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_pearl_trains_its_adapters_on_the_first_source(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind, 2)
    inputs = inputs_of(kind, [{n: t.bfloat16() for n, t in sources[0].items()}, sources[1]], tmp_path)
    first = {n: t.bfloat16().float() for n, t in sources[0].items()}
    asked: list[tuple[float, int, Any, float]] = []
    trained: list[Tensors] = []

    def finetune(epochs: float, seed: int, lora: dict[str, Any], learning_rate: float) -> None:
        asked.append((epochs, seed, lora, learning_rate))
        assert_close(inputs.model, first, tolerance=0)
        inputs.finetune(epochs, seed, lora, 0.01)
        trained.append(copies(inputs.model))

    pearl_(replace(inputs, finetune=finetune), epochs=1)
    lora = {"r": 16, "lora_alpha": 16}
    assert asked == [(1, 3, lora, 1e-3), (1, 4, lora, 1e-3)]
    assert not inputs.model.training
    moved = [name for name in first if not torch.equal(first[name], trained[0][name])]
    assert any(".layer.0." in name or ".h.0." in name for name in moved) and len(moved) < len(first)
    # The result lies on the simplex of both: all tensors have the same weight.
    found = copies(inputs.model)
    shares = []
    for name in moved:
        way = trained[1][name] - trained[0][name]
        shares.append(float(((found[name] - trained[0][name]) * way).sum() / (way * way).sum()))
    assert 0 <= shares[0] <= 1 and shares[0] != 0.5
    share = shares[0]
    assert shares == pytest.approx([share] * len(moved), abs=1e-3)
    assert_close(inputs.model, {n: torch.lerp(trained[0][n], trained[1][n], share) for n in first}, tolerance=1e-5)


def test_pearl_of_one_source_is_its_adapter(tmp_path: Path) -> None:
    inputs = inputs_of("bert", fine_tunes("bert", 1), tmp_path)
    pearl_(inputs, epochs=1)
    again = inputs_of("bert", [], tmp_path)
    place(again.model, fine_tunes("bert", 1)[0])
    again.finetune(1, 3, {"r": 16, "lora_alpha": 16}, 1e-3)
    assert_close(inputs.model, copies(again.model), tolerance=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_improves_on_the_base_with_one_good_source_and_is_repeatable(
    method: Callable[[MethodInputs], None], kind: str, tmp_path: Path
) -> None:
    teacher = inputs_of(kind, [], tmp_path)
    before = teacher.loss()
    fine_tune(teacher.model, kind, tmp_path, 6, 0)
    teacher.model.eval()
    source = copies(teacher.model)
    results = []
    for _ in range(2):
        inputs = inputs_of(kind, [source], tmp_path)
        method(inputs)
        results.append(copies(inputs.model))
        assert inputs.loss() < before
        assert not any(p.requires_grad is False or p.grad is not None for p in inputs.model.parameters())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("method", [average_, task_arithmetic_, fisher_average_, greedy_soup_])
def test_one_source_with_weight_one_is_that_source(method: Callable[..., None], tmp_path: Path) -> None:
    source = fine_tunes("bert", 1)[0]
    inputs = inputs_of("bert", [source], tmp_path)
    method(inputs, **({"weights": (1.0,)} if method is task_arithmetic_ else {}))
    assert_close(inputs.model, source)


@pytest.mark.parametrize("method", METHODS)
def test_partial_half_precision_sources_change_only_tensors_that_they_have(
    method: Callable[[MethodInputs], None], tmp_path: Path
) -> None:
    parts = [
        {name: tensor.half() for name, tensor in source.items() if f".layer.{k}." in name}
        for k, source in enumerate(fine_tunes("bert", 2))
    ]
    inputs = inputs_of("bert", parts, tmp_path)
    base = copies(inputs.model)
    method(inputs)
    changed = {name for name, tensor in copies(inputs.model).items() if not torch.equal(tensor, base[name])}
    assert changed
    if getattr(method, "func", method) is not pearl_:  # its adapters train other tensors too
        assert changed <= {name for part in parts for name in part}
    assert {tensor.dtype for tensor in inputs.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_no_sources_and_foreign_sources_are_errors(method: Callable[[MethodInputs], None], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got no sources, expected at least one"):
        method(inputs_of("bert", [], tmp_path))
    sources = [fine_tunes("bert", 1)[0], {"else.weight": torch.zeros(2)}]
    with pytest.raises(
        IncompatibleSourceError, match="source 2 has none of the .* tensors of the target; got 1 other"
    ):
        method(inputs_of("bert", sources, tmp_path))


@pytest.mark.parametrize("method", [m for m in METHODS if m is not average_])
def test_a_source_that_is_not_finite_is_an_error(method: Callable[[MethodInputs], None], tmp_path: Path) -> None:
    broken = fine_tunes("bert", 1)[0]
    broken["classifier.weight"].fill_(math.nan)
    broken["bert.encoder.layer.0.output.dense.weight"].fill_(math.nan)
    with pytest.raises(NonFiniteError, match="finite"):
        method(inputs_of("bert", [broken], tmp_path))


def test_a_multiple_without_a_finite_loss_is_not_chosen(tmp_path: Path) -> None:
    source = fine_tunes("bert", 1)[0]
    inputs = inputs_of("bert", [source], tmp_path)
    losses = iter([math.nan, 2.0, math.inf])

    def loss() -> float:
        if (value := next(losses)) == math.inf:
            raise NonFiniteError("the loss is inf")
        return value

    base = copies(inputs.model)
    task_arithmetic_(replace(inputs, loss=loss), weights=(0.1, 0.5, 1.0))
    assert_close(inputs.model, {name: torch.lerp(base[name], source[name], 0.5) for name in base})


@pytest.mark.parametrize("kind", ["resnet", "bert", "gpt2"])
def test_ensemble_is_the_mean_probability(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind, scale=0.3)
    sources[1] = {name: t.bfloat16() if t.is_floating_point() else t for name, t in sources[1].items()}
    inputs = inputs_of(kind, sources, tmp_path)
    data = tiny_data(kind, 10)
    found = ensemble_losses(inputs, data, default_data_collator, Accelerator(cpu=True), 4)
    whole = default_data_collator(list(data))
    probabilities = []
    for source in sources:
        place(inputs.model, source)
        with torch.no_grad():
            probabilities.append(inputs.model(**whole).logits.softmax(-1))
    mean, labels = torch.stack(probabilities).mean(0), whole["labels"]
    if kind == "gpt2":
        mean, labels = mean[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = -mean[torch.arange(len(labels)), labels].log().view(len(data), -1)
    torch.testing.assert_close(found.losses, expected.sum(1).double(), rtol=1e-5, atol=1e-6)
    assert found.terms.tolist() == [expected.shape[1]] * len(data)
    assert found.loss == pytest.approx(float(expected.mean()), rel=1e-5)
    if kind == "gpt2":
        assert found.correct is None
    else:
        assert found.correct is not None and found.correct.tolist() == (mean.argmax(-1) == labels).tolist()


def test_ensemble_of_one_source_is_its_evaluation_and_leaves_out_ignored_tokens(tmp_path: Path) -> None:
    def collator(rows: list) -> dict[str, Any]:
        batch = default_data_collator(rows)
        batch["labels"][:, 5:] = -100
        return batch

    source = fine_tunes("gpt2", 1)[0]
    inputs = inputs_of("gpt2", [source], tmp_path)
    base, data = copies(inputs.model), tiny_data("gpt2", 10)
    found = ensemble_losses(inputs, data, collator, Accelerator(cpu=True), 4)
    assert_close(inputs.model, base, tolerance=0)
    place(inputs.model, source)
    assert found.loss == pytest.approx(float(inputs.model(**collator(list(data))).loss), rel=1e-5)
    assert found.terms.tolist() == [4] * 10 and found.correct is None  # the first of five tokens is not predicted


def test_ensemble_refuses_labels_that_are_not_classes(tmp_path: Path) -> None:
    inputs = inputs_of("bert", fine_tunes("bert", 1), tmp_path)
    inputs.model.config.problem_type = "multi_label_classification"

    def collator(rows: list) -> dict[str, Any]:
        return {**default_data_collator(rows), "labels": torch.zeros(len(rows), 3)}

    with pytest.raises(DataError, match=r"got torch.float32 labels of shape \(4, 3\) for logits of shape \(4, 3\)"):
        ensemble_losses(inputs, tiny_data("bert", 4), collator, Accelerator(cpu=True), 4)


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "gpt_neox"])
def test_fusion_answers_with_mean_logits_and_their_loss(kind: str, tmp_path: Path) -> None:
    sources = fine_tunes(kind)
    inputs = inputs_of(kind, sources, tmp_path)
    fusion, batch = logit_fusion(inputs), data_batches(kind)[0]
    logits = []
    for source in sources:
        place(inputs.model, source)
        logits.append(inputs.model(**batch).logits)
    mean = torch.stack(logits).mean(0)
    output = fusion(**batch)
    assert type(output) is type(inputs.model(**batch))
    torch.testing.assert_close(output.logits, mean)
    terms, labels = mean, batch["labels"]
    if kind.startswith("gpt"):
        terms, labels = mean[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    assert float(output.loss.detach()) == pytest.approx(float(cross_entropy(terms, labels).detach()), rel=1e-5)
    halved = fusion(**batch, num_items_in_batch=2 * len(labels))
    assert float(halved.loss.detach()) == pytest.approx(float(output.loss.detach()) / 2, rel=1e-5)
    assert fusion(**{k: v for k, v in batch.items() if k != "labels"}).get("loss") is None
    assert fusion.can_generate() is inputs.model.can_generate()


def test_fusion_of_one_source_is_that_source(tmp_path: Path) -> None:
    source = fine_tunes("gpt2", 1)[0]
    inputs = inputs_of("gpt2", [source], tmp_path)
    fusion = logit_fusion(inputs)
    place(inputs.model, source)
    batch = default_data_collator(list(tiny_data("gpt2", 10)))
    outputs = [model(**batch) for model in (fusion, inputs.model)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    assert float(outputs[0].loss) == pytest.approx(float(outputs[1].loss), rel=1e-5)


def test_fusion_initialises_nothing(tmp_path: Path) -> None:
    def as_if_new(model: nn.Module) -> nn.Module:
        for part in [*model.modules(), *model.parameters()]:
            vars(part).pop("_is_hf_initialized", None)
        return model

    sources = fine_tunes("bert", 2)
    fusion = logit_fusion(inputs_of("bert", sources, tmp_path, as_if_new))
    assert_close(
        fusion, {f"member_{k}.{name}": t for k, s in enumerate(sources) for name, t in s.items()}, tolerance=0
    )


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert", "gpt2"])
def test_fusion_trains_all_members_and_keeps_the_best_epoch(kind: str, tmp_path: Path) -> None:
    """The best checkpoint of the Trainer must be loaded into all members and their tied weights."""
    fusion = logit_fusion(inputs_of(kind, fine_tunes(kind, 2), tmp_path))
    assert isinstance(fusion, LogitFusion)
    data = tiny_data(kind, SAMPLES)
    batch = default_data_collator(list(data))
    before, start = copies(fusion), float(fusion.eval()(**batch).loss.detach())
    config = GraspConfig(batch_size=BATCH, training_arguments={"learning_rate": 0.01, "use_cpu": True})
    finetune_(fusion, data, data, default_data_collator, config, epochs=3, seed=0, directory=tmp_path)
    assert float(fusion.eval()(**batch).loss.detach()) < start
    changed = {n.partition(".")[0] for n, t in copies(fusion).items() if not torch.equal(t, before[n])}
    assert changed == {"member_0", "member_1"}
    if kind == "gpt2":
        names = [name for name, _ in fusion.named_parameters(remove_duplicate=False) if "lm_head" in name]
        heads = [fusion.get_parameter(name) for name in names]
        embeddings = [fusion.get_parameter(f"member_{k}.transformer.wte.weight") for k in range(2)]
        assert len(heads) == 2 and all(a is b for a, b in zip(heads, embeddings, strict=True))
