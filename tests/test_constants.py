"""Numbers as tensors: kept by value, and made anew where a kept one would be wrong."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusedloss.engine import constants

CPU = torch.device("cpu")


def of(
    *values: object, common: tuple[float, ...] = (), dtype: torch.dtype = torch.float32
) -> tuple[list[object], object]:
    return constants.parameters(values, common, dtype, CPU)


def test_numbers_are_views_of_one_tensor_that_is_kept():
    params, common = of(0.5, 2, common=(0.9, 0.1, 0.0))
    assert [p.tolist() for p in params] == [0.5, 2.0] and common.tolist() == pytest.approx([0.9, 0.1, 0.0])
    assert {x.untyped_storage().data_ptr() for x in (*params, common)} == {params[0].untyped_storage().data_ptr()}
    again, _ = of(0.5, 2, common=(0.9, 0.1, 0.0))
    assert again[0].data_ptr() == params[0].data_ptr()
    other, _ = of(0.5, 2, common=(0.9, 0.1, 0.0), dtype=torch.float64)
    assert other[0].dtype == torch.float64 and other[0] == 0.5
    assert of() == ([], None)


def test_a_tensor_takes_the_place_of_a_number():
    gamma, rows = torch.tensor(3, requires_grad=False), torch.rand(2, 3, dtype=torch.float64)
    params, common = of(1.5, gamma, rows)
    assert params[0] == 1.5 and params[1].dtype == torch.float32 and params[1] == 3
    assert params[2].shape == (6,) and common is None
    learnt = torch.tensor(2.0, requires_grad=True)
    (param,), common = of(learnt, common=(1.0, 0.0, 0.5))
    param.backward()
    assert learnt.grad == 1 and common.tolist() == [1.0, 0.0, 0.5]


def test_not_in_a_mode_or_in_inference_mode():
    kept = of(0.25)[0][0]
    with FakeTensorMode():
        assert isinstance(of(0.25)[0][0], FakeTensor)
    with torch.inference_mode():
        assert of(0.25)[0][0].is_inference()
        inside = of(0.125)[0][0]
    assert inside.is_inference() and not of(0.125)[0][0].is_inference()
    assert of(0.25)[0][0].data_ptr() == kept.data_ptr()


def test_a_function_transform_leaves_none_of_its_own_behind():
    """Under a Hessian, a new tensor is wrapped and has no memory."""
    torch.func.hessian(lambda x: x**2 * of(0.375)[0][0])(torch.tensor(1.0))
    assert of(0.375)[0][0].data_ptr()
