"""Packing: small storages become few large ones, and nobody notices."""

import pytest
import torch
from core_toys import Tensors, Trainer, device_bytes, junk, odd_floats, raw, snapshot, storages

from megastow.device import CpuDevice
from megastow.flat import FlatTensors
from megastow.state import Inventory, StateKind
from megastow.storages import find_storages

CPU = torch.device("cpu")


class Packer:
    """`FlatTensors` over a changing set of tensors."""

    def __init__(self, bucket_bytes=1 << 20):
        self.flat = FlatTensors(CpuDevice(CPU), bucket_bytes)

    def pack(self, *tensors, kind=StateKind.WEIGHTS, keep=True):
        inventory = Inventory(CPU)
        group = inventory.group(kind, "test", keep=keep)
        for index, tensor in enumerate(tensors):
            group.add(str(index), tensor)
        records = find_storages(inventory, [kind], ())
        groups = self.flat.groups(records)
        foreseen = [bucket.nbytes for bucket in self.flat.buckets(groups)]
        self.flat.pack(groups)
        assert [{record.nbytes for record in group} for group in groups] == [{nbytes} for nbytes in foreseen]
        return sum(map(len, groups))


def one_storage(*tensors):
    return len({t.untyped_storage()._cdata for t in tensors}) == 1


def test_small_storages_share_a_bucket_and_stay_themselves():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64)
    tensors = [torch.arange(1, 8).to(dtype) for dtype in dtypes * 2] + [odd_floats(), torch.tensor(3.0)]
    tensors.append(torch.nn.Parameter(torch.randn(3, 5).t()))
    shapes = [(t.shape, t.stride(), t.dtype, t.requires_grad, t.is_leaf, t._version) for t in tensors]
    before = [raw(t) for t in tensors]
    assert Packer().pack(*tensors) == len(tensors)
    for dtype in dtypes:
        assert one_storage(*(t for t in tensors if t.dtype == dtype))
    assert [(t.shape, t.stride(), t.dtype, t.requires_grad, t.is_leaf, t._version) for t in tensors] == shapes
    assert all(torch.equal(a, raw(t)) for a, t in zip(before, tensors, strict=True))
    assert all((t.data_ptr() - t.untyped_storage().data_ptr()) % 512 == 0 for t in tensors)


def test_views_and_bases_move_together():
    base = torch.randn(100)
    hidden_base = torch.randn(300)
    views = [base[10:20], base[::3], base.view(10, 10).t(), hidden_base[200:210]]
    del hidden_base
    distances = [v.data_ptr() - base.data_ptr() for v in views[:3]]
    before = [raw(t) for t in (base, *views)]
    assert Packer().pack(base, *views, torch.zeros(2)) == 3
    assert [v.data_ptr() - base.data_ptr() for v in views[:3]] == distances
    assert all(torch.equal(a, raw(t)) for a, t in zip(before, (base, *views), strict=True))
    base.fill_(7)
    assert all((v == 7).all() for v in views[:3])
    assert views[3]._base.untyped_storage()._cdata == views[3].untyped_storage()._cdata
    views[3]._base.fill_(9)
    assert (views[3] == 9).all()


def test_autograd_hooks_and_accumulators_stay():
    parameter = torch.nn.Parameter(torch.ones(4))
    other = torch.zeros(4)
    fired = []
    parameter.register_hook(lambda g: fired.append(g))
    accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    loss = (parameter * parameter).sum()  # saves the parameter itself, which moves along
    assert Packer().pack(parameter, other) == 2
    loss.backward()
    assert torch.equal(parameter.grad, torch.full((4,), 2.0))
    assert len(fired) == 1
    assert parameter.expand_as(parameter).grad_fn.next_functions[0][0] is accumulator


def unknown_view(tensor):
    return tensor[1:]


def unknown_alias(tensor):
    return tensor.detach()


def unknown_saved(tensor):
    return (tensor.requires_grad_().t() @ tensor).sum()  # autograd saves a view


