"""Instructions of the forms of a LayerNorm over channels, between two 1x1 convolutions in float.

    python benchmarks/norm_forms.py

Counted is what the norm adds to the file without one, per value of the map. Maps are those of S2AFormer-mini at 224.
Rows go to benchmarks/results/norm_forms.json, from which the table in docs/products.md is made.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import ROOT, Row, markdown, write_results, write_section
from torch import Tensor, nn

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.lower.executorch import Lowered, lower

CORE, EPSILON, PAGE = "cortex-a55", 1e-5, ROOT / "docs" / "products.md"
Form = Callable[[Tensor, Tensor, Tensor], Tensor]
MAPS = ((24, 56), (112, 14), (288, 7))


def nothing(x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    return x


def as_it_is(x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=EPSILON).permute(0, 3, 1, 2)


def convolutions(x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    """Means as 1x1 convolutions: what `spell_layer_norm` writes."""
    centred = x - F.conv2d(x, weight)
    return centred * torch.rsqrt(F.conv2d(centred * centred, weight, epsilon))


def moments(x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    """The variance as the mean of squares less the square of the mean."""
    mean = F.conv2d(x, weight)
    return (x - mean) * torch.rsqrt(F.conv2d(x * x, weight, epsilon) - mean * mean)


def means(x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    """Means as the one mean that XNNPACK takes, over the last two of four dimensions."""

    def mean(y: Tensor) -> Tensor:
        batch, channels, height, width = y.shape
        rows = y.permute(0, 2, 3, 1).reshape(-1, 1, channels, 1)
        return rows.mean((2, 3), keepdim=True).reshape(batch, height, width, 1).permute(0, 3, 1, 2)

    centred = x - mean(x)
    return centred * torch.rsqrt(mean(centred * centred) + EPSILON)


FORMS: dict[str, Form] = {
    "LayerNorm": as_it_is,
    "1x1 convolutions": convolutions,
    "1x1 convolutions, of squares": moments,
    "means": means,
}


class Between(nn.Module):
    weight: Tensor
    epsilon: Tensor

    def __init__(self, channels: int, norm: Form) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((1, channels, 1, 1), 1 / channels))
        self.register_buffer("epsilon", torch.tensor([EPSILON]))
        torch.manual_seed(0)
        self.before, self.after, self.norm = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1), norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.norm(self.before(x), self.weight, self.epsilon))
        return out


def main() -> None:
    rows = [_row(channels, side, name) for channels, side in MAPS for name in FORMS]
    write_results("norm_forms", rows)
    write_section("norm_forms", _table, PAGE)


def _row(channels: int, side: int, name: str) -> Row:
    (bare, _), (cost, lowered) = (_cost(channels, side, norm) for norm in (nothing, FORMS[name]))
    each = round((cost - bare) / (channels * side * side), 2)
    return {"channels": channels, "side": side, "form": name, "per_value": each, **_shape(lowered)}


def _shape(lowered: Lowered) -> Row:
    return {"delegates": lowered.coverage.delegates, "transposes": lowered.coverage.transposes}


@functools.cache
def _cost(channels: int, side: int, norm: Form) -> tuple[int, Lowered]:
    with torch.no_grad():
        program = torch.export.export(Between(channels, norm).eval(), (torch.zeros(1, channels, side, side),))
    lowered = lower(program)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(lowered.data)
        return count_instructions(path, CORE).total, lowered


def _table(rows: list[Row]) -> str:
    lines = []
    for name in FORMS:
        of_form = [row for row in rows if row["form"] == name]
        counts = (f"{row['per_value']:.1f}" for row in of_form)
        lines.append((name, str(of_form[0]["delegates"]), str(of_form[0]["transposes"]), *counts))
    heads = (f"{channels} x {side} x {side}" for channels, side in MAPS)
    return markdown(("form", "delegates", "transposes", *heads), lines)


if __name__ == "__main__":
    main()
