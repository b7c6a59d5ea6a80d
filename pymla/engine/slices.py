"""Ranges cut into slices: of tokens, so that intermediate results stay small, and of heads."""


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Slices of at most `size` from `start` to `stop`."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def even_slices(stop: int, size: int) -> list[slice]:
    """As few slices of at most `size` as cover 0 to `stop`, of about the same size: a short slice would keep few of a
    GPU's multiprocessors busy for as long as a long one keeps all of them."""
    count = -(-stop // size)
    return [slice(i * stop // count, (i + 1) * stop // count) for i in range(count)]
