"""The package's types reach its users."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hadaptive_q

SCRIPT = Path(__file__).parent / "typed" / "user_script.py"
PACKAGE = Path(hadaptive_q.__file__).parent


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_a_users_script_is_checked_against_the_package(tmp_path: Path) -> None:
    # From another folder and without our settings; what the package is built on is left out, which saves a minute.
    skipped = ",".join(f"{name}.*" for name in ("torch", "torchao", "executorch", "numpy", "pydantic"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[mypy-{skipped}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path), str(SCRIPT)]
    environment = {**os.environ, "MYPYPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    (mistake,) = [line for line in done.stdout.splitlines() if "error:" in line]
    assert 'expression has type "int", variable has type "str"' in mistake
    assert f"user_script.py:{len(SCRIPT.read_text().splitlines())}:" in mistake