def unknown_storage(tensor):
    return tensor.untyped_storage()


@pytest.mark.parametrize("hold", [unknown_view, unknown_alias, unknown_saved, unknown_storage])
def test_a_storage_with_an_unknown_owner_is_left_where_it_is(hold):
    tensor, others = torch.ones(4, 4), [torch.zeros(4), torch.zeros(4)]
    held = hold(tensor)
    place = tensor.data_ptr()
    packer = Packer()
    assert packer.pack(tensor, *others) == 2
    assert tensor.data_ptr() == place
    if hold is unknown_saved:
        held.backward()
        assert tensor.grad is not None
    del held
    assert packer.pack(tensor, torch.zeros(4)) == 2
    assert tensor.data_ptr() != place


def special_conj(tensor):
    return torch.view_as_complex(tensor.view(2, 2)).conj()


def special_neg(tensor):
    return torch._neg_view(tensor)


class Subclass(torch.Tensor):
    pass


def special_subclass(tensor):
    return tensor.as_subclass(Subclass)


def special_inference(tensor):
    with torch.inference_mode():
        return torch.arange(4.0)


def special_rebased(tensor):
    view = torch.zeros(4)[:]
    view.data = tensor  # its base lies elsewhere
    return view


@pytest.mark.parametrize("make", [special_conj, special_neg, special_subclass, special_inference, special_rebased])
def test_tensors_that_are_more_than_a_place_keep_it(make):
    tensor = torch.arange(4.0)
    special = make(tensor)
    before = raw(special.resolve_conj().resolve_neg())
    flags = (type(special), special.is_conj(), special.is_neg(), special.is_inference())
    Packer().pack(tensor, special, torch.zeros(4), torch.zeros(4))
    assert (type(special), special.is_conj(), special.is_neg(), special.is_inference()) == flags
    assert torch.equal(before, raw(special.resolve_conj().resolve_neg()))


def test_what_is_dropped_and_what_is_large_is_not_packed():
    packer = Packer(bucket_bytes=4096)
    assert packer.pack(torch.zeros(4), torch.zeros(4), keep=False) == 0
    assert packer.pack(torch.zeros(512), torch.zeros(512)) == 0  # half a bucket each
    assert packer.pack(torch.zeros(4)) == 0  # alone


def test_buckets_are_no_larger_than_asked():
    tensors = [torch.randn(100) for _ in range(20)]
    packer = Packer(bucket_bytes=2048)
    assert packer.pack(*tensors) == 20
    assert set(storages(Tensors(enumerate(tensors))).values()) == {2048}
    assert packer.pack(*tensors) == 0


def test_holes_are_closed_and_the_old_bucket_is_given_back():
    packer, tensors = Packer(), [torch.full((100,), float(i)) for i in range(8)]
    packer.pack(*tensors)
    full = device_bytes(Tensors(enumerate(tensors)))
    del tensors[::2]
    kept = [raw(t) for t in tensors]
    blocks = junk([full])
    assert packer.pack(*tensors) == 1
    assert device_bytes(Tensors(enumerate(tensors))) == full // 2
    assert all(torch.equal(a, raw(t)) for a, t in zip(kept, tensors, strict=True))
    tensors.append(torch.zeros(100))
    assert packer.pack(*tensors) in (0, 2)
    assert packer.pack(*tensors) == 0
    tensors.clear()
    packer.pack()
    assert not packer.flat._buckets
    del blocks


def test_a_trainer_is_packed_into_one_bucket_a_kind():
    trainer = Trainer()
    trainer.step()
    tensors = trainer.tensors(("optimizer_states",))
    moments = [t for n, t in tensors.items() if "exp_avg" in n]
    before = snapshot(tensors)
    assert Packer().pack(*moments, kind=StateKind.OPTIMIZER_STATES) == len(moments)
    assert one_storage(*moments)
    assert snapshot(tensors).keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in snapshot(tensors).items())
