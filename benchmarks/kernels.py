"""Times single kernels beside what the same card reaches: its copy bandwidth, its matrix products, dense attention.

First the card's own bandwidth and product rate, then `cggr::score_partials` beside the product alone, and all of
`cggr::score` in bfloat16 and in 8-bit floats with the rank correlation of the difficulties with float32's, then the
backward of attention from the selected queries beside dense forwards and backwards (by PyTorch's own kernels, and by
those of the package flash-attn where it is installed), then loss and gradients of the selected rows beside other ways
to compute them (selected_ce.py), then log-probabilities and entropies of the positions with a label
(`cggr_compile.token_log_probs`), with gradients, beside log_softmax and gather over all logits. Medians; the
second-level cache is cleared between runs. `of product rate`: arithmetic of the operator (of a loss: three products of
the rows that have one, whatever an arm computes), over its time, over the rate of the card's own large product. Peak
memory is what a call allocates over what it is given.

    python benchmarks/kernels.py                 # CUDA, bfloat16
    python benchmarks/kernels.py --cuda-graphs   # the kernels alone, without the host's time to launch them
    python benchmarks/kernels.py --only selected-ce
    python benchmarks/kernels.py --tiny          # CPU, float32: a rehearsal on the reference implementations
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import describe
from results import NONE, machine_line, save, text
from rich.console import Console
from rich.table import Table
from selected_ce import arms
from timing import MB
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from cggr_compile import lowerings, token_log_probs
from cggr_compile.ops.attention_rows import attention_rows_backward
from cggr_compile.ops.difficulty import difficulty
from cggr_compile.ops.score import SPAN, score, score_partials

RATIO = 4  # one position in so many is selected


class Heads(NamedTuple):
    """A call of attention: sequences, positions, heads of queries and of keys, width of a head."""

    batch: int
    length: int
    queries: int
    keys: int
    width: int


SCORES = {"cuda": [(32768, 576, 49152), (8192, 2048, 128256)], "cpu": [(64, 16, 1000)]}  # rows, hidden, vocabulary
ATTENTIONS = {"cuda": [Heads(16, 2048, 9, 3, 64), Heads(4, 4096, 32, 8, 128)], "cpu": [Heads(2, 64, 4, 2, 16)]}
LOSSES = {"cuda": [(8192, 576, 49152), (4096, 2048, 128256)], "cpu": [(16, 16, 1000)]}  # selected rows, hidden, V
TOKENS = {"cuda": [(16384, 576, 49152), (8192, 2048, 128256)], "cpu": [(64, 16, 1000)]}  # positions, hidden, V
LABELLED = (1.0, 0.25, 0.05)  # shares of the positions


def milliseconds(function: Callable[[], Any], device: str, graph: bool = False) -> float:
    """``graph``: on CUDA, of a replay, so that only the kernels count."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(captured(function) if graph else function, warmup=50, rep=200, return_mode="median"))
    return 1e3 * Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=0.05).median


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a CUDA graph of one call.

    The current stream must not be the default one, and a backward in ``function`` must have run its forward on it:
    autograd runs a backward on the stream of its forward.
    """
    for _ in range(3):  # what compiles or allocates on first use
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return graph.replay


def peak_mb(function: Callable[[], Any], device: str) -> float | None:
    """What a call allocates at most, over what is there before; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MB


