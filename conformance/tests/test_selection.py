"""Which adapter takes which Megatron: every installed one is asked, and exactly one may accept.

A Megatron is looked at without importing it, so a few files with the class definitions that a release has, where it has
them, stand for the release. What is expected follows from the layouts that the installed adapters say they are for, so
an adapter that joins is tested from then on. Where MEGASTOW_MEGATRON names real trees, the same is asked of them.
"""

import os
import sys
from dataclasses import dataclass, field

import pytest
import torch

from megastow import AdapterSelectionError, detect_megatron, registry
from megastow.megatron import Generation
from megastow.megatron_adapter import MegatronAdapter
from megastow_conformance.plan import TREES_VARIABLE
from megastow_conformance.rows import parse_trees, read_matrix

MEMORY_BUFFER = {"model/distributed.py": "class MemoryBuffer: ...\nclass DistributedDataParallel: ..."}
TYPED_MEMORY_BUFFER = {
    "model/distributed.py": "import enum\nclass ParamBufferType(enum.Enum): ...\nclass MemoryBuffer: ...",
    "core/tensor_parallel/__init__.py": "",
}
GRAD_BUFFER = {
    "core/distributed/__init__.py": "from .distributed_data_parallel import DistributedDataParallel",
    "core/distributed/grad_buffer.py": "class Bucket: ...\nclass GradBuffer: ...",
    "memory.py": "class MemoryBuffer: ...",
}
GRAD_BUFFER_IN_A_MODULE = {"core/distributed.py": "class MemoryBuffer: ...\nclass GradBuffer(MemoryBuffer): ..."}
PARAM_AND_GRAD_BUFFER = {
    "core/distributed/__init__.py": "from .param_and_grad_buffer import ParamAndGradBuffer, shard_buffer",
    "core/distributed/param_and_grad_buffer.py": "class Bucket: ...\nclass ParamAndGradBuffer: ...",
}
BUCKET_GROUPS = {
    "core/distributed/__init__.py": "from .distributed_data_parallel import DistributedDataParallel",
    "core/distributed/param_and_grad_buffer.py": "class _ParamAndGradBucketGroup: ...\nclass _ParamAndGradBuffer: ...",
}
DEPRECATED_NAME = {
    "core/distributed/__init__.py": "from .param_and_grad_buffer import ParamAndGradBuffer",
    "core/distributed/param_and_grad_buffer.py": (
        "class _ParamAndGradBuffer: ...\nclass ParamAndGradBuffer(_ParamAndGradBuffer): ..."
    ),
}


@dataclass(frozen=True)
class Tree:
    """The files of a release, what it says of itself, and the layout that it really has.

    Attributes:
        layout: None where no adapter may accept.
        files: by path below the package.
        version: what it states; None where it states nothing.
    """

    layout: Generation | None
    files: dict[str, str] = field(repr=False)
    version: str | None = None


TREES = {
    "v2.6": Tree(Generation.MEMORY_BUFFER, MEMORY_BUFFER),
    "23.08": Tree(Generation.MEMORY_BUFFER, MEMORY_BUFFER, "0.3.0"),
    "Qwen-MoE fork": Tree(Generation.TYPED_MEMORY_BUFFER, TYPED_MEMORY_BUFFER, "0.3.0"),
    "Qwen-MoE fork without a version": Tree(Generation.TYPED_MEMORY_BUFFER, TYPED_MEMORY_BUFFER),
    "October 2023": Tree(Generation.GRAD_BUFFER, GRAD_BUFFER_IN_A_MODULE, "0.4.0"),
    "0.5.0": Tree(Generation.GRAD_BUFFER, GRAD_BUFFER, "0.5.0"),
    "March 2024": Tree(
        Generation.PARAM_AND_GRAD_BUFFER, {"core/distributed/grad_buffer.py": "class ParamAndGradBuffer: ..."}, "0.5.0"
    ),
    "0.6.0": Tree(Generation.PARAM_AND_GRAD_BUFFER, PARAM_AND_GRAD_BUFFER, "0.6.0"),
    "0.8.0": Tree(Generation.PARAM_AND_GRAD_BUFFER, PARAM_AND_GRAD_BUFFER, "0.8.0"),
    "24.09-alpha, which says 0.9": Tree(Generation.PARAM_AND_GRAD_BUFFER, PARAM_AND_GRAD_BUFFER, "0.9.0rc0"),
    "0.8.0 with the fork's names": Tree(
        Generation.TYPED_MEMORY_BUFFER, {**PARAM_AND_GRAD_BUFFER, **TYPED_MEMORY_BUFFER}, "0.8.0"
    ),
    "0.9.0 with the deprecated class": Tree(Generation.BUCKET_GROUPS, DEPRECATED_NAME, "0.9.0"),
    "0.12.3 with FSDP's class of the same name": Tree(
        Generation.BUCKET_GROUPS,
        {**BUCKET_GROUPS, "core/distributed/custom_fsdp/param_and_grad_buffer.py": "class ParamAndGradBuffer: ..."},
        "0.12.3",
    ),
    "0.16.1 with FSDP's class of the same name": Tree(
        Generation.BUCKET_GROUPS,
        {
            **BUCKET_GROUPS,
            "core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py": "class ParamAndGradBuffer: ...",
        },
        "0.16.1",
    ),
    "0.16 without a version": Tree(Generation.BUCKET_GROUPS, BUCKET_GROUPS),
    "0.20, which nobody has tested": Tree(None, BUCKET_GROUPS, "0.20.0"),
    "0.20 before its release": Tree(None, BUCKET_GROUPS, "0.20.0rc1"),
    "1.0, which nobody has tested": Tree(None, BUCKET_GROUPS, "1.0"),
    "FSDP's class alone": Tree(
        None, {"core/distributed/custom_fsdp/param_and_grad_buffer.py": "class ParamAndGradBuffer: ..."}, "0.12.0"
    ),
    "megatron-core 0.3, which has no DDP": Tree(None, {"core/tensor_parallel/__init__.py": ""}, "0.3.0"),
}

