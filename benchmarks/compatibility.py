"""Which versions work: lower and run the nano network in each set, and run every set's files in every other's runtime.

    python benchmarks/compatibility.py --folder FOLDER

Makes one virtual environment per set in FOLDER (minutes, some GB; finished ones are used again) from wherever pip is
set up to install from, with the dependencies of this checkout but for those the set names, and writes the tables in
docs/compatibility.md. A file "works" where it gives the logits of its program's integer interpreter on every image, bit
for bit (a float file: torch's, up to the order of additions), on this machine and on one emulated ARM64 core, whose
runtime is the set's own ExecuTorch for ARM64.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from rows import ROOT, Row, markdown, read_results, write_results, write_table

CORE = "cortex-a76"
# The versions of what decides a file. pip takes the newest of each that fits the names given here.
SETS = tuple({"executorch": version, "torch": "2.13.*", "torchao": "0.18.*"} for version in ("1.5.1", "1.4.1"))
PAGE = ROOT / "docs" / "compatibility.md"
_VERSIONS = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for environments and files; without it only the tables are made")
    folder = parser.parse_args().folder
    if folder:
        write_results("compatibility", measure(folder.resolve()))
    rows = read_results("compatibility")
    write_table("compatibility", own_table(rows), PAGE)
    write_table("crossed", crossed_table(rows), PAGE)


def measure(folder: Path) -> list[Row]:
    """Return a row per file, set that wrote it, set that runs it and machine."""
    pythons = [environment(folder, versions) for versions in SETS]
    installed = [json.loads(_output(python, "-c", _VERSIONS % list(SETS[0]))) for python in pythons]
    written = [write(python) for python in pythons]
    rows = []
    for files, by in zip(written, installed, strict=True):
        for python, in_ in zip(pythons, installed, strict=True):
            found = run(python, files) if isinstance(files, Path) else [_refused(files)]
            rows += [{"written_by": by, "run_in": in_, **row} for row in found]
            print(by["executorch"], "in", in_["executorch"], json.dumps(found), file=sys.stderr, flush=True)
    return rows


def environment(folder: Path, versions: dict[str, str]) -> Path:
    """Return the Python of an environment with `versions` and everything else that this checkout wants."""
    home = folder / "-".join(f"{name}{version.strip('.*')}" for name, version in versions.items())
    python = home / "bin" / "python"
    if not (home / "finished").is_file():
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        others = [one for one in wanted if re.split(r"[^\w-]", one)[0] not in versions]
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pinned = [f"{name}=={version}" for name, version in versions.items()]
        _output(python, "-m", "pip", "install", "--quiet", "--no-compile", *pinned, *others)
        # Its own pins may forbid the set: whether they should is the question.
        _output(python, "-m", "pip", "install", "--quiet", "--no-deps", str(ROOT))
        (home / "finished").touch()
    return python


def write(python: Path) -> Path | str:
    """Return the folder with this environment's files, or why it writes none."""
    folder = python.parent.parent / "files"
    if not (folder / "finished").is_file():
        folder.mkdir(exist_ok=True)
        try:
            _output(python, "benchmarks/one_set.py", "write", str(folder))
        except subprocess.CalledProcessError as error:
            return str(error.stderr).strip().splitlines()[-1]
        (folder / "finished").touch()
    return folder


def run(python: Path, files: Path) -> list[Row]:
    """Return what each of `files` does in this environment; one that takes the process down says so."""
    command = [str(python), "benchmarks/one_set.py", "run", str(files), "--core", CORE]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [""])[-1]
        found.append(_refused(f"the process ends with {done.returncode}: {said}"))
    return found


def _refused(why: str) -> Row:
    return {"file": "what is not named here", "core": "", "refused": why}


def _output(python: Path, *arguments: str) -> str:
    command = [str(python), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), check=True, capture_output=True, text=True)
    return done.stdout


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def own_table(rows: list[Row]) -> str:
    """Return the sets, and how their own files do in them."""
    lines: list[tuple[str, ...]] = []
    for versions in _sets(rows):
        own = [row for row in rows if row["written_by"] == row["run_in"] == versions]
        results = [_result([row for row in own if row["core"] == core]) for core in ("", CORE)]
        lines.append((*(versions[name] for name in SETS[0]), *results))
    return markdown((*SETS[0], "this machine", CORE), lines)


def crossed_table(rows: list[Row]) -> str:
    """Return what the files of one set do in the runtime of another."""
    sets = _sets(rows)
    lines: list[tuple[str, ...]] = []
    for by in sets:
        of_it = [row for row in rows if row["written_by"] == by]
        cells = [_on_both([row for row in of_it if row["run_in"] == in_]) for in_ in sets]
        lines.append((f"written by {by['executorch']}", *cells))
    return markdown(("", *(f"run by {versions['executorch']}" for versions in sets)), lines)


def _sets(rows: list[Row]) -> list[dict[str, str]]:
    return list({tuple(row["run_in"].values()): row["run_in"] for row in rows}.values())


def _on_both(rows: list[Row]) -> str:
    here, there = (_result([row for row in rows if row["core"] == core]) for core in ("", CORE))
    return here if here == there else f"this machine: {here}; {CORE}: {there}"


def _result(rows: list[Row]) -> str:
    failed = [row for row in rows if row.get("same") != row.get("images") or "refused" in row]
    if not rows:
        return "not run"
    if not failed:
        return f"all {len({row['file'] for row in rows})} files"
    files: dict[str, list[str]] = {}
    for row in failed:
        files.setdefault(row.get("refused") or "{same} of {images} images".format(**row), []).append(row["file"])
    said = [f"{'none' if len(names) == len(rows) else ', '.join(names)}: {why}" for why, names in files.items()]
    return "; ".join(said).replace("|", "/")


if __name__ == "__main__":
    main()
