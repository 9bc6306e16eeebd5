"""What the processor, the compiler and the accelerator at hand can do."""

from __future__ import annotations

import torch

TORCH_VERSION = str(torch.__version__)


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that Inductor would use on the CPU, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler:
        return None


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has bfloat16 products in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def multiplies_in_tf32() -> bool:
    """Whether float32 matrix products on CUDA are allowed to use TF32, by whichever of torch's settings."""
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def runs_our_kernels() -> bool:
    """Whether the package's Triton kernels may run on the ``cuda`` device: not on ROCm, where nobody has tried them."""
    return has_triton() and torch.version.hip is None


def has_triton() -> bool:
    from torch.utils._triton import has_triton as available

    return bool(available())
