"""Cost of our files beside the stock tools': instructions on an emulated core, latency on this host, in one run.

    python benchmarks/instructions.py --model hadaptive_net_s --model hadaptive_net_m --model hadaptive_net_l

Random weights and inputs: the count does not depend on them. Per-sample selection, batch 1; one thread where
instructions are counted, the runtime's own choice on the host, where all files run in alternation. Rows replace those
of the same model and file in benchmarks/results/instructions.json, from which the table in README.md is made; with
`--counts-only` they add their counts to them and leave the latencies, which want a quiet host, as they are.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from files import FORMS, make_file, random_model
from rows import Row, markdown, read_results, write_results, write_section

from hadaptive_q.arm.cores import CORES
from hadaptive_q.bench import bench_files
from hadaptive_q.models.config import MODELS

BASE = "stock int8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], choices=MODELS)
    parser.add_argument("--core", action="append", default=[], choices=CORES)
    parser.add_argument("--form", action="append", default=[], choices=FORMS, help="all unless given")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--counts-only", action="store_true", help="keep the latencies of earlier rows")
    parser.add_argument("--render", action="store_true", help="only write the README table from the results")
    arguments = parser.parse_args()
    if not arguments.render:
        models = arguments.model or ["hadaptive_net_s"]
        forms = arguments.form or FORMS
        rows = _measure(models, forms, arguments.core or ["cortex-a76"], arguments.image_size)
        _keep(rows, arguments.counts_only)
    write_section("instructions", _table)


def _measure(models: Sequence[str], forms: Sequence[str], cores: Sequence[str], image_size: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[tuple[str, str], Path] = {}
        for name in models:
            model, inputs = random_model(name, image_size)
            for form in forms:
                path = Path(folder) / f"{name}-{form.replace(' ', '-')}.pte"
                path.write_bytes(make_file(form, model, inputs))
                paths[name, form] = path
        results = bench_files(list(paths.values()), cores)
    return [
        {
            "model": name,
            "form": form,
            "image_size": image_size,
            "bytes": result["bytes"],
            "instructions": {core: cost["instructions"] for core, cost in result["arm"].items()},
            "host_ms_median": round(result["host_ms_median"], 4),
            "host_ms_spread": round(result["host_ms_spread"], 4),
        }
        for (name, form), result in zip(paths, results, strict=True)
    ]


def _keep(rows: list[Row], counts_only: bool) -> None:
    kept = {_identity(row): row for row in read_results("instructions")}
    for row in rows:
        old = kept.get(_identity(row), row)
        # Counts of another file say nothing of this one.
        if counts_only and old["bytes"] == row["bytes"]:
            row = {**old, "instructions": {**old["instructions"], **row["instructions"]}}
        kept[_identity(row)] = row
    write_results("instructions", sorted(kept.values(), key=_identity))


def _identity(row: Row) -> tuple[int, int, int]:
    return list(MODELS).index(row["model"]), row["image_size"], FORMS.index(row["form"])


def _table(rows: list[Row]) -> str:
    bases = {(row["model"], row["image_size"]): row for row in rows if row["form"] == BASE}
    cores = [core for core in CORES if any(core in row["instructions"] for row in rows)]
    lines = [_line(row, bases[row["model"], row["image_size"]], cores) for row in rows]
    return markdown(("model", "file", "bytes", *cores, "this host"), lines)


def _line(row: Row, base: Row, cores: Sequence[str]) -> tuple[str, ...]:
    counts, others = row["instructions"], base["instructions"]
    ratio = row["host_ms_median"] / base["host_ms_median"]
    return (
        f"{row['model'].removeprefix('hadaptive_net_').upper()} at {row['image_size']}",
        row["form"],
        f"{row['bytes']:,}",
        *(f"{counts[core]:,} ({counts[core] / others[core]:.3f})" if core in counts else "" for core in cores),
        f"{row['host_ms_median']:.2f} ms ± {row['host_ms_spread']:.2f} ({ratio:.3f})",
    )


if __name__ == "__main__":
    main()
