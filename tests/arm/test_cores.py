"""The table of cores: what the guest reads, and what a wrong name answers."""

from __future__ import annotations

import pytest

from hadaptive_q.arm.cores import CORES, Core, find_core
from hadaptive_q.errors import UserError


def test_five_cores_by_name() -> None:
    assert list(CORES) == ["cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76", "neoverse-v1"]
    assert all(find_core(name).name == name for name in CORES)


@pytest.mark.parametrize("core", CORES.values(), ids=lambda core: core.name)
def test_cpuinfo_names_the_core_and_its_features(core: Core) -> None:
    lines = dict(line.split("\t: ") for line in core.cpuinfo.splitlines() if line)
    assert int(lines["CPU part"], 16) == core.part
    assert lines["Features"] == core.features
    assert ("asimddp" in core.features) == (core.name not in {"cortex-a53", "cortex-a72"})
    assert ("i8mm" in core.features) == (core.name == "neoverse-v1")


def test_sme_stays_off() -> None:
    assert all("sme=off" in core.cpu for core in CORES.values() if core.cpu.startswith("max"))


def test_unknown_core_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'cortex-a76'"):
        find_core("cortex-a78")
