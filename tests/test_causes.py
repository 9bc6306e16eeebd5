"""Each cause of a graph that is not rewritten is produced for real and named; its remedy works, or a near miss does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, compiled, family, make_batch
from torch import nn
from training import complaints, metrics, padded

import cggr_compile
from cggr_compile.causes import PIECES, Cause
from cggr_compile.passes.base import PassResult, SemanticPass, refused
from cggr_compile.pipeline import PASSES

IDS = make_batch()["input_ids"]
LABELS = make_batch()["labels"]


def is_text_of(cause, message):
    """Whether a message is the cause's text, whatever its fields."""
    parts = re.split(r"\{\w+\}", cause.value.replace("{{", "{").replace("}}", "}"))
    return re.search(".*".join(map(re.escape, parts)), message, re.DOTALL) is not None


def heard_from(call):
    """The causes that warnings name, and their texts."""
    with complaints() as found:
        call()
    texts = [text for text in found if text.startswith("cggr: this training graph ")]  # all of it, or but for the head
    return [next(cause.name for cause in Cause if is_text_of(cause, text)) for text in texts], texts


def told_once(cause, call):
    """``call`` makes one warning, which names the cause; returns its text."""
    causes, texts = heard_from(call)
    assert causes == [cause.name], texts
    return texts[0]


def train(model, **batch):
    model(**batch).loss.backward()


def matches(call):
    """No warning; the near miss of a cause."""
    assert heard_from(call) == ([], [])


# The list.


def test_the_list_is_closed():
    """Every cause is one that something gives; a pass that leaves no fact for later ones gives one."""
    package = Path(cggr_compile.__file__).parent
    source = "".join(path.read_text() for folder in (package, package / "passes") for path in folder.rglob("*.py"))
    assert [cause.name for cause in Cause if f"Cause.{cause.name}" not in source.replace("        Cause.", "")] == []
    semantic = [p for p in PASSES if isinstance(p, SemanticPass)]
    needed = {fact for graph_pass in semantic for fact in graph_pass.needs}
    for graph_pass in semantic:
        if needed & {*graph_pass.provides} - {*graph_pass.needs, *graph_pass.uses}:
            before_the_fact = inspect.getsource(inspect.getmodule(type(graph_pass))).partition("ctx.add(")[0]
            assert "PassResult(False" not in before_the_fact, graph_pass.name


def test_texts_are_complete():
    assert Cause.LAUNCH_BOUND.says(found="x").startswith("x: ") and "{'cuda_graphs': True}" in Cause.LAUNCH_BOUND.says(
        found="x"
    )
    with pytest.raises(KeyError):
        Cause.GRAPH_BREAK.says(where="here")
    for cause in Cause:
        fields = dict.fromkeys(re.findall(r"(?<!\{)\{(\w+)\}", cause.value), "x")
        assert is_text_of(cause, cause.says(**fields)) and "{" not in cause.says(**fields).replace("{'", "")
    for cause in PIECES:
        assert not [other for other in PIECES - {cause} if is_text_of(other, cause.value)]


# Pieces of a model.


class Broken(models.SlicedLoss):
    """A graph break in one of its blocks, in every mode or in evaluation only."""

    def __init__(self, where):
        super().__init__(fused=False)
        self.where = where

    def forward(self, ids, labels=None):
        x = self.wte(ids)
        if self.where == "loop":
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 0:
                    torch._dynamo.graph_break()
        else:
            x = self.blocks[0](x)
            if self.where == "middle" or (self.where == "evaluation" and not self.training):
                torch._dynamo.graph_break()
            x = self.blocks[1](x)
        logits = self.lm_head(self.ln_f(x))
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
        if self.where == "behind":
            torch._dynamo.graph_break()
        return loss * 2


def line_of_the_break(model):
    lines, first = inspect.getsourcelines(type(model).forward)
    return first + next(i for i, line in enumerate(lines) if "graph_break()" in line and ("middle" in lines[i - 1]))


