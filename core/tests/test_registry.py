"""Choosing the adapter, and finding Megatron without importing it."""

import sys

import pytest
import torch

from megastow import AdapterSelectionError, create_memory_manager, detect_megatron, registry
from megastow.plain import PlainAdapter


class Fake:
    """An adapter that says what it is told to."""

    supports = "tests"

    def __init__(self, name, installation=(), instances=()):
        self.name, self._installation, self._instances = name, installation, instances

    def refuses_installation(self, megatron):
        return list(self._installation)

    def refuses(self, model, optimizer):
        return list(self._instances)

    def bind(self, model, optimizer):
        return PlainAdapter().bind(model, optimizer)


class Entry:
    def __init__(self, name, load):
        self.name, self.value, self._load = name, f"somewhere:{name}", load

    def load(self):
        return self._load()


@pytest.fixture
def installed(monkeypatch):
    def install(*adapters):
        entries = [a if isinstance(a, Entry) else Entry(a.name, lambda a=a: a) for a in adapters]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)

    return install


MODEL = [torch.nn.Linear(2, 2)]


def test_the_plain_adapter_takes_a_plain_module(installed):
    installed(Fake("other", instances=["not mine"]))
    assert registry.choose_adapter(MODEL, None).name == "plain"


def test_two_that_accept_are_one_too_many(installed):
    installed(Fake("eager"))
    with pytest.raises(AdapterSelectionError, match="2 adapters accept a Linear with no optimizer") as raised:
        registry.choose_adapter(MODEL, None)
    assert "- eager: accepts" in str(raised.value)
    assert registry.choose_adapter(MODEL, None, "eager").name == "eager"


def test_all_reasons_are_listed(installed):
    installed(Fake("old", installation=["too new", "too shiny"], instances=["not mine"]), Fake("new", instances=["no"]))
    with pytest.raises(AdapterSelectionError, match="0 adapters accept") as raised:
        registry.choose_adapter(MODEL, object())
    for line in ("- plain: the optimizer is a builtins.object", "- old: not mine; too new; too shiny", "- new: no"):
        assert line in str(raised.value)


def test_forcing_skips_the_opinion_on_the_version_but_not_the_look(installed):
    installed(Fake("old", installation=["too new"]), Fake("blind", instances=["cannot see it"]))
    assert registry.choose_adapter(MODEL, None, "old").name == "old"
    with pytest.raises(AdapterSelectionError, match="'blind' was asked for and does not fit: cannot see it"):
        registry.choose_adapter(MODEL, None, "blind")
    create_memory_manager(MODEL, adapter="old").close()


def test_broken_third_parties_do_not_take_the_others_down(installed):
    def broken():
        raise ImportError("no module named lost")

    class Raising(Fake):
        def refuses(self, model, optimizer):
            raise AttributeError("surprise")

    installed(Entry("broken", broken), Entry("wrong", lambda: 7), Raising("raising"))
    assert registry.choose_adapter(MODEL, None).name == "plain"
    for name, words in (("broken", "ImportError: no module named lost"), ("wrong", "a int, not an adapter")):
        with pytest.raises(AdapterSelectionError, match=words):
            registry.choose_adapter(MODEL, None, name)
    with pytest.raises(AdapterSelectionError, match="surprise"):
        registry.choose_adapter(MODEL, None, "raising")


def test_megatron_is_found_in_its_files_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "megatron/core"
    (package / "distributed").mkdir(parents=True)
    (package / "package_info.py").write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\nPRE_RELEASE = 'rc0'\n")
    (package / "distributed/param_and_grad_buffer.py").write_text(
        "class _ParamAndGradBuffer:\n    pass\nraise OSError\n"
    )
    (package / "distributed/distributed_data_parallel.py").write_text("this is no Python")
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = detect_megatron()
    assert found.path == tmp_path / "megatron"
    assert str(found.version) == "0.16.1rc0"
    assert found.defines("core/distributed/param_and_grad_buffer.py", "_ParamAndGradBuffer")
    assert not found.defines("core/distributed/param_and_grad_buffer.py", "Lost")
    assert "megatron.core" not in sys.modules
    (package / "distributed/param_and_grad_buffer.py").write_bytes(b"\xff\xfe\x00")
    (package / "package_info.py").write_text("VERSION = '1'\n")
    assert detect_megatron().version is None


def test_without_megatron(monkeypatch):
    monkeypatch.setattr("megastow.megatron.importlib.util.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    assert detect_megatron() is None
    assert registry.choose_adapter(MODEL, None).name == "plain"
