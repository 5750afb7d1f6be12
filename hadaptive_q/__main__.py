"""The entry point: parse, run, and turn a user's mistake into one line and exit code 2."""

from __future__ import annotations

import sys

from hadaptive_q.errors import UserError


def main() -> None:
    """Run the command line."""
    from hadaptive_q.cli import app

    try:
        app()
    except UserError as error:
        print(f"hadaptive-q: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
