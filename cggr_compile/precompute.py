"""``python -m cggr_compile reference-loss``: what ``scoring="excess"`` needs, computed once, before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Combination = Literal["mean", "min"]


def reference_loss(
    models: Sequence[str | Path],
    tokens: str | Path,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    combine: Combination = "mean",
    batch_size: int = 8,
    device: str = "cpu",
) -> Iterator[float]:
    """Write the loss that reference models have on every token of a dataset (Rho-1, arXiv 2404.07965, equation 2).

    Args:
        models: folders of transformers models, of the tokenizer that made ``tokens``; loaded one after the other, in
            the number format that they are stored in.
        tokens: a ``.npy`` file, integers [N, S]: N sequences as the training will see them. Its memory is mapped, not
            read at once; so is the result's.
        out: the ``.npy`` file to write, float32 [N, S]: at position t the loss on the token that position t predicts;
            0 at the last position and wherever there is no label. Row n belongs to row n of ``tokens``; give both to
            :func:`cggr_compile.with_reference_loss`. Complete only when the iterator is exhausted: until then the file
            has ``.part`` at the end of its name.
        labels: a file like ``tokens``, -100 where there is no label; None: the tokens.
        combine: of several models the ``mean`` of their losses, or the ``min``: what any of them can predict is not
            worth a reference's doubt.

    Yields:
        the share of the work that is done, after every batch.

    Raises:
        ValueError: for files that do not fit, or a model that does not know a token. Nothing runs before the first
            ``next()``.
    """
    import numpy as np

    if combine not in get_args(Combination):
        raise ValueError(f"combine must be one of {sorted(get_args(Combination))}, got {combine!r}")
    if batch_size < 1 or not models:
        raise ValueError(f"there must be at least one model and batch_size >= 1, got {list(models)} and {batch_size}")
    ids = _read(tokens, "tokens")
    targets = ids if labels is None else _read(labels, "labels")
    if targets.shape != ids.shape:
        raise ValueError(f"labels must have the shape of tokens, {ids.shape}, got {targets.shape}")
    part = Path(f"{out}.part")
    found = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=ids.shape)
    count = len(ids)
    for number, name in enumerate(models):
        model = _load(name).to(device).eval()
        known = model.get_input_embeddings().num_embeddings
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            batch, target = _tensor(ids[rows]), _tensor(targets[rows])
            if int(batch.min()) < 0 or int(max(batch.max(), target.max())) >= known:
                raise ValueError(
                    f"tokens must be in [0, {known}), the vocabulary of {name}: sequences {start} to "
                    f"{start + len(batch) - 1} of {tokens} have others (another tokenizer?)"
                )
            losses = _losses(model, batch.to(device), target.to(device)).cpu().numpy()
            if number == 0:
                found[rows] = losses
            elif combine == "min":
                found[rows] = np.minimum(found[rows], losses)
            else:
                found[rows] += (losses - found[rows]) / (number + 1)
            yield (number + min(start + batch_size, count) / count) / len(models)
        del model
    found.flush()
    part.replace(out)


@torch.no_grad()
def _losses(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """float32 [B, S]; logits are float32 for one sequence at a time."""
    logits = model(input_ids=ids, use_cache=False).logits
    target = F.pad(labels[:, 1:], (0, 1), value=-100)
    return torch.stack(
        [F.cross_entropy(row.float(), each, reduction="none") for row, each in zip(logits, target, strict=True)]
    )


def _load(name: str | Path) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("models: reading them needs transformers (pip install transformers)") from error
    if not Path(name).is_dir():  # never a download in the middle of a long run
        raise ValueError(f"models must be folders of transformers models; no such folder: {name}")
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto", local_files_only=True)


def _read(path: str | Path, what: str) -> Any:
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} must be a .npy file: {path}: {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0:
        raise ValueError(f"{what} must be integers [N, S], got {array.dtype} {array.shape} in {path}")
    return array


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array.astype("int64"))
