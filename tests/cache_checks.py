"""What a paged cache promises, for tests of every backend."""

import definitions
import numpy as np

from pymla.engine.cache import PagedCache, Sequence
from pymla.pages import PAGE, FullCache, IndexedCache


def rows_of(cache, backend, sequence, length):
    """The first rows of a sequence in every layer, as bytes."""
    pages = sequence.pages[: -(-length // PAGE)]
    layers = [rows.data for layer in cache.layers for rows in layer]
    return [np.stack([backend.memory.to_host(data[p * PAGE : (p + 1) * PAGE]) for p in pages]) for data in layers]


def give_way_and_come_back(config, backend, cache_type, mla):
    """Three sequences in a cache with room for one and a half: rows that left the cache come back as they were."""
    cache = PagedCache(config, cache_type, mla, 3, 192, [backend] * config.num_hidden_layers)
    rng = np.random.default_rng(0)
    tokens = np.zeros(70, np.int32)
    sequences, kept = [Sequence() for _ in range(3)], [None] * 3
    for turn in (0, 1, 2, 1, 0, 2):
        sequence = sequences[turn]
        cache.extend([(sequence, tokens if kept[turn] is None else tokens[:1])])
        if kept[turn] is None:
            for page in sequence.pages:
                for layer in cache.layers:
                    for rows in layer:
                        part = rows.data[page * PAGE : (page + 1) * PAGE]
                        backend.memory.write(part, rng.integers(0, 256, part.shape, np.uint8))
            cache.advance([(sequence, tokens)])
            kept[turn] = rows_of(cache, backend, sequence, 70)
        else:
            for now, before in zip(rows_of(cache, backend, sequence, 70), kept[turn], strict=True):
                np.testing.assert_array_equal(now, before)
        held = [page for each in sequences for page in each.pages]
        assert len(held) == len(set(held)) == 3 - cache.free_pages
        assert sum(each.saved is not None for each in sequences) == sum(k is not None for k in kept) - 1
    cache.truncate(sequences[0], 10)
    cache.extend([(sequences[0], tokens[:1])])
    for now, before in zip(rows_of(cache, backend, sequences[0], 10), kept[0], strict=True):
        np.testing.assert_array_equal(now, before[:1])
    for sequence in sequences:
        cache.free(sequence)
    assert cache.free_pages == 3


def shift_and_compare(config, backend, cache_type, mla, tolerance, positions=(64, 192, 270)):
    """Keys behind a context shift are turned by its length, and nothing else changes: not the first tokens of the
    sequence, and no row of a fork or of kept pages.

    Parameters
    ----------
    tolerance : float
        Share of the largest number of a key's row by which keys may differ from the definition.
    positions : tuple
        Where the shift starts and stops, and where the text ends.
    """
    start, stop, length = positions
    cache = PagedCache(config, cache_type, mla, 9, 512, [backend] * config.num_hidden_layers)
    sequence, rng = Sequence(), np.random.default_rng(0)
    tokens = list(range(length))
    step = cache.extend([(sequence, tokens)])
    for layer in cache.layers:
        for rows, width in zip(layer, widths(config, layer), strict=True):
            numbers = backend.memory.to_device(rng.standard_normal((length, width), np.float32))
            backend.attention.store(numbers, backend.memory.to_device(step.slots), rows)
    cache.advance([(sequence, tokens)])
    before = numbers_of(cache, backend, config, sequence)
    fork, shared = cache.fork(sequence), rows_of(cache, backend, sequence, length)
    frequencies = config.inv_freq()
    cache.shift(sequence, start, stop, {backend: backend.memory.to_device(frequencies)})
    assert sequence.tokens == tokens[:start] + tokens[stop:]
    after = numbers_of(cache, backend, config, sequence)
    for layer, now, old in zip(cache.layers, after, before, strict=True):
        for i, (numbers, expected) in enumerate(zip(now, old, strict=True)):
            expected = np.concatenate([expected[:start], expected[stop:]])
            np.testing.assert_array_equal(numbers[:start], expected[:start])
            turned = turned_keys(config, layer, i, expected, start - stop, frequencies)
            largest = np.abs(expected).max(1, keepdims=True)
            assert (np.abs(numbers - turned)[start:] <= tolerance * largest[start:]).all()
            if turned is expected:
                np.testing.assert_array_equal(numbers, expected)
            else:
                assert np.abs(turned - expected)[start:].max() > 0.1
    for now, old in zip(rows_of(cache, backend, fork, length), shared, strict=True):
        np.testing.assert_array_equal(now, old)


def widths(config, layer):
    """Numbers of the rows of each kind in a layer's cache."""
    if isinstance(layer, FullCache):
        return config.num_attention_heads * config.qk_head_dim, config.num_attention_heads * config.v_head_dim
    latent = config.kv_lora_rank, config.qk_rope_head_dim
    return (*latent, config.indexer.head_dim) if isinstance(layer, IndexedCache) else latent


def numbers_of(cache, backend, config, sequence):
    """The rows of a sequence as numbers: for every layer an array (tokens, width) of each kind."""
    result, table = [], backend.memory.to_device(np.array(sequence.pages, np.int32))
    for layer in cache.layers:
        result.append([])
        for rows, width in zip(layer, widths(config, layer), strict=True):
            out = backend.memory.empty((sequence.length, width), np.float32)
            result[-1].append(backend.memory.to_host(backend.attention.load(rows, table, out)).astype(np.float64))
    return result


def turned_keys(config, layer, kind, numbers, by, frequencies):
    """The definition: numbers (T, width) of a kind of rows whose keys, if it has any, move by some positions."""
    count, size = len(numbers), 2 * len(frequencies)
    positions = np.full(count, by)
    layout = "interleaved" if config.rope_interleave else "neox"
    if isinstance(layer, FullCache) and kind == 0:
        heads = numbers.reshape(count, config.num_attention_heads, -1)
        return definitions.rotated(heads, positions, frequencies, 1.0, layout).reshape(count, -1)
    if not isinstance(layer, FullCache) and kind == 1:
        return definitions.rotated(numbers[:, None], positions, frequencies, 1.0, layout)[:, 0]
    if kind == 2:
        layout = "interleaved" if config.indexer.interleave else "neox"
        front = definitions.rotated(numbers[:, None, :size], positions, frequencies, 1.0, layout)[:, 0]
        return np.concatenate([front, numbers[:, size:]], axis=1)
    return numbers
