"""`pymla.moved`: scripts that import modules by their former names."""

import importlib
import sys

import pytest

from pymla.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_former_name_gives_the_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == module.__spec__.name == MOVED[old]


def test_from_the_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "pymla.chat", raising=False)
    monkeypatch.delattr("pymla.chat", raising=False)
    with pytest.warns(DeprecationWarning, match="pymla.text.chat") as found:
        from pymla import chat
    assert chat.__name__ == "pymla.text.chat"
    assert found[0].filename == __file__


def test_other_names_are_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pymla.nothing")
