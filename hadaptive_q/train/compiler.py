"""Whether torch.compile has what it needs on this machine, said before a training starts."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from hadaptive_q.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Raise UserError where no compiler for `device` is present: Triton for GPUs, one for C++ for the CPU."""
    if device.type == "cpu":
        try:
            get_cpp_compiler()
            return
        except InvalidCxxCompiler:
            wanted = "a C++ compiler, such as g++"
    elif find_spec("triton"):
        return
    else:
        wanted = "the package triton"
    raise UserError("compile: true", "no compiler", wanted, "install it, or train with compile: false")
