"""Backends against `pymla.backend`: every operation under its name, with its arguments, and nothing else."""

import importlib
import importlib.util
import inspect
import re
import typing

import pytest

from pymla import backend as protocols
from pymla.contract import Contract
from pymla.reference import limits

BACKENDS = ["pymla.reference", "pymla.cpu"]
if importlib.util.find_spec("numba_cuda"):
    BACKENDS.append("pymla.cuda.backend")

#: Submodules and their Protocols.
MODULES = {
    "attention": protocols.Attention,
    "limits": protocols.Limits,
    "memory": protocols.Memory,
    "moe": protocols.MoE,
    "norm": protocols.Norm,
    "quant": protocols.Quant,
    "rope": protocols.Rope,
    "sampling": protocols.Sampling,
}

#: Public functions and classes of a backend's module that are no operations, and why they are there.
EXTRAS = {
    r"(attention|moe|norm|quant|rope)\.\w*kernels": "the kernels that `compile_for` compiles for a model",
    r"reference\.quant\.(de)?quantise(_activations)?": "the definition of the types, for tests, tools and converters",
    r"limits\.(Limits|Stream|read_rate|int8_rate|packed_rate|seconds)": "the measurements one by one, for experiments",
    r"cpu\.memory\.(allocate|allocate_f32|fetch_ahead)": "memory in kernels",
    r"cpu\.quant\.(consecutive|counting|takes_tiles)": "products that `moe` and `attention` make part of their own",
    r"cuda\.memory\.\w+": "the device's memory, which the host cannot read",
    r"cuda\.sampling\.(SEGMENT|greedy|new_state|on_device|sample)": "choosing the tokens of several sequences at once",
    r"sampling\.(Sampled|SamplingParams)": "what `Sampler` takes and gives, the same for all backends",
    r"cpu\.(ISA|set_threads|usable_cores)": "the processor's instructions and cores",
}


def members(protocol):
    """Names of what a Protocol lists; Python gives an `__init__` to those that have none."""
    own = protocol.__init__.__qualname__ == f"{protocol.__name__}.__init__"
    return [name for name in vars(protocol) if not name.startswith("_") or (own and name == "__init__")]


def arguments(function):
    """Names, kinds and defaults of the arguments but `self`, as Python writes them."""
    found = inspect.signature(function).parameters.values()
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in found if each.name != "self"]
    return str(inspect.Signature(plain))


def differences(protocol, actual, where):
    """In words, what of a Protocol a module or a class does not have as it is listed."""
    for name in members(protocol):
        listed = inspect.getattr_static(protocol, name)
        if name != "__init__" and not hasattr(actual, name):
            yield f"{where}.{name} is missing"
        elif isinstance(listed, property):
            yield from differences_of_value(typing.get_type_hints(listed.fget)["return"], getattr(actual, name), where)
        else:
            wanted = arguments(getattr(listed, "__func__", listed))
            got = arguments(actual if name == "__init__" else getattr(actual, name))
            if got != wanted:
                yield f"{where}.{name} is {name}{got}, and {name}{wanted} is listed"


def differences_of_value(kind, value, where):
    if typing.get_origin(kind) is type:  # a class
        (kind,) = typing.get_args(kind)
        yield from differences(kind, value, f"{where}.{kind.__name__}")
    elif kind in MODULES.values():
        yield from differences(kind, value, value.__name__)
    elif not isinstance(value, kind):
        yield f"{where} has {value!r} where a {kind.__name__} is listed"


def public(module):
    """Names of a module's public functions and classes: those that it lists, or those that it defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return {name for name in listed if not inspect.ismodule(getattr(module, name))}
    return {
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, tuple)))
        and value.__module__.startswith(module.__name__)
        and not name.startswith("_")
    }


@pytest.fixture(params=BACKENDS)
def backend(request):
    return importlib.import_module(request.param)


def test_every_operation_is_there_with_its_arguments(backend):
    found = list(differences(protocols.Backend, backend, backend.__name__))
    assert not found, "\n".join(found)


def test_nothing_else_is_public(backend):
    """Whoever writes for one backend finds the same in the others, but for what is listed here with a reason."""
    found = {f"{backend.NAME}.{name}" for name in public(backend) - set(members(protocols.Backend))}
    for name, protocol in MODULES.items():
        module = getattr(backend, name, None)
        if module is not None:  # the other test tells what is missing
            found |= {f"{backend.NAME}.{name}.{each}" for each in public(module) - set(members(protocol))}
    unknown = {name for name in found if not any(re.fullmatch(rf"(\w+\.)?{pattern}", name) for pattern in EXTRAS)}
    assert unknown == set()


def test_limits_of_the_reference_are_rates():
    found = limits.measure()
    assert 1e8 < found.read < 1e13
    assert 1e7 < found.int8 < 1e14


def test_checks_are_those_of_operations():
    """`Contract` has the checks of operations, under their names, with arguments of theirs."""
    listed = {
        name: set(inspect.signature(getattr(protocol, name)).parameters)
        for protocol in MODULES.values()
        for name in members(protocol)
        if not isinstance(inspect.getattr_static(protocol, name), property)
    }
    #: Sizes of expanded keys and values stand for them, as each backend has a form of its own; a backend may store more
    #: types than it computes in, and `absorbed_materialised` has the checks of `absorbed`.
    own = {
        "expand": {"sizes", "rotated"},
        "expanded": {"sizes", "rotated"},
        "store": {"floats"},
        "absorbed": {"operation"},
    }
    for name in vars(Contract):
        if name.startswith("_") or name == "sizes":
            continue
        operation = "Activation" if name == "activation" else name
        taken = set(inspect.signature(getattr(Contract, name)).parameters)
        assert taken - own.get(name, set()) <= listed[operation], name
