"""Mixed precision between the uniform recipes: files of int8, of int4, and of searched recipes, side by side.

    python benchmarks/mixed.py --seeds 3

After training only. Every figure comes from running the written file in the ExecuTorch runtime over the whole
validation split; the same images throughout, so that accuracies can be compared in pairs. What is already in the output
folder is not repeated. Table and plot go into docs/search.md.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from int8 import settings
from matplotlib.figure import Figure
from rows import ROOT, Row, markdown, read_results, run, write_results, write_section
from torch import Tensor

from hadaptive_q.atomic import write_bytes
from hadaptive_q.data.calibration import find_manifest, resolve
from hadaptive_q.data.datasets import ImageData
from hadaptive_q.lower.executorch import lower
from hadaptive_q.lower.parity import agreement, sqnr_db, top1
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.models.checkpoint import load_model
from hadaptive_q.models.network import Network
from hadaptive_q.pipeline import open_data_for, quantized_program
from hadaptive_q.recipe import load_recipe
from hadaptive_q.search import Goal, recipe_file, search
from hadaptive_q.train.loop import predict

PAGE, PLOT = ROOT / "docs" / "search.md", ROOT / "docs" / "search.png"
LARGE, SMALL = "int8_ptq", "int4_ptq"
# Of the way from the file of int4 to that of int8.
SHARES = (0.2, 0.35, 0.0, 0.1)
COLUMNS = ("files", "bytes", "of int8", "top-1", "to int8, 95 % of pairs", "like float", "logit SQNR to float")


@dataclass(frozen=True)
class Case:
    """A float network, its data, its answers, and where its files lie."""

    seed: int
    model: Network
    data: ImageData
    logits: Tensor
    labels: Tensor
    checkpoint: Path
    out: Path

    def row(self, name: str, path: Path, large: Tensor | None) -> tuple[Row, Tensor]:
        """Return the figures of the file at `path`, and its answers; those of the int8 file are `large`."""
        found = PteFile(path).predict(self.data.val, self.data.preprocess)
        right, reference = (logits.argmax(1) == self.labels for logits in (found, found if large is None else large))
        row = {
            "name": name,
            "seed": self.seed,
            "bytes": path.stat().st_size,
            "float_top1": top1(self.logits, self.labels),
            "top1": top1(found, self.labels),
            "gained": int((right & ~reference).sum()),
            "lost": int((reference & ~right).sum()),
            "float_agreement": agreement(self.logits, found),
            "float_sqnr_db": sqnr_db(self.logits, found),
            "samples": len(self.labels),
        }
        print(row, flush=True)
        return row, found

    def mixed(self, size: int, base: Sequence[str]) -> Path:
        """Return the file of the recipe that a search finds for `size` bytes, from the recipe int4_ptq with `base`."""
        recipe = load_recipe(SMALL, list(base))
        folder = self.out / f"{self.seed}-search"
        path = self.out / f"{self.seed}-{size}.pte"
        if not path.is_file():
            search(
                recipe, self.checkpoint, Goal(target_bytes=size), folder, samples=64
            )  # accuracy is the file's, below
            written = load_recipe(str(recipe_file(recipe, folder)))
            manifest = resolve(find_manifest(written.calibration.manifest, self.data), self.data)
            program = quantized_program(written, self.model, self.data, manifest, folder, self.model)
            write_bytes(path, lower(program.export()).data)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--model", default="hadaptive_net_s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "int8", help="as of benchmarks/int8.py")
    parser.add_argument("--render", action="store_true", help="only write table and plot from the results")
    arguments = parser.parse_args()
    if not arguments.render:
        for seed in range(arguments.seeds):
            for row in _rows(arguments.model, arguments.data, seed, arguments.out):
                kept = {(old["name"], old["seed"]): old for old in [*read_results("mixed"), row]}
                write_results("mixed", list(kept.values()))
    write_section("mixed", _table, PAGE)
    write_bytes(PLOT, _plot(read_results("mixed")))


def _rows(model: str, data: str, seed: int, out: Path) -> Iterator[Row]:
    folders = {}
    for name in (LARGE, SMALL):
        folders[name] = out / f"{model.removeprefix('hadaptive_net_')}-{data}-{seed}-{name}"
        given = folders[LARGE] / "float.safetensors" if folders else None
        run(load_recipe(name, settings(name, model, data, seed)), folders[name], given if name == SMALL else None)
    checkpoint = folders[LARGE] / "float.safetensors"
    base = settings(SMALL, model, data, seed)
    network = load_model(checkpoint)
    images = open_data_for(load_recipe(SMALL, base), network)
    network.preprocess = images.preprocess
    logits, labels = predict(network.eval(), images.val, images.preprocess)
    case = Case(seed, network, images, logits, labels, checkpoint, out / f"mixed-{model}-{data}")
    case.out.mkdir(exist_ok=True)
    large, answers = case.row(LARGE, folders[LARGE] / "model.pte", None)
    small, _ = case.row(SMALL, folders[SMALL] / "model.pte", answers)
    yield from (large, small)
    for share in SHARES:
        size = round(small["bytes"] + share * (large["bytes"] - small["bytes"]))
        yield case.row(f"searched, share {share:.0%}", case.mixed(size, base), answers)[0]


def _groups(rows: list[Row]) -> list[list[Row]]:
    names = sorted({row["name"] for row in rows}, key=lambda name: [row["name"] for row in rows].index(name))
    groups = [[row for row in rows if row["name"] == name] for name in names]
    return sorted(groups, key=lambda group: -_mean(group, "bytes"))


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(float(row[key]) for row in rows)


def _table(rows: list[Row]) -> str:
    groups = _groups(rows)
    return markdown(COLUMNS, [_line(group, groups[0]) for group in groups])


def _line(rows: list[Row], large: list[Row]) -> tuple[str, ...]:
    gained, lost, images = (sum(row[key] for row in rows) for key in ("gained", "lost", "samples"))
    # Of pairs of answers only those that differ count: the variance of their difference is their number.
    error = 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / images) / images
    each = ", ".join(f"{row['float_sqnr_db']:.1f}" for row in rows)
    return (
        NAMES.get(str(rows[0]["name"]), str(rows[0]["name"])),
        f"{_mean(rows, 'bytes'):,.0f}",
        f"{_mean(rows, 'bytes') / _mean(large, 'bytes'):.3f}",
        f"{_mean(rows, 'top1'):.2f}",
        f"{100 * (gained - lost) / images:+.2f} ± {100 * error:.2f}" if rows is not large else "",
        f"{100 * _mean(rows, 'float_agreement'):.2f} %",
        f"{_mean(rows, 'float_sqnr_db'):.1f} dB ({each})",
    )


NAMES = {LARGE: "`int8_ptq`, uniform", SMALL: "`int4_ptq`, uniform"}


def _plot(rows: list[Row]) -> bytes:
    """Return a PNG: size against logit SQNR and against top-1, one line for each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (("float_sqnr_db", "logit SQNR to float, dB"), ("top1", "top-1, %"))
    for axis, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for seed, color in zip(sorted({row["seed"] for row in rows}), ("#2f6fde", "#d9822b", "#8a8f98"), strict=False):
            own = sorted((row for row in rows if row["seed"] == seed), key=lambda row: row["bytes"])
            for names, style in ((False, {"marker": ".", "label": f"searched, seed {seed}"}), (True, {"marker": "s"})):
                shown = [row for row in own if (row["name"] in NAMES) == names]
                line = "--" if names else "-"
                axis.plot(
                    [row["bytes"] / 1e6 for row in shown], [row[key] for row in shown], line, color=color, **style
                )
        axis.set_xlabel("file, MB (squares: the uniform recipes)")
        axis.set_ylabel(label)
        axis.grid(color="#d8dce2")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


if __name__ == "__main__":
    main()
