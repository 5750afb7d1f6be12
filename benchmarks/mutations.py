"""Model files cut and flipped at random: refused in one line, or answered; never the end of the process that reads.

    python benchmarks/mutations.py RUN --count 300

RUN is a folder that `hadaptive-q qat --to pte,onnx` wrote for `digits`. Every mutant is evaluated as `hadaptive-q eval`
does in its child process, but in one that serves many; where a mutant ends it, it is started again, and that mutant is
evaluated once more as a user would, by `evaluate_file`, which has to refuse it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rows import write_robustness

CLASSES = 10
SECONDS = 300
MEMORY = 16 * 2**30
OUTCOMES = ("refused in one line", "same answers", "other answers", "traceback", "process died", "hung")
UNSAFE = OUTCOMES[3:]
SERVER = "server"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_images(Path(folder) / "images")
        shutil.copy(arguments.run / "float.json", folder)
        for kind in ("pte", "onnx"):
            content = (arguments.run / f"model.{kind}").read_bytes()
            found, outside = measure(content, Path(folder) / f"mutant.{kind}", data, arguments.count, arguments.seed)
            outcome = ", ".join(f"{found[name]} {name}" for name in OUTCOMES if found[name])
            lines.append((f"`.{kind}` cut or flipped, in a child process", str(arguments.count), outcome))
            outcome = ", ".join(f"{count} {name}" for name, count in outside.items()) or "none"
            lines.append(("those of them that ended it, in `eval`", str(sum(outside.values())), outcome))
    write_robustness("mutations", lines)


def measure(content: bytes, path: Path, data: Path, count: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Return how many mutants of `content` ended in each of `OUTCOMES`: all in the child, the unsafe ones in `eval`."""
    generator = random.Random(seed)
    with Server(data) as server:
        path.write_bytes(content)
        wanted = server.ask(path)
        if not wanted.startswith("answers"):
            raise SystemExit(f"{path.name} as it was written: {wanted}")
        found: Counter[str] = Counter()
        outside: Counter[str] = Counter()
        for index in range(count):
            path.write_bytes(mutate(content, generator))
            answer = server.ask(path)
            if answer.startswith("answers"):
                answer = "same answers" if answer == wanted else "other answers"
            found[answer] += 1
            if answer in UNSAFE:
                again = server.ask(path, "evaluate_file")
                outside["answers" if again.startswith("answers") else again] += 1
            print(f"{path.suffix} {index}: {answer}", file=sys.stderr, flush=True)
    return found, outside


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Return `content` cut, with bits flipped, with numbers made extreme, with a piece zeroed or moved."""
    data = bytearray(content)

    def place() -> int:
        # Every second one in the first kilobytes, where a format keeps its structure.
        return generator.randrange(len(data) if generator.random() < 0.5 else min(len(data), 4096))

    kind = generator.choice(("cut", "bit", "bytes", "number", "zeros", "move"))
    if kind == "cut":
        del data[place() :]
    elif kind == "bit":
        data[place()] ^= 1 << generator.randrange(8)
    elif kind == "bytes":
        for _ in range(generator.randrange(2, 33)):
            data[place()] = generator.randrange(256)
    elif kind == "number":
        at = place() & ~3
        data[at : at + 4] = generator.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", bytes(4)))
    else:
        start, length = place(), generator.randrange(1, 257)
        source = place()
        piece = bytes(length) if kind == "zeros" else bytes(data[source : source + length])
        data[start : start + len(piece)] = piece
    return bytes(data)


class Server:
    """A process that evaluates one file after the other; where a file ends it, the next one finds a new process."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, path: Path, function: str = "evaluate_written") -> str:
        if self.process is None:
            command = [sys.executable, __file__, SERVER, str(self.data)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            assert self.process.stdout is not None
            self.process.stdout.readline()  # its libraries are loaded: from now on the time counts
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(function, path, file=self.process.stdin, flush=True)
        with _ended_after(self.process, SECONDS) as ended:
            answer = self.process.stdout.readline().strip()
        if not answer:
            self._end()
            return "hung" if ended else "process died"
        return answer

    def _end(self) -> None:
        if self.process:
            _kill(self.process)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen[str], seconds: float) -> Iterator[list[bool]]:
    """Kill `process` where the block takes longer; what is yielded is filled then."""
    ended: list[bool] = []

    def end() -> None:
        ended.append(True)
        _kill(process)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield ended
    finally:
        timer.cancel()


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill `process` with the children that `evaluate_file` starts."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def serve(data: str) -> None:
    """Answer every path on standard input with one line: what became of it, with its logits where it has any."""
    import hashlib

    import torch

    from hadaptive_q import evaluate
    from hadaptive_q.errors import UserError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logits: list[torch.Tensor] = []

    def keep(answered: torch.Tensor, _labels: torch.Tensor) -> float:
        logits.append(answered)
        return 0.0

    vars(evaluate)["top1"] = keep  # accuracy alone would not tell whether an answer changed
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            function, path = line.strip().split(" ", 1)
            if function == "evaluate_file":
                answer = f"answers {evaluate.evaluate_file(Path(path), data)}"
            else:
                evaluate.evaluate_written(path, data)
                answer = f"answers {hashlib.sha256(logits[-1].numpy().tobytes()).hexdigest()}"
        except UserError as error:
            answer = "refused in one line" if "\n" not in str(error) else "traceback"
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            answer = "traceback"
        print(answer, flush=True)


def make_images(root: Path) -> Path:
    """Write two images for each of ten classes; one of them validates."""
    generator = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / str(label)).mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{index}.png")
    return root


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == SERVER else main()
