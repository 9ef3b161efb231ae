"""Tensors are replaced, interpolated and scored as closed forms require."""

from pathlib import Path

import pytest
import torch

from grasp_hf.errors import DiskFullError
from grasp_hf.methods.blend import CoefficientDescent
from grasp_hf.tensors.mapped import MappedTensors
from grasp_hf.tensors.mixing import Mix, interpolate_, mix_
from grasp_hf.tensors.placing import overwrite_, placed
from grasp_hf.tensors.products import CPU_PIECE, cosine, inner_products, mean_defined


def test_placing_moves_pointers_and_is_undone_bit_for_bit() -> None:
    weight, value = torch.nn.Parameter(torch.randn(3)), torch.randn(3)
    before, storage = weight.detach().clone(), weight.data_ptr()
    with placed({"w": weight}, {"w": value}, {}):
        assert weight.data_ptr() == value.data_ptr()
    assert weight.data_ptr() == storage
    assert torch.equal(weight.detach(), before)


def test_placed_restores_when_the_block_raises() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(KeyError, match="inside"), placed({"w": weight}, {"w": torch.ones(2)}, {}):
        assert weight.tolist() == [1, 1]
        raise KeyError("inside")
    assert weight.tolist() == [0, 0]


def test_a_parameter_of_another_dtype_is_overwritten_and_comes_back_from_the_start() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    start, storage = {"w": weight.detach().clone()}, weight.data_ptr()
    with placed({"w": weight}, {"w": torch.ones(2, dtype=torch.bfloat16)}, start):
        assert weight.dtype == torch.float32
        assert weight.data_ptr() == storage
        assert weight.tolist() == [1, 1]
    assert weight.tolist() == [0, 0]


def test_a_buffer_can_be_changed_inside_the_block_and_is_restored() -> None:
    buffer = torch.zeros(2)
    with placed({"b": buffer}, {"b": torch.ones(2, dtype=torch.bfloat16)}, {}):
        buffer.add_(5)
        assert buffer.tolist() == [6, 6]
    assert buffer.tolist() == [0, 0]


def test_overwrite_uses_the_targets_own_storage() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    storage = weight.data_ptr()
    overwrite_({"w": weight}, {"w": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)})
    assert weight.tolist() == [1.5, 2.5]
    assert weight.data_ptr() == storage


def test_interpolate() -> None:
    start, end, tensor = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 2.0]), torch.empty(2)
    interpolate_(tensor, start, end, 0.25)
    assert tensor.tolist() == [1.0, 2.0]
    for coefficient, expected in ((0.0, start), (1.0, end)):
        interpolate_(tensor, start, end, coefficient)
        assert torch.equal(tensor, expected)
    count = torch.tensor(0)
    for coefficient, expected_count in ((0.4, 3), (0.5, 9), (1.0, 9)):
        interpolate_(count, torch.tensor(3), torch.tensor(9), coefficient)
        assert int(count) == expected_count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mix_counts_both_ways_from_the_base(dtype: torch.dtype) -> None:
    base, start, end = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5.0], dtype=dtype)
    weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    mix_(weight, start, end, base, Mix(0.5, 1.5))
    assert weight.tolist() == [1 + 0.5 * 2, 1 + 1.5 * 4] and weight.dtype == dtype
    for mix, expected in ((Mix.on_line(0.0), start), (Mix.on_line(1.0), end), (Mix.on_line(0.25), [2.5, 2.0])):
        mix_(weight, start, end, None, mix)
        assert weight.tolist() == list(expected), "with a sum of 1 the base cancels out"
    statistic, count = torch.zeros(2), torch.tensor(0)
    mix_(statistic, start, end, base, Mix(0.5, 1.5))
    mix_(count, torch.tensor(3), torch.tensor(9), torch.tensor(0), Mix(0.5, 1.5))
    assert statistic.tolist() == [1.5, 4.0] and int(count) == 9, "statistics lie between those of the two models"
    assert [Mix(1.0, 0.0).moves, Mix(0.9, 0.0).moves, Mix(1.0, 0.1).moves] == [False, True, True]


def test_mapped_tensors_live_in_their_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor(7), "c": torch.randn(4).bfloat16(), "d": torch.empty(0)}
    mapped = MappedTensors(tmp_path / "file", tensors).copy_(tensors)
    assert list(mapped) == list(tensors) and len(mapped) == 4
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype and torch.equal(mapped[name], tensor)
    mapped["a"].fill_(1.5)
    again = torch.from_file(str(tmp_path / "file"), size=15, dtype=torch.float32)
    assert again.tolist() == [1.5] * 15
    assert f"{tmp_path}/file" in Path("/proc/self/maps").read_text()


def test_a_disk_without_room_is_an_error_when_the_file_is_made(tmp_path: Path) -> None:
    message = f"^no space for 1,125,899,906.8 MB in '{tmp_path}' .*(No space left|too large).*TMPDIR"
    with pytest.raises(DiskFullError, match=message):
        MappedTensors(tmp_path / "file", {"a": torch.empty(2**48, device="meta")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1.0, 1e19])
def test_inner_products_of_short_and_long_gradients(scale: float) -> None:
    a, b = torch.tensor([3.0, 4.0, 0.0]) * scale, torch.tensor([4.0, 3.0, 12.0]) * scale
    products = (inner_products(a, b) / scale**2).tolist()
    assert products == pytest.approx([24.0, 25.0, 169.0], rel=1e-6)


def test_inner_products_of_many_pieces_and_of_half_precision() -> None:
    ones = torch.ones(3 * CPU_PIECE + 1, dtype=torch.bfloat16)
    assert inner_products(ones, -ones).tolist() == [-len(ones), len(ones), len(ones)]


def test_cosine_of_short_gradients_is_not_lost() -> None:
    tiny = 1e-10
    assert cosine(tiny**2, tiny**2, tiny**2) == pytest.approx(1.0)
    assert cosine(-(tiny**2), tiny**2, tiny**2) == pytest.approx(-1.0)
    # The paper's score of the same vectors is 1e-20 / (1e-20 + 1e-8).
    assert cosine(tiny**2, tiny**2, tiny**2, epsilon=1e-8) == pytest.approx(1e-12)


def test_cosine_of_a_zero_gradient_is_undefined() -> None:
    assert cosine(0.0, 0.0, 1.0) is None
    assert cosine(0.0, 0.0, 1.0, epsilon=1e-8) == 0.0
    assert mean_defined([None, 0.5, 0.25]) == 0.375
    assert mean_defined([None]) is None


def test_coefficients_go_down_by_their_rate_and_stay_in_bounds() -> None:
    descent = CoefficientDescent([[0.0, 0.5], [0.0, 0.0]], lr=0.3, steps=40)
    descent.step([[-1e-6, 0.0], [5.0, -2.0]])
    # Adam's first step is lr * g / (|g| + eps), whatever the size of g.
    assert descent.values[0] == pytest.approx([0.3 * 1e-6 / (1e-6 + 1e-8), 0.5])
    assert descent.values[1] == pytest.approx([0.0, 0.3])
    for step in range(1, 40):
        before = descent.values[1][1]
        descent.step([[-1.0, 0.0], [5.0, -2.0]])
        if step < 5:  # the slope is the same in every step, so that only the step size changes the value
            assert descent.values[1][1] - before == pytest.approx(0.3 * (1 - step / 40), rel=1e-5)
    assert descent.values == [[2.0, 0.5], [0.0, 2.0]]
    before = descent.values[0][1]
    descent.step([[0.0, 1.0], [0.0, 0.0]])
    assert descent.values[0][1] == before, "no steps remain"
