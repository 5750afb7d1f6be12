"""The entry point: parse, run, and turn a user's mistake into one line and exit code 2."""

from __future__ import annotations

import logging
import sys
import warnings

from hadaptive_q.errors import UserError


def main() -> None:
    """Run the command line."""
    from hadaptive_q.cli import app

    # What libraries tell each other (deprecated calls, kernels for other machines) is no message to the user.
    warnings.simplefilter("ignore")
    for name in ("torchao", "torch.utils._pytree", "torch.export", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except UserError as error:
        print(f"hadaptive-q: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:
            raise
        # The system's word on a file that is gone, a name that is too long, a disk that fails.
        reason = UserError(str(error.filename or "a file"), f"'{error.strerror}'", "files that can be read and written")
        print(f"hadaptive-q: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
