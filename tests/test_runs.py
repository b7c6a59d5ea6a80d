"""Which tokens of a step attend together, and in which form (`pymla.engine.runs`, `forms`, `slices`)."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_costs import V2_LITE

from pymla.engine.forms import check_mode, form_of
from pymla.engine.runs import Run, runs_of
from pymla.engine.slices import even_slices, slices
from pymla.errors import PymlaError


def batch(*sizes):
    """Sequences of some tokens in the cache, each with some new ones."""
    return [(SimpleNamespace(length=cached), np.zeros(new, np.int32)) for cached, new in sizes]


@pytest.mark.parametrize(
    ("mla", "token", "prompt"),
    [
        ("auto", "absorbed", "expanded"),
        ("0", "full", "full"),
        ("1", "absorbed", "absorbed"),
        ("2", "absorbed", "expanded"),
        ("3", "absorbed", "expanded"),
    ],
)
def test_the_form_of_each_mode(mla, token, prompt):
    check_mode(V2_LITE, mla)
    assert form_of(V2_LITE, mla, 1, 1000) == token
    assert form_of(V2_LITE, mla, 500, 500) == prompt


def test_a_mode_that_is_none():
    with pytest.raises(PymlaError, match="unknown MLA mode '4'; choose auto, 0, 1, 2, 3"):
        check_mode(V2_LITE, "4")


def test_neighbours_of_one_form_are_one_run():
    runs = runs_of(V2_LITE, "auto", batch((10, 1), (20, 1), (0, 300), (0, 300), (5, 1)))
    assert runs == [
        Run("absorbed", 0, 2, 0, 21),
        Run("expanded", 2, 302, 2, 300),
        Run("expanded", 302, 602, 3, 300),
        Run("absorbed", 602, 603, 4, 6),
    ]
    assert runs_of(V2_LITE, "0", batch((10, 1), (0, 300))) == [Run("full", 0, 301, 0, 300)]


def test_slices_cover_a_range():
    assert slices(3, 10, 4) == [slice(3, 7), slice(7, 10)]
    assert slices(0, 8, 4) == [slice(0, 4), slice(4, 8)]
    assert slices(5, 5, 4) == []
    assert even_slices(16, 7) == [slice(0, 5), slice(5, 10), slice(10, 16)]
    assert even_slices(16, 16) == even_slices(16, 100) == [slice(0, 16)]
