"""A recipe names its backend; no other one is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hadaptive_q.errors import UserError
from hadaptive_q.quant import backends
from hadaptive_q.quant.backends import torchao_pt2e
from hadaptive_q.quant.backends.select import find_backend


def test_only_the_backend_that_was_named_is_imported() -> None:
    code = (
        "import sys\n"
        "from hadaptive_q import pipeline\n"
        "from hadaptive_q.quant.backends.select import find_backend\n"
        "find_backend('torchao')\n"
        "assert 'brevitas' not in sys.modules\n"
        "assert find_backend('brevitas').__name__ == 'hadaptive_q.quant.backends.brevitas'\n"
        "assert 'brevitas' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert find_backend("torchao") is torchao_pt2e


class _Absent:
    """Answers for Brevitas as the import system does where it is not installed."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "brevitas":
            raise ModuleNotFoundError("No module named 'brevitas'", name=name)


def test_a_missing_package_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(backends, "brevitas", raising=False)
    for name in [name for name in sys.modules if "brevitas" in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent, *sys.meta_path])
    with pytest.raises(UserError, match=r"quantize.backend, brevitas: got no package.*hadaptive-q\[brevitas\]"):
        find_backend("brevitas")
