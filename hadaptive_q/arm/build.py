"""Build what counting needs, once, into the user's cache: runners, plugin, runtime libraries, one fake root per core.

    arm-KEY/  runner  tracing_runner  count_plugin.so  lib/*.so  roots/CORE/{lib, proc/cpuinfo, sys/devices/system/cpu}

KEY is a digest of the sources and of the versions of runtime and emulator: a change of either makes a new folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from hadaptive_q.arm.cores import CORES, Core
from hadaptive_q.cache import cache_folder
from hadaptive_q.errors import UserError

EMULATOR, CROSS, HOST = "qemu-aarch64", "aarch64-linux-gnu-g++", "cc"
INSTALL = "on Debian 12: apt-get install qemu-user g++-aarch64-linux-gnu gcc libc6-dev"

_HERE = Path(__file__).parent
_SOURCES = ("runner.cpp", "tracer.h", "clock.cpp", "count_plugin.c", "build.py", "cores.py")
_LIBRARIES = tuple(
    f"executorch{name}" for name in ("", "_threadpool", "_backend_xnnpack", "_kernels_optimized", "_kernels_quantized")
)
_FLAGS = ("-std=c++17", "-O2", "-Wno-deprecated-declarations", "-DC10_USING_CUSTOM_GENERATED_MACROS")
_WHEEL = ("manylinux_2_28_aarch64", "3.11", "cp", "cp311")
# One processor with a topology of its own, so that neither the thread count nor the kernels follow the host's.
_PROCESSOR = {
    "kernel_max": "0",
    "possible": "0",
    "present": "0",
    "online": "0",
    "cpu0/cpufreq/cpuinfo_max_freq": "2000000",
    "cpu0/cpufreq/cpuinfo_min_freq": "2000000",
    "cpu0/topology/physical_package_id": "0",
    "cpu0/topology/core_id": "0",
    "cpu0/topology/cluster_cpus_list": "0",
    "cpu0/topology/core_siblings_list": "0",
    "cpu0/topology/thread_siblings_list": "0",
}


@dataclass(frozen=True)
class Tools:
    """The programs found on this machine and the emulator's version."""

    emulator: str
    cross: str
    host: str
    version: str


@dataclass(frozen=True)
class Build:
    """A finished build in the cache."""

    folder: Path
    emulator: str

    @property
    def runner(self) -> Path:
        """The guest program that runs a `.pte`."""
        return self.folder / "runner"

    @property
    def tracing_runner(self) -> Path:
        """The same with a clock of its own, which tells operators apart."""
        return self.folder / "tracing_runner"

    @property
    def plugin(self) -> Path:
        """The emulator's plugin that counts."""
        return self.folder / "count_plugin.so"

    def root(self, core: Core) -> Path:
        """The fake root of a guest on `core`."""
        return self.folder / "roots" / core.name


def missing() -> str:
    """Say in one line why nothing can be counted on this machine, or return an empty string."""
    try:
        find_tools()
    except UserError as error:
        return str(error)
    return ""


def find_tools() -> Tools:
    """Find emulator and compilers; raise UserError that names the packages where one is missing or does not fit."""
    found = {name: shutil.which(name) for name in (EMULATOR, CROSS, HOST)}
    absent = [name for name, path in found.items() if path is None]
    if absent:
        raise UserError("emulated ARM64", f"no {', '.join(absent)}", "emulator and compilers", INSTALL)
    emulator, cross, host = (str(path) for path in found.values())
    reported = _output([emulator, "--version"]).partition("\n")[0]
    number = re.search(r"(\d+)\.(\d+)", reported)
    # 7.1 is the first with an A76 and with `sme=off`. Later ones make up /proc/cpuinfo (8.x), change the plugins'
    # interface (9.0) or come as one static program that loads none (Debian 13).
    fits = number is not None and (7, 1) <= (int(number[1]), int(number[2])) < (8, 1)
    if not fits or "-plugin" not in _output([emulator, "--help"]):
        raise UserError(f"emulator {emulator}", f"'{reported}'", "QEMU 7.1 to 8.0 that loads plugins", INSTALL)
    return Tools(emulator, cross, host, reported)


