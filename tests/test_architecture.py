"""The rules of the tree: who may import whom, which library lives where, what must answer without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hadaptive_q"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
# Lower layers first; a module imports its own layer and those before it.
LAYERS = [
    ["errors", "atomic", "cache", "interruption", "processes"],
    ["models.config", "quant.formats"],
    ["recipe", "candidates", "models", "data"],
    ["rewrite", "train"],
    ["quant"],
    ["arm"],
    ["lower"],
    ["report"],
    ["significance"],
    ["baseline"],
    ["changes"],
    ["regress", "passports", "measurement"],
    ["pipeline", "evaluate", "bench", "restore", "explain", "export", "search", "trial", "verify"],
    ["finished", "compare"],
    ["share"],
    ["doctor", "examples", "options", "progress"],
    ["cli_compare", "cli_share"],
    ["cli", "pytest_plugin", "__main__", "__init__"],
]
FENCES = {
    "torchao": {"quant/fake_quant.py", "quant/backends/torchao_pt2e.py"},
    "executorch": {
        "lower/executorch.py",
        "lower/delegate.py",
        "lower/read_delegate.py",
        "lower/idle_work.py",
        "lower/runtime.py",
        "lower/int8_tables.py",
        "lower/fused_clamps.py",
        "lower/uint8_input.py",
        "lower/pointwise_int4.py",
    },
    "brevitas": {"quant/backends/brevitas.py"},
    "onnx": {"lower/onnx.py", "lower/tidy_onnx.py"},
    "onnxruntime": {"lower/onnx.py"},
    "matplotlib": {"report/plots.py", "report/front_plot.py", "data/glyphs.py"},
    "typer": {"cli.py", "cli_compare.py", "cli_share.py", "options.py"},
    "datasets": {"data/hub.py"},
    "pyarrow": {"data/hub.py"},
    "huggingface_hub": {"share.py", "report/card.py"},
    "kornia": {"data/transforms.py"},
    "accelerate": {"train/loop.py", "train/together.py"},
    "triton": {"models/cross_hadamard_triton.py"},
    "sklearn": {"data/digits.py"},
    "jinja2": {"report/render.py"},
    "scipy": {"quant/assignment.py", "significance.py"},
    "pytest": {"pytest_plugin.py"},
}


def imports(path: Path) -> set[str]:
    """Return the dotted names a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    for prefix in (module, *(module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1))):
        for index, names in enumerate(LAYERS):
            if prefix in names:
                return index
    raise AssertionError(f"{module} belongs to no layer: name it in LAYERS")


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "__init__" else name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = layer(module_name(path))
    known = {module_name(p) for p in SOURCES}
    for name in imports(path):
        if name.startswith("hadaptive_q."):
            target = name.removeprefix("hadaptive_q.")
            if target in known:
                assert layer(target) <= own, f"{module_name(path)} imports {target}, which lies above it"


@pytest.mark.parametrize("library", FENCES)
def test_libraries_live_in_one_place(library: str) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users <= FENCES[library]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_named_for_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert path.stem not in {"util", "utils", "common", "helper", "helpers", "misc"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_refused_habits(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in {"", "Exception", "BaseException"}, f"line {node.lineno} catches everything"
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["qat", "--help"],
        ["explain", "--help"],
        ["search", "--help"],
        ["search", "no.safetensors", "--target-size", "many"],
        ["check", "no-such-run", "--budget", "size.ratio < 1"],
        ["compare", "hadaptive_net_s", "--core", "cortex-a7"],
        ["compare", "hadaptive_net_xs"],
        ["compare", "hadaptive_net_s", "--recipe", "mobilenet_v3_small=int8"],
        ["recipes"],
        ["doctor", "--help"],
        ["--quiet", "qat", "--recipe", "int9"],
        ["qat", "--to", "onxx"],
        ["qat", "--input", "uint9"],
        ["qat", "--set", "fit.epoch=3"],
        ["qat", "--set", "fit.epochs=many"],
    ],
    ids=" ".join,
)
def test_answers_without_loading_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from hadaptive_q.__main__ import main\n"
        f"sys.argv = ['hadaptive-q', *{arguments!r}]\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch was imported" not in done.stderr
    assert done.returncode in (0, 2), done.stderr
