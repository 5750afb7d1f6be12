"""Files appear whole or not at all: write beside the target, flush, rename. A folder has one writer at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hadaptive_q.errors import UserError

LOCK, PART = ".lock", ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder and rename it to `path` on success.

    On any exception the temporary file is removed and the old file, if any, stays as it was.
    Raises UserError where the file cannot be written: a full disk, a folder that is gone or read-only.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            str(path),
            f"'{error.strerror or error}'",
            "a disk that takes the file",
            "make room and run the same command again",
        ) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` in one step."""
    write_bytes(path, text.encode())


def write_with(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` fill a temporary file, then rename it to `path`."""
    with replacing(path) as temporary:
        writer(temporary)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Create `path` and be its only writer until the end of the block; the lock ends with the process, however it ends.

    What a killed writer left half-written is removed. Raises UserError, before any long work starts, where the folder
    cannot be written or another process holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _hold(path)
    except OSError as error:
        raise UserError(
            f"--out {path}", f"'{error.strerror}'", "a folder that can be written", "choose another --out"
        ) from error
    try:
        _remove_parts(path)
        yield path
    finally:
        (path / LOCK).unlink(missing_ok=True)
        os.close(lock)


def clear(path: Path) -> None:
    """Remove what this process, which ends now, has half-written in the folder `path` that it holds."""
    if holds(path):
        _remove_parts(path)
        (path / LOCK).unlink()


def holds(path: Path) -> bool:
    """Return whether this process is the writer of the folder `path`."""
    return (path / LOCK).is_file() and (path / LOCK).read_text() == str(os.getpid())


def _remove_parts(path: Path) -> None:
    for left in path.glob(f".*{PART}"):
        left.unlink()


def _hold(folder: Path) -> int:
    """Return the descriptor of the lock on `folder`; closing it, or the process' end, gives the folder free."""
    while True:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder removes the file: a lock on a file without a name keeps nobody out.
            if os.fstat(lock).st_nlink:
                os.ftruncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
                return lock
        except BlockingIOError as error:
            holder = os.read(lock, 20).decode(errors="replace")
            os.close(lock)
            raise UserError(
                f"--out {folder}",
                f"a folder that process {holder or 'of another run'} is writing into",
                "one run at a time in a folder",
                "wait for it, or choose another --out",
            ) from error
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