def prepare() -> Build:
    """Return the build in the cache, made now where there is none (a download of 18 MB and some seconds of compiling).

    Raises UserError where a tool is missing, the runtime's wheel cannot be had or a compiler fails.
    """
    tools = find_tools()
    runtime = version("executorch").partition("+")[0]
    digest = hashlib.sha256(f"{runtime}\n{tools.version}\n".encode())
    for name in _SOURCES:
        digest.update((_HERE / name).read_bytes())
    cache = cache_folder()
    folder = cache / f"arm-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as temporary:
                _build(Path(temporary), tools, runtime)
                _rename(Path(temporary) / "build", folder)
        except OSError as error:
            raise UserError(
                f"cache {cache}", f"'{error}'", "a folder that can be written", "set XDG_CACHE_HOME"
            ) from error
    return Build(folder, tools.emulator)


def _rename(built: Path, folder: Path) -> None:
    """Move a whole build into place; the first of two processes wins, and both builds are the same."""
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _build(temporary: Path, tools: Tools, runtime: str) -> None:
    unpacked, build = temporary / "wheel", temporary / "build"
    _download(temporary, unpacked, runtime)
    (build / "lib").mkdir(parents=True)
    for library in _LIBRARIES:
        shutil.copy(unpacked / _library(library), build / "lib")
    include = unpacked / "executorch" / "include"
    flags = [*_FLAGS, f"-I{include}", f"-I{include / 'executorch/runtime/core/portable_type/c10'}"]
    # Operators and delegate register themselves: nothing names them, so the linker must be told to keep them.
    link = [f"-L{build / 'lib'}", "-Wl,--no-as-needed", *(f"-l{name}" for name in _LIBRARIES), "-Wl,-rpath,$ORIGIN/lib"]
    runner, clock = str(_HERE / "runner.cpp"), str(_HERE / "clock.cpp")
    _compile([tools.cross, *flags, runner, *link, "-o", str(build / "runner")])
    # -rdynamic, so that the libraries find this program's clock before the C library's.
    _compile([tools.cross, *flags, runner, clock, "-rdynamic", *link, "-o", str(build / "tracing_runner")])
    plugin = [str(_HERE / "count_plugin.c"), "-o", str(build / "count_plugin.so")]
    _compile([tools.host, "-O2", "-shared", "-fPIC", *plugin])
    libc = Path(_output([tools.cross, "-print-file-name=libc.so.6"]).strip()).resolve().parent
    if not (libc / "ld-linux-aarch64.so.1").exists():
        raise UserError(tools.cross, f"no C library in '{libc}'", "the cross compiler's", INSTALL)
    for core in CORES.values():
        _fake_root(build / "roots" / core.name, core, libc)


def _download(temporary: Path, unpacked: Path, runtime: str) -> None:
    """Fetch the runtime's wheel for ARM64, a complete C++ development kit, with the user's pip, and unpack it."""
    platform, python, implementation, abi = _WHEEL
    command = [sys.executable, "-m", "pip", "download", f"executorch=={runtime}", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", platform, "--python-version", python, "--implementation", implementation, "--abi", abi]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        got = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(
            f"executorch {runtime} for ARM64", f"'{got}'", "a wheel that pip can download", "check pip and the network"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(
            unpacked, [name for name in wheel.namelist() if name.startswith(("executorch/include/", "executorch/lib/"))]
        )
    absent = [name for name in _LIBRARIES if not (unpacked / _library(name)).is_file()]
    if absent:
        raise UserError(
            f"executorch {runtime} for ARM64",
            f"a wheel without {_library(absent[0])}",
            "one with the C++ runtime, as 1.5.1 has it",
        )


def _library(name: str) -> str:
    return f"executorch/lib/lib{name}.so"


def _compile(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise UserError(command[0], f"'{(errors or ['no message'])[0]}'", "sources that compile", INSTALL)


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout


def _fake_root(root: Path, core: Core, libc: Path) -> None:
    """Lay out what the guest sees first: the cross compiler's libraries and a machine with one `core`."""
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(core.cpuinfo)
    (root / "lib").symlink_to(libc)
    for name, value in _PROCESSOR.items():
        path = root / "sys/devices/system/cpu" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
