"""Layouts that cannot be moved by releasing storages and that more than one Megatron generation has.

Refusing is done by looking, never by importing Transformer Engine or by trusting a configuration flag: what counts is
whether the thing is there. Each function yields a sentence for each such thing: what was found, where, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from megastow.collect import NamedModules
from megastow.errors import UnsupportedLayoutError
from megastow.guard import unblocked
from megastow.state import PLAIN_TYPES

_QUANTIZED = {
    "Float8Tensor",
    "Float8BlockwiseQTensor",
    "GroupedTensor",
    "MXFP8Tensor",
    "NVFP4Tensor",
    "QuantizedTensor",
}


_GRAPHED_FORWARDS = ("make_graphed_callables.", "_make_graphed_callables.")
"""How the names of functions begin that torch and Transformer Engine put in the place of a `forward`."""


def refuse(problems: Iterable[str]) -> None:
    """Look for problems until one is found.

    Raises:
        UnsupportedLayoutError: one was found; the message names it, where, and what to do. Nothing was touched.
    """
    found = next(iter(problems), None)
    if found is not None:
        raise UnsupportedLayoutError(f"{found}. megastow does not understand that layout, and touched nothing")


def quantized_parameters(modules: NamedModules) -> Iterator[str]:
    """Parameters of Transformer Engine's tensor classes, whose bytes lie in tensors inside."""
    for name, parameter in modules.parameters:
        if type(parameter) in PLAIN_TYPES:
            continue  # and so is its `data`
        for tensor in (parameter, parameter.data):
            if type(tensor) not in PLAIN_TYPES:
                found = ", ".join(sorted({base.__name__ for base in type(tensor).__mro__} & _QUANTIZED))
                if found:
                    yield (
                        f"parameter {name} is a quantised tensor ({found}) whose bytes lie in inner tensors. Keep "
                        "parameters in bf16 (fp8_param_gather off)"
                    )


def captured_modules(modules: NamedModules) -> Iterator[str]:
    """Modules that CUDA graphs were captured for, over the addresses of weights and gradients.

    Mirrors megatron/core/transformer/transformer_block.py (`cuda_graphs`, 0.7 and later) and cuda_graphs.py (managers,
    0.9 and later); and torch/cuda/graphs.py, whose `make_graphed_callables` puts a function in the place of `forward`,
    as does transformer_engine/pytorch/graph.py.
    """
    others: set[str] = set()
    for path, module in modules:
        graphs = _captured_graphs(module, others)
        if graphs:
            yield (
                f"{graphs} of module {path or type(module).__name__} hold CUDA graphs, which were captured over the "
                "addresses of weights and gradients; releasing those would make a replay write into foreign memory. "
                "Train without CUDA graphs (cuda_graph_impl none, enable_cuda_graph off, no make_graphed_callables)"
            )


def _captured_graphs(module: torch.nn.Module, others: set[str]) -> str | None:
    """The attributes of a module that hold captured graphs.

    Args:
        module: the module.
        others: names of attributes that hold none in any module; grows by those that are met, for most modules have no
            other.
    """
    found = []
    forward = vars(module).get("forward")
    if forward is not None:
        qualified_name = getattr(unblocked(forward), "__qualname__", None)
        if isinstance(qualified_name, str) and qualified_name.startswith(_GRAPHED_FORWARDS):
            found.append("forward")
    for attributes in (vars(module), module._modules):  # a manager may be an attribute or a registered submodule
        if attributes.keys() <= others:
            continue
        for name, value in list(attributes.items()):
            if "cudagraph_manager" in name:
                has_captured = any(map(_is_captured, getattr(value, "cudagraph_runners", ())))
            elif name == "cuda_graphs":
                has_captured = isinstance(value, (list, tuple, Mapping)) and len(value) > 0
            else:
                others.add(name)
                continue
            if has_captured:
                found.append(name)
    return " and ".join(found) or None


def _is_captured(runner: Any) -> bool:
    """Whether a runner has recorded a graph. 0.9 and 0.10 only make a runner by capturing."""
    if not hasattr(runner, "fwd_graph"):
        return True
    return runner.fwd_graph is not None or getattr(runner, "bwd_graph", None) is not None