def test_graph_break():
    model = compiled(Broken("middle"), fallback="warn")
    text = told_once(Cause.GRAPH_BREAK, lambda: model(IDS, LABELS).backward())
    assert (
        f"test_causes.py:{line_of_the_break(model)}, in forward" in text
        and "Call to `torch._dynamo.graph_break()`" in text
    )


def test_a_piece_behind_a_graph_break_names_it():
    """The head and the loss alone, in a graph of their own; the break is in what ran before."""

    class Split(models.SlicedLoss):
        def forward(self, ids, labels):
            hidden = models.Decoder.forward(self, ids)
            torch._dynamo.graph_break()
            return F.log_softmax(hidden, -1).gather(-1, labels.clamp(min=0)[..., None]).mean()

    model = compiled(Split(), fallback="warn")
    told_once(Cause.GRAPH_BREAK, lambda: model(IDS, LABELS).backward())
    reports = cggr_compile.runtime(model).reports
    assert {report.cause for report in reports} == {Cause.GRAPH_BREAK} and len({r.reason for r in reports}) == 1


class Checks(models.SlicedLoss):
    """A function that is called checks its input on the host, as vision-language models of transformers do."""

    def hidden(self, ids):
        x = self.wte(ids)
        torch._check_tensor_all(ids >= 0)
        return self.ln_f(self.blocks[1](self.blocks[0](x)))

    def forward(self, ids, labels=None):
        logits = self.lm_head(self.hidden(ids))
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def test_a_graph_break_says_what_keeps_it_in_the_graph():
    model = compiled(Checks(layers=2), fallback="warn")
    text = told_once(Cause.GRAPH_BREAK, lambda: model(IDS, LABELS).backward())
    settings = re.findall(r"torch\._dynamo\.config\.(\w+) = True", text)
    assert settings == ["capture_scalar_outputs", "nested_graph_breaks"]
    for setting in settings:
        torch._dynamo.reset()
        with torch._dynamo.config.patch({setting: True}):
            again = compiled(Checks(layers=2), compiler="eager", fallback="warn")
            again(IDS, LABELS).backward()
        assert metrics(again)["level"] == "routed" and again.wte.weight.grad.any()


def test_graph_break_in_a_loop():
    """Dynamo leaves the whole function to Python, and compiles the blocks."""
    text = told_once(Cause.PLAIN_PYTHON, lambda: compiled(Broken("loop"), fallback="warn")(IDS, LABELS).backward())
    assert re.search(r"test_causes\.py:\d+, in forward", text)


@pytest.mark.parametrize("where", ["evaluation", "behind"])
def test_graph_breaks_elsewhere_do_not_matter(where):
    model = compiled(Broken(where), fallback="warn")
    matches(lambda: model(IDS, LABELS).backward())
    assert metrics(model)["matched"]


def test_blocks_compiled_one_by_one():
    model = models.SlicedLoss()
    for block in model.blocks:
        compiled(block, fallback="warn")
    told_once(Cause.ONE_BLOCK, lambda: model(IDS, LABELS).backward())
    whole = compiled(models.SlicedLoss(), fallback="warn")
    matches(lambda: whole(IDS, LABELS).backward())


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    import torch.distributed as dist

    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("cut", "in_place"),
    [("everywhere", True), ("behind the embedding", False), pytest.param("everywhere", False, marks=pytest.mark.slow)],
)
def test_data_parallel(process_group, monkeypatch, cut, in_place):
    """The whole graph is asked for; where that is not rewritten its pieces say why, one that looks whole as well."""
    from torch.nn.parallel import DistributedDataParallel

    model = models.SlicedLoss(tied=False, fused=False)
    rest = sum(p.nbytes for name, p in model.named_parameters() if name not in ("wte.weight", "wpe.weight"))
    size = {"everywhere": 4096, "behind the embedding": rest - 64}[cut]
    monkeypatch.setattr(process_group, "_DEFAULT_FIRST_BUCKET_BYTES", size)
    inner = compiled(model, fallback="warn") if in_place else model
    wrapped = DistributedDataParallel(inner, bucket_cap_mb=size / 2**20)
    step = wrapped if in_place else compiled(wrapped, in_place=False, fallback="warn")
    matches(lambda: step(IDS, LABELS).backward())
    assert metrics(model)["matched"]
    torch._dynamo.reset()
    with monkeypatch.context() as patched:
        refusal = refused(Cause.UNSUPPORTED_STACK, what="it")
        patched.setattr("cggr_compile.pipeline.FindStack.__call__", lambda *_: refusal)
        assert "unsupported layers: it; supported are" in told_once(
            Cause.UNSUPPORTED_STACK, lambda: step(IDS, LABELS).backward()
        )


