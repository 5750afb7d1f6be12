"""`search.json`: what a search for mixed precision measured and chose. Keys are a public contract: never renamed."""

from __future__ import annotations

from hadaptive_q.report.record import Part


class SearchedLayer(Part):
    """A layer that can have 4 bits: what it spares in the file, noise and instructions it adds, what it was given."""

    layer: str
    weights: int
    bytes_saved: int
    sensitivity: float
    instructions_added: int | None = None
    bits: int


class FrontPoint(Part):
    """The least sum of single noises at one size; both and `instructions` predicted, `top1` in percent measured."""

    pte_bytes: int
    noise: float
    four_bit_layers: int
    top1: float | None = None
    instructions: int | None = None


class Instructions(Part):
    """Instructions of one inference on `core`: with 8 bits everywhere, with all layers in 4 (`smallest`), and of the
    chosen file, as its layers' single costs say (`predicted`) and counted (`chosen`)."""

    core: str
    int8: int
    smallest: int
    predicted: int
    chosen: int


class SearchRecord(Part):
    """The whole search.

    Noises are shares of the power of the int8 logits on `calibration_images` images: `predicted_noise` the sum of the
    chosen layers' sensitivities, `joint_noise` these layers in 4 bits together and nothing else changed,
    `program_noise` the logits of the recipe that was written, calibrated anew. `pte_bytes` is the size of that recipe's
    file, lowered; `predicted_bytes` what the layers' savings said. Top-1 in percent on `samples` validation images.
    Where nothing could be counted, `instructions_absent` says why.
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
    instructions: Instructions | None = None
    instructions_absent: str = ""
    layers: list[SearchedLayer]
    front: list[FrontPoint]
