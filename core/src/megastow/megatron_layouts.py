"""Layouts that cannot be moved by releasing storages and that more than one Megatron generation has.

Refusing is done by looking, never by importing Transformer Engine or by trusting a configuration flag: what counts is
whether the thing is there. Each function yields a sentence for each such thing: what was found, where, what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from megastow.errors import UnsupportedLayoutError

_QUANTIZED = {
    "Float8Tensor",
    "Float8BlockwiseQTensor",
    "GroupedTensor",
    "MXFP8Tensor",
    "NVFP4Tensor",
    "QuantizedTensor",
}


def refuse(problems: Iterable[str]) -> None:
    """Look for problems until one is found.

    Raises:
        UnsupportedLayoutError: one was found; the message names it, where, and what to do. Nothing was touched.
    """
    found = next(iter(problems), None)
    if found is not None:
        raise UnsupportedLayoutError(f"{found}. megastow does not understand that layout, and touched nothing")


def quantized_parameters(model: Sequence[torch.nn.Module]) -> Iterator[str]:
    """Parameters of Transformer Engine's tensor classes, whose bytes lie in tensors inside."""
    for index, chunk in enumerate(model):
        for name, parameter in chunk.named_parameters():
            classes = {base.__name__ for tensor in (parameter, parameter.data) for base in type(tensor).__mro__}
            found = ", ".join(sorted(classes & _QUANTIZED))
            if found:
                yield (
                    f"parameter {name} of chunk {index} is a quantised tensor ({found}) whose bytes lie in inner "
                    "tensors. Keep parameters in bf16 (fp8_param_gather off)"
                )


def captured_modules(model: Sequence[torch.nn.Module]) -> Iterator[str]:
    """Modules that CUDA graphs were captured for, over the addresses of weights and gradients.

    Mirrors megatron/core/transformer/transformer_block.py (`cuda_graphs`, 0.7 and later) and cuda_graphs.py (managers,
    0.9 and later).
    """
    for index, chunk in enumerate(model):
        for path, module in chunk.named_modules():
            graphs = _captured_graphs(module)
            if graphs:
                yield (
                    f"{graphs} of chunk {index} module {path or type(module).__name__} hold CUDA graphs, which were "
                    "captured over the addresses of weights and gradients; releasing those would make a replay write "
                    "into foreign memory. Train without CUDA graphs (cuda_graph_impl none, enable_cuda_graph off)"
                )


def _captured_graphs(module: torch.nn.Module) -> str | None:
    """The attributes of a module that hold captured graphs."""
    # A manager may be an attribute or a registered submodule; vars() shows only the former.
    attributes = {**vars(module), **module._modules}
    managers = [
        name
        for name, value in attributes.items()
        if "cudagraph_manager" in name and any(map(_is_captured, getattr(value, "cudagraph_runners", ())))
    ]
    return " and ".join(managers + ["cuda_graphs"] * bool(attributes.get("cuda_graphs"))) or None


def _is_captured(runner: Any) -> bool:
    """Whether a runner has recorded a graph. 0.9 and 0.10 only make a runner by capturing."""
    if not hasattr(runner, "fwd_graph"):
        return True
    return runner.fwd_graph is not None or getattr(runner, "bwd_graph", None) is not None
