"""What lets an unmodified Megatron train on a machine without a GPU.

Megatron's DDP and optimizers name CUDA in a few places and import a few packages that exist only for it, although
nothing in them needs a GPU. The conformance suite wants the real code on every change, on ordinary CI machines, so the
few places are answered here and no Megatron file is edited.

Three kinds of help, kept apart because they end at different borders:

* *CUDA answers* (``torch.cuda`` and tensor factories) are given only where there is no GPU. With one, torch is left as
  it is.
* *Stand-ins* for missing packages (Apex, ``pkg_resources``, Triton) are registered only where the package is missing
  and the Megatron release cannot do without. On a GPU machine a release that needs Apex gets the same stand-in.
* *Repairs* of what a release does wrong when Transformer Engine is missing are made after the import, on any device.

Everything patches the whole process and nothing is undone: call it only in a process that exists to train, before
Megatron is imported. Which release needs what was found by dropping the patches one by one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import runpy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import packaging
import torch
from packaging.version import Version

_CPU = torch.device("cpu")


def find_core_version() -> Version:
    """The version of the megatron-core that an import would find, without importing it.

    Raises:
        ModuleNotFoundError: If there is no megatron-core on the path.
    """
    spec = importlib.util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("megatron.core is not on the path", name="megatron.core")
    facts = runpy.run_path(str(Path(spec.origin).with_name("package_info.py")))
    return Version(facts["__version__"])


def install(core_version: Version) -> None:
    """Makes ``megatron.core`` importable, and DDP and the optimizers run, before they are imported.

    Args:
        core_version: What ``find_core_version`` says.
    """
    if core_version < Version("0.10") and _is_missing("apex"):
        _stand_in_for_apex()
    if core_version < Version("0.9") and _is_missing("pkg_resources"):
        _stand_in_for_pkg_resources()
    if core_version < Version("0.1") and _is_missing("torch._six"):
        _stand_in("torch._six", inf=float("inf"))  # torch has lost it since
    if _is_missing("psutil"):
        _stand_in_for_psutil()
    if core_version >= Version("0.18") and _is_missing("triton"):
        _stand_in_for_triton()
    if not torch.cuda.is_available():
        _compile_nothing()
        _answer_current_device()
        _redirect_factories("tensor", "zeros")
        _answer_tensor_type()
        _answer_tensor_cuda()
        _answer_streams()
        _forget_seeds_of_devices()
        if core_version < Version("0.5"):
            _answer_legacy_constructors()


def install_gpt(core_version: Version) -> None:
    """Adds what a real ``GPTModel`` needs beyond ``install``: random state, and normalisation or routing kernels.

    Args:
        core_version: What ``find_core_version`` says.
    """
    if core_version < Version("0.10") and _is_missing("apex.normalization"):
        _stand_in_for_apex_normalization()
    if core_version < Version("0.8") and _is_missing("transformer_engine"):
        _stand_in_for_transformer_engine_layers()
    if not torch.cuda.is_available():
        _answer_random_state()
        if core_version < Version("0.10"):
            _answer_histogram_of_integers()


@contextlib.contextmanager
def answered_synchronize() -> Iterator[None]:
    """Lets a block of Megatron's code wait for a device that may not be there.

    No longer than the block, unlike everything else here: megastow must not wait unasked, and a test is to see it.
    """
    original = torch.cuda.synchronize
    if not torch.cuda.is_available():
        setattr(torch.cuda, "synchronize", lambda *args: None)  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.cuda, "synchronize", original)  # noqa: B010


def post_import(core_version: Version) -> None:
    """Repairs, after the import, what a release gets wrong with a newer NumPy or without Transformer Engine.

    Args:
        core_version: What ``find_core_version`` says.
    """
    if core_version < Version("0.16"):
        _repair_numpy_product()
    if not _is_missing("transformer_engine"):
        return
    if Version("0.12") <= core_version < Version("0.13"):
        _repair_quantize_of_nothing()
    if Version("0.13") <= core_version < Version("0.17"):
        _repair_missing_gemm_name()
    if Version("0.10") <= core_version < Version("0.11"):
        _repair_local_moe_spec()


def freeze_imports() -> None:
    """Takes what has been imported out of the garbage collector's sight, once Megatron has been.

    A trainer's ``close()`` collects garbage, and would walk all of torch and Megatron each time: 0.2 s.
    """
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first optimizer imports torch's compiler
    gc.collect()
    gc.freeze()


# --- small tools ------------------------------------------------------------------------------------------------------


def _is_missing(name: str) -> bool:
    """Whether a module can neither be found nor is registered already."""
    if name in sys.modules:
        return False
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # the parent package is missing, or is a stand-in without a path
        return True


def _register(module: types.ModuleType) -> None:
    """Puts a stand-in where imports find it, as a package with an empty path."""
    name = module.__name__
    module.__path__ = []
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)


def _stand_in(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    _register(module)


# --- answers where there is no GPU ------------------------------------------------------------------------------------


def _answer_current_device() -> None:
    """Buffers are allocated on ``torch.cuda.current_device()``."""
    setattr(torch.cuda, "current_device", lambda: _CPU)  # noqa: B010  (mypy knows the attribute's type)


def _redirect_factories(*names: str) -> None:
    """Some scalars are made with ``device="cuda"`` literally."""
    for name in names:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _answer_tensor_type() -> None:
    """Optimizers sort parameters by names such as ``torch.cuda.BFloat16Tensor``."""
    original = torch.Tensor.type

    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(tensor, *args, **kwargs)
        return original(tensor).replace("torch.", "torch.cuda.", 1)

    setattr(torch.Tensor, "type", type_)  # noqa: B010


def _answer_legacy_constructors() -> None:
    """Before 0.5 some scalars are made with constructors such as ``torch.cuda.FloatTensor([1.0])``.

    Modules also ask whether something is an instance of them; here nothing is, and no trainer needs the answer.
    """
    for dtype, name in _LEGACY_CONSTRUCTORS.items():

        def make(_cls: type, values: Any, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype)

        setattr(torch.cuda, name, type(name, (), {"__new__": make}))


_LEGACY_CONSTRUCTORS = {
    torch.float32: "FloatTensor",
    torch.float16: "HalfTensor",
    torch.bfloat16: "BFloat16Tensor",
    torch.int32: "IntTensor",
}


def _answer_tensor_cuda() -> None:
    """Loss scalers bring what they load to the current device."""
    setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(_CPU))  # noqa: B010


class _NoStream:
    """A stream of a device that runs everything at once, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def _in_stream(stream: Any) -> Iterator[None]:
    yield


