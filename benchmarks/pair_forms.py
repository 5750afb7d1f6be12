"""Instructions of the forms of the cross product, from chosen channels to what the depthwise convolution reads.

    python benchmarks/pair_forms.py

Chosen channels `(1, H, W, Cs)` in float, as the selection leaves them, become the int8 codes of DySoft's output, inside
one delegate and for every block of S, M and L at 224. Counted is every operator before the depthwise convolution that
reads the codes, and the delegate's preparation, which grows with the number of operators. DySoft is in its folded form:
slope and weight moved into the neighbours, a shift per slot stays.

The table goes to hadaptive_q/rewrite/pair_costs.json, from which `roll_pairs` takes its form. It also keeps the SQNR of
both precisions on standard normals: the forms named `int8 product` store products in 8 bits, and are not float-equal.
The runtime has no softsign in int8; tanh, which it has as a table of 256 entries, stands in for its cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401 -- registers the operators
from pair_sqnr import product_sqnr_db
from rows import ROOT, markdown, write_table
from torch import Tensor, nn

from hadaptive_q.arm.operators import count_operators
from hadaptive_q.atomic import write_text
from hadaptive_q.lower.executorch import lower
from hadaptive_q.models.ach import ACH
from hadaptive_q.models.cross_hadamard import pair_indices
from hadaptive_q.models.families import create_model
from hadaptive_q.rewrite.pair_costs import TABLE
from hadaptive_q.rewrite.split_dequantize import split_dequantize

MODELS, IMAGE_SIZE, CORES = ("hadaptive_net_s", "hadaptive_net_m", "hadaptive_net_l"), 224, ("cortex-a76", "cortex-a53")
PAGE = ROOT / "docs" / "lowering.md"
# Scales of standard normals: operands, products, DySoft's output with its shift. They change no count.
OPERAND, PRODUCT, NORMED = 8 / 255, 24 / 255, 2 / 127


def stored(x: Tensor, scale: float) -> Tensor:
    """Return `x` through int8 codes."""
    ops, format_ = torch.ops.quantized_decomposed, (scale, 0, -128, 127, torch.int8)
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *format_), *format_)  # type: ignore[no-any-return]


def as_it_is(x: Tensor) -> Tensor:
    return x


def rolled(z: Tensor, keep: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor]) -> Tensor:
    """All pairs by distance; `keep` and `product` store views of the operands and products."""
    cs = z.shape[1]
    half = keep(z[:, : cs // 2])
    doubled = keep(torch.cat([z, half], 1))
    parts = []
    for distance in range(1, cs // 2 + 1):
        count = cs if 2 * distance < cs else cs // 2
        parts.append(product((z if count == cs else half) * keep(doubled[:, distance : distance + count])))
    return product(torch.cat(parts, 1))


def rows(z: Tensor) -> Tensor:
    return torch.cat([z[:, i : i + 1] * z[:, i + 1 :] for i in range(z.shape[1] - 1)], 1)


class Form(nn.Module):
    """One form between the selection and a depthwise convolution."""

    def __init__(self, name: str, cs: int) -> None:
        super().__init__()
        slots = cs * (cs - 1) // 2
        self.name = name
        self.slope: Tensor
        self.register_buffer("slope", torch.tensor(0.7))
        shift = torch.linspace(-0.5, 0.5, slots)[:, None, None]
        self.shift, self.shift_codes = nn.Parameter(shift), Codes(shift, NORMED, per_channel=False)
        self.filter = Codes(torch.randn(slots, 1, 3, 3), 1 / 32, per_channel=True)
        picks = [torch.eye(cs)[index][:, :, None, None] for index in pair_indices(cs)]
        self.picks = nn.ParameterList(self.slope * pick for pick in picks)
        self.pick_codes = nn.ModuleList(Codes(pick, 1 / 127, per_channel=True) for pick in picks)

    def forward(self, pixels: Tensor) -> Tensor:
        z = pixels.permute(0, 3, 1, 2)
        normed = stored(self.shift_of(self.saturated(z)), NORMED)
        return stored(nn.functional.conv2d(normed, self.filter(), padding=1, groups=normed.shape[1]), 1.0)

    def shift_of(self, u: Tensor) -> Tensor:
        # The int8 shift is a constant in codes, as the sum's other side is.
        return stored(u, NORMED) + self.shift_codes() if self.name.endswith("table") else u + self.shift

    def saturated(self, z: Tensor) -> Tensor:
        """Return ``u(z_i z_j)`` for all pairs."""
        if self.name == "rolled":
            return softsign(rolled(z * self.slope, as_it_is, as_it_is))
        if self.name == "row broadcast":
            return softsign(rows(z * self.slope))
        if self.name == "one-hot float":
            left, right = (nn.functional.conv2d(z, pick) for pick in self.picks)
            return softsign(left * right)
        codes = stored(z, OPERAND)
        if self.name == "one-hot int8 operands":
            # Float-equal: operands are codes already, picking keeps them, and the slope is the picks' scale.
            left, right = (
                stored(nn.functional.conv2d(stored(z, OPERAND), pick()), OPERAND) for pick in self.pick_codes
            )
            return softsign(left * right)
        products = rolled(codes, lambda x: stored(x, OPERAND), lambda x: stored(x, PRODUCT))
        return softsign(products) if self.name == "int8 product" else torch.tanh(products)


def softsign(x: Tensor) -> Tensor:
    return x / (x.abs() + 1.0)


class Codes(nn.Module):
    """A constant in int8 codes, with a scale per filter or one scale."""

    def __init__(self, value: Tensor, scale: float, per_channel: bool) -> None:
        super().__init__()
        self.per_channel, self.scale = per_channel, scale
        self.register_buffer("codes", (value / scale).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scales", torch.full((len(value),), scale))
        self.register_buffer("zeros", torch.zeros(len(value), dtype=torch.int64))

    def forward(self) -> Tensor:
        ops = torch.ops.quantized_decomposed
        if self.per_channel:
            format_ = (self.scales, self.zeros, 0, -127, 127, torch.int8)
            return ops.dequantize_per_channel.default(self.codes, *format_)  # type: ignore[no-any-return]
        return ops.dequantize_per_tensor.default(self.codes, self.scale, 0, -128, 127, torch.int8)  # type: ignore[no-any-return]


NAMES = ("rolled", "row broadcast", "one-hot float", "one-hot int8 operands", "int8 product", "int8 product, table")


def costs(name: str, cs: int, height: int, width: int) -> dict[str, int]:
    """Return the instructions of one form by core."""
    torch.manual_seed(0)
    example = (torch.randn(1, height, width, cs),)
    graph = torch.export.export(Form(name, cs).eval(), example).module()
    split_dequantize(graph)
    program = torch.export.export(graph, example)
    lowered = lower(program)
    coverage = lowered.coverage
    if coverage.delegates != 1 or coverage.portable_ops:
        raise RuntimeError(f"{name}: {coverage.delegates} delegates, outside of them {coverage.portable_ops}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "form.pte"
        path.write_bytes(lowered.data)
        return {core: _before_depthwise(path, core) for core in CORES}


def _before_depthwise(path: Path, core: str) -> int:
    operators = count_operators(path, core)
    last = max(i for i, operator in enumerate(operators) if "DWConv" in operator.name)
    return sum(operator.counts.total for operator in operators[:last])


def blocks() -> dict[tuple[int, int, int, int], list[str]]:
    """Return (C, Cs, H, W) of every ACH at 224 with the models that have it."""
    found: dict[tuple[int, int, int, int], list[str]] = {}
    for name in MODELS:
        model = create_model(name, 10).eval()

        def note(module: nn.Module, inputs: Any, name: str = name) -> None:
            assert isinstance(module, ACH)
            _, channels, height, width = inputs[0].shape
            users = found.setdefault((channels, module.cs, height, width), [])
            if name not in users:
                users.append(name)

        for _, ach in model.ach_modules():
            ach.register_forward_pre_hook(note)
        with torch.no_grad():
            model(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the page's table from the figures kept")
    if parser.parse_args().render:
        write_table("pair_forms", _table(json.loads(TABLE.read_text())["blocks"]), PAGE)
        return
    measured: dict[tuple[int, int, int], dict[str, dict[str, int]]] = {}
    table = []
    for (channels, cs, height, width), models in blocks().items():
        size = (cs, height, width)
        if size not in measured:
            measured[size] = {name: costs(name, *size) for name in NAMES}
            for name, by_core in measured[size].items():
                print(size, name, by_core, flush=True)
        block = {"models": models, "channels": channels, "cs": cs, "height": height, "width": width}
        table.append({**block, "instructions": measured[size]})
    sqnr = {name: round(value, 1) for name, value in product_sqnr_db().items()}
    kept = {"made_by": "python benchmarks/pair_forms.py", "sqnr_db": sqnr, "blocks": table}
    write_text(TABLE, json.dumps(kept, indent=1) + "\n")
    write_table("pair_forms", _table(table), PAGE)


def _table(blocks: list[dict[str, Any]]) -> str:
    columns = ("models", "Cs", "pixels", "core", *NAMES)
    lines = []
    for block in blocks:
        models = ", ".join(name.removeprefix("hadaptive_net_").upper() for name in block["models"])
        for core in CORES:
            counts = (f"{block['instructions'][name][core]:,}" for name in NAMES)
            lines.append((models, str(block["cs"]), f"{block['height']} x {block['width']}", core, *counts))
    return markdown(columns, lines)


if __name__ == "__main__":
    main()
