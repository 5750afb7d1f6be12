"""`search.json`: what a search for mixed precision measured and chose. Keys are a public contract: never renamed."""

from __future__ import annotations

from hadaptive_q.report.record import Part


class SearchedLayer(Part):
    """A layer that can have 4 bits: what it spares in the file, what noise it adds alone, what it was given."""

    layer: str
    weights: int
    bytes_saved: int
    sensitivity: float
    bits: int


class FrontPoint(Part):
    """The least sum of single noises at one size, both predicted; `top1` in percent where it was measured."""

    pte_bytes: int
    noise: float
    four_bit_layers: int
    top1: float | None = None


class SearchRecord(Part):
    """The whole search.

    Noises are shares of the power of the int8 logits on `calibration_images` images: `predicted_noise` the sum of the
    chosen layers' sensitivities, `joint_noise` these layers in 4 bits together and nothing else changed,
    `program_noise` the logits of the recipe that was written, calibrated anew. `pte_bytes` is the size of that recipe's
    file, lowered; `predicted_bytes` what the layers' savings said. Top-1 in percent on `samples` validation images.
    """

    model: str
    data: str
    checkpoint_digest: str
    calibration_digest: str
    calibration_images: int
    samples: int
    target_bytes: int | None
    max_drop: float | None
    int8_bytes: int
    smallest_bytes: int
    predicted_bytes: int
    pte_bytes: int
    predicted_noise: float
    joint_noise: float
    program_noise: float
    float_top1: float
    int8_top1: float
    top1: float
    layers: list[SearchedLayer]
    front: list[FrontPoint]
