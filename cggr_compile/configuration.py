"""What one captured graph is compiled with, the same at each of its ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cggr_compile import compat
from cggr_compile.engine import Engine, device_of, engine_for
from cggr_compile.options import OptionError, Options
from cggr_compile.pipeline import check_disabled


@dataclass(frozen=True)
class Configuration:
    """Options, compiler and Inductor's settings of one compilation.

    Attributes:
        options: as the user gave them.
        engine: what compiles the graph.
        patches: Inductor's settings: those of the mode, of the option ``inductor`` and of ``cuda_graphs``.
        notice: what the user should hear about them; empty if nothing.
    """

    options: Options
    engine: Engine
    patches: Mapping[str, Any]
    notice: str = ""

    @classmethod
    def of(cls, options: Options, mode: str | None, inputs: Sequence[Any]) -> Configuration:
        """Settle what is left open.

        Raises:
            OptionError: ``mode``, ``inductor`` or ``disable_passes`` names what does not exist.
        """
        modes = compat.inductor_modes()
        if mode is not None and mode not in modes:
            raise OptionError(f"mode must be one of {sorted(modes)}, got {mode!r}")
        check_disabled(options)
        patches = {**modes[mode or "default"], **options.inductor}
        if options.cuda_graphs:
            patches[compat.CUDA_GRAPHS] = True
        unknown = sorted(set(patches) - compat.inductor_option_names())
        if unknown:
            raise OptionError(f"inductor: unknown Inductor settings {unknown}")
        engine, _ = engine_for(device_of(inputs), options.compiler)
        notice = ""
        if patches.get(compat.CUDA_GRAPHS) and engine != "Inductor CUDA":
            notice = f"CUDA graphs do nothing here: the compiler is {engine}"
            patches[compat.CUDA_GRAPHS] = False
        return cls(options, engine, patches, notice)

    def without(self, name: str) -> Configuration:
        """The same, with an optional pass switched off."""
        options = replace(self.options, disable_passes=(*self.options.disable_passes, name))
        return replace(self, options=options)

    @property
    def pays_launches(self) -> bool:
        """Whether every kernel launch costs the host's time."""
        return self.engine == "Inductor CUDA" and not self.patches.get(compat.CUDA_GRAPHS)

    @property
    def replays(self) -> bool:
        """Whether the next step overwrites what this one returns."""
        return self.engine == "Inductor CUDA" and compat.uses_cuda_graphs(dict(self.patches))
