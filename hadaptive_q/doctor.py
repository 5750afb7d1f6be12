"""What this environment has, what is missing, and the command that gets it.

Imports nothing that may be broken: versions come from the metadata of the packages, and whether they load is tried in a
process of its own, which may crash.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hadaptive_q.arm.build import find_tools
from hadaptive_q.errors import UserError

PACKAGE = "hadaptive-q"
# What kernels are chosen by, as /proc/cpuinfo names it.
_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "asimd", "asimddp", "i8mm", "sve")
_IMPORTS = """
import json, sys
import torch; print("torch", flush=True)
import torchao; print("torchao", flush=True)
import executorch.runtime; executorch.runtime.Runtime.get(); print("executorch", flush=True)
cuda = torch.cuda.is_available()
print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []))
"""
_SECONDS = 300


@dataclass(frozen=True)
class Finding:
    """One thing looked at; the main job works only where every `needed` one is "ok".

    `remedy` is a command where there is one.
    """

    name: str
    state: Literal["ok", "missing", "wrong"]
    detail: str
    needed: bool
    remedy: str = ""


def examine(trial: bool = False) -> list[Finding]:
    """Return everything there is to say about this environment; `trial` lowers and runs a tiny network, too."""
    findings = [*_packages()]
    loads, accelerators = _loads()
    findings += [loads, _processor(), *_extras(), _fonts(), _arm(), accelerators]
    return [*findings, _trial()] if trial else findings


def works(findings: Iterable[Finding]) -> bool:
    """Return whether the main job can work."""
    return all(finding.state == "ok" for finding in findings if finding.needed)


def listing(findings: Iterable[Finding]) -> str:
    """Return the findings for a terminal, a line each, with the remedy below what is not as it should be."""
    lines = []
    for finding in findings:
        state = finding.state if finding.needed or finding.state == "ok" else f"{finding.state} (optional)"
        lines.append(f"{finding.name:22} {state}: {finding.detail}")
        if finding.remedy and finding.state != "ok":
            lines.append(f"{'':22} -> {finding.remedy}")
    return "\n".join(lines)


def _packages() -> Iterator[Finding]:
    try:
        own = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        yield Finding(PACKAGE, "missing", "not installed", True, "pip install .")
        return
    python = platform.python_version()
    wanted = own["Requires-Python"] or ""
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    yield Finding("python", "ok" if fits else "wrong", f"{python}, wants {wanted}", True)
    for requirement in _requirements(""):
        state, detail = _installed(requirement)
        yield Finding(requirement.name, state, detail, True, _pip([requirement]))


def _requirements(extra: str) -> list[Requirement]:
    """Return what `extra` wants beyond the package's own dependencies, or those where `extra` is empty."""
    try:
        every = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        return []
    found = [one for one in every if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [one for one in found if not extra or (one.marker and not one.marker.evaluate({"extra": ""}))]


def _installed(requirement: Requirement) -> tuple[Literal["ok", "missing", "wrong"], str]:
    wants = f", wants {requirement.specifier}" if requirement.specifier else ""
    try:
        version: str | None = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "missing", f"not installed{wants}"
    if version is None:  # a folder that an interrupted pip left
        return "wrong", f"no version in its metadata{wants}"
    fits = requirement.specifier.contains(version, prereleases=True)
    return ("ok" if fits else "wrong"), f"{version}{wants}"


def _pip(requirements: Iterable[Requirement]) -> str:
    return " ".join(["pip install", *(f'"{one.name}{one.specifier}"' for one in requirements)])


def _loads() -> tuple[Finding, Finding]:
    """Import what runs and lowers files in another process: it may be built for another machine, and crash."""
    lines, error = _python("-c", _IMPORTS)
    if error:
        loaded = [name for name in ("torch", "torchao", "executorch") if name in lines]
        failed = ("torch", "torchao", "executorch", "torch")[len(loaded)]  # the last asks torch for devices
        own = [one for one in _requirements("") if one.name == failed]
        remedy = _pip(own).replace("install", "install --force-reinstall", 1)
        return (
            Finding("imports", "wrong", f"{failed} does not load: {error}", True, remedy),
            Finding("accelerator", "missing", "not asked: torch does not load", False),
        )
    devices = json.loads(lines[-1])
    return (
        Finding("imports", "ok", "torch, torchao and the ExecuTorch runtime load", True),
        Finding("accelerator", "ok", ", ".join(devices) or "none; training runs on the CPU", False),
    )


def _trial() -> Finding:
    lines, error = _python("-m", "hadaptive_q.trial")
    name, remedy = "trial", "take versions that docs/compatibility.md lists"
    if error:
        return Finding(name, "wrong", error, True, remedy)
    found = json.loads(lines[-1])
    detail = f"{found['bytes']:,} bytes, {found['identical']} of {found['images']} images as the integer interpreter"
    return Finding(name, "ok" if found["identical"] == found["images"] else "wrong", detail, True, remedy)


def _python(*arguments: str) -> tuple[list[str], str]:
    """Return the lines that another Python prints, and why it failed where it did."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [], f"no end after {_SECONDS} s"
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return lines, ""
    said = done.stderr.strip().splitlines() or ["no message"]
    return lines, said[-1] if done.returncode > 0 else f"a crash (signal {-done.returncode})"


def _processor() -> Finding:
    listed = Path("/proc/cpuinfo")
    words = set(listed.read_text().split()) if listed.is_file() else set()
    found = " ".join(name for name in _FEATURES if name in words) or "features unknown"
    return Finding("processor", "ok", f"{platform.machine()}, {found}", False)


def _extras() -> Iterator[Finding]:
    try:
        extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    for extra in sorted({*extras} - {"dev"}):
        wanted = [one for one in _requirements(extra) if one.name != PACKAGE]
        states = {one.name: _installed(one) for one in wanted}
        bad = [one for one in wanted if states[one.name][0] != "ok"]
        state = states[bad[0].name][0] if bad else "ok"
        detail = ", ".join(f"{one.name} {states[one.name][1]}" for one in bad or wanted)
        yield Finding(f"extra {extra}", state, detail, False, _pip(bad))


def _fonts() -> Finding:
    """Distributions strip the fonts out of matplotlib, and `glyphs` renders them."""
    found = find_spec("matplotlib")
    folder = Path(found.origin or "").parent / "mpl-data" / "fonts" / "ttf" if found else Path("nowhere")
    count = len(list(folder.glob("*.ttf")))
    remedy = "pip install --force-reinstall matplotlib"
    return Finding("fonts of --data glyphs", "ok" if count else "missing", f"{count} of matplotlib", False, remedy)


def _arm() -> Finding:
    try:
        tools = find_tools()
    except UserError as error:
        return Finding("bench --core", "missing", f"{error.where}: {error.got}", False, error.remedy)
    return Finding("bench --core", "ok", tools.version, False)
