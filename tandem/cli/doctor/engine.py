"""Checks of what computes: compiler, kernels, accelerators."""

from __future__ import annotations

import torch

from tandem.cli.doctor.report import Check, Group, ok_or
from tandem.device import accelerators
from tandem.engine.kernels.build import COMPILERS, cpu_features, find_compiler
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kernels.choose_gpu import UNMEASURED, installed_gpu_kernels

TELLING = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Instruction sets that decide how fast a model runs."""


def check_kernels() -> Group:
    """Compiles the native kernels if that was not done before; may take some seconds then."""
    features, compiler = cpu_features(), find_compiler()
    chosen = choose_kernels("auto", torch.device("cpu"))
    install = f"install a C++ compiler ({', '.join(COMPILERS)}), such as apt install g++; without, decoding is slow"
    gpu = installed_gpu_kernels()
    return Group(
        "kernels",
        [
            Check("instruction sets", " ".join(name for name in TELLING if name in features) or "unknown"),
            ok_or(f"{compiler.version} ({compiler.path})" if compiler else "none", "compiler", bool(compiler), install),
            ok_or(
                f"{chosen.name}: {chosen.detail}",
                "CPU kernels",
                chosen.name == "native",
                "see the compiler above" if compiler is None else "see the reason, and the log of the compilation",
            ),
            Check("GPU kernels", f"{', '.join(gpu)} ({UNMEASURED})" if gpu else "none"),
            Check("accelerators", ", ".join(accelerators()) or "none"),
            Check("threads", f"{torch.get_num_threads()} for a worker that sets none"),
            Check("overlap of steps", f"off unless asked for: no faster on CPUs; on GPUs {UNMEASURED}"),
        ],
    )
