"""The code in the documentation runs as it stands, with a small trainer in place of the reader's."""

import re
from pathlib import Path

import torch
from core_toys import KEPT, Net, Trainer, assert_same, raw, snapshot

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name):
    """The Python blocks of a page, each with its place."""
    text = (DOCS / name).read_text()
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: found.start()].count("\n") + 2, found[1]


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
    for line, code in blocks("integration.md"):
        exec(compile("\n" * (line - 1) + code, str(DOCS / "integration.md"), "exec"), names)
    twin.step()
    saved = trainer.model.state_dict()  # nothing has trained since
    assert_same(snapshot(twin.tensors(KEPT)), snapshot(trainer.tensors(KEPT)))
    assert {n: t.tolist() for n, t in sent.items()} == {n: raw(p).tolist() for n, p in trainer.model.named_parameters()}
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert_same(snapshot(saved), snapshot(loaded["model"]))
