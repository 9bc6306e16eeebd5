from __future__ import annotations

import models
import pytest
from capture import Captured

from cggr_compile.passes.facts import LayerStack
from cggr_compile.passes.nodes import op_name, shape_of


def markers(captured):
    return [n for n in captured.gm.graph.nodes if op_name(n).startswith("detach_unselected")]


def test_exact_stops_nothing(decoder_step):
    captured = decoder_step({"gradient": "exact"})
    result = captured.run("route_gradient")
    assert not result.matched and not markers(captured)


@pytest.mark.parametrize("attend", [models.attend_sdpa, models.attend_softmax])
def test_stop_marks_keys_and_values(attend, decoder_step):
    captured = decoder_step({"kv_gradient": "stop"}, models.Decoder(attend))
    assert captured.run("route_gradient").matched
    captured.check_shapes()
    found = markers(captured)
    assert len(found) == 2 * models.LAYERS
    for block in captured.ctx[LayerStack].blocks:
        for tensor, user in (
            (block.attentions[0].key, block.attentions[0].key_user),
            (block.attentions[0].value, block.attentions[0].value_user),
        ):
            assert tensor not in user.all_input_nodes
            assert any(m in user.all_input_nodes and m.args[0] is tensor for m in found)
    assert all(shape_of(m)[m.args[1]] == 16 for m in found)


@pytest.mark.parametrize("fused", [True, False])
def test_project_marks_the_projections_input(fused, decoder_step):
    captured = decoder_step({"kv_gradient": "project"}, models.Decoder(fused=fused))
    captured.run("route_gradient")
    found = markers(captured)
    assert len(found) == models.LAYERS and {m.args[1] for m in found} == {1}
    for marker in found:
        assert op_name(marker.args[0]) == "layer_norm"
        assert {op_name(u) for u in marker.users} == {"linear"}
        assert len(marker.users) == (1 if fused else 2)  # k and v; the query reads the norm itself
        others = [u for u in marker.args[0].users if u is not marker]
        assert len(others) == (0 if fused else 1)


def test_project_lets_adapters_learn_from_every_row(batch):
    """A LoRA path is part of the projection: the marker stands in front of both branches."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.0)
    model = peft.get_peft_model(models.family("llama"), config)
    captured = Captured(model, **batch)
    assert captured.run("route_gradient").matched
    for marker in markers(captured):
        assert len(marker.users) == 4  # base and lora_A, of k and of v


def test_idempotent_shape(decoder_step):
    """Running the pass on its own result would mark twice; the pipeline runs it once, on a copy."""
    captured = decoder_step()
    captured.run("detach_outputs")
    assert len(markers(captured)) == models.LAYERS
