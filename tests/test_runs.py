"""Which tokens of a step attend together, and in which form (`pymla.engine.runs`, `forms`, `slices`)."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from test_costs import V2_LITE

from pymla.engine.forms import Part, check_mode, form_of, parts_of
from pymla.engine.runs import Portion, Run, portions_of, runs_of
from pymla.engine.slices import even_slices, slices
from pymla.errors import PymlaError
from pymla.models.config import Indexer

SPARSE = dataclasses.replace(V2_LITE, indexer=Indexer(heads=4, head_dim=64, top_k=100, full=(True,) * 27))


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


def test_modes_of_sparse_attention():
    for mla in ("auto", "1", "3"):
        check_mode(SPARSE, mla)
    for mla in ("0", "2"):
        with pytest.raises(PymlaError, match=f"`mla` is {mla}, which attends to all positions"):
            check_mode(SPARSE, mla)


def test_tokens_that_see_more_positions_than_are_chosen_are_sparse():
    assert parts_of(SPARSE, "auto", 100, 100) == [Part("expanded", 100, 100)]
    assert parts_of(SPARSE, "auto", 101, 101) == [Part("expanded", 100, 100), Part("sparse", 1, 101)]
    assert parts_of(SPARSE, "1", 5, 102) == [Part("absorbed", 3, 100), Part("sparse", 2, 102)]
    assert parts_of(SPARSE, "auto", 5, 300) == [Part("sparse", 5, 300)]
    assert parts_of(SPARSE, "auto", 1, 100) == [Part("absorbed", 1, 100)]
    assert parts_of(V2_LITE, "auto", 1000, 1000) == [Part("expanded", 1000, 1000)]
    assert runs_of(SPARSE, "auto", batch((0, 120), (150, 1), (10, 1), (99, 2))) == [
        Run("expanded", 0, 100, 0, 100),
        Run("sparse", 100, 121, 0, 151),
        Run("absorbed", 121, 123, 2, 100),
        Run("sparse", 123, 124, 3, 101),
    ]


def test_portions_have_so_many_sparse_tokens():
    runs = [Run("expanded", 0, 100, 0, 100), Run("sparse", 100, 125, 0, 125), Run("absorbed", 125, 126, 1, 8)]
    assert portions_of(runs, 25) == [Portion(0, 126, runs)]
    assert portions_of(runs, 10) == [
        Portion(0, 110, [runs[0], Run("sparse", 100, 110, 0, 125)]),
        Portion(110, 120, [Run("sparse", 0, 10, 0, 125)]),
        Portion(120, 126, [Run("sparse", 0, 5, 0, 125), Run("absorbed", 5, 6, 1, 8)]),
    ]
    more = [*runs, Run("sparse", 126, 132, 2, 200)]
    assert [(each.start, each.stop) for each in portions_of(more, 10)] == [(0, 110), (110, 120), (120, 126), (126, 132)]
    assert portions_of(runs[:1], 1) == [Portion(0, 100, runs[:1])]


def test_slices_cover_a_range():
    assert slices(3, 10, 4) == [slice(3, 7), slice(7, 10)]
    assert slices(0, 8, 4) == [slice(0, 4), slice(4, 8)]
    assert slices(5, 5, 4) == []
    assert even_slices(16, 7) == [slice(0, 5), slice(5, 10), slice(10, 16)]
    assert even_slices(16, 16) == even_slices(16, 100) == [slice(0, 16)]
