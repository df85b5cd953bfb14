"""The walk over modules: what it may remember of one module when it comes to the next."""

import gc
import weakref
from types import SimpleNamespace

import torch
from core_toys import raw

from megastow import create_memory_manager
from megastow.collect import named_modules
from megastow.megatron_layouts import captured_modules


def test_what_stands_for_a_tensor_is_found_behind_others_of_its_class_that_stand_for_none():
    """A weak proxy is of the same class whatever it is for; `isinstance` asks what that is."""
    scales, names = torch.arange(5.0), {"scales"}
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].shared, model[1].shared = weakref.proxy(names), weakref.proxy(scales)
    before = raw(scales)
    with create_memory_manager(model) as manager:
        manager.offload()
        assert scales.untyped_storage().nbytes() == 0
        manager.onload()
    assert torch.equal(raw(scales), before)


def test_a_tensor_is_found_in_each_place_whatever_was_there_in_the_module_before():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    model[0].cached, model[1].cached, model[2].cached = None, torch.zeros(3), "none"
    with create_memory_manager(model) as manager:
        manager.offload()
        assert model[1].cached.untyped_storage().nbytes() == 0


def test_graphs_are_found_under_a_name_that_held_none_in_the_module_before():
    def found(*modules):
        model = torch.nn.Sequential(*modules)
        return [sentence.split(" hold ")[0] for sentence in captured_modules(named_modules([model]))]

    def module(**attributes):
        made = torch.nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    idle, used = SimpleNamespace(cudagraph_runners=[]), SimpleNamespace(cudagraph_runners=[object()])
    assert found(module(cuda_graphs=[]), module(cudagraph_manager=idle)) == []
    assert found(module(cuda_graphs=[]), module(cuda_graphs=[1])) == ["cuda_graphs of module 1"]
    wrapped, graphed = lambda: None, lambda: None
    graphed.__qualname__ = "make_graphed_callables.<locals>.make_graphed_forward.<locals>.new_fwd"  # as torch names it
    assert found(module(forward=wrapped), module(forward=graphed)) == ["forward of module 1"]
    graphed.__qualname__ = f"_{graphed.__qualname__}"  # as Transformer Engine does
    assert found(module(forward=wrapped), module(forward=graphed)) == ["forward of module 1"]
    wrapped.__qualname__ = "make_graph"
    others = (True, "off", {}, torch.zeros(2))  # what a module of somebody else may mean by the name
    assert found(*(module(cuda_graphs=other) for other in others), module(forward=wrapped)) == []
    assert found(module(cudagraph_manager=idle), module(cudagraph_manager=used)) == ["cudagraph_manager of module 1"]
    registered = torch.nn.Module()
    registered.cudagraph_runners = [object()]
    assert found(module(), module(cudagraph_manager=registered)) == ["cudagraph_manager of module 1"]


def test_a_walk_leaves_no_reference_cycle_behind():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    gone = weakref.ref(model[0])
    gc.disable()
    try:
        assert [path for path, _ in named_modules([model])] == ["", "0"]
        del model
        assert gone() is None
    finally:
        gc.enable()
