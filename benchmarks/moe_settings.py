"""The settings of the grouped products that ``moe.py --sweep`` tries.

GATHERED, which is no setting of the kernels, times a product over rows that another kernel has gathered.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

Setting = dict[str, Any]

GROUPS = (1, 4, 16, 32)  # tried with the best of the others


def _tile(m: int, n: int, warps: int, stages: int, programs: int = 1, k: int = 64) -> Setting:
    sizes = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8, num_warps=warps, num_stages=stages)
    return sizes | (dict(PROGRAMS=programs) if programs > 1 else {})


def _flags(*names: str) -> Iterator[Setting]:
    for values in itertools.product((True, False), repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def _swiglu() -> Iterator[Setting]:
    # two halves of 128 columns a program, or two programs of two halves of 64
    for tile in (_tile(128, 128, 8, 3), _tile(128, 128, 8, 4), _tile(128, 64, 4, 3, 2), _tile(128, 64, 8, 3, 2)):
        for flags in _flags("FLATTEN", "STORES", "GATHERED"):
            yield tile | flags | dict(MERGED=True)
    for tile in (_tile(128, 128, 8, 4), _tile(256, 64, 8, 3)):
        for flags in _flags("FLATTEN", "STORES"):
            yield tile | flags | dict(MERGED=tile["BLOCK_N"] == 64, GATHERED=True)


def _swiglu_backward() -> Iterator[Setting]:
    for tile in (_tile(128, 128, 8, 3), _tile(128, 128, 8, 4)):
        for flags in _flags("FLATTEN", "STORES", "GATHERED"):
            yield tile | flags
    halves = (
        *(_tile(128, 128, 4, 3, 2), _tile(128, 128, 8, 3, 2) | dict(maxnreg=128)),
        *(_tile(128, 64, 4, 3, 2), _tile(128, 64, 4, 4, 2), _tile(128, 64, 4, 4, 3, 32) | dict(maxnreg=168)),
    )
    thirds = (_tile(128, 64, 4, 3, 3) | dict(maxnreg=168), _tile(64, 128, 4, 3, 3) | dict(maxnreg=168))
    for tile in (_tile(128, 128, 8, 3), _tile(128, 64, 4, 3, 2), _tile(128, 64, 8, 3, 2) | dict(maxnreg=128)):
        for flags in _flags("STORES", "GATHERED"):
            yield tile | flags | dict(FLATTEN=False, PARTS=2)
    for tile in halves:  # two programs hide each other's beginnings
        for flags in _flags("STORES", "GATHERED"):
            yield tile | flags | dict(FLATTEN=False)
    for tile in thirds:
        for flags in _flags("GATHERED"):
            yield tile | flags | dict(FLATTEN=False)


def _rows() -> Iterator[Setting]:
    for tile in (_tile(128, 256, 8, 3), _tile(256, 128, 8, 3), _tile(128, 128, 4, 4, 2, 32)):
        for flags in _flags("FLATTEN", "STORES"):
            yield tile | flags
    for tile in (_tile(128, 256, 8, 4), _tile(128, 128, 4, 3, 2), _tile(128, 128, 8, 3, 2)):  # no room for stores
        for flags in _flags("FLATTEN"):
            yield tile | flags


def _sums() -> Iterator[Setting]:
    tiles = (
        *(_tile(128, 256, 8, 3), _tile(128, 256, 8, 4), _tile(256, 128, 8, 3), _tile(256, 128, 8, 4)),
        *(_tile(128, 128, 4, 3, 2), _tile(128, 128, 4, 3)),
    )
    for tile, gathered in itertools.product(tiles, (True, False)):
        yield tile | dict(GATHERED=gathered, DESCRIPTORS=True, LIBRARY=False)
    yield dict(LIBRARY=True, GATHERED=True)
    yield dict(LIBRARY=True)
    yield _tile(128, 128, 8, 4) | dict(LIBRARY=False)


def settings(kernel: str) -> list[Setting]:
    """All but GROUP, which comes after."""
    make = {"swiglu": _swiglu, "swiglu_backward": _swiglu_backward, "down": _rows, "d_hidden": _rows}
    return list(make.get(kernel, _sums)())


def specialized(kernel: str) -> list[Setting]:
    """Those whose warps load or multiply; apart, as Triton compiles few of them."""
    tiles = [_tile(128, 256, 4, stages) for stages in (3, 4)] if kernel in ("down", "d_hidden") else []
    return [tile | dict(FLATTEN=False, SPECIALIZE=True, GROUP=group) for tile in tiles for group in (4, 8, 16)]
