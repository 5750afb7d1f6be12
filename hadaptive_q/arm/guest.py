"""Start the runner on an emulated core, in a process and a folder of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hadaptive_q.arm.build import Build, prepare
from hadaptive_q.arm.cores import Core, find_core
from hadaptive_q.errors import UserError

MODEL, INPUTS, OUTPUTS = "model.pte", "inputs.raw", "outputs.raw"
BEGIN, END, ENTER, LEAVE, CLOCK = 1, 2, 3, 4, 5  # the runner's marks, see tracer.h
_COUNTS = "counts.json"


@dataclass(frozen=True)
class Cut:
    """A mark of the runner and the instructions by class since the first mark."""

    mark: int
    sums: dict[str, int]

    def since(self, earlier: Cut) -> dict[str, int]:
        """Return the instructions by class between `earlier` and this cut."""
        return {name: count - earlier.sums[name] for name, count in self.sums.items()}


@dataclass(frozen=True)
class Guest:
    """A file, a core and a folder for inputs and outputs; every method starts one process."""

    build: Build
    core: Core
    pte: Path
    folder: Path
    timeout: float

    def run(self, arguments: Sequence[str]) -> list[str]:
        """Run the runner with `arguments` and return the lines it printed; raise UserError where it fails."""
        return self._start(self.build.runner, arguments, [])

    def count(self, arguments: Sequence[str], traced: bool = False) -> tuple[list[str], list[Cut]]:
        """Like `run`, with the cuts: the first is BEGIN, the last END, in between there are some only where traced."""
        plugin = f"{str(self.build.plugin).replace(',', ',,')},out={_COUNTS}"
        runner = self.build.tracing_runner if traced else self.build.runner
        printed = self._start(runner, arguments, ["-plugin", plugin])
        counted = json.loads((self.folder / _COUNTS).read_text())
        cuts = [Cut(mark, dict(zip(counted["classes"], sums, strict=True))) for mark, *sums in counted["cuts"]]
        if counted["threads"] != 1 or len(cuts) < 2 or (cuts[0].mark, cuts[-1].mark) != (BEGIN, END):
            raise RuntimeError(f"the runner broke its rules: {counted['threads']} threads, {len(cuts)} marks")
        return printed, cuts

    def _start(self, runner: Path, arguments: Sequence[str], options: Sequence[str]) -> list[str]:
        # Short names and a fixed environment: what lies on the guest's stack must not move the counts. The path keeps
        # the guest away from libraries that the host may have for ARM64.
        command = [self.build.emulator, "-L", str(self.build.root(self.core)), "-cpu", self.core.cpu]
        command += ["-E", "LD_LIBRARY_PATH=/lib", *options, str(runner), *arguments]
        # The shell sets the limit: a function between fork and exec is unsafe beside torch's threads.
        shell = ["/bin/sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *command]
        try:
            done = subprocess.run(
                shell,
                cwd=self.folder,
                env={"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            got = f"no end after {self.timeout:g} s"
            raise UserError(self._where, got, "an inference that ends", "allow a longer timeout") from error
        if done.returncode != 0:
            raise self._refusal(done.returncode, done.stderr)
        return done.stdout.splitlines()

    @property
    def _where(self) -> str:
        return f"file {self.pte} on {self.core.name}"

    def _refusal(self, code: int, log: str) -> UserError:
        runs = "a .pte that the ExecuTorch runtime runs"
        if code == -signal.SIGILL:
            return UserError(self._where, "an illegal instruction", runs, "the file needs a CPU feature the core lacks")
        if code < 0:
            return UserError(self._where, f"a crash ({signal.Signals(-code).name})", runs)
        lines = log.splitlines()
        said = [line.removeprefix("runner: ") for line in lines if line.startswith("runner: ")]
        # The runtime's own first error names the cause (an operator, an offset): "E TIME FILE:LINE] TEXT".
        causes = [line.partition("] ")[2] for line in lines if line.startswith("E ")]
        return UserError(self._where, f"'{'; '.join([*said[:1], *causes[:1]]) or f'exit code {code}'}'", runs)


@contextmanager
def open_guest(pte: Path, core: str, timeout: float) -> Iterator[Guest]:
    """Check file and core, build what is missing, and lay `pte` into a folder that lasts as long as the context."""
    chosen = find_core(core)
    if not pte.is_file():
        raise UserError(f"file {pte}", "no such file", "a .pte")
    build = prepare()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MODEL).symlink_to(pte.resolve())
        yield Guest(build, chosen, pte, Path(folder), timeout)
