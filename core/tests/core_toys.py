"""A small trainer in plain torch, and an oracle for it. Nothing here calls megastow.

The trainer is shaped like Megatron's mixed precision without being it: bf16 parameters in the model, fp32 copies of
them that only the optimizer knows. So all four kinds of state have bytes.
"""

import gc
import os
import struct
import subprocess
import sys
from pathlib import Path

import torch

KINDS = ("weights", "main_weights", "optimizer_states", "grad_buffers")
KEPT = KINDS[:3]

# Quiet and signalling NaN with payloads, a negative one, -0.0, the smallest subnormal and a negative one, infinities.
_BITS = (0x7FC12345, 0x7F812345, 0xFFABCDEF, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000)


def odd_floats(dtype=torch.float32):
    """Bit patterns that arithmetic, or a comparison of values, would lose."""
    return torch.frombuffer(bytearray(struct.pack("<8I", *_BITS)), dtype=dtype).clone()


class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = torch.nn.Embedding(16, width, dtype=torch.bfloat16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(3))
        self.norm = torch.nn.LayerNorm(width, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(width, 16, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight  # tied
        self.frozen = torch.nn.Parameter(odd_floats(), requires_grad=False)
        self.register_buffer("odd", odd_floats(torch.bfloat16))
        self.register_buffer("odd_view", self.odd[3:7])  # an alias of a registered buffer
        self.table = torch.arange(5.0)  # a plain attribute, as rotary embeddings have

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(self.norm(hidden))


class Trainer:
    """bf16 model, fp32 main weights, Adam; deterministic, so that two of them stay equal bit for bit."""

    def __init__(self, seed=0, width=16):
        torch.manual_seed(seed)
        self.model = Net(width)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.main = [p.detach().float().clone().requires_grad_() for p in self.trained]
        self.optimizer = torch.optim.Adam(self.main, lr=0.01)
        self._data = torch.Generator().manual_seed(seed)

    def step(self):
        """One training step; returns the loss. Gradients stay until the next one."""
        loss = self.backward(self.forward())
        self.update()
        return loss

    def forward(self):
        tokens = torch.randint(0, 16, (4, 6), generator=self._data)
        for p in (*self.trained, *self.main):
            p.grad = None
        return torch.nn.functional.cross_entropy(self.model(tokens).float().flatten(0, 1), tokens.flatten())

    def backward(self, loss):
        loss.backward()
        return loss.detach()

    def update(self):
        for p, main in zip(self.trained, self.main, strict=True):
            main.grad = p.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for p, main in zip(self.trained, self.main, strict=True):
                p.copy_(main)

    def tensors(self, kinds=KINDS):
        """Every tensor of the trainer by name, for the kinds given."""
        found = Tensors()
        if "weights" in kinds:
            found.update(self.model.named_parameters(prefix="weights"))
            found.update(self.model.named_buffers(prefix="weights"))
            found["weights.table"] = self.model.table
        if "main_weights" in kinds:
            found.update({f"main[{i}]": t for i, t in enumerate(self.main)})
        if "optimizer_states" in kinds:
            for i, main in enumerate(self.main):
                found.update({f"state[{i}].{k}": v for k, v in self.optimizer.state.get(main, {}).items()})
        if "grad_buffers" in kinds:
            found.update(
                {f"grad[{i}]": p.grad for i, p in enumerate((*self.trained, *self.main)) if p.grad is not None}
            )
        return found


def raw(tensor):
    """A copy of the elements of a tensor, as bytes."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


class Tensors(dict):
    """Tensors by name. Not printed: that reads them, and one whose storage was released crashes."""

    def __repr__(self):
        return f"<{len(self)} tensors>"


def snapshot(tensors):
    return {name: raw(tensor) for name, tensor in tensors.items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    wrong = [name for name, expected in before.items() if not torch.equal(expected, after[name])]
    assert not wrong, f"other bytes than before: {wrong}"


def moved(tensors):
    """Those which leave; Adam's `step` counters lie on the host, and stay there."""
    return Tensors({n: t for n, t in tensors.items() if not n.endswith(".step")})


def storages(tensors):
    """Distinct storages behind tensors, by identity, with their size in bytes now."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors.values()}


def device_bytes(tensors):
    return sum(storages(tensors).values())


def places(tensors):
    """What must not change in a refused call: each tensor's identity, storage and address."""
    return {n: (id(t), t.untyped_storage()._cdata, t.data_ptr(), t._version) for n, t in tensors.items()}


def aliases(tensors):
    """Which tensors share a storage, and how they lie to each other."""
    shape = {n: (tuple(t.shape), t.stride(), t.dtype) for n, t in tensors.items()}
    ids = {n: t.untyped_storage()._cdata for n, t in tensors.items()}
    distance = {
        (a, b): tensors[b].data_ptr() - tensors[a].data_ptr()
        for a in ids
        for b in ids
        if a < b and ids[a] == ids[b] and "view" in a + b
    }
    return shape, distance


def junk(sizes):
    """Occupies memory of these sizes with 0xFF, so that nothing passes by finding its old bytes at its old address.

    Give every second block back by dropping what is not returned: later allocations then find 0xFF in their way.
    """
    blocks = [torch.full((max(1, n),), 0xFF, dtype=torch.uint8) for n in sizes for _ in range(2)]
    return blocks[::2]


def live_bytes():
    """Bytes of all storages that any tensor in this process stands on."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return sum(found.values())


def run_python(code, timeout=90):
    """Run code that may crash in a process of its own; returns what it printed, and fails if it did not end well."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=env, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
