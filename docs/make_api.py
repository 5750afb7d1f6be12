"""Write docs/api.md from the docstrings of what users call.

python docs/make_api.py
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import hadaptive_q

PAGE = Path(__file__).parent / "api.md"
# Beside `hadaptive_q.__all__`: the steps of the command line, by module.
ENTRY_POINTS = {
    "recipe": ("load_recipe", "Recipe"),
    "pipeline": ("train_float", "quantize"),
    "evaluate": ("evaluate_file",),
    "bench": ("bench_files",),
    "candidates": ("find_candidates",),
    "compare": ("compare",),
    "explain": ("explain", "write_explanation"),
    "search": ("Goal", "search"),
    "export": ("export_run",),
    "restore": ("open_run",),
    "verify": ("verify",),
    "share": ("pull",),
    "regress": ("hold", "Outcome", "figures"),
    "report.record": ("read_report", "Report"),
    "data.sources": ("open_data",),
    "lower.file_formats": ("open_file",),
    "lower.runtime": ("PteFile",),
    "quant.interpreter": ("IntegerProgram",),
    "arm.count": ("count_instructions", "run_on"),
    "errors": ("UserError",),
}
INTRODUCTION = """# The Python interface

Made from the docstrings by `python docs/make_api.py`. Shapes: `B` images, `C` channels, `H` and `W` pixels.
"""
WIDTH = 100


def page() -> str:
    """Return the whole page."""
    sections = [("hadaptive_q", [getattr(hadaptive_q, name) for name in hadaptive_q.__all__])]
    for path, names in ENTRY_POINTS.items():
        module = importlib.import_module(f"hadaptive_q.{path}")
        sections.append((module.__name__, [getattr(module, name) for name in names]))
    parts = [f"## `{name}`\n\n{''.join(map(entry, members))}" for name, members in sections]
    return "\n".join([INTRODUCTION, *parts]).rstrip() + "\n"


def entry(member: Any) -> str:
    """Return a function or a class with the methods of its own that say what they do."""
    text = f"### {member.__name__}\n\n{_code(member)}{_doc(member)}"
    if inspect.isclass(member):
        for name, method in vars(member).items():
            if inspect.isfunction(method) and method.__doc__ and (not name.startswith("_") or name == "__call__"):
                text += f"`{member.__name__}.{name}{_signature(method)}`: {_doc(method)}"
    return text


def _code(member: Any) -> str:
    return "```python\n" + _declaration(member).replace("'", '"') + "\n```\n\n"


def _declaration(member: Any) -> str:
    if inspect.isclass(member) and issubclass(member, BaseModel):
        fields = "\n".join(f"    {name}: {kind}" for name, kind in member.__annotations__.items())
        return f"class {member.__name__}:\n{fields}"
    signature = _signature(member)
    line = f"{member.__name__}{signature}"
    if len(line) > WIDTH:
        inside = "".join(f"    {parameter},\n" for parameter in signature.parameters.values())
        line = f"{member.__name__}(\n{inside})"
        if signature.return_annotation is not inspect.Signature.empty:
            line += f" -> {signature.return_annotation}"
    return line


class _Bare(str):
    """An annotation that is printed without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(member: Any) -> inspect.Signature:
    found = inspect.signature(member)
    parameters = [one.replace(annotation=_bare(one.annotation)) for one in found.parameters.values()]
    return found.replace(parameters=parameters, return_annotation=_bare(found.return_annotation))


def _bare(annotation: object) -> object:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _doc(member: Any) -> str:
    return (inspect.getdoc(member) or "").replace("``", "`") + "\n\n"


if __name__ == "__main__":
    PAGE.write_text(page())