def test_data_parallel_in_one_bucket(process_group):
    from torch.nn.parallel import DistributedDataParallel

    step = compiled(DistributedDataParallel(models.SlicedLoss()), in_place=False, fallback="warn")
    matches(lambda: step(IDS, LABELS).backward())


@pytest.mark.parametrize(
    "kind", ["fully_shard", "blocks compiled", pytest.param("FullyShardedDataParallel", marks=pytest.mark.slow)]
)
def test_sharded_blocks(process_group, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model = models.SlicedLoss(tied=False)
    if kind == "FullyShardedDataParallel":
        policy = ModuleWrapPolicy({models.Layer})
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            if kind == "blocks compiled":
                compiled(block, fallback="warn")
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind != "blocks compiled":
        compiled(model, fallback="warn")
    text = told_once(Cause.FSDP_BLOCKS, lambda: model(IDS, LABELS).backward())
    assert f"FSDP wraps {models.LAYERS} modules" in text


def test_sharded_at_the_root(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = models.SlicedLoss()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    compiled(model, fallback="warn")
    matches(lambda: model(IDS, LABELS).backward())


# What transformers, PEFT and TRL do.


def checkpointed(name="llama"):
    model = family(name, num_hidden_layers=1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model


def test_input_grads_hook():
    peft = pytest.importorskip("peft")
    base = checkpointed()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    base.enable_input_require_grads()
    compiled(model, fallback="warn")
    text = told_once(Cause.INPUT_GRADS_HOOK, lambda: train(model, **make_batch()))
    assert "transformers/modeling_utils.py" in text and "make_inputs_require_grads" in text
    torch._dynamo.reset()
    base.disable_input_require_grads()
    matches(lambda: train(model, **make_batch()))


def test_cache_under_checkpoints():
    model = checkpointed()
    model.config.use_cache = True
    compiled(model, fallback="warn")
    told_once(Cause.CACHE_WARNING, lambda: train(model, **make_batch()))
    torch._dynamo.reset()
    model.config.use_cache = False
    matches(lambda: train(model, **make_batch()))


def test_no_loss_type():
    model = family("gpt2", n_layer=1)
    model.loss_type = None
    compiled(model, fallback="error")
    matches(lambda: train(model, **make_batch()))
    assert model.loss_type == "ForCausalLM"  # what transformers takes by default, with a warning


def test_no_loss_type_to_set(monkeypatch):
    monkeypatch.setattr("cggr_compile.default_loss._takes_default", lambda module: False)
    model = family("gpt2", n_layer=1)
    model.loss_type = None
    compiled(model, fallback="warn")
    told_once(Cause.LOSS_TYPE, lambda: train(model, **make_batch()))


def test_loop_over_experts():
    model = family("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("eager")
    compiled(model, fallback="warn")
    told_once(Cause.EXPERTS_LOOP, lambda: train(model, **make_batch()))
    torch._dynamo.reset()
    model.set_experts_implementation("grouped_mm")
    matches(lambda: train(model, **make_batch()))


@pytest.mark.parametrize("how", ["all_reduce", pytest.param("all_to_all", marks=pytest.mark.slow)])
def test_experts_of_several_processes(process_group, how):
    """Of one process here, which sends all tokens to itself."""
    parallel = pytest.importorskip("transformers.distributed.expert_parallel")
    model, mesh = family("mixtral", num_hidden_layers=1), process_group.device_mesh.init_device_mesh("cpu", (1,))
    experts = "model.layers.0.mlp.experts"
    plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    parallel.apply_expert_parallelism(model, mesh, mesh, plan | {experts: "ep_dispatch_experts"}, how)
    compiled(model, fallback="warn")
    causes, texts = heard_from(lambda: train(model, **make_batch()))
    assert set(causes) == {Cause.EXPERT_PARALLEL.name}, texts
    assert sum(Cause.EXPERT_PARALLEL.says() in text for text in texts) >= 1


@pytest.mark.slow
def test_hooks_for_router_logits():
    model, batch = family("mixtral", num_hidden_layers=1), padded("right")
    holder = [model]  # the frame holds no model that could be prepared

    def step(labels, **batch):
        logits = holder[0](**batch, output_router_logits=True).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    step = torch.compile(step, backend="cggr", options={"fallback": "warn", "compiler": "eager"})
    causes, texts = heard_from(lambda: step(**batch).backward())
    assert set(causes) == {Cause.OUTPUT_HOOKS.name}, texts
    torch._dynamo.reset()
    assert heard_from(lambda: step(**batch).backward()) == ([], [])  # the call above has installed them


def fused_forward(model, breaks):
    """As TRL's add_fused_lm_head does it: log-probabilities of the labels, the loss left to the caller.

    TRL's own function of the head ``breaks`` the graph.
    """
    forward = model.forward

    def fused(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return forward(*args, labels=labels, **kwargs)
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        if breaks:
            torch._dynamo.graph_break()
        scores = torch.log_softmax(model.lm_head(hidden), -1)
        return scores.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)

    model.forward = fused
    return model


def test_fused_head():
    model = compiled(fused_forward(family("llama", num_hidden_layers=1), breaks=True), fallback="warn")
    call = lambda: model(**make_batch(), fused_lm_head=True).sum().backward()  # noqa: E731
    assert "CGGRCallback()" in told_once(Cause.FUSED_HEAD, call)
    matches(lambda: train(model, **make_batch()))
    torch._dynamo.reset()
    model = compiled(fused_forward(family("llama", num_hidden_layers=1), breaks=False), fallback="warn")
    matches(call)  # per-token values that leave the graph


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": LABELS[i]}


def fit(model, folder, **arguments):
    import transformers

    settings = transformers.TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        **arguments,
    )
    transformers.Trainer(model, settings, train_dataset=Rows()).train()


def smoothed(logits, labels, vocab_size, **kwargs):
    flat = logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
    return F.cross_entropy(*flat, label_smoothing=0.1)


@pytest.mark.slow
def test_label_smoothing_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = compiled(family("llama", num_hidden_layers=1), fallback="warn")
    text = told_once(Cause.LABEL_SMOOTHER, lambda: fit(model, tmp_path, label_smoothing_factor=0.1))
    assert "label_smoothing_factor=0.1" in text and "CGGRCallback()" in text
    matches(lambda: fit(model, tmp_path))
    torch._dynamo.reset()
    model.loss_function = smoothed
    matches(lambda: fit(model, tmp_path))
    record = cggr_compile.runtime(model).reports[-1].record("find_loss")
    assert record is not None and record.details["label_smoothing"] == 0.1


# The loss.


def test_loss_outside():
    model = compiled(models.Decoder(layers=1), fallback="warn")
    call = lambda: F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()  # noqa: E731
    assert f"returns linear_16 [2, {models.SEQ}, {VOCAB}]" in re.sub(
        r"linear \[", "linear_16 [", told_once(Cause.LOSS_OUTSIDE, call)
    )
    torch._dynamo.reset()
    step = cggr_compile.train_step(compiler="eager", fallback="warn")(
        lambda m, x: F.cross_entropy(m(x).flatten(0, 1), x.flatten())
    )
    matches(lambda: step(models.Decoder(layers=1), IDS).backward())


TARGET = IDS.flatten()
LOSSES = {
    "mixed tokens": (lambda z: F.cross_entropy(z.roll(1, 1).flatten(0, 1), TARGET), "'roll'"),
    "over positions": (lambda z: z.log_softmax(1).exp().sum(-1).mean(), "over positions"),
    "classes of positions": (lambda z: F.cross_entropy(z, torch.full(z.shape, 0.5)), "another axis"),
    "regression": (lambda z: F.mse_loss(z, torch.zeros_like(z)), "no cross-entropy (it ends in 'mse_loss')"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_unsupported_losses_are_named(name):
    loss, words = LOSSES[name]
    model = models.Decoder(layers=1)
    assert words in told_once(
        Cause.UNSUPPORTED_LOSS, lambda: compiled(lambda x: loss(model(x)), fallback="warn")(IDS).backward()
    )


# Layers, and what the user reads.


class PyTorchLayers(nn.Module):
    """Of nn.MultiheadAttention, by itself or in the layer of PyTorch."""

    def __init__(self, layers):
        super().__init__()
        self.embedding, self.layers, self.head = nn.Embedding(VOCAB, 8), nn.ModuleList(layers), nn.Linear(8, VOCAB)

    def forward(self, ids, labels):
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        padding = torch.zeros(ids.shape)  # of the kind that the mask is, or PyTorch warns, which breaks the graph
        for layer in self.layers:
            if isinstance(layer, nn.MultiheadAttention):
                x = x + layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=True)[0]
            else:
                x = layer(x, src_mask=mask, src_key_padding_mask=padding, is_causal=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (
            lambda: nn.MultiheadAttention(8, 2, batch_first=True),
            "(layers.0) hides its products: it returns the weights",
        ),
        (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
            "(layers.0.self_attn) hides its products: it has a key_padding_mask",
        ),
    ],
)
def test_attention_of_pytorch(layer, said):
    model = compiled(PyTorchLayers([layer(), layer()]), fallback="warn")
    assert said in told_once(Cause.UNSUPPORTED_ATTENTION, lambda: model(IDS, IDS).backward())


def test_where_it_can_be_read(tmp_path):
    model = compiled(models.Decoder(layers=1), fallback="silent")
    model(IDS).sum().backward()
    (report,) = cggr_compile.runtime(model).reports
    assert report.cause is Cause.LOSS_OUTSIDE and report.as_dict()["cause"] == "LOSS_OUTSIDE"
    assert metrics(model)["fallback_reason"] == report.reason and is_text_of(Cause.LOSS_OUTSIDE, report.reason)
    explanation = cggr_compile.explain(model, IDS)
    assert explanation.cause is Cause.LOSS_OUTSIDE and "LOSS_OUTSIDE: no cross-entropy" in " ".join(
        str(explanation).split()
    )
    assert '"cause": "LOSS_OUTSIDE"' in explanation.save(tmp_path).read_text()
    inference = cggr_compile.explain(models.SlicedLoss(layers=1).eval(), IDS, IDS)
    assert inference.cause is Cause.NOT_TRAINING and "NOT_TRAINING" in str(inference)
    torch._dynamo.reset()
    matched = cggr_compile.explain(models.SlicedLoss(layers=1), IDS, IDS)
    assert matched.cause is None and matched.matched
    dense = cggr_compile.explain(models.SlicedLoss(layers=1), IDS, IDS, options={"min_tokens_ratio": 1.0})
    assert dense.cause is Cause.EVERY_TOKEN and PassResult(True, "").cause is None
