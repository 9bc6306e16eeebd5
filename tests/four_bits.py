"""Linear layers with weights in four bits: bitsandbytes' where it is installed, else what its graph looks like."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None

if not INSTALLED:  # the same operators by name and signature: a linear code of sixteen steps
    LIBRARY = torch.library.Library("bitsandbytes", "DEF")
    LIBRARY.define("dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, "
                   "ScalarType dtype) -> Tensor")  # fmt: skip
    LIBRARY.define("gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
                   "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
                   "Tensor? absmax_offset=None) -> Tensor")  # fmt: skip

    def unpacked(packed: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: Any, dtype: torch.dtype) -> Tensor:
        codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1, blocksize)
        return ((codes.float() / 7.5 - 1.0) * absmax[:, None]).to(dtype).view(list(shape))

    def product(x: Tensor, packed: Tensor, shape: Any, absmax: Tensor, blocksize: int, kind: str, *rest: Any) -> Tensor:
        return x @ unpacked(packed, absmax, blocksize, kind, shape, x.dtype).T

    LIBRARY.impl("dequantize_4bit", unpacked, "CPU")
    LIBRARY.impl("gemm_4bit", product, "CPU")
    torch.library.register_fake("bitsandbytes::dequantize_4bit", lib=LIBRARY)(
        lambda packed, absmax, blocksize, kind, shape, dtype: packed.new_empty(shape, dtype=dtype)
    )
    torch.library.register_fake("bitsandbytes::gemm_4bit", lib=LIBRARY)(
        lambda x, packed, shape, *rest: x.new_empty((*x.shape[:-1], shape[0]))
    )


class Product(torch.autograd.Function):
    """Packed forward; the backward unpacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return torch.ops.bitsandbytes.gemm_4bit.default(x, packed, shape, absmax, BLOCK, "nf4", bias=None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        packed, absmax = ctx.saved_tensors
        weight = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, BLOCK, "nf4", ctx.shape, grad.dtype)
        return torch.matmul(grad, weight), None, None, None


class PackedLinear(nn.Linear):
    """Frozen, without a bias."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        blocks = layer.weight.detach().reshape(-1, BLOCK)
        self.register_buffer("absmax", blocks.abs().amax(1))
        codes = ((blocks / self.absmax[:, None] + 1.0) * 7.5).round().to(torch.uint8).view(-1, 2)
        self.weight = nn.Parameter((codes[:, :1] << 4) | codes[:, 1:], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        if x.requires_grad and torch.is_grad_enabled():
            return Product.apply(x, self.weight, self.absmax, shape)
        return torch.ops.bitsandbytes.gemm_4bit.default(x, self.weight, shape, self.absmax, BLOCK, "nf4")


def packed(layer: nn.Linear, nested: bool) -> nn.Module:
    """A layer without a bias in four bits. ``nested``: the scales in eight bits, if the library is there."""
    if not INSTALLED:
        return PackedLinear(layer)
    import bitsandbytes as bnb

    arguments = {"quant_type": "nf4", "compress_statistics": nested}
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, **arguments
    )
    made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, **arguments)
    return made.to("cpu")


def pack(model: nn.Module, nested: bool = False) -> nn.Module:
    """Packs every linear layer but the head, in place."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not name.endswith("lm_head"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, packed(layer, nested))
    return model
