"""Text for quality.py: what Python sources and documentation the machine has, and GSM8K, as blocks of tokens.

Nothing is downloaded. The text depends on the machine, so losses compare within one corpus only; its ``digest`` is in
every result.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

GSM8K = Path(__file__).resolve().parent.parent / "data" / "gsm8k"
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
FILE_BYTES = (200, 200_000)  # smaller says nothing, larger is usually data
HELD_OUT = 40  # one file in so many
LINE = 30  # characters: shorter lines are in every file
TOKENIZER_BYTES = 16_000_000
END = "<|end|>"
IGNORE = -100


@dataclass(frozen=True)
class Blocks:
    """Token sequences, int32 [N, S] each; labels are the ids, or -100."""

    ids: Tensor
    labels: Tensor

    def to(self, device: str) -> Blocks:
        return Blocks(self.ids.to(device), self.labels.to(device))

    def head(self, tokens: int) -> Blocks:
        """About so many tokens, at least one sequence."""
        count = max(1, tokens // self.ids.shape[1])
        return Blocks(self.ids[:count], self.labels[:count])

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def share(self) -> float:
        """Of the tokens that have a label."""
        return float((self.labels != IGNORE).float().mean())

    @property
    def usual_labels(self) -> int:
        """As many as 95 of 100 sequences have at most; the first position is nobody's prediction."""
        counts = (self.labels[:, 1:] != IGNORE).sum(1)
        return int(counts.sort().values[int(0.95 * (len(counts) - 1))])


@dataclass(frozen=True)
class Corpus:
    """Encoded files, their tokens joined; what they were made of."""

    train: np.ndarray[Any, Any]
    held_out: np.ndarray[Any, Any]
    tokenizer: Tokenizer
    facts: dict[str, Any]

    def blocks(self, part: str, length: int) -> Blocks:
        ids = _cut(getattr(self, part), length)
        return Blocks(ids, ids.clone())


def load_corpus(folder: Path, *, vocab: int, megabytes: float, roots: Sequence[Path] | None = None) -> Corpus:
    """The corpus of this machine, read from ``folder`` or made and kept there.

    Args:
        vocab: of the tokenizer that is trained. megabytes: of text at most, of files chosen by their digest.
        roots: folders to take files from; None for all that :func:`installed` names.
    """
    key = hashlib.sha256(json.dumps([vocab, megabytes, *map(str, roots or [])]).encode()).hexdigest()[:8]
    base = folder / f"text-{key}"
    paths = {name: base / name for name in ("train.npy", "held_out.npy", "tokenizer.json", "facts.json")}
    if not paths["facts.json"].exists():  # it is written last
        base.mkdir(parents=True, exist_ok=True)
        _make(paths, vocab, megabytes, installed() if roots is None else roots)
    return Corpus(
        np.load(paths["train.npy"], mmap_mode="r"),
        np.load(paths["held_out.npy"], mmap_mode="r"),
        Tokenizer.from_file(str(paths["tokenizer.json"])),
        json.loads(paths["facts.json"].read_text()),
    )


