"""Images per second from every layout of data, and what the index of a large tree costs: docs/data.md.

python benchmarks/loading.py --folder FOLDER

Photographs are stand-ins of ImageNet's usual size, 500 x 375, made here: a JPEG of them has 50 kB. Decoding is measured
on larger ones, too.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from rows import ROOT, Row, markdown, read_results, write_results, write_section

from hadaptive_q.data.class_tree import CLOCK_GRAIN_NS, open_tree
from hadaptive_q.data.crop import CentralCrop, Crop, RandomCrop
from hadaptive_q.data.image_file import decode
from hadaptive_q.data.kept import index_file
from hadaptive_q.data.loader import Batch, Draw, batches_of, training_batches
from hadaptive_q.data.sources import open_data

PAGE = ROOT / "docs" / "data.md"
SIZE, BATCH, LEAST_AREA = 224, 32, 0.08
WORKERS = (0, 1, 2)
REPEATS = 2
DECODINGS = 5
# Of the photographs' sides, and how many there are of each.
FACTORS = {1: 60, 2: 30, 4: 15}


def photograph(index: int, factor: int = 1) -> bytes:
    """Return a JPEG with detail at every scale, as photographs have; of `factor` times the usual sides."""
    generator = np.random.default_rng(index)
    pixels = np.zeros((375, 500, 3))
    for step in (125, 25, 5, 1):
        coarse = generator.normal(0, 4 * step**0.5, (375 // step, 500 // step, 3))
        pixels += coarse.repeat(step, 0).repeat(step, 1)
    stream = io.BytesIO()
    image = Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8))
    image.resize((500 * factor, 375 * factor)).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def make_sources(folder: Path, count: int) -> dict[str, str]:
    """Write the same photographs in every layout and return what `--data` says of each."""
    data = {"train": [photograph(i) for i in range(count)], "val": [photograph(i) for i in range(count // 2)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1"])})
    for layout in ("tree", "tar", "parquet"):
        shutil.rmtree(folder / layout, ignore_errors=True)
        (folder / layout).mkdir(parents=True)
    for split, images in data.items():
        for index, image in enumerate(images):
            path = folder / "tree" / split / str(index % 2) / f"{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        with tarfile.open(folder / "tar" / f"{split}-0.tar", "w") as archive:
            for index, image in enumerate(images):
                for ending, content in (("jpg", image), ("cls", str(index % 2).encode())):
                    member = tarfile.TarInfo(f"{index:06}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        rows = {
            "image": [{"bytes": image, "path": None} for image in images],
            "label": [i % 2 for i in range(len(images))],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "parquet" / f"{split}-0.parquet")
    tree, tar, parquet = (str(folder / layout) for layout in ("tree", "tar", "parquet"))
    return {
        "class folders": tree,
        "tar shards": tar,
        "`hf:` parquet": f"hf:{parquet}",
        "`hf-stream:` parquet": f"hf-stream:{parquet}",
    }


def source_row(layout: str, name: str) -> Row:
    """Return images per second and CPU time per image, in training and in evaluation, by the number of workers."""
    row: Row = {"layout": layout}
    for workers in WORKERS:
        data = open_data(name, SIZE, 0.875, workers)
        for _ in range(REPEATS):
            passes = {
                "training": training_batches(data.train, BATCH, Draw(0, 0, LEAST_AREA)),
                "evaluation": batches_of(data.val, BATCH),
            }
            for kind, batches in passes.items():
                for figure, better, found in zip(("rate", "cpu_ms"), (max, min), costs(batches), strict=True):
                    key = f"{kind}_{workers}_{figure}"
                    row[key] = better(found, row.get(key, found))
    return row


def costs(batches: Iterator[Batch]) -> tuple[float, float]:
    """Return images per second, and milliseconds of CPU per image in this process and its workers."""
    start, used = time.perf_counter(), os.times()
    count = sum(len(images) for images, _ in batches)
    elapsed, now = time.perf_counter() - start, os.times()
    return count / elapsed, 1000 * (sum(now[:4]) - sum(used[:4])) / count


def decoder_rows(crops: dict[str, Callable[[int], Crop]], factor: int) -> list[Row]:
    """Return what one image takes of CPU time to decode, crop and resize; the ways take turns on every image."""
    images = [photograph(i, factor) for i in range(FACTORS[factor])]
    spent = dict.fromkeys(crops, 0.0)
    for index, image in enumerate(images):
        least = dict.fromkeys(crops, float("inf"))
        for _ in range(DECODINGS):
            for layout, crop in crops.items():
                start = time.process_time()
                decode(image, SIZE, "", crop(index))
                least[layout] = min(least[layout], time.process_time() - start)
        spent = {layout: spent[layout] + least[layout] for layout in crops}
    size = sum(map(len, images)) / len(images)
    sides = f"{500 * factor} x {375 * factor}"
    return [{"layout": w, "sides": sides, "ms": 1000 * spent[w] / len(images), "bytes": size} for w in crops]


def index_row(folder: Path, classes: int, per_class: int) -> Row:
    """Return what walking, keeping and reading a tree of tiny images costs, names as long as ImageNet's."""
    root = folder / "many"
    shutil.rmtree(root, ignore_errors=True)
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "JPEG")
    for label in range(classes):
        (root / f"n{label:08}").mkdir(parents=True)
        for index in range(per_class):
            (root / f"n{label:08}" / f"n{label:08}_{index}.JPEG").write_bytes(stream.getvalue())
    past = time.time_ns() - 2 * CLOCK_GRAIN_NS
    for path in (root, *root.iterdir()):
        os.utime(path, ns=(past, past))
    index_file(root).unlink(missing_ok=True)
    start = time.process_time()
    tree = open_tree(root, 1)
    walked = time.process_time()
    open_tree(root, 1)
    recalled = time.process_time()
    tracemalloc.start()
    again = open_tree(root, 1)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    row = {
        "images": len(tree.labels),
        "walk_s": walked - start,
        "recall_s": recalled - walked,
        "file_bytes": index_file(root).stat().st_size,
        "held_bytes": held,
        "most_bytes": most,
    }
    assert again.path(classes * per_class - 1) == tree.path(classes * per_class - 1)
    shutil.rmtree(root)
    index_file(root).unlink()
    return row


