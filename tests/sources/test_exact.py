"""The merge that takes an adapter whole computes the logits of the adapter as PEFT runs it, or refuses the adapter."""

from pathlib import Path

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor

from grasp_hf import IncompatibleSourceError
from grasp_hf.tensors.units import movable_tensors
from tests.support.exact import CASES, TOLERANCE, logits, logits_of_peft, merged, save_case

EXACT = [name for name, case in CASES.items() if not case.refused]
# Types that PEFT runs only with more than one folder of files, or on other models than transformers'.
ELSEWHERE = {"XLORA", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING"}


def assert_exact(got: Tensor, expected: Tensor, plain: Tensor) -> None:
    scale = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 100 * TOLERANCE * scale, "the adapter changes nothing"
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("tied", [False, True], ids=["two matrices", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_exact_or_refused(name: str, tied: bool, tmp_path: Path) -> None:
    case = CASES[name]
    if tied and case.model != "lm":
        pytest.skip("the model has no option to tie its weights")
    cls, base, adapter = save_case(case, tmp_path, tied=tied)
    if case.refused:
        with pytest.raises(IncompatibleSourceError, match=case.refused):
            merged(base, adapter)
        return
    expected, plain = logits_of_peft(cls, base, adapter), logits(cls.from_pretrained(base))
    if tied and case.splits:
        with pytest.raises(IncompatibleSourceError, match=r"are tied in the target.* with untie: true"):
            merged(base, adapter)
    else:
        assert_exact(logits(merged(base, adapter)), expected, plain)
    if tied:
        assert_exact(logits(merged(base, adapter, untie=True)), expected, plain)


HALF = (torch.bfloat16, torch.bfloat16)
NO_BFLOAT16 = "VB-LoRA, top k only"  # PEFT cannot load it
DTYPES = [(name, HALF) for name in EXACT if name != NO_BFLOAT16]
DTYPES += [(name, (torch.float16, torch.float32)) for name in ("LoRA", "DoRA", "OFT", "LoKr", NO_BFLOAT16)]


@pytest.mark.parametrize(("name", "dtypes"), DTYPES, ids=str)
def test_an_adapter_of_a_half_precision_base(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    """A target in float32 is exact; one in half precision holds the same weights, rounded once.

    `dtypes` are those of the base and of the adapter.
    """
    cls, base, adapter = save_case(CASES[name], tmp_path, dtypes=dtypes)
    expected, plain = logits_of_peft(cls, base, adapter), logits(cls.from_pretrained(base, dtype=torch.float32))
    model = merged(base, adapter)
    assert_exact(logits(model), expected, plain)
    rounded = movable_tensors(merged(base, adapter, dtype="auto"))
    for key, value in movable_tensors(model).items():
        assert rounded[key].dtype == dtypes[0] or not value.is_floating_point()
        assert torch.equal(rounded[key], value.to(rounded[key].dtype)), key


def test_every_type_of_peft_has_a_case() -> None:
    kinds = {getattr(case.config().peft_type, "value", "") for case in CASES.values()}
    assert kinds | ELSEWHERE == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
