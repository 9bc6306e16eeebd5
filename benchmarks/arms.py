"""The ways of computing one training step that the benchmarks compare.

plain        ``torch.compile(model)``, called as users do: ``model(input_ids=ids, labels=labels).loss``. Compiled,
             transformers builds a dense causal mask (it cannot rule out packed sequences), and the logits are outputs.
fair         the same model and the same loss (transformers' own: float32 logits, shifted, mean cross-entropy) without
             these two handicaps: SDPA with ``is_causal=True`` and no mask tensor, a compiled function that returns the
             loss alone. None of this project's code takes part.
fair-checkpointed  `fair` with transformers' gradient checkpointing, which keeps the blocks' inputs only.
fair-flash   `fair` with the kernels of the package flash-attn (CUDA, 16 bits) instead of the ones that SDPA takes.
selective    ``backend="cggr"`` with its default options, router included.
stop         the same with ``kv_gradient="stop"``.
random       control: random tokens, no router.
learned      scores that a small network has learned: no head in the router.
spans        blocks of consecutive tokens, by these scores.
spans-random  blocks at random, no router.
fused        ``stop`` with ``cross_entropy="fused"``.
fp8          ``stop`` with ``router_precision="fp8"``.
selective-flash  `selective` of the model that `fair-flash` has.
exact        ``gradient="exact"``: the true gradient of the selected loss.
dense-cggr   control: ``backend="cggr"`` at ratio 1.0, where it must equal the dense model.

How `fair` gets rid of the mask: transformers makes no mask for an attention function that has no mask function
registered beside it, and its SDPA function is causal without a mask. So the arm's model uses that very SDPA function
under another name. :func:`check_fair` looks at the captured graph to prove it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from shapes import SHAPES, build_model, make_batch
from torch import Tensor
from torch.fx import GraphModule
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cggr_compile import enable_flash_attention
from cggr_compile.backend import cggr

Step = Callable[[Tensor, Tensor], Tensor]

BASELINES = ("plain", "fair", "fair-checkpointed")
FLASH = ("fair-flash", "selective-flash")  # they train what `with_flash_attention` makes of the model
# options of backend "cggr" beside the ratio
SELECTIVE: dict[str, dict[str, Any]] = {
    "selective": {},
    "stop": {"kv_gradient": "stop"},
    "random": {"scoring": "random"},
    "learned": {"scoring": "learned"},
    "spans": {"selection": "spans", "scoring": "learned"},
    "spans-random": {"selection": "spans", "scoring": "random"},
    "fused": {"kv_gradient": "stop", "cross_entropy": "fused"},
    "fp8": {"kv_gradient": "stop", "router_precision": "fp8"},
    "selective-flash": {},
    "exact": {"gradient": "exact"},
    "dense-cggr": {"min_tokens_ratio": 1.0},
}
ARMS = (*BASELINES, "fair-flash", *SELECTIVE)
DEFAULT_ARMS = ("plain", "fair", "selective", "stop", "random")
# arms that compute the dense model: their losses and gradients must agree
DENSE = ("fair", "plain", "fair-checkpointed", "fair-flash", "dense-cggr")

MASKLESS = "sdpa_without_mask"
AttentionInterface.register(MASKLESS, sdpa_attention_forward)


def labels(arms: Sequence[str], ratios: Sequence[float]) -> dict[str, tuple[str, float]]:
    """What is timed: arm and ratio by name. An arm that selects is there once for each ratio, named so if several."""
    found = {}
    for arm in arms:
        several = arm in SELECTIVE and "min_tokens_ratio" not in SELECTIVE[arm] and len(ratios) > 1
        for ratio in ratios if several else ratios[:1]:
            found[f"{arm} {ratio:g}" if several else arm] = arm, ratio
    return found


def without_mask(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with causal attention that needs no mask tensor; the parameters are shared."""
    twin = _twin(model)
    twin.set_attn_implementation(MASKLESS)
    return twin


