"""Files of 4-bit weights want dot products, others want nothing; the names are those of the emulated cores."""

from __future__ import annotations

from hadaptive_q.arm.cores import CORES
from hadaptive_q.lower.cpu_features import wanted_arm_features
from hadaptive_q.quant.formats import WeightFormat
from hadaptive_q.quant.plan import Plan


def test_four_bits_want_dot_products() -> None:
    assert wanted_arm_features(Plan(weights={"a": WeightFormat(8), "b": WeightFormat(4)})) == ()
    (wanted,) = wanted_arm_features(Plan(weights={"a": WeightFormat(8), "b": WeightFormat(3, packed=True)}))
    having = {name for name, core in CORES.items() if wanted in core.features.split()}
    assert having == {"cortex-a55", "cortex-a76", "neoverse-v1"}
