"""Every operator of an inference, in order, with its share of the instructions."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.arm.operators import PREPARE, count_operators


@pytest.mark.usefixtures("emulator")
def test_operators_in_order_and_nearly_all_of_the_inference(int8_file: tuple[Path, Tensor, Tensor]) -> None:
    operators = count_operators(int8_file[0], "cortex-a76")
    assert operators == count_operators(int8_file[0], "cortex-a76")
    names = [operator.name for operator in operators]
    assert names[0] == PREPARE
    convs = [index for index, name in enumerate(names) if name.startswith("Convolution")]
    assert len(convs) == 2
    assert convs[-1] < next(index for index, name in enumerate(names) if name.startswith("Fully Connected"))
    assert all(operator.counts.total > 0 for operator in operators)
    total = count_instructions(int8_file[0], "cortex-a76").total
    assert sum(operator.counts.total for operator in operators) == pytest.approx(total, rel=0.1)


@pytest.mark.usefixtures("emulator")
def test_dot_products_are_in_the_convolution_and_the_linear(int8_file: tuple[Path, Tensor, Tensor]) -> None:
    """A concatenation takes one step per input; were steps mistaken for operators, later names would slip by one."""
    operators = count_operators(int8_file[0], "cortex-a76")
    assert {operator.name.split(" (")[0] for operator in operators if operator.counts.by_class["dot"]} == {
        "Convolution",
        "Fully Connected",
    }
    dots = sum(operator.counts.by_class["dot"] for operator in operators)
    assert dots == count_instructions(int8_file[0], "cortex-a76").by_class["dot"]
    assert any(name.name.startswith("Copy") for name in operators)
