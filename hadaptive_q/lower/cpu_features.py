"""Which CPU features a written file asks for."""

from __future__ import annotations

from hadaptive_q.quant.plan import Plan

# As `/proc/cpuinfo` names the dot products of ARMv8.2.
DOT_PRODUCTS = "asimddp"


def wanted_arm_features(plan: Plan) -> tuple[str, ...]:
    """Return what an ARM64 CPU should have for the file of `plan`, as `/proc/cpuinfo` names it.

    No file needs anything beyond ARMv8.0: the runtime has a kernel for every CPU and all give the same codes. But for
    4-bit weights it has dot products or one number at a time: Hadaptive-Net-S takes 1.03 times the instructions of its
    int8 file on Cortex-A76, and 4.0 times on Cortex-A53, which has no dot products.
    """
    return (DOT_PRODUCTS,) if any(form.packed for form in plan.weights.values()) else ()