def _answer_streams() -> None:
    """Bucket groups (from 0.19) and MoE token dispatchers order their work by streams."""
    stream = _NoStream()
    for name, answer in {
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "Stream": _NoStream,
        "stream": _in_stream,
    }.items():
        setattr(torch.cuda, name, answer)


def _forget_seeds_of_devices() -> None:
    """``torch.manual_seed`` notes a seed, with the stack, for each kind of device that may come up later; none will."""
    for module in (torch.cuda, torch.xpu, torch.mtia):
        setattr(module, "manual_seed_all", lambda seed: None)  # noqa: B010


class _DefaultGenerators(tuple[int, ...]):
    """One device, whose generator is the CPU's."""

    def __getitem__(self, index: Any) -> Any:
        return torch.default_generator


def _answer_random_state() -> None:
    """Tensor-parallel regions fork the CUDA random state; here they fork the CPU's."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    cuda.default_generators = _DefaultGenerators((0,))
    cuda._lazy_call = lambda call, **kwargs: call()
    cuda._lazy_init = lambda: None


def _answer_histogram_of_integers() -> None:
    """The MoE router counts tokens with ``histc``, which on the CPU exists for floats only."""
    original: Callable[..., torch.Tensor] = torch.histc

    def histc(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if values.is_floating_point():
            return original(values, *args, **kwargs)
        return original(values.float(), *args, **kwargs).to(values.dtype)

    setattr(torch, "histc", histc)  # noqa: B010


# --- stand-ins for missing packages -----------------------------------------------------------------------------------


class _FusedAdam(torch.optim.AdamW):
    """Apex's optimizer, whose default is decoupled weight decay, without its extra options.

    As there, the number of steps is kept once for each group of parameters and not with each parameter. Checkpoints are
    written and read for that.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **extras: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # torch's Adam would look for the steps of each parameter

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for state in self._states(group):
                state["step"] = torch.tensor(float(group.get("step", 0)))
        loss = super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for state in self._states(group):
                del state["step"]
        return loss

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """The states of those parameters of a group that have one already."""
        return [self.state[parameter] for parameter in group["params"] if self.state.get(parameter)]


_TensorLists = Sequence[Sequence[torch.Tensor]]


