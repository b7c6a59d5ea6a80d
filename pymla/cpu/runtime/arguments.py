"""Arguments of kernels as a block of 64-bit words, so that every kernel has the same C signature.

`Packer` writes the block in Python; `unpacker` reads it inside the compiled kernel. Integers, floats, arrays and tuples
of these are known. An array is its address, its shape and its strides in bytes.
"""

import operator
import struct

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import populate_array

from pymla.host.arguments import ArgumentWriter

_WORD = ir.IntType(64)


class Packer:
    """Writes the words of a kernel's arguments.

    Parameters
    ----------
    signature : sequence of Numba types
    name : str
        The kernel's, for errors.
    """

    def __init__(self, signature, name):
        self._write = ArgumentWriter(name, signature, _array, lambda value: value.flags.c_contiguous, _number)

    def __call__(self, arguments):
        """The words of `arguments`: int64 (n,).

        Raises
        ------
        TypeError
            An argument does not have the type that the signature says.
        """
        return np.array(self._write(arguments), np.int64)


def _array(value):
    return (value.__array_interface__["data"][0], *value.shape, *value.strides)


def _number(kind):
    return _bits_of_float if isinstance(kind, types.Float) else operator.index


def _bits_of_float(value):
    return struct.unpack("q", struct.pack("d", float(value)))[0]


def unpacker(signature):
    """A function of kernels that reads a block's address into a tuple of arguments."""

    @intrinsic
    def unpack(typingctx, address):
        def codegen(context, builder, _, args):
            block = builder.inttoptr(args[0], _WORD.as_pointer())
            values, _ = _unpack_all(context, builder, signature, block, 0)
            return context.make_tuple(builder, types.Tuple(signature), values)

        return types.Tuple(signature)(types.int64), codegen

    return unpack


def _unpack_all(context, builder, kinds, block, at):
    values = []
    for kind in kinds:
        value, at = _unpack(context, builder, kind, block, at)
        values.append(value)
    return values, at


def _unpack(context, builder, kind, block, at):
    """A value of type `kind` from word `at` on, and the number of the word after it."""

    def word(i):
        return builder.load(builder.gep(block, [ir.Constant(_WORD, at + i)]))

    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder)
        item = context.get_data_type(kind.dtype)
        populate_array(
            array,
            data=builder.inttoptr(word(0), item.as_pointer()),
            shape=[word(1 + i) for i in range(kind.ndim)],
            strides=[word(1 + kind.ndim + i) for i in range(kind.ndim)],
            itemsize=ir.Constant(_WORD, numpy_support.as_dtype(kind.dtype).itemsize),
            meminfo=None,
        )
        return array._getvalue(), at + 1 + 2 * kind.ndim
    if isinstance(kind, types.BaseTuple):
        values, at = _unpack_all(context, builder, list(kind), block, at)
        return context.make_tuple(builder, kind, values), at
    if isinstance(kind, types.Float):
        return builder.bitcast(word(0), ir.DoubleType()), at + 1
    return word(0), at + 1
