"""Bad inputs and properties, tried with many more and other examples than the tests draw.

    python benchmarks/properties.py --seed 1

Runs the tests that hand bad inputs over, counts them, and runs the properties under the profile `many`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable

from rows import ROOT, write_robustness

# What is tried -> the tests that try it.
BAD_INPUTS = {
    "checkpoints": ("tests/models/test_checkpoint.py", "tests/models/test_conductor.py", "refused or executed or cut"),
    "images and folders of them": ("tests/data/test_image_file.py", "tests/data/test_folder.py", "not test_any"),
    "tables and manifests": ("tests/data/test_hub.py", "tests/data/test_calibration.py", "not test_any"),
    "recipes and settings": ("tests/test_recipe.py", "explained or refused or answered"),
    "command lines": ("tests/test_cli.py", "mistakes or names or garbage or truncated or broken"),
    "full disks, folders in use, kills at a step": ("tests/test_atomic.py", "tests/test_interruption.py", "test"),
}
PROPERTIES = (
    "tests/test_recipe_properties.py",
    "tests/data/test_calibration_properties.py",
    "tests/data/test_image_file.py",
    "tests/models/test_cross_hadamard.py",
    "tests/quant/test_arithmetic_properties.py",
    "tests/rewrite/test_deploy_properties.py",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    lines = [tried(name, *tests) for name, tests in BAD_INPUTS.items()]
    statistics = ["--hypothesis-show-statistics", f"--hypothesis-seed={arguments.seed}"]
    said = run([*PROPERTIES, *statistics], "test_", HYPOTHESIS_PROFILE="many")
    examples = sum(int(count) for count in re.findall(r"(\d+) passing", said))
    failing = sum(int(count) for count in re.findall(r"(\d+) failing", said))
    properties = len(re.findall(r"^ {2}- during generate phase", said, re.MULTILINE))
    outcome = f"{properties} properties, {failing} examples against one"
    write_robustness("properties", [*lines, ("examples of properties", f"{examples:,}", outcome)])


def tried(name: str, *tests: str) -> tuple[str, ...]:
    """Return a row: how many bad inputs of a kind the tests hand over, and how many were answered as they should."""
    said = run(tests[:-1], tests[-1])
    passed, failed = (sum(map(int, re.findall(rf"(\d+) {word}", said))) for word in ("passed", "failed"))
    return name, str(passed + failed), f"{passed} in one line or as an image of the right size, {failed} not"


def run(tests: Iterable[str], chosen: str, **settings: str) -> str:
    """Return what pytest prints about the `chosen` of `tests`, with `settings` in the environment."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout[-2000:], file=sys.stderr, flush=True)
    return done.stdout


if __name__ == "__main__":
    main()
