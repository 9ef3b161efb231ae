"""Placing, interpolating and scoring tensors, against closed forms."""

import math

import pytest
import torch

from grasp_hf.alignment import CoefficientDescent, cosine, inner_product, mean_defined
from grasp_hf.transfer import interpolate, overwrite_, place_, placed


def test_place_moves_pointers_and_undoes_bit_for_bit() -> None:
    weight, value = torch.nn.Parameter(torch.randn(3)), torch.randn(3)
    before, storage = weight.detach().clone(), weight.data_ptr()
    kept = place_({"w": weight}, {"w": value})
    assert weight.data_ptr() == value.data_ptr()
    place_({"w": weight}, kept)
    assert weight.data_ptr() == storage
    assert torch.equal(weight.detach(), before)


def test_placed_restores_when_the_block_raises() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(KeyError, match="inside"), placed({"w": weight}, {"w": torch.ones(2)}):
        assert weight.tolist() == [1, 1]
        raise KeyError("inside")
    assert weight.tolist() == [0, 0]


def test_placed_keeps_the_dtype_of_the_target() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with placed({"w": weight}, {"w": torch.ones(2, dtype=torch.bfloat16)}):
        assert weight.dtype == torch.float32


def test_overwrite_uses_the_targets_own_storage() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    storage = weight.data_ptr()
    overwrite_({"w": weight}, {"w": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)})
    assert weight.tolist() == [1.5, 2.5]
    assert weight.data_ptr() == storage


def test_interpolate() -> None:
    start, end = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 2.0])
    assert interpolate(start, end, 0.25).tolist() == [1.0, 2.0]
    assert interpolate(start, end, 0) is start
    count, other = torch.tensor(3), torch.tensor(9)
    assert int(interpolate(count, other, 0.4)) == 3
    assert int(interpolate(count, other, 0.5)) == 9


def test_inner_product_is_computed_in_float32() -> None:
    ones = torch.ones(4096, dtype=torch.bfloat16)
    assert float(inner_product(ones, ones)) == 4096.0
    assert inner_product(ones, ones).dtype == torch.float32


def test_cosine_of_short_gradients_is_not_lost() -> None:
    tiny = 1e-10
    assert cosine(tiny**2, tiny**2, tiny**2) == pytest.approx(1.0)
    assert cosine(-(tiny**2), tiny**2, tiny**2) == pytest.approx(-1.0)
    # The published score of the same vectors: 1e-20 / (1e-20 + 1e-8).
    assert cosine(tiny**2, tiny**2, tiny**2, epsilon=1e-8) == pytest.approx(1e-12)


def test_cosine_of_a_zero_gradient_is_undefined() -> None:
    assert cosine(0.0, 0.0, 1.0) is None
    assert cosine(0.0, 0.0, 1.0, epsilon=1e-8) == 0.0
    assert mean_defined([None, 0.5, 0.25]) == 0.375
    assert mean_defined([None]) is None


def test_coefficients_go_down_by_their_rate_and_stay_in_bounds() -> None:
    descent = CoefficientDescent(3, lr=0.3)
    descent.step([-1e-6, 0.0, 5.0])
    # Adam's first step is lr * g / (|g| + eps), whatever the size of g.
    assert descent.values == pytest.approx([0.3 * 1e-6 / (1e-6 + 1e-8), 0.0, 0.0])
    for _ in range(10):
        descent.step([-1.0, 0.0, 5.0])
    assert descent.values == [1.0, 0.0, 0.0]
    assert not any(map(math.isnan, descent.values))