def with_flash_attention(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with the package flash-attn, which needs no mask tensor either; the parameters are shared.

    Raises:
        ValueError: with the reason why it cannot be had here.
    """
    twin = _twin(model)
    enable_flash_attention(twin, "flash_attention_2")
    return twin


def _twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def checkpointed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`without_mask`, its blocks under gradient checkpointing; the parameters are shared."""
    twin = without_mask(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    twin.disable_input_require_grads()  # a hook, with adapters, that breaks the graph; only reentrant ones need it
    return twin


def loss_of(model: LlamaForCausalLM) -> Step:
    def step(ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=labels).loss
        return loss

    return step


def build_arm(
    name: str,
    model: LlamaForCausalLM,
    *,
    ratio: float,
    compiler: str = "auto",
    cuda_graphs: bool = False,
    dump_dir: str | None = None,
) -> Step:
    """A function (ids, labels) -> loss, compiled at its first call. All arms of one ``model`` share its parameters.

    ``model``: of the arms in FLASH, what `with_flash_attention` has made of it.
    """
    if name not in SELECTIVE:
        return build_baseline(name, model, compiler=compiler, cuda_graphs=cuda_graphs)
    options = {"min_tokens_ratio": ratio, "compiler": compiler, "dump_dir": dump_dir, "cuda_graphs": cuda_graphs}
    return build_selective(model, options | SELECTIVE[name])


def build_baseline(name: str, model: LlamaForCausalLM, *, compiler: str, cuda_graphs: bool) -> Step:
    """One of BASELINES, or `fair-flash`."""
    how = dense_compiler(compiler, cuda_graphs=cuda_graphs)
    if name == "plain":
        return loss_of(torch.compile(model, **how))
    # one graph: where one arm's graph breaks, Dynamo stops compiling frames whose code other arms share
    twins = {"fair": without_mask, "fair-checkpointed": checkpointed}
    twin = twins[name](model) if name in twins else model
    return torch.compile(loss_of(twin), fullgraph=True, **how)


def build_selective(model: LlamaForCausalLM, options: dict[str, Any]) -> Step:
    """backend="cggr" with these options; a graph that is not rewritten is an error."""
    # the function behind the name: found in a checkout that is not installed, too
    return loss_of(torch.compile(model, backend=cggr, options={"fallback": "error", **options}))


def dense_compiler(compiler: str, *, cuda_graphs: bool) -> dict[str, Any]:
    """Arguments of ``torch.compile`` for what is not selective."""
    return {
        "backend": "aot_eager" if compiler == "eager" else "inductor",
        "mode": "reduce-overhead" if cuda_graphs else None,
    }


def captured(step: Step, *batch: Tensor) -> list[GraphModule]:
    """The graphs that Dynamo captures of a call; they run as they are."""
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(step, backend=keep)(*batch)
    return graphs


def plain_causal(graph: GraphModule) -> list[bool]:
    """For every attention of a captured graph: is it causal by its flag, without a mask tensor?"""
    calls = [n for n in graph.graph.nodes if getattr(n.target, "__name__", "") == "scaled_dot_product_attention"]
    return [len(n.args) == 3 and n.kwargs.get("attn_mask") is None and n.kwargs.get("is_causal") is True for n in calls]


def check_fair() -> None:
    """Raises RuntimeError unless the fair arm is one graph that returns the loss, with causal attention and no mask."""
    shape = SHAPES["tiny"]
    model = build_model(shape, device="cpu", dtype=torch.float32, layers=1)
    graphs = captured(loss_of(without_mask(model)), *make_batch(shape, device="cpu"))
    torch._dynamo.reset()
    outputs = [len(graph.graph.output_node().all_input_nodes) for graph in graphs]
    if outputs != [1] or plain_causal(graphs[0]) != [True]:
        raise RuntimeError("this release of transformers gives the fair baseline a mask tensor or further outputs")
