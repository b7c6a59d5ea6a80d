"""What a paged cache promises, for tests of every backend."""

import numpy as np

from pymla.engine.cache import PagedCache, Sequence
from pymla.pages import PAGE


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
