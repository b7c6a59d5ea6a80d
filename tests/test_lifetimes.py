"""Arrays of kernels live as long as their addresses are used.

Numba frees an array behind the last line that names it, whoever has its address. A function that takes an address
before a loop must therefore name the array in the loop as well.
"""

import ast
from pathlib import Path

import pytest

import pymla.cpu

ALLOCATORS = {"empty", "zeros", "allocate", "allocate_f32", "block_memory", "_block_memory"}
SOURCES = sorted(Path(pymla.cpu.__file__).parent.rglob("*.py"))


def allocated(function):
    """Names of the arrays that a function makes."""
    names = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        targets, values = node.targets[0], node.value
        both = isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple)
        pairs = zip(targets.elts, values.elts, strict=True) if both else [(targets, values)]
        for target, value in pairs:
            called = value.func if isinstance(value, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", None))
            if isinstance(target, ast.Name) and name in ALLOCATORS:
                names.add(target.id)
    return names


def names_in(node):
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def freed_too_early(source):
    """(function, array) for arrays whose address is taken before a loop that does not name them."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        arrays, addressed = allocated(function), set()
        for statement in function.body:
            if isinstance(statement, ast.For | ast.While):
                yield from ((function.name, name) for name in addressed - names_in(statement))
                continue
            for call in ast.walk(statement):
                if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "address":
                    addressed |= arrays & names_in(call)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_arrays_outlive_their_addresses(path):
    assert not list(freed_too_early(path.read_text(encoding="utf-8")))


def test_an_address_taken_before_a_loop_is_found():
    source = """
def kernel(n):
    scratch, other = allocate(n), np.empty(n)
    at, behind = address(scratch), address(other[0])
    for i in range(n):
        use(at, behind, other)
"""
    assert list(freed_too_early(source)) == [("kernel", "scratch")]