def loading_table(rows: list[Row]) -> str:
    kinds = [(kind, workers) for kind in ("training", "evaluation") for workers in WORKERS]
    columns = ("layout", *(f"{kind}, {workers} workers" for kind, workers in kinds))
    lines: list[tuple[str, ...]] = []
    for row in rows:
        cells = [f"{row[f'{kind}_{n}_rate']:.0f} ({row[f'{kind}_{n}_cpu_ms']:.1f} ms)" for kind, n in kinds]
        lines.append((row["layout"], *cells))
    return markdown(columns, lines)


def decoding_table(rows: list[Row]) -> str:
    lines: list[tuple[str, ...]] = [
        (row["sides"], row["layout"], f"{row['ms']:.2f} ms", f"{row['bytes'] / 1000:.0f} kB") for row in rows
    ]
    return markdown(("one image", "to 224 x 224", "CPU time", "bytes"), lines)


def index_table(rows: list[Row]) -> str:
    columns = ("images", "walk, headers read", "later starts", "file", "memory", "memory per image")
    lines: list[tuple[str, ...]] = [
        (
            f"{row['images']:,}",
            f"{row['walk_s']:.1f} s",
            f"{1000 * row['recall_s']:.0f} ms",
            f"{row['file_bytes'] / 1e6:.1f} MB",
            f"{row['held_bytes'] / 1e6:.1f} MB",
            f"{row['held_bytes'] / row['images']:.0f} bytes",
        )
        for row in rows
    ]
    return markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the images: 100 MB and many small files")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--per-class", type=int, default=50)
    arguments = parser.parse_args()
    crops: dict[str, Callable[[int], Crop]] = {
        "the middle": lambda _: CentralCrop(0.875),
        "a random part, decoded whole": lambda i: RandomCrop(LEAST_AREA, np.random.default_rng(i), quick=False),
        "a random part, decoded at a fraction where that is enough": lambda i: RandomCrop(
            LEAST_AREA, np.random.default_rng(i)
        ),
    }
    write_results("decoding", [row for factor in FACTORS for row in decoder_rows(crops, factor)])
    sources = make_sources(arguments.folder, arguments.images)
    write_results("loading", [source_row(layout, name) for layout, name in sources.items()])
    write_results("index", [index_row(arguments.folder, arguments.classes, arguments.per_class)])
    for name, table in (("decoding", decoding_table), ("loading", loading_table), ("index", index_table)):
        print(table(read_results(name)))
        write_section(name, table, PAGE)


if __name__ == "__main__":
    main()
