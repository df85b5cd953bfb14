"""From an inventory to distinct storages: who claims what, what is kept, who else owns it."""

import pytest
import torch
from core_toys import raw

from megastow.errors import StateChangedError
from megastow.state import Inventory, StateKind, parse_kinds
from megastow.storages import StorageRecord, belongs_to, byte_view, find_storages, storage_id

W, M, S, G = StateKind
CPU = torch.device("cpu")


def inventory(*groups):
    made = Inventory(CPU)
    for kind, keep, tensors in groups:
        group = made.group(kind, "test", keep=keep)
        for index, tensor in enumerate(tensors):
            group.add(f"{kind}[{index}]", tensor)
    return made


def test_aliases_are_one_storage_and_each_tensor_counts_once():
    base = torch.zeros(8)
    view = base[2:4]
    (record,) = find_storages(inventory((W, True, [base, view, base, None])), [W], ())
    assert record.storage._cdata == base.untyped_storage()._cdata
    assert record.nbytes == 32
    assert [id(t) for _, t in record.tensors] == [id(base), id(view)]
    assert record.names == ("weights[0]", "weights[1]")


def test_a_storage_goes_with_the_first_kind_and_is_kept_if_anybody_asks():
    shared = torch.zeros(8)
    made = inventory((G, False, [shared]), (W, True, [shared[:2]]), (M, True, [torch.zeros(2)]))
    assert find_storages(made, [G], ()) == []
    (record,) = find_storages(made, [W], ())
    assert (record.kind, record.keep) == (W, True)
    made = inventory((G, False, [shared]), (G, True, [shared[:2]]))
    assert find_storages(made, [G], ())[0].keep


def test_what_is_elsewhere_empty_or_away_is_left_out():
    tensor = torch.zeros(2)
    made = inventory((W, True, [torch.zeros(2, device="meta"), torch.zeros(0), tensor]))
    assert [r.storage._cdata for r in find_storages(made, [W], ())] == [tensor.untyped_storage()._cdata]
    tensor.untyped_storage().resize_(0)
    assert find_storages(made, [W], {storage_id(tensor.untyped_storage())}) == []
    with pytest.raises(StateChangedError, match=r"weights\[2\].*has no storage"):
        find_storages(made, [W], ())
    assert find_storages(made, [M], ()) == []  # nobody asked for it


def test_belongs_to_sees_every_other_owner():
    def record_of(tensor):
        return StorageRecord(tensor.untyped_storage(), W, True)

    tensor = torch.zeros(8, requires_grad=True)
    assert belongs_to(record_of(tensor), 1)
    for other in (tensor.detach(), tensor.view(2, 4), tensor.untyped_storage(), tensor.data, (tensor[2:] * tensor[:6])):
        assert not belongs_to(record_of(tensor), 1), other
        del other
    assert belongs_to(record_of(tensor), 1)
    record = record_of(tensor)
    del tensor
    assert belongs_to(record, 0)
    held = record.storage
    assert not belongs_to(record, 0)
    del held


def test_byte_view_is_no_copy():
    tensor = torch.zeros(3, dtype=torch.float64)[1:]
    view = byte_view(tensor.untyped_storage())
    assert view.shape == (24,)
    view[8:] = 255
    assert raw(tensor).eq(255).all()


def test_parse_kinds_sorts_and_removes_repetitions():
    assert parse_kinds(["grad_buffers", S, "weights", "weights"]) == (W, S, G)
    assert parse_kinds([]) == (W, M, S, G)
    assert str(W) == f"{W}" == "weights"


def test_a_group_lists_the_inner_tensors_of_a_subclass_however_deep():
    class Outer:
        def __init__(self, **inner):
            self.__dict__.update(inner)

        def __tensor_flatten__(self):
            return list(self.__dict__), None

    made = Inventory(CPU)
    group = made.group(W, "test")
    group.add("q", Outer(data=torch.zeros(2), scales=Outer(low=torch.zeros(1))))
    assert [name for name, _ in group.tensors] == ["q.data", "q.scales.low"]


def test_a_storage_is_replicated_over_the_ranks_that_all_who_know_name():
    shared = torch.zeros(8)
    made = Inventory(CPU)
    for index, replicas in enumerate([(), (0, 1, 2, 3), (0, 2), ()]):
        made.group(W, "test", replicas=replicas).add(f"{index}", shared[index : index + 1])
    (record,) = find_storages(made, [W], ())
    assert record.replicas == (0, 2)
