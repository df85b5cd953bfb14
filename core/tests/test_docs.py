"""The code in the documentation runs as it stands, with a small trainer in place of the reader's."""

import re
from pathlib import Path

import torch
import torch.distributed as dist
from core_toys import KEPT, Net, Trainer, assert_same, raw, snapshot

from megastow import Residency, create_memory_manager

ROOT = Path(__file__).parents[2]


def run_page(name, names):
    """Run the Python blocks of a page, one after the other, so that a traceback shows its lines."""
    text = (ROOT / name).read_text()
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines_before = text[: found.start()].count("\n") + 1
        exec(compile("\n" * lines_before + found[1], str(ROOT / name), "exec"), names)


def test_the_readme(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    others = [Trainer(), Trainer()]
    trainers = (trainer, *others)
    before = [snapshot(each.tensors(KEPT)) for each in trainers]
    managers = [create_memory_manager(other.model, other.optimizer) for other in others]
    managers[1].offload()
    names = {
        "torch": torch,
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "tokens": torch.zeros(1, dtype=torch.long),
        "rollout": lambda: None,
        "trainer_manager": managers[0],
        "critic_manager": managers[1],
    }
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        run_page("README.md", names)
        assert [m.residency("weights") for m in managers] == [Residency.OFFLOADED, Residency.RESIDENT]
        managers[0].onload()
    finally:
        dist.destroy_process_group()
    for each, state in zip(trainers, before, strict=True):
        assert_same(state, snapshot(each.tensors(KEPT)))
    assert torch.load(tmp_path / "optimizer.pt", weights_only=True).keys() == trainer.optimizer.state_dict().keys()


def test_the_page_on_integration(trainer, tmp_path):
    twin, sent = Trainer(), {}
    for _ in range(2):
        twin.step()
    names = {
        "torch": torch,
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "tokens": torch.zeros(1, dtype=torch.long),
        "reference_model": Net(16),
        "train_step": trainer.step,
        "send": lambda name, tensor: sent.update({name: raw(tensor)}),
        "path": tmp_path / "checkpoint.pt",
    }
    run_page("docs/integration.md", names)
    twin.step()
    saved = trainer.model.state_dict()  # nothing has trained since
    assert_same(snapshot(twin.tensors(KEPT)), snapshot(trainer.tensors(KEPT)))
    assert {n: t.tolist() for n, t in sent.items()} == {n: raw(p).tolist() for n, p in trainer.model.named_parameters()}
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert_same(snapshot(saved), snapshot(loaded["model"]))
