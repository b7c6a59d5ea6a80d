"""The LLVM instructions of a load or store by address, in global or shared memory."""

from llvmlite import ir

from pymla.cuda.machine.ptx.instruction import F32, I32, LLVM

#: Address spaces of LLVM's NVPTX target.
GLOBAL, SHARED = 1, 3


def _pointer(builder, address, item, space):
    if address.type.width < 64:
        address = builder.zext(address, ir.IntType(64))
    return builder.inttoptr(address, item.as_pointer(space))


def loading(item, count=1, space=GLOBAL, constant=False, then=None):
    """A writer of ``ld``: `count` items as one access; `then` converts an item."""

    def write(builder, values):
        kind = item if count == 1 else ir.VectorType(item, count)
        size = 2 if item == ir.HalfType() else (32 if item == ir.FloatType() else item.width) // 8
        value = builder.load(_pointer(builder, values[0], kind, space), align=count * size)
        if constant:
            value.set_metadata("invariant.load", builder.module.add_metadata([]))
        if count == 1:
            return then(builder, value) if then else value
        return [builder.extract_element(value, ir.Constant(LLVM[I32], i)) for i in range(count)]

    return write


def storing(item, count=1, space=GLOBAL, then=None):
    """A writer of ``st``; `then` converts the value to an item."""

    def write(builder, values):
        kind = item if count == 1 else ir.VectorType(item, count)
        size = (32 if item == ir.FloatType() else 16 if item == ir.HalfType() else item.width) // 8
        value = then(builder, values[1]) if then else values[1]
        if count > 1:
            value = ir.Constant(kind, ir.Undefined)
            for i, each in enumerate(values[1:]):
                value = builder.insert_element(value, each, ir.Constant(LLVM[I32], i))
        builder.store(value, _pointer(builder, values[0], kind, space), align=count * size)

    return write


def bits(width):
    """An integer type of LLVM."""
    return ir.IntType(width)


def as_unsigned(builder, value):
    """An integer of fewer bits as a word, zeros before it."""
    return builder.zext(value, LLVM[I32])


def as_signed(builder, value):
    """An integer of fewer bits as a word, its sign repeated before it."""
    return builder.sext(value, LLVM[I32])


def truncated(width):
    """A converter of a word to its low bits."""
    return lambda builder, value: builder.trunc(value, bits(width))


def from_half(builder, value):
    """A float16 as float32."""
    return builder.fpext(value, LLVM[F32])


def to_half(builder, value):
    """A float32, rounded to float16."""
    return builder.fptrunc(value, ir.HalfType())


def from_bfloat(builder, value):
    """The bits of a bfloat16 as float32."""
    return builder.bitcast(builder.shl(as_unsigned(builder, value), ir.Constant(LLVM[I32], 16)), LLVM[F32])