def card(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and multiply-adds per second that the device reaches on a plain copy and a plain product."""
    size = 1 << (28 if device == "cuda" else 20)
    source = torch.empty(size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    side = 8192 if device == "cuda" else 256
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = milliseconds(lambda: left @ right, device)
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e6,
        "product_tflops": 2 * side**3 / product / 1e9,
    }


def record(
    name: str, shape: str, time: float, flops: float, baseline: float | None, peak: float | None = None
) -> dict[str, Any]:
    """``baseline``: milliseconds of what the operator is compared with. ``peak``: megabytes."""
    rate, times = flops / time / 1e9, baseline / time if baseline else None
    return {"name": name, "shape": shape, "ms": time, "tflops": rate, "times": times, "peak_mb": peak}


def scores(size: tuple[int, int, int], device: str, dtype: torch.dtype, graph: bool) -> list[dict[str, Any]]:
    rows, hidden, vocabulary = size
    states = torch.randn(rows, hidden, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5
    flops = 2.0 * rows * hidden * vocabulary
    product = milliseconds(lambda: states @ weight.t(), device, graph)
    span = SPAN if device == "cuda" else vocabulary
    ours = milliseconds(lambda: score_partials(states, weight, None, 1.0, 0.0, span), device, graph)
    shape = "×".join(map(str, size))
    found = [
        record("product alone (mm)", shape, product, flops, None),
        record("score_partials", shape, ours, flops, product),
    ]
    # distributions from flat to sharp: where all are alike no two precisions rank them alike
    states *= torch.linspace(0.2, 4.0, rows, device=device, dtype=dtype)[:, None]
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    exact = _difficulty(states.float(), weight.float(), labels, False)
    compiled = torch.compile(_difficulty, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
    ways = [("score and difficulty", compiled, False), ("score and difficulty, fp8", compiled, True)]
    if device == "cuda":
        lowerings.register()
        tuned = torch.compile(_difficulty, dynamic=False, options={"max_autotune_gemm": True})
        ways.append(("score and difficulty, max-autotune", tuned, False))
    for name, way, fp8 in ways:
        call = partial(way, states, weight, labels, fp8)
        entry = record(name, shape, milliseconds(call, device, graph), flops, product)
        found.append(entry | {"rank_correlation": rank_correlation(call(), exact)})
    return found


def _difficulty(states: Tensor, weight: Tensor, labels: Tensor, fp8: bool) -> Tensor:
    _, *statistics = score(states, weight, None, labels, 1.0, 0.0, fp8)
    found: Tensor = difficulty(*statistics, "combined")
    return found


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's: the correlation of the ranks."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (left, right)])
    return float(torch.corrcoef(ranks)[0, 1])


def attentions(heads: Heads, device: str, dtype: torch.dtype, graph: bool) -> list[dict[str, Any]]:
    batch, length, queries, keys, width = heads
    make = dict(device=device, dtype=dtype)
    query = torch.randn(batch, queries, length, width, **make).requires_grad_()  # type: ignore[call-overload]
    key, value = (torch.randn(batch, keys, length, width, **make) for _ in range(2))  # type: ignore[call-overload]
    upstream = torch.randn(batch, queries, length, width, **make)  # type: ignore[call-overload]
    shape = f"{batch}×{length}, {queries}/{keys} heads, d {width}"
    pairs = batch * queries * width * length * (length + 1) / 2  # under a causal mask
    shared = [tensor.repeat_interleave(queries // keys, 1).requires_grad_() for tensor in (key, value)]
    found: list[dict[str, Any]] = []
    inputs = (query, *shared)
    ways = _dense(device)
    first: dict[str, float] = {}

    def add(part: str, name: str, time: float, flops: float) -> None:
        found.append(record(f"{part}, {name}", shape, time, flops, first.get(part)))
        first.setdefault(part, time)

    for name, way in ways.items():
        add("forward", name, milliseconds(partial(way, *inputs), device, graph), 4 * pairs)
    for name, way in ways.items():
        grads = partial(torch.autograd.grad, way(*inputs), inputs, upstream, retain_graph=True)
        add("dense backward", name, milliseconds(grads, device, graph), 10 * pairs)
    baseline = first["dense backward"]

    slots = length // RATIO
    rows = torch.rand(batch, length, device=device).argsort(1)[:, :slots].sort(1).values
    at = rows[:, None, :, None].expand(-1, queries, -1, width)
    with torch.no_grad():
        logsumexp = _logsumexp(query, key, rows)
        out = F.scaled_dot_product_attention(query, shared[0], shared[1], is_causal=True)
        picked = [tensor.detach().gather(2, at) for tensor in (upstream, query, out)]
        for name, all_keys in (("rows, gradients of selected keys", False), ("rows, gradients of all keys", True)):
            # dq: three products of the selected queries and all keys; dk, dv: four with the keys that are wanted
            products = 6 + 8 * (1 if all_keys else 1 / RATIO)
            call = (picked[0], picked[1], key, value, picked[2], logsumexp, rows, None, width**-0.5, True, all_keys)
            time = milliseconds(lambda call=call: attention_rows_backward(*call), device, graph)  # type: ignore[misc]
            found.append(record(name, shape, time, products * pairs / RATIO, baseline))
    return found


def losses(size: tuple[int, int, int], device: str, dtype: torch.dtype, graph: bool) -> list[dict[str, Any]]:
    """Loss and both gradients of the selected rows."""
    rows, hidden, vocabulary = size
    states = torch.randn(rows, hidden, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    found: list[dict[str, Any]] = []
    for name, arm in arms(device).items():

        def step(loss: Any = arm.loss) -> Any:
            return torch.autograd.grad(loss(states, weight, labels), (states, weight))

        replayed = graph and not arm.waits
        launched = ", launched" if graph and arm.waits else ""
        step()  # compiles
        peak = peak_mb(step, device)
        time = milliseconds(step, device, replayed)
        baseline = found[0]["ms"] if found else None
        shape = "×".join(map(str, size))
        found.append(
            record(f"selected-ce, {name}{launched}", shape, time, 6.0 * rows * hidden * vocabulary, baseline, peak)
        )
    return found


def tokens(size: tuple[int, int, int], device: str, dtype: torch.dtype, graph: bool) -> list[dict[str, Any]]:
    """Log-probabilities and entropies of the labelled positions, and the gradients of a loss over them."""
    positions, hidden, vocabulary = size
    states = torch.randn(positions, hidden, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5).requires_grad_()
    upstream = torch.rand(2, positions, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    arms = {"all logits": torch.compile(_of_all_logits, dynamic=False, backend=backend), "cggr": _ours}
    found: list[dict[str, Any]] = []
    for share in LABELLED:
        labels = torch.randint(0, vocabulary, (positions,), device=device)
        labels[torch.rand(positions, device=device) >= share] = -100
        baseline = None
        for name, arm in arms.items():

            def step(arm: Any = arm, labels: Tensor = labels) -> Any:
                return torch.autograd.grad(arm(states, weight, labels), (states, weight), tuple(upstream))

            step()  # compiles
            peak = peak_mb(step, device)
            time = milliseconds(step, device, graph)
            shape = f"{'×'.join(map(str, size))}, {share:.0%} labelled"
            flops = 6.0 * share * positions * hidden * vocabulary
            found.append(record(f"token-log-probs, {name}", shape, time, flops, baseline, peak))
            baseline = baseline or time
    return found


def _of_all_logits(states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.linear(states, weight).float().log_softmax(-1)
    known = labels >= 0
    picked = logp.gather(-1, torch.where(known, labels, 0)[:, None])[:, 0]
    return torch.where(known, picked, 0.0), torch.where(known, -(logp.exp() * logp).sum(-1), 0.0)


def _ours(states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_prob, entropy, *_ = token_log_probs(states, weight, labels)
    assert log_prob is not None and entropy is not None
    return log_prob, entropy


def _dense(device: str) -> dict[str, Callable[..., Tensor]]:
    """Causal attention of query, key and value [batch, heads, length, width], by the names of the kernels."""
    found: dict[str, Callable[..., Tensor]] = {"flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION)}
    if device == "cuda":
        found["cuDNN"] = partial(_sdpa, SDPBackend.CUDNN_ATTENTION)
        try:
            from flash_attn import flash_attn_func
        except ImportError:  # not installed, or FlashAttention-4, which has its name
            return found
        found["flash-attn"] = lambda *qkv: flash_attn_func(*(x.transpose(1, 2) for x in qkv), causal=True).transpose(
            1, 2
        )
    return found


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _logsumexp(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """Of the causal scores of the selected queries, float32 [B, heads, K]; one sequence and head at a time."""
    found = []
    positions = torch.arange(key.shape[2], device=key.device)
    for sequence, chosen in enumerate(rows):
        later = positions > chosen[:, None]
        for head in range(query.shape[1]):
            keys = key[sequence, head * key.shape[1] // query.shape[1]]
            products = (query[sequence, head, chosen] @ keys.t()).float() * query.shape[3] ** -0.5
            found.append(products.masked_fill(later, -torch.inf).logsumexp(-1))
    return torch.stack(found).view(query.shape[0], query.shape[1], -1)


def table(records: Sequence[dict[str, Any]], rate: float) -> Table:
    found = Table()
    for column in ("kernel", "shape"):
        found.add_column(column)
    for column in ("ms", "TFLOP/s", "of product rate", "× the first", "peak MB", "ranks as float32"):
        found.add_column(column, justify="right")
    for entry in records:
        fraction = entry["tflops"] / rate
        times = text(entry["times"], "{:.2f}") if entry["times"] else NONE
        figures = (f"{entry['ms']:.3f}", f"{entry['tflops']:.0f}", f"{fraction:.2f}", times)
        more = (text(entry["peak_mb"], "{:.0f}"), text(entry.get("rank_correlation"), "{:.4f}"))
        found.add_row(entry["name"], entry["shape"], *figures, *more)
    return found


KERNELS: dict[str, tuple[dict[str, Any], Callable[..., list[dict[str, Any]]]]] = {
    "score": (SCORES, scores),
    "attention": (ATTENTIONS, attentions),
    "selected-ce": (LOSSES, losses),
    "token-log-probs": (TOKENS, tokens),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, float32")
    parser.add_argument("--cuda-graphs", action="store_true", help="time replays of CUDA graphs: no launches")
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS), help="kernels to time")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/kernels.json"))
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device: --tiny rehearses on the CPU")
    if args.tiny and args.cuda_graphs:
        parser.error("--cuda-graphs needs a CUDA device, --tiny runs on the CPU")
    device, dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    console = Console(width=max(120, Console().width))
    document: dict[str, Any] = {
        "machine": describe(device),
        "card": card(device, dtype),
        "cuda_graphs": args.cuda_graphs,
        "results": [],
    }
    console.print(machine_line(document["machine"]), highlight=False)
    own = document["card"]
    console.print(f"copy {own['copy_gb_per_s']:.0f} GB/s, product {own['product_tflops']:.1f} TFLOP/s", highlight=False)
    # graphs are captured on a stream of their own; see captured()
    with torch.cuda.stream(torch.cuda.Stream()) if args.cuda_graphs else nullcontext():
        for name in args.only:
            sizes, measure = KERNELS[name]
            for size in sizes[device]:
                document["results"] += measure(size, device, dtype, args.cuda_graphs)
                save(document, args.json)
    console.print(table(document["results"], own["product_tflops"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
