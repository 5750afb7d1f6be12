"""The one error a user causes: a single clear line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec


class UserError(Exception):
    """A mistake the user can mend.

    The message is one line: where it happened, what came, what was expected, what to do.
    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, where: str, got: str, expected: str, remedy: str = "") -> None:
        self.where, self.got, self.expected, self.remedy = where, got, expected, remedy
        line = f"{where}: got {got}; expected {expected}"
        super().__init__(" ".join((line + (f"; {remedy}" if remedy else "")).split()))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, ...]]:
        return type(self), (self.where, self.got, self.expected, self.remedy)


def first_line(error: BaseException) -> str:
    """Return the first line of what `error` says, or its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the choice nearest to `word`, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else ""


def require(where: str, extra: str, packages: Sequence[str]) -> None:
    """Raise UserError unless all `packages` of the package's extra are installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        got = f"no {', '.join(missing)} in this environment"
        raise UserError(where, got, f"the packages of the extra '{extra}'", f"pip install {' '.join(packages)}")
