"""Why a training graph is not rewritten: the closed list of causes, each with the one text that users read."""

from __future__ import annotations

import enum


class Cause(enum.Enum):
    """A member per cause. Its text names the cause, then the remedy; fields in braces are filled in by ``says``."""

    # Nothing is missing: the graph is not to be rewritten.
    NOT_TRAINING = "not a training graph: gradients are off or the model is in evaluation mode"
    EVERY_TOKEN = "{name} is 1.0: every token is trained on"
    LAUNCH_BOUND = (
        "{found}: at this size selecting tokens would not be faster without CUDA graphs, so every token is trained on; "
        "options={{'cuda_graphs': True}} (or mode='reduce-overhead') makes it pay, "
        "options={{'launch_bound': 'select'}} selects all the same"
    )

    # The graph is a piece of the training step.
    FSDP_BLOCKS = (
        "FSDP wraps {count} modules inside of the model, and its hooks cut the graph at each: wrap the root only "
        "(fully_shard(model) without fully_shard of its blocks), or, where all parameters at once do not fit, call "
        "cggr_compile.distributed.shard(model, mesh) instead; and compile the root"
    )
    ONE_BLOCK = (
        "this graph is a part of a model, compiled by itself: it turns one hidden state into another, and has neither "
        "embedding nor loss; compile the whole model, or the step that calls it, and not its blocks"
    )
    GRAPH_BREAK = (
        "a graph break at {where} separates the model from its loss: {why}; take it out of the compiled function"
        "{or_else} (TORCH_LOGS=graph_breaks prints all of them)"
    )
    PLAIN_PYTHON = (
        "Dynamo runs the function at {where} as plain Python and compiles what it calls piece by piece, as it does for "
        "a graph break in a loop: TORCH_LOGS=graph_breaks says where; take it out of the compiled function"
    )
    INPUT_GRADS_HOOK = (
        "the hook of enable_input_require_grads() ({where}) breaks the graph behind the embedding: call "
        "model.disable_input_require_grads(), and checkpoint with use_reentrant=False, which does not need it"
    )
    CACHE_WARNING = (
        "transformers warns that use_cache=True does not go with gradient checkpointing ({where}), which breaks the "
        "graph: set model.config.use_cache = False"
    )
    LOSS_TYPE = (
        "transformers warns that the model has no loss_type ({where}), which breaks the graph between the head and the "
        "loss: set model.loss_type = 'ForCausalLM'"
    )
    FLASH_ATTENTION = (
        "with flash_attention_2, transformers breaks the graph ({where}) for every batch with an attention_mask, and "
        "for a single sequence without cu_seq_lens_q, cu_seq_lens_k (two tensors), max_length_q and max_length_k (a "
        "DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives them): leave out a mask that hides nothing, "
        "or take attn_implementation='sdpa'"
    )
    EXPERTS_LOOP = (
        "a loop over experts ({where}) breaks the graph in every layer: "
        "call model.set_experts_implementation('grouped_mm')"
    )
    OUTPUT_HOOKS = (
        "with output_router_logits=True (or output_hidden_states, output_attentions), transformers breaks the graph "
        "({where}), unless the compiled function shows what is asked for (in its arguments, its code or the model's "
        "config) or the model was called so once before it was compiled; some releases need an attention_mask as well"
    )
    EXPERT_PARALLEL = (
        "the experts are spread over processes (ep_size > 1), and tokens are sent to them and back in each layer, by "
        "counts that the host reads: keep every expert in every process (ep_size=1), and spread parameters by FSDP "
        "around the root or cggr_compile.distributed.shard"
    )

    # The loss.
    NO_LOSS = "no cross-entropy in this graph: give labels=, or compile a function that returns the loss"
    NO_HEAD = (
        "the logits come into this graph from outside ({what}), where no linear head computes them: compile a function "
        "that calls the model and returns the loss"
    )
    LOSS_OUTSIDE = (
        "no cross-entropy in this graph: the compiled function returns {what}, and the loss is computed outside of it; "
        "return the loss from it: pass labels=, or compile the step (cggr_compile.train_step); a trainer that computes "
        "its loss of the model's logits, as TRL's ORPO, CPO and GKD do, trains on every token"
    )
    FUSED_HEAD = (
        "TRL calls the model with fused_lm_head=True, and its head ends the compiled graph: give the trainer "
        "callbacks=[cggr_compile.integrations.transformers.CGGRCallback()], which compiles the model with a head that "
        "stays in it, and do not compile the model yourself"
    )
    LABEL_SMOOTHER = (
        "the Trainer's label_smoothing_factor={factor} takes the labels away from the model and computes the loss "
        "outside of the compiled graph: give the trainer callbacks=[cggr_compile.integrations.transformers."
        "CGGRCallback()], which compiles the model and lets its own loss smooth; or leave it at 0, and give the model "
        "a loss that smooths (model.loss_function = a function that calls F.cross_entropy(..., "
        "label_smoothing={factor}))"
    )
    UNSUPPORTED_LOSS = (
        "unsupported loss: {what}; supported is one F.cross_entropy of the logits, and any function of values that are "
        "computed from the logits of one position each: log-probabilities, entropies, divergences"
    )

    SEVERAL_FORWARDS = (
        "{what} combines the logits of several forwards with gradient, each of which has a selection of its own: "
        "combine their losses, or the values of their positions; put the batches together and call the model once "
        "(torch.cat); or run a forward that needs no gradient under torch.no_grad()"
    )

    # The layers.
    UNSUPPORTED_ATTENTION = (
        "unsupported attention: nn.MultiheadAttention ({module}) hides its products: {why}; supported are its "
        "self-attention with batch_first=True, need_weights=False and an attn_mask, "
        "F.scaled_dot_product_attention, flex_attention, flash-attn and softmax(Q K^T) V written out"
    )
    CLOSED_CHECKPOINTS = (
        "the blocks are inside activation checkpoints that stay closed: selective ones (context_fn), or any at ratio "
        "1.0; use checkpoint(..., use_reentrant=False) without context_fn"
    )
    UNSUPPORTED_STACK = (
        "unsupported layers: {what}; supported are blocks around a residual stream [batch, sequence, hidden], with one "
        "attention each"
    )

    # The labels, and the capture.
    LATE_LABELS = (
        "the targets are not known when the selection is made: {what}; compute them before the model is called"
    )
    UNALIGNED_TARGETS = "cannot line the targets up with the positions of the sequence: give one label per position"
    UNKNOWN_MODE = (
        "whether it trains or evaluates is unknown: the captured frame has no module {module}; hand the model to the "
        "compiled function as an argument, or compile the model"
    )
    RECOMPILE_LIMIT = (
        "Dynamo has compiled {function} as often as torch._dynamo.config.{limit} ({value}) allows; where no earlier "
        "graph fits, it now runs as plain Python, on every token: pad batches to fewer sizes, generate and evaluate "
        "with a model that is not compiled (or after training), call torch._dynamo.reset() between models, or raise "
        "the limit"
    )
    INTERNAL_ERROR = (
        "internal error: {error}, in pass {name}: please report this (CGGR_STRICT=1 raises it, with its traceback)"
    )

    def says(self, **fields: object) -> str:
        """The text, with its fields. KeyError if one is missing."""
        return self.value.format(**fields)


# What is said of one piece holds for all of them: it is said once a process.
PIECES = frozenset(
    {
        Cause.FSDP_BLOCKS,
        Cause.ONE_BLOCK,
        Cause.GRAPH_BREAK,
        Cause.PLAIN_PYTHON,
        Cause.INPUT_GRADS_HOOK,
        Cause.CACHE_WARNING,
        Cause.LOSS_TYPE,
        Cause.FLASH_ATTENTION,
        Cause.EXPERTS_LOOP,
        Cause.OUTPUT_HOOKS,
        Cause.FUSED_HEAD,
    }
)
