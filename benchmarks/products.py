"""Networks of element-wise products beside the stock tools': instructions on an emulated core, and logits to float.

    python benchmarks/products.py --model mobilenet_v3_small --model starnet_s1

Random weights, calibrated on four images of noise, on which the file's logits are then compared with the float
network's: what the same weights lose in either recipe. Rows replace those of the same model and file in
benchmarks/results/products.json, from which the table in docs/products.md is made.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from files import make_file, random_model
from rows import ROOT, Row, markdown, read_results, write_results, write_section
from torch import Tensor

from hadaptive_q.arm.count import count_instructions
from hadaptive_q.lower.parity import sqnr_db
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.network import Network

MODELS = ("mobilenet_v3_small", "rcvit_xs", "starnet_s1")
FORMS = ("int8", "float", "stock int8")
CORE, IMAGE_SIZE = "cortex-a76", 224
PAGE = ROOT / "docs" / "products.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], choices=MODELS)
    parser.add_argument("--form", action="append", default=[], choices=FORMS, help="all unless given")
    parser.add_argument("--render", action="store_true", help="only write the table from the results")
    arguments = parser.parse_args()
    for name in [] if arguments.render else arguments.model or MODELS:
        model, inputs = random_model(name, IMAGE_SIZE)
        for form in arguments.form or FORMS:
            row = _measure(name, form, model, inputs)
            kept = {(r["model"], r["form"]): r for r in [*read_results("products"), row]}
            write_results("products", [kept[key] for key in sorted(kept)])
    write_section("products", _table, PAGE)


def _measure(name: str, form: str, model: Network, inputs: Tensor) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(make_file(form, model, inputs))
        file = PteFile(path)
        with torch.no_grad():
            sqnr = sqnr_db(model(inputs), torch.cat([file(image[None]) for image in inputs]))
        size, counted = path.stat().st_size, count_instructions(path, CORE).total
    return {"model": name, "form": form, "bytes": size, "instructions": counted, "float_sqnr_db": round(sqnr, 2)}


def _table(rows: list[Row]) -> str:
    stock = {row["model"]: row["instructions"] for row in rows if row["form"] == "stock int8"}
    lines: list[tuple[str, ...]] = [
        (
            f"`{row['model']}` at {IMAGE_SIZE}",
            row["form"],
            f"{row['bytes']:,}",
            f"{row['instructions']:,}",
            f"{row['instructions'] / stock[row['model']]:.3f}" if row["model"] in stock else "",
            "" if row["form"] == "float" else f"{row['float_sqnr_db']:.1f} dB",
        )
        for row in rows
    ]
    return markdown(("model", "file", "bytes", f"instructions, {CORE}", "of stock int8", "logit SQNR to float"), lines)


if __name__ == "__main__":
    main()