def _multi_tensor_l2norm(
    chunk_size: int, overflow: torch.Tensor, lists: _TensorLists, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else None


def _multi_tensor_scale(chunk_size: int, overflow: torch.Tensor, lists: _TensorLists, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def _apply_to_lists(operation: Callable[..., Any], overflow: torch.Tensor, lists: _TensorLists, *args: Any) -> Any:
    return operation(65536, overflow, lists, *args)


def _stand_in_for_apex() -> None:
    """Before 0.10 the optimizers come from Apex, and the distributed one insists on it.

    From 0.10 torch's AdamW is accepted, and a stand-in would only make Megatron look for more of Apex.
    """
    _stand_in("apex")
    _stand_in("apex.optimizers", FusedAdam=_FusedAdam, FusedSGD=torch.optim.SGD)
    _stand_in("apex.multi_tensor_apply", multi_tensor_applier=_apply_to_lists)
    _stand_in("amp_C", multi_tensor_l2norm=_multi_tensor_l2norm, multi_tensor_scale=_multi_tensor_scale)


class _LayerNormAffine(torch.autograd.Function):
    """Apex's layer norm. A real autograd function, since Megatron inspects the signature of ``forward``."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        normalized_shape: Sequence[int],
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> torch.Tensor:
        output, mean, inverse_deviation = torch.native_layer_norm(values, list(normalized_shape), weight, bias, eps)
        ctx.save_for_backward(values, weight, bias, mean, inverse_deviation)
        ctx.normalized_shape = list(normalized_shape)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        values, weight, bias, mean, inverse_deviation = ctx.saved_tensors
        inputs = torch.ops.aten.native_layer_norm_backward(
            grads[0], values, ctx.normalized_shape, mean, inverse_deviation, weight, bias, [True, True, True]
        )
        return (*inputs, None, None, None)


def _stand_in_for_apex_normalization() -> None:
    _stand_in("apex.normalization")
    _stand_in("apex.normalization.fused_layer_norm", FusedLayerNormAffineFunction=_LayerNormAffine)


def _stand_in_for_transformer_engine_layers() -> None:
    """Before 0.8 every model imports Megatron's wrappers of Transformer Engine, and uses only one of the layers.

    That one is the norm at the end of a ``TransformerBlock``; 0.8 takes Megatron's own there when there is no
    Transformer Engine, and so does this.
    """

    def norm(config: Any, hidden_size: int, eps: float = 1e-5) -> Any:
        fusions: Any = importlib.import_module("megatron.core.fusions.fused_layer_norm")
        return fusions.FusedLayerNorm(config=config, hidden_size=hidden_size, eps=eps)

    module = _ModuleOfAnything("megatron.core.transformer.custom_layers.transformer_engine")
    module.__dict__.update(TENorm=norm, SplitAlongDim=None, get_cpu_offload_context=None)
    _register(module)


def _stand_in_for_pkg_resources() -> None:
    """0.6 to 0.8 ask it for a version; setuptools no longer has it."""
    _stand_in(
        "pkg_resources",
        get_distribution=lambda name: types.SimpleNamespace(version="1.0.0"),
        packaging=packaging,
    )


class _Process:
    """A process that uses no memory."""

    def __init__(self, *args: Any) -> None:
        pass

    def memory_info(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(rss=0)


def _stand_in_for_psutil() -> None:
    """Distributed checkpoints log with it how much memory their writers use, and fail or hang without it."""
    _stand_in("psutil", Process=_Process)


class _Anything:
    """Stands for any name of a package whose code never runs here: decorators decorate, the rest goes nowhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_decoration = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if is_decoration else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, key: Any) -> Any:
        return _Anything()


class _ModuleOfAnything(types.ModuleType):
    __version__ = "3.4.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def _stand_in_for_triton() -> None:
    """From 0.18 the DDP's import path imports Triton unconditionally.

    torch must not take the stand-in for the real thing: it is asked about Triton while there is none (it remembers its
    answers), and nothing is compiled.
    """
    probes = importlib.import_module("torch.utils._triton")
    for name in dir(probes):
        if name.startswith("has_triton"):
            getattr(probes, name)()
    _compile_nothing()
    for name in ("triton", "triton.language", "triton.language.extra"):
        _register(_ModuleOfAnything(name))


def _compile_nothing() -> None:
    """``torch.compile`` leaves functions as they are: its compiler takes seconds to import, for nothing on a CPU."""
    setattr(torch, "compile", lambda model=None, **kwargs: model or (lambda function: function))  # noqa: B010


# --- repairs of releases --------------------------------------------------------------------------------------------


def _repair_numpy_product() -> None:
    """Distributed checkpoints before 0.16 multiply shapes with a function that NumPy 2 has no more."""
    numpy: Any = importlib.import_module("numpy")
    if not hasattr(numpy, "product"):
        numpy.product = numpy.prod


def _repair_quantize_of_nothing() -> None:
    """0.12 raises about FP8 in every distributed step, even when there is nothing to quantize; 0.13 returns."""
    fp8_utils: Any = importlib.import_module("megatron.core.fp8_utils")
    original = fp8_utils._quantize_param_shard_impl

    def quantize(model_params: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        return original(model_params, *args, **kwargs) if model_params else None

    fp8_utils._quantize_param_shard_impl = quantize


def _repair_missing_gemm_name() -> None:
    """0.13 to 0.16 test a name for ``None`` that a failed import never bound."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _repair_local_moe_spec() -> None:
    """0.10 asks for the Transformer Engine variant while it builds the local specification of MoE layers."""
    specs: Any = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    original = specs._get_moe_module_spec

    def local_spec(**kwargs: Any) -> Any:
        return original(**{**kwargs, "use_te": False})

    specs._get_moe_module_spec = local_spec
