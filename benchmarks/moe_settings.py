"""The settings of the grouped products that ``moe.py --sweep`` tries.

GATHERED, which is no setting of the kernels, times a product over rows that another kernel has gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Setting = dict[str, Any]

GROUPS = (1, 4, 16)  # tried with the best of the others


def _tile(m: int, n: int, warps: int, stages: int, **more: Any) -> Setting:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=64, GROUP=8, num_warps=warps, num_stages=stages) | more


def _alone(m: int, n: int, warps: int, stages: int) -> Iterator[Setting]:
    """One program per multiprocessor."""
    for flatten in (True, False):
        yield _tile(m, n, warps, stages, PROGRAMS=1, maxnreg=None, FLATTEN=flatten)


def _two(m: int, n: int, warps: int, stages: int, maxnreg: int | None = None) -> Setting:
    """Two programs per multiprocessor, of which one stores while the other multiplies."""
    return _tile(m, n, warps, stages, PROGRAMS=2, maxnreg=maxnreg, FLATTEN=False)


def _gathered_or_not(tiles: Iterable[Setting]) -> Iterator[Setting]:
    for tile in tiles:
        yield tile | dict(GATHERED=True)
        yield tile | dict(GATHER=True)


def _swiglu() -> Iterator[Setting]:
    return _gathered_or_not([*_alone(128, 128, 8, 3), *_alone(128, 128, 8, 4), *_alone(256, 64, 8, 3)])


def _swiglu_backward() -> Iterator[Setting]:
    alone = (*_alone(128, 128, 8, 3), *_alone(128, 128, 8, 4))
    return _gathered_or_not([*alone, _two(128, 128, 8, 3, 128), _two(128, 128, 4, 3), _two(128, 64, 4, 4)])


def _rows() -> Iterator[Setting]:
    for tile in ((128, 256, 8, 3), (256, 128, 8, 3), (128, 256, 8, 4)):
        yield from _alone(*tile)
    yield _two(128, 128, 8, 3)


def _sums() -> Iterator[Setting]:
    for tile in (_tile(128, 256, 8, 3), _tile(256, 128, 8, 3), _tile(128, 128, 4, 3)):
        yield tile | dict(GATHERED=True)
        yield tile  # the time of the gather is in it
    yield _tile(128, 128, 8, 4, DESCRIPTORS=False)


def settings(kernel: str) -> list[Setting]:
    """All but GROUP, which comes after."""
    make = {"swiglu": _swiglu, "swiglu_backward": _swiglu_backward, "down": _rows, "d_hidden": _rows}
    return list(make.get(kernel, _sums)())
