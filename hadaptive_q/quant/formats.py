"""Number formats: small frozen values that say how a tensor is stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationFormat:
    """Affine, per tensor: ``x ~ (code - zero_point) * scale`` with codes in [-2^(bits-1), 2^(bits-1) - 1]."""

    bits: int = 8

    @property
    def code_range(self) -> tuple[int, int]:
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class WeightFormat:
    """Symmetric, per output channel: ``w ~ code * scale[channel]`` with codes in +-(2^(bits-1) - 1).

    `packed`: two codes share a byte of the file; all others take a byte each, however few bits they have.
    """

    bits: int = 8
    packed: bool = False

    @property
    def code_range(self) -> tuple[int, int]:
        top = (1 << (self.bits - 1)) - 1
        return -top, top

    @property
    def stored_range(self) -> tuple[int, int]:
        """What the place that the file has for a code could hold."""
        return WeightFormat(4 if self.packed else 8).code_range


# The convolutions that may have 4-bit weights: over NHWC, a Linear of every pixel.
POINTWISE = "1x1 with stride 1, no padding and one group"

# XNNPACK's quantizer never goes below this scale; smaller ones overflow its fixed-point rescaling.
SMALLEST_SCALE = 2.0**-12
