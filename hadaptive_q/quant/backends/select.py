"""The door to the backends: a recipe names one, and only that one is imported.

A backend finds and learns scales in the graph that `torchao_pt2e.prepare` makes of a plan; what restores and converts
that graph is the same for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from hadaptive_q.errors import UserError
from hadaptive_q.quant.backends import torchao_pt2e
from hadaptive_q.quant.backends.torchao_pt2e import Calibrated, Prepared
from hadaptive_q.recipe import BackendName


class Backend(Protocol):
    """What a backend does, step by step: a module with these functions."""

    def calibrate(self, prepared: Prepared, batches: Iterable[Tensor]) -> Calibrated:
        """Watch `batches` of network inputs, then fix every scale."""

    def start_fit(
        self,
        calibrated: Calibrated,
        learned: bool,
        weights: bool = False,
        dropout: bool = True,
        live: Iterable[Tensor] | None = None,
    ) -> None:
        """Make ready for training: ranges learned or following the batches, dropout, BatchNorm live over `live`.

        `weights` has the scales of weights learned that do not follow their weight.
        """

    def refine_weights(self, calibrated: Calibrated, bits: int) -> None:
        """Round weights of fewer bits to `bits` of them, over the same range, until they are refined to other ones."""

    def freeze_ranges(self, calibrated: Calibrated) -> None:
        """Keep every range from now on; weights go on training against them."""

    def end_fit(self, calibrated: Calibrated) -> None:
        """Leave the graph that `convert` takes: it computes what the program will."""


def find_backend(name: BackendName) -> Backend:
    """Return the backend `name`. Raises UserError where its package is not installed."""
    if name == "torchao":
        return torchao_pt2e
    try:
        from hadaptive_q.quant.backends import brevitas
    except ModuleNotFoundError as error:
        if error.name != "brevitas":
            raise
        raise UserError(
            f"quantize.backend, {name}",
            "no package brevitas",
            "it installed beside this one",
            "pip install 'hadaptive-q[brevitas]'",
        ) from error
    return brevitas
