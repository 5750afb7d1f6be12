"""Run a file that somebody else made in a process of its own: what it breaks there is not ours.

A runtime checks little of a file's inside: a changed byte can make native code write anywhere. The answer comes back as
JSON, which executes nothing on its way.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from hadaptive_q.errors import UserError

Answer = TypeVar("Answer")


def isolated(work: Callable[..., Answer], where: str, *arguments: Any, limit_s: float | None = None) -> Answer:
    """Return ``work(*arguments)``, done in a child process that may die.

    `work` is a function at the top level of a module; its arguments and its answer are JSON. `where` names the file in
    messages. Raises what `work` raises of UserError, and UserError where the child dies or takes longer than `limit_s`
    seconds.
    """
    request = {"module": work.__module__, "name": work.__qualname__, "arguments": arguments}
    # The same modules as here, and none from the current folder, which may be the stranger's.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryFile() as reply, tempfile.TemporaryFile() as noise:
        command = [sys.executable, "-P", "-m", __name__, str(reply.fileno())]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request).encode(),
                env=environment,
                pass_fds=(reply.fileno(),),
                stdout=noise,
                stderr=noise,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(where, f"no answer in {limit_s:g} seconds", "a file that its runtime can run") from error
        reply.seek(0)
        noise.seek(0)
        answer: Answer = _answer(done.returncode, reply.read(), noise.read().decode(errors="replace"), where)
        return answer


def _answer(status: int, reply: bytes, noise: str, where: str) -> Any:
    if status < 0:
        raise UserError(where, f"its runtime died of {_signal(-status)}", "a file that its runtime can run")
    if status:
        raise RuntimeError(f"{where}: the process that ran it ended with {status}:\n{noise}")
    content = json.loads(reply)
    if "refused" in content:
        raise UserError(*content["refused"])
    return content["answer"]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _serve(reply: int) -> None:
    """Do what standard input asks for and write the answer to the file descriptor `reply`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is an answer, not something to debug
    request = json.load(sys.stdin)
    work = getattr(importlib.import_module(request["module"]), request["name"])
    try:
        content = {"answer": work(*request["arguments"])}
    except UserError as error:
        content = {"refused": [error.where, error.got, error.expected, error.remedy]}
    with os.fdopen(reply, "w") as out:
        json.dump(content, out)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
