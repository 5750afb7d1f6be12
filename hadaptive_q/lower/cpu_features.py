"""Which CPU features a written file asks for, read off the file."""

from __future__ import annotations

from hadaptive_q.lower.read_delegate import read_operators

# As `/proc/cpuinfo` names the dot products of ARMv8.2.
DOT_PRODUCTS = "asimddp"
# A fully connected layer of 4-bit weights per channel on int8 activations of a fixed scale. With dynamic scales, or
# weights in blocks, the runtime has vector kernels for every CPU.
_SCALAR_WITHOUT = {"input1": "qint8", "filter": "qcint4"}


def wanted_arm_features(pte: bytes) -> tuple[str, ...]:
    """Return what an ARM64 CPU should have for the file `pte`, as `/proc/cpuinfo` names it.

    No file needs anything beyond ARMv8.0: the runtime has a kernel for every CPU and all give the same codes. But for
    4-bit weights it has dot products or one number at a time: Hadaptive-Net-S takes 1.03 times the instructions of its
    int8 file on Cortex-A76, and 4.0 times on Cortex-A53, which has no dot products.
    """
    slow = (_SCALAR_WITHOUT.items() <= operator.types.items() for operator in read_operators(pte))
    return (DOT_PRODUCTS,) if any(slow) else ()