def installed() -> list[Path]:
    """Standard library, installed packages, their documentation; no file below two of them counts twice."""
    known = sysconfig.get_paths()
    found = [Path(known[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return [*dict.fromkeys([*found, *(Path(p) / "share" / "doc" for p in (sys.prefix, sys.base_prefix))])]


def few() -> list[Path]:
    """A part of the standard library that is read in a second."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [library / name for name in ("asyncio", "email", "http", "multiprocessing", "unittest", "xml", "json")]


def _make(paths: dict[str, Path], vocab: int, megabytes: float, roots: Sequence[Path]) -> None:
    files = read_files(roots, int(megabytes * 1e6))
    train, held_out = split(files)
    if not train or not held_out:
        raise ValueError(f"{len(files)} files of text found below {', '.join(map(str, roots))}: too few to split")
    tokenizer = train_tokenizer([*_gsm8k_texts("train"), *train.values()], vocab)
    tokenizer.save(str(paths["tokenizer.json"]))
    sizes = {}
    for name, part in (("train", train), ("held_out", held_out)):
        tokens = encode(part.values(), tokenizer)
        np.save(paths[f"{name}.npy"], tokens)
        sizes[name] = {"files": len(part), "tokens": len(tokens)}
    digest = hashlib.sha256("".join([*train, "|", *held_out]).encode()).hexdigest()[:12]
    facts = {"digest": digest, "vocab": vocab, **sizes, "left_out": len(files) - len(train) - len(held_out)}
    paths["facts.json"].write_text(json.dumps(facts))


def read_files(roots: Iterable[Path], limit: int) -> dict[str, str]:
    """Different texts by their digest, in the order of the digests (so: of many packages), ``limit`` bytes in all."""
    found: dict[str, Path] = {}
    for path in _walk(roots):
        content = path.read_bytes()
        if FILE_BYTES[0] <= len(content) <= FILE_BYTES[1]:
            found.setdefault(hashlib.sha256(content.strip()).hexdigest(), path)
    texts: dict[str, str] = {}
    for digest in sorted(found):
        try:
            text = found[digest].read_text(encoding="utf-8")
        except UnicodeDecodeError:  # tests of other encodings
            continue
        limit -= len(text)
        if limit < 0:
            break
        texts[digest] = text
    return texts


def _walk(roots: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for root in roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            real = path.resolve()
            if path.suffix in SUFFIXES and real.is_file() and real not in seen:
                seen.add(real)
                yield real


def split(files: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Training files, and held-out ones: chosen by digest, without those of which half is in training files as well.

    Packages copy from each other; a copy would measure memory.
    """
    held_out = {digest: text for digest, text in files.items() if int(digest[:8], 16) % HELD_OUT == 0}
    train = {digest: text for digest, text in files.items() if digest not in held_out}
    known = {hash(line) for text in train.values() for line in _lines(text)}

    def new(text: str) -> bool:
        lines = _lines(text)
        return 2 * sum(hash(line) in known for line in lines) < len(lines)

    return train, {digest: text for digest, text in held_out.items() if new(text)}


def _lines(text: str) -> list[str]:
    return [line for each in text.splitlines() if len(line := each.strip()) >= LINE]


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE, trained on the first texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    sample, size = [], 0
    for text in texts:
        sample.append(text)
        size += len(text)
        if size > TOKENIZER_BYTES:
            break
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
    """uint16 or uint32: every text and an end token, one after the other."""
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    parts, waiting = [], []
    for text in [*texts, None]:
        waiting.append(text)
        if text is None or len(waiting) == 1000:
            ready = [each + END for each in waiting if each is not None]
            parts += [np.array(encoding.ids, dtype=kind) for encoding in tokenizer.encode_batch(ready)]
            waiting = []
    return np.concatenate(parts)


def gsm8k(
    part: str,
    tokenizer: Tokenizer,
    length: int,
    *,
    answers_only: bool = False,
    shots: int = 0,
    same_prompt: bool = False,
) -> Blocks:
    """The problems of ``train`` or ``test``, packed.

    With ``answers_only`` a question has no labels. Then every problem may have ``shots`` others, solved, as its prompt,
    also without labels: GSM8K's answers alone are three fifths of its tokens, prompts are usually longer.

    With ``same_prompt`` the first ``shots`` problems of ``train``, solved, are the prompt of every problem. It has
    labels in ``train``, where it is soon known by heart, and none in ``test``.
    """
    problems = _encoded(_gsm8k(part), tokenizer)
    same = _encoded(islice(_gsm8k("train"), shots), tokenizer) if same_prompt else []
    labelled = part == "train" if same_prompt else not answers_only
    ids: list[int] = []
    labels: list[int] = []
    for number, (question, answer) in enumerate(problems):
        shown = same if same_prompt else [problems[other] for other in range(number - shots, number)]
        prompt = [token for shot in shown for half in shot for token in half]
        ids += prompt + question + answer
        labels += prompt if labelled else [IGNORE] * len(prompt)
        labels += ([IGNORE] * len(question) if answers_only else question) + answer
    return Blocks(_cut(np.array(ids), length), _cut(np.array(labels), length))


def _encoded(problems: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Question and answer of every problem."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch([half for pair in problems for half in pair])]
    return list(zip(encoded[::2], encoded[1::2], strict=True))


def _gsm8k(part: str) -> Iterator[tuple[str, str]]:
    for line in (GSM8K / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        yield record["question"] + "\n", record["answer"] + END


def _gsm8k_texts(part: str) -> list[str]:
    return [question + answer for question, answer in _gsm8k(part)]


def _cut(tokens: np.ndarray[Any, Any], length: int) -> Tensor:
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"{len(tokens)} tokens do not fill one block of {length}")
    return torch.from_numpy(tokens[: count * length].astype("int32")).view(count, length)
