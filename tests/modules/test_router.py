from __future__ import annotations

import copy
import threading
import warnings

import models
import pytest
import torch
from modules import zoo
from torch import nn

from cggr_compile import CGGRScorer, TruncatedRouter, create_truncated_router

BLOCKS = 2


def by_config(name: str, model: nn.Module) -> nn.Module:
    """The model that a configuration with fewer blocks makes, with the first blocks' weights."""
    small = zoo.style(name, layers=BLOCKS)
    missing = small.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing
    return small.train(model.training)


@pytest.mark.parametrize("name", zoo.STYLES)
def test_equals_the_model_of_a_shorter_configuration(name):
    model = zoo.style(name).eval()
    router = TruncatedRouter(model, BLOCKS)
    assert (router.architecture, router.num_layers, router.passthrough) == (zoo.STYLES[name][0], BLOCKS, False)
    batch = zoo.ids()
    mask = torch.ones_like(batch)
    mask[0, -4:] = 0
    reference = by_config(name, model)
    for arguments in ({}, {"attention_mask": mask}):
        got = router(batch, **arguments)
        with torch.no_grad():
            want, whole = reference(batch, **arguments).logits, model(batch, **arguments).logits
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, whole, atol=1e-2)  # the control: blocks were left out
        assert not got.requires_grad


def test_position_ids_reach_the_rotary_embedding():
    model = zoo.style("llama")
    router, batch = TruncatedRouter(model, BLOCKS), zoo.ids()
    positions = (torch.arange(12) % 5).expand(2, -1)
    got = router(batch, position_ids=positions)
    torch.testing.assert_close(got, by_config("llama", model)(batch, position_ids=positions).logits.detach())
    assert not torch.allclose(got, router(batch), atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_shares_the_weights_and_owns_none(name):
    model = zoo.style(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    router = TruncatedRouter(model, BLOCKS)
    assert not list(router.parameters()) and not router.state_dict() and len(list(router.modules())) == 1
    assert len(model.get_submodule(zoo.STYLES[name][1])) == 4
    first = router(zoo.ids())
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(router(zoo.ids()), first)
    torch.testing.assert_close(router(zoo.ids()), by_config(name, model)(zoo.ids()).logits.detach())


def test_follows_the_model_to_another_dtype_and_mode():
    model = zoo.style("gpt2", embd_pdrop=0.5)
    router = TruncatedRouter(model, BLOCKS)
    model.to(torch.float64)
    assert router(zoo.ids()).dtype == torch.float64
    assert not torch.equal(router(zoo.ids()), router(zoo.ids()))
    model.eval()
    assert torch.equal(router(zoo.ids()), router(zoo.ids()))


def test_mode_of_the_modules_above_the_blocks():
    """Some models read their own ``training``: the copies' must be the model's of now."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layers = nn.Embedding(8, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, ids):
            x = self.embed(ids) + float(self.training)
            for layer in self.layers:
                x = layer(x)
            return x

    model = nn.Sequential()
    model.model = Noisy()
    router = TruncatedRouter(model, 1)
    ids = torch.arange(4)[None]
    training = router(ids)
    model.eval()
    assert not torch.allclose(training, router(ids))
    model.train()
    assert torch.equal(training, router(ids))


def test_may_be_a_part_of_the_model():
    model = zoo.style("llama")
    keys = set(model.state_dict())
    model.scorer = CGGRScorer(TruncatedRouter(model, BLOCKS))
    assert set(model.state_dict()) == keys | {"scorer.step_count"}
    model.eval()  # would not end if the router held the model as a child
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not twin.scorer.router(zoo.ids()).any() and model.scorer.router(zoo.ids()).any()


def test_leaves_the_model_alone_in_other_threads():
    model = zoo.style("llama").eval()
    router, batch = TruncatedRouter(model, 1), zoo.ids()
    with torch.no_grad():
        whole, short = model(batch).logits, router(batch)
    wrong = []

    def work(call, want):
        with torch.no_grad():
            wrong.extend(1 for _ in range(20) if not torch.equal(call(batch), want))

    threads = [
        threading.Thread(target=work, args=(lambda x: model(x).logits, whole)),
        threading.Thread(target=work, args=(router, short)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_recorded_hidden_states_are_the_models():
    model = zoo.style("llama").eval()
    TruncatedRouter(model, BLOCKS)(zoo.ids(), output_hidden_states=True)
    assert len(model(zoo.ids(), output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert", "mamba"])
def test_one_graph(name):
    model = zoo.style(name).eval()
    router = TruncatedRouter(model, BLOCKS)
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(zoo.ids()), router(zoo.ids()))


def test_adapters():
    peft = pytest.importorskip("peft")
    model = zoo.style("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    router = TruncatedRouter(adapted, BLOCKS)
    assert not router.passthrough
    short = copy.deepcopy(adapted)
    inner = short.base_model.model.model
    inner.layers = nn.ModuleList(list(inner.layers)[:BLOCKS])
    torch.testing.assert_close(router(zoo.ids()), short(zoo.ids()).logits.detach())


def test_other_models_are_their_own_router_with_one_warning():
    model = models.Decoder()
    with pytest.warns(UserWarning, match="the router is the full model: Decoder has no block lists at") as caught:
        router = create_truncated_router(model, num_layers=1)
    assert len(caught) == 1
    assert router.passthrough and router.architecture == "passthrough" and router.num_layers is None
    with torch.no_grad():
        assert torch.equal(router(zoo.ids()), model(zoo.ids()))


def test_a_forward_set_on_the_instance_is_not_copied():
    model = zoo.style("llama")
    model.forward = model.forward
    with pytest.warns(UserWarning, match="the forward of LlamaForCausalLM"):
        assert TruncatedRouter(model, BLOCKS).passthrough


def test_whole_model_by_choice_is_no_warning():
    model = zoo.style("llama").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routers = [TruncatedRouter(model, 4), TruncatedRouter(model, architecture="passthrough")]
    for router in routers:
        assert router.passthrough
        torch.testing.assert_close(router(zoo.ids()), model(zoo.ids()).logits.detach())


def test_architecture_by_name():
    assert not TruncatedRouter(zoo.style("llama"), architecture="llama").passthrough
    with pytest.raises(ValueError, match=r"architecture='gpt' does not fit .*no block lists at transformer\.h"):
        TruncatedRouter(zoo.style("llama"), architecture="gpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an integer >= 1, got 0"),
        ({"num_layers": True}, "num_layers"),
        ({"num_layers": 5}, r"num_layers must be in \[1, 4\].* got 5"),
        ({"architecture": "lama"}, "architecture must be one of .*did you mean 'llama'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TruncatedRouter(zoo.style("llama"), **arguments)


def test_no_cache():
    import transformers

    router = TruncatedRouter(zoo.style("llama"), BLOCKS)
    with pytest.raises(ValueError, match="past_key_values must be None"):
        router(zoo.ids(), past_key_values=transformers.DynamicCache())
