import numpy as np
import pyarrow as pa

from recray.data.hashing import hash_strings, mix, unit

MASK = 2**64 - 1


def splitmix(*keys: int) -> int:
    """The definition, in Python's own integers."""
    state = 0
    for key in keys:
        state = (state + key + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def test_mix_is_splitmix64_chained() -> None:
    keys = np.array([0, 1, -1, 2**62])
    assert mix(5, keys).tolist() == [splitmix(5, int(key) & MASK) for key in keys]
    # The first outputs of splitmix64 from state 0, as its authors print them.
    assert int(mix(0)) == 0xE220A8397B1DCDAF


def test_a_string_hashes_alike_wherever_it_stands() -> None:
    first = hash_strings(pa.array(["a", "ab", "ba", "", None, "é", "a" * 300]))
    assert len(set(first.tolist())) == 6  # null is the empty string
    short = hash_strings(pa.chunked_array([["ba"], ["x", "a"]]))
    assert short[0] == first[2]
    assert short[2] == first[0]  # whether the longest string of the batch fits the table or not
    assert hash_strings(pa.array([], pa.string())).tolist() == []
    sliced = pa.array(["zz", "a", "ab"]).slice(1)
    assert hash_strings(sliced).tolist() == first[:2].tolist()


def test_units_are_spread_evenly() -> None:
    draws = unit(mix(3, np.arange(100_000)))
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert abs(counts - 5000).max() < 5 * 5000**0.5
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.02
