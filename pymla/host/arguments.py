"""Arguments of kernels as flat lists of numbers, for both compiled backends.

Kernels take integers, floats, arrays and tuples of these. What an array and a number become is the backend's.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numba import types
from numba.np import numpy_support

#: Appends what a value becomes to a list of numbers.
Writer = Callable[[Any, list], None]


class ArgumentWriter:
    """Writes the arguments of a kernel as numbers.

    Parameters
    ----------
    name : str
        The kernel's, for errors.
    signature : sequence of Numba types
        Of its arguments.
    array : callable(array) -> sequence of numbers
        What an array of the right type becomes.
    is_contiguous : callable(array) -> bool
    number : callable(Numba type) -> callable(value) -> number
        What a number of a type becomes.
    """

    def __init__(
        self,
        name: str,
        signature: Sequence[types.Type],
        array: Callable[[Any], Sequence],
        is_contiguous: Callable[[Any], bool],
        number: Callable[[types.Type], Callable[[Any], Any]],
    ) -> None:
        self._name = name
        self._array, self._is_contiguous, self._number = array, is_contiguous, number
        self._writers = [self._writer(kind) for kind in signature]

    def __call__(self, arguments: Sequence) -> list:
        """The numbers of all arguments.

        Raises
        ------
        TypeError
            An argument does not have the type that the signature says.
        """
        if len(arguments) != len(self._writers):
            raise TypeError(f"kernel {self._name} takes {len(self._writers)} arguments, not {len(arguments)}")
        numbers: list = []
        for position, (write, value) in enumerate(zip(self._writers, arguments, strict=True)):
            try:
                write(value, numbers)
            except (TypeError, ValueError, AttributeError) as error:
                raise TypeError(f"argument {position} of kernel {self._name}: {error}") from None
        return numbers

    def _writer(self, kind: types.Type) -> Writer:
        if isinstance(kind, types.Array):
            return self._array_writer(kind)
        if isinstance(kind, types.BaseTuple):
            return self._tuple_writer(kind)
        number = self._number(kind)
        return lambda value, numbers: numbers.append(number(value))

    def _array_writer(self, kind: types.Array) -> Writer:
        dtype, dimensions, contiguous = numpy_support.as_dtype(kind.dtype), kind.ndim, kind.layout == "C"

        def write(value: Any, numbers: list) -> None:
            if value.dtype != dtype or value.ndim != dimensions or (contiguous and not self._is_contiguous(value)):
                found = f"{value.dtype}, {value.ndim} dimensions, strides {value.strides}"
                raise TypeError(f"expected {kind}, got an array of {found}")
            numbers += self._array(value)

        return write

    def _tuple_writer(self, kind: types.BaseTuple) -> Writer:
        writers = [self._writer(each) for each in kind]

        def write(value: Any, numbers: list) -> None:
            if len(value) != len(writers):
                raise TypeError(f"expected {len(writers)} values, got {len(value)}")
            for each, part in zip(writers, value, strict=True):
                each(part, numbers)

        return write
