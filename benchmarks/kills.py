"""Runs that are killed at random moments: what they leave is whole, and they end with an undisturbed run's bytes.

    python benchmarks/kills.py --kills 24 --interrupts 8

Every run trains, quantizes, lowers and reports a nano network on a small folder of images, in a process forked from
this one, which has the libraries loaded. It is killed (SIGKILL) or interrupted (SIGINT) at a random moment and started
again by the same command: twice before it may end. The first of these moments is, every other time, drawn from the
trainings alone: lowering takes most of the time of a network as small as this.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rows import write_robustness
from safetensors.torch import load_file

from hadaptive_q import pipeline  # noqa: F401
from hadaptive_q.__main__ import main as hadaptive_q
from hadaptive_q.lower.runtime import PteFile
from hadaptive_q.recipe import read_yaml
from hadaptive_q.report.record import read_report

CLASSES, PER_CLASS, SIZE = 4, 24, 32
SETTINGS = ("model=hadaptive_net_nano", f"image_size={SIZE}", "float.epochs=8", "fit.epochs=6", "fit.ema=0.9")
BATCHES = ("float.batch_size=16", "fit.batch_size=16", "float.lr=0.005")
COMPARED = ("float.safetensors", "quantized.safetensors", "model.pte", "float.pte")
# The last of these that is there tells how far a run is.
PHASES = {
    "start": "start",
    "float.state": "float training",
    "float.safetensors": "calibration",
    "qat.state": "QAT",
    "quantized.safetensors": "lowering",
    "model.pte": "report",
}
READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": load_file,
    ".state": lambda path: torch.load(path, weights_only=True),
    ".json": lambda path: json.loads(path.read_text()),
    ".yaml": read_yaml,
    ".pte": PteFile,
    ".md": lambda path: path.read_text().rindex("\n"),
    ".html": lambda path: path.read_text().rindex("</html>"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--interrupts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_robustness("kills", measure(Path(folder), arguments.kills, arguments.interrupts))


def measure(folder: Path, kills: int, interrupts: int) -> list[tuple[str, ...]]:
    """Return rows of the table: what was tried, how often, what became of it."""
    make_images(folder / "images")
    begin = time.perf_counter()
    undisturbed = folder / "undisturbed"
    first = Run(folder, undisturbed)
    while first.lasts(0.1) and not (undisturbed / "quantized.safetensors").is_file():
        pass
    trained = time.perf_counter() - begin
    if first.wait() != 0:
        raise SystemExit("the undisturbed run failed")
    whole = time.perf_counter() - begin
    signals = [signal.SIGKILL] * kills + [signal.SIGINT] * interrupts
    random.shuffle(signals)
    phases: dict[signal.Signals, Counter[str]] = {signal.SIGKILL: Counter(), signal.SIGINT: Counter()}
    broken, runs, unclear = [], 0, []
    while signals:
        out = folder / f"run {runs}"
        for longest in (trained if runs % 2 else whole, 0.7 * whole):
            run = Run(folder, out)
            if not signals or not run.lasts(random.uniform(0, longest)):
                run.wait()
                break
            os.kill(run.pid, signals[-1])
            code = run.wait()
            if code == 0:  # it was done just then
                print(f"{signals[-1].name} came to nothing: {phase(out)}", file=sys.stderr, flush=True)
                break
            last = run.said().splitlines()[-1:]
            interrupted = bool(last) and last[0].startswith("hadaptive-q: interrupted; ")
            if code not in (-signal.SIGKILL, 130) or (code == 130) != interrupted:
                unclear.append(f"code {code}: {run.said()}")
            at = phase(out)
            phases[signals.pop()][at] += 1
            broken += damaged(out)
            print(f"{code} during {at}: {len(signals)} left", file=sys.stderr, flush=True)
        else:
            run = Run(folder, out)
            if run.wait() != 0:
                unclear.append(run.said())
        runs += 1
        left = [path.name for path in out.iterdir() if path.name.startswith(".") or path.suffix == ".state"]
        other = [name for name in COMPARED if (out / name).read_bytes() != (undisturbed / name).read_bytes()]
        broken += damaged(out) + [f"left behind: {name}" for name in left] + [f"other bytes: {name}" for name in other]
    print(*broken, *unclear, sep="\n", file=sys.stderr)
    end = f"{runs} runs, all with the bytes of an undisturbed one" if not broken else f"{len(broken)} broken files"
    return [
        ("SIGKILL at a random moment", counted(phases[signal.SIGKILL]), end),
        ("Ctrl-C at a random moment", counted(phases[signal.SIGINT]), f"{len(unclear)} without one clear line"),
    ]


def make_images(root: Path) -> None:
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        folder = root / f"class {label}"
        folder.mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = generator.integers(0, 160, (SIZE, SIZE, 3), dtype=np.uint8)
            pixels[8 * label : 8 * label + 8] += 90
            Image.fromarray(pixels).save(folder / f"{index}.png")


class Run:
    """`hadaptive-q qat` into `out`, started."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.log = folder / "log"
        self.pid = os.fork()
        if self.pid == 0:
            # A shell without job control has what it runs in the background ignore it.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            settings = [part for setting in (*SETTINGS, *BATCHES) for part in ("--set", setting)]
            sys.argv = ["hadaptive-q", "qat", "--data", str(folder / "images"), "--out", str(out), *settings]
            with open(self.log, "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = 1
            try:
                hadaptive_q()
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                os._exit(code)

    def lasts(self, seconds: float) -> bool:
        """Return whether it still runs after `seconds`."""
        end = time.perf_counter() + seconds
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.perf_counter() > end:
                return True
            time.sleep(0.01)
        return False

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        """Return what it printed, without progress bars."""
        lines = self.log.read_text().splitlines()
        return "\n".join(line for line in lines if line and not line.startswith(("float ", "qat ")))


def phase(out: Path) -> str:
    return PHASES[[name for name in PHASES if name == "start" or (out / name).is_file()][-1]]


def damaged(out: Path) -> list[str]:
    """Return the files in `out` that cannot be read to their end; parts that were never renamed are no files yet."""
    found = []
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        if not path.name.startswith("."):
            try:
                READERS[path.suffix](path)
            except (ValueError, KeyError, RuntimeError, OSError, EOFError) as error:
                found.append(f"{path.name}: {error}")
    if (out / "report.json").is_file():
        read_report(out)
    return found


def counted(phases: Counter[str]) -> str:
    return f"{phases.total()} ({', '.join(f'{count} in {name}' for name, count in phases.items())})"


if __name__ == "__main__":
    main()
