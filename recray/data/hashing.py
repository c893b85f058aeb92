"""Seeded 64-bit hashes of numbers and strings: what decides order, samples and draws, whatever the order of files.

A draw made by hashing (seed, user, counter) is the same on one process and on many, and needs no generator state.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Hash = NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_TABLE_PLACES = 256  # up to this length of string, hashes of (place, byte) are looked up


def mix(*keys: Any) -> Hash:
    """Return one hash of several keys: integers or integer arrays, broadcast against each other.

    Each key goes through the finaliser of splitmix64 (Steele, Lea and Flood, 2014) before the next is added.

    >>> bool((mix(1, np.arange(3)) == mix(1, np.arange(3))).all()), int(mix(1, 2)) == int(mix(2, 1))
    (True, False)
    """
    state: Hash = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            values = np.asarray(key)
            if values.dtype != np.uint64:
                values = values.astype(np.int64).astype(np.uint64)
            state = _finalise(np.asarray(state + values + _STEP))
    return state


def hash_strings(values: pa.Array | pa.ChunkedArray) -> Hash:
    """Return one hash a string: the finalised sum of a hash of each (byte, place) in it, and of its length.

    Nulls hash as the empty string. Equal strings are hashed once.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not pa.types.is_dictionary(values.type):
        values = pc.fill_null(values, "").dictionary_encode()
    codes = values.indices.to_numpy(zero_copy_only=False)
    hashes: Hash = _hash_distinct(values.dictionary.cast(pa.large_binary()))[codes]
    return hashes


def unit(hashes: Hash) -> NDArray[np.float64]:
    """Return each hash as a number in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hash_distinct(values: pa.Array) -> Hash:
    if len(values) == 0:
        return np.zeros(0, dtype=np.uint64)
    _, offsets_buffer, data_buffer = values.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    lengths = np.diff(offsets)
    data = np.frombuffer(data_buffer or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    places = np.arange(len(data), dtype=np.int64) - np.repeat(offsets[:-1] - offsets[0], lengths)
    if lengths.max() <= _TABLE_PLACES:
        table = mix(np.arange(lengths.max())[:, None], np.arange(256)[None, :])
        hashes = table.ravel()[places * 256 + data]
    else:
        hashes = mix(places, data)
    with np.errstate(over="ignore"):
        running = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(hashes, dtype=np.uint64)])
        sums = running[offsets[1:] - offsets[0]] - running[offsets[:-1] - offsets[0]]
    return mix(sums, lengths)


def _finalise(state: Hash) -> Hash:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))  # numpy turns arrays without axes into scalars