LAYOUTS = {
    Generation.MEMORY_BUFFER: {"_grad_buffers": {torch.float32: object()}},
    Generation.TYPED_MEMORY_BUFFER: {"_grad_buffers": {"allreduce": {torch.float32: object()}}},
    Generation.GRAD_BUFFER: {"grad_buffers": {torch.float32: object()}},
    Generation.PARAM_AND_GRAD_BUFFER: {"param_to_buffer": {}, "buffers": [], "expert_parallel_buffers": []},
    Generation.BUCKET_GROUPS: {"bucket_groups": [], "param_to_bucket_group": {}, "buffers": []},
}
"""What a DDP chunk of each layout has and others have not."""


class Chunk(torch.nn.Module):
    """Stands for Megatron's DDP, of whose package it says that it is."""

    __module__ = "megatron.core.distributed.distributed_data_parallel"

    def __init__(self, layout):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        vars(self).update(LAYOUTS[layout])


@pytest.fixture
def put_on_path(tmp_path, monkeypatch):
    """A function that makes a folder the only Megatron there is, if need be from the files of a `Tree`."""
    before = sys.path

    def put(tree_or_folder):
        folder = tree_or_folder
        if isinstance(tree_or_folder, Tree):
            folder = tmp_path / "tree"
            write(tree_or_folder, folder / "megatron")
        for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "path", [str(folder), *before])
        found = detect_megatron()
        assert found.path == folder / "megatron"
        return found

    return put


def write(tree, package):
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for path, text in tree.files.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    if tree.version is not None:
        major, minor, patch = (*tree.version.split("."), "0")[:3]
        digits = patch[:1]
        (package / "core").mkdir(exist_ok=True)
        (package / "core/package_info.py").write_text(
            f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {digits}\nPRE_RELEASE = {patch[1:]!r}\n"
        )


def megatron_adapters():
    """Those installed that are for a Megatron."""
    found = {name: a for name, a in registry.adapters().items() if isinstance(a, MegatronAdapter)}
    assert {"legacy_v3", "mcore"} <= found.keys(), "install the adapters first"
    return found


def adapters_for(layout):
    """The names of the installed adapters that say they are for a layout: one, or none if it is not installed."""
    names = [name for name, adapter in megatron_adapters().items() if layout in adapter.generations]
    assert len(names) <= 1, f"{names} are for the same layout"
    return names


def accepting(verdicts):
    """The names of those that accept, after a look at the reasons of those that do not."""
    ours = [verdict for verdict in verdicts if verdict.name in megatron_adapters()]
    for verdict in ours:
        assert all(len(reason) > 20 for reason in verdict.reasons), f"{verdict.name} says too little: {verdict.reasons}"
    return [verdict.name for verdict in ours if not verdict.reasons]


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_exactly_the_right_adapter_takes_an_installation(tree, put_on_path):
    found = put_on_path(tree)
    assert str(found.version) == str(tree.version) or str(found.version).startswith(f"{tree.version}.")
    assert accepting(registry.judge_installation(found)) == adapters_for(tree.layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_exactly_the_right_adapter_takes_an_instance(layout):
    model = [Chunk(layout)]
    verdicts = [
        registry.Verdict(name, adapter, tuple(adapter.refuses(model, None)))
        for name, adapter in megatron_adapters().items()
    ]
    assert accepting(verdicts) == adapters_for(layout)


@pytest.mark.parametrize(
    "tree", [tree for tree in TREES.values() if tree.layout is not None], ids=lambda tree: str(tree.version)
)
def test_files_and_instance_together_choose(tree, put_on_path):
    put_on_path(tree)
    for layout in LAYOUTS:
        right = [name for name in adapters_for(layout) if name in adapters_for(tree.layout)]
        if right:
            assert registry.choose_adapter([Chunk(layout)], None).name == right[0]
        else:
            with pytest.raises(AdapterSelectionError, match="0 adapters accept") as raised:
                registry.choose_adapter([Chunk(layout)], None)
            assert all(f"- {name}: " in str(raised.value) for name in megatron_adapters())


@pytest.mark.parametrize("version", ["0.20.0", "1.0"])
def test_a_version_that_nobody_has_tested_can_be_forced(version, put_on_path):
    put_on_path(Tree(None, BUCKET_GROUPS, version))
    model = [Chunk(Generation.BUCKET_GROUPS)]
    with pytest.raises(AdapterSelectionError, match="force it with adapter='mcore'"):
        registry.choose_adapter(model, None)
    assert registry.choose_adapter(model, None, "mcore").name == "mcore"
    with pytest.raises(AdapterSelectionError, match="has the layout _ParamAndGradBuffer"):
        registry.choose_adapter(model, None, "legacy_v3")


def test_real_trees(pytestconfig, put_on_path):
    """Every tree that somebody has: the adapter of its row in the matrix takes it, and no other."""
    pairs = [pair for pair in os.environ.get(TREES_VARIABLE, "").split(os.pathsep) if pair]
    if not pairs:
        pytest.skip(f"no Megatron: set {TREES_VARIABLE}")
    rows = read_matrix(pytestconfig.rootpath / "matrix.toml")
    for name, folder in parse_trees(pairs).items():
        found = put_on_path(folder.resolve())
        assert found.generation is not None, f"{name}: {found} has no layout that is known"
        accepts = accepting(registry.judge_installation(found))
        assert accepts == adapters_for(found.generation), f"{name}: {found}"
        assert name not in rows or accepts == [rows[name].adapter], f"{name}: {found}"
