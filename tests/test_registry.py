"""Which runtime a model has. Nothing is compiled here: ``of_module`` is what a captured graph asks."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import cggr_compile
from cggr_compile.registry import registry

SIZE = 3


class Wrapper(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


def part() -> nn.Module:
    return nn.Linear(SIZE, SIZE)


def adapted(base: nn.Module) -> nn.Module:
    return Wrapper(base.requires_grad_(False), part())


def test_a_shared_parameter_is_no_identity():
    shared = part()
    first, second = Wrapper(shared, part()), Wrapper(shared, part())
    runtimes = [registry.of_module(m) for m in (first, second)]
    assert runtimes[0] is not runtimes[1]
    assert [cggr_compile.runtime(m) for m in (first, second)] == runtimes
    with pytest.raises(ValueError, match=r"part of several compiled models.*\['Wrapper', 'Wrapper'\]"):
        cggr_compile.runtime(shared)
    with pytest.raises(ValueError, match=r"several parts .* \['parts.0', 'parts.1'\]"):
        cggr_compile.runtime(Wrapper(first, second))
    with pytest.raises(ValueError, match="several compiled models have the parameters"):
        cggr_compile.runtime(list(shared.parameters()))
    assert cggr_compile.runtime(list(first.parameters())) is runtimes[0]


def test_two_adapters_on_one_base():
    base = part()
    first, second = adapted(base), adapted(base)
    asked = cggr_compile.runtime(second)
    runtime = registry.of_module(first)
    assert runtime is not asked and registry.of_module(second) is asked
    del second
    gc.collect()
    assert cggr_compile.runtime(base) is runtime  # now the only one


@pytest.mark.parametrize("compiled", [0, 1, 2])
@pytest.mark.parametrize("asked", [None, 0, 1, 2])
def test_wrappers_have_the_runtime_of_what_is_compiled(compiled, asked):
    inner = part()
    chain = [inner, Wrapper(inner), Wrapper(Wrapper(inner))]
    chain[2].parts[0] = chain[1]
    before = None if asked is None else cggr_compile.runtime(chain[asked])
    runtime = registry.of_module(chain[compiled])
    assert before in (None, runtime)
    assert all(cggr_compile.runtime(m) is runtime for m in (*chain, torch.compile(chain[1])))
    assert cggr_compile.runtime(dict(inner.named_parameters())) is runtime
    assert cggr_compile.runtime(part()) is not runtime


def test_parts_compiled_in_turn_each_have_their_own():
    parts = [part(), part()]
    whole = Wrapper(*parts)
    asked = cggr_compile.runtime(whole)
    found = [registry.of_module(m) for m in parts]
    assert found[0] is asked is not found[1]
    with pytest.raises(ValueError, match="several parts"):
        cggr_compile.runtime(whole)  # what was asked for is one of two by now
    assert registry.of_module(whole) is cggr_compile.runtime(whole)


def test_nested_compiled_modules():
    inner = part()
    outer = Wrapper(inner)
    own = [registry.of_module(m) for m in (inner, outer)]
    assert [cggr_compile.runtime(m) for m in (inner, outer)] == own and own[0] is not own[1]
    assert cggr_compile.runtime(Wrapper(outer)) is own[1]


def test_a_module_that_a_graph_reads_from_outside_of_its_root():
    hidden = part()
    root = nn.Module()
    runtime = registry.of_module(root, [hidden])
    assert cggr_compile.runtime(root) is cggr_compile.runtime(hidden) is runtime


def test_parameters_may_be_replaced():
    model = Wrapper(part())
    runtime = registry.of_module(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.to_empty(device="cpu")
    model.parts[0] = part()
    assert registry.of_module(model) is cggr_compile.runtime(model) is runtime


def test_a_copy_has_its_own():
    model = Wrapper(part())
    assert registry.of_module(model) is not cggr_compile.runtime(copy.deepcopy(model))


def test_equal_modules_are_not_the_same():
    class Equal(nn.Linear):
        def __eq__(self, other):
            return True

        def __hash__(self):
            return 1

    assert registry.of_module(Equal(SIZE, SIZE)) is not registry.of_module(Equal(SIZE, SIZE))


def test_a_runtime_dies_with_its_model():
    shared = part()
    first, second = Wrapper(shared, part()), Wrapper(shared, part())
    runtimes = [weakref.ref(registry.of_module(first, [second])), weakref.ref(registry.of_module(second))]
    models = [weakref.ref(first), weakref.ref(second)]
    del first
    gc.collect()
    assert runtimes[0]() is None is models[0]() and runtimes[1]() is cggr_compile.runtime(shared)
    del second
    gc.collect()
    assert runtimes[1]() is None is models[1]()


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.zeros(SIZE, requires_grad=True) for _ in range(count)]


def test_functional_models():
    shared, *others = tensors(3)
    frozen, batch = torch.zeros(SIZE), torch.zeros(SIZE, requires_grad=True)
    first, second = [shared, others[0], frozen], [shared, others[1], frozen]
    asked = cggr_compile.runtime(first)
    assert registry.of_tensors(first[:2]) is asked  # a graph knows the differentiable ones
    assert registry.of_tensors([*first[:2], batch]) is asked  # its inputs among them
    other = registry.of_tensors(second[:2])
    assert other is not asked
    assert [cggr_compile.runtime(m) for m in (first, {str(i): t for i, t in enumerate(second)})] == [asked, other]
    del second[1], others[1:]
    gc.collect()  # of the second only the shared one is left
    assert registry.of_tensors([shared, *tensors(2)]) not in (asked, other)


def test_a_functional_runtime_dies_with_its_tensors():
    parameters = tensors(2)
    alive = weakref.ref(registry.of_tensors(parameters))
    gc.collect()
    assert alive() is not None
    del parameters
    gc.collect()
    assert alive() is None


def test_a_graph_of_the_parameters_alone_is_the_models():
    """As an optimizer's, within a compiled training step."""
    model = Wrapper(part())
    runtime = registry.of_module(model)
    assert registry.of_tensors(list(model.parameters())) is runtime
    asked = cggr_compile.runtime(list((other := Wrapper(part())).parameters()))
    assert registry.of_module(other) is asked is not runtime


def test_a_runtime_for_the_time_being():
    model = Wrapper(part())
    for own in (None, registry.of_module(model)):
        with registry.replaced(model) as runtime:
            assert registry.of_module(model) is runtime is not own
        assert own in (None, registry.of_module(model))
        assert cggr_compile.runtime(model) is not runtime
