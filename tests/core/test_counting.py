"""Compare parameter counts with the numbers of the paper and with its bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamss import core
from adamss.core.analysis import count_trainable_bound
from adamss.errors import ConfigError

SUBSPACES = st.lists(
    st.tuples(st.integers(1, 500), st.integers(0, 9), st.integers(1, 200)), min_size=1, max_size=40
)


@pytest.mark.parametrize(("width", "layers", "expected"), [(768, 12, 42_432), (1024, 24, 97_152)])
def test_roberta_of_the_papers_table_1(width, layers, expected):
    """The paper prints 0.042M and 0.097M for query and value, K = 10, r_k = 1, R = 100."""
    sizes = [width - 9 * 7] + 9 * [7]
    assert 2 * layers * core.count_trainable(sizes, [1] * 10, [100] * 10) == expected


@given(SUBSPACES)
def test_is_the_sum_and_below_the_bound(subspaces):
    sizes, ranks, bases = zip(*subspaces, strict=True)
    count = core.count_trainable(sizes, ranks, bases)
    assert count == sum(core.subspace_costs(sizes, ranks, bases)) == sum(r * (n + R) for n, r, R in subspaces)
    assert count <= count_trainable_bound(sizes, ranks, bases)
    assert count_trainable_bound(sizes, ranks, bases) == sum(ranks) * max(n + R for n, _, R in subspaces)


def test_arrays_and_iterators_count_alike():
    expected = core.count_trainable([3, 4], [1, 2], [5, 5])
    assert core.count_trainable(np.asarray([3, 4]), iter([1, 2]), np.asarray([5, 5])) == expected == 8 + 18
    assert count_trainable_bound(iter([3, 4]), iter([1, 2]), iter([5, 5])) == 27


def test_lora_and_full():
    assert core.count_lora(768, 1024, 8) == (768 + 1024) * 8
    assert core.count_full(768, 1024) == 768 * 1024
    assert core.count_full(768, 1024, bias=True) == 769 * 1024


def test_active_only():
    W = np.random.default_rng(0).standard_normal((6, 8))
    decomposition = core.decompose(W, 4)
    f = core.initial_factors(decomposition, np.asarray([0, 0, 0, 0, 0, 1, 1, 2]), 2)
    assert core.count_factors(f) == 2 * (5 + 4) + 2 * (2 + 4) + 1 * (1 + 4)
    frozen = f._replace(active=np.asarray([False, True, True]))
    assert core.count_factors(frozen) == core.count_factors(f)
    assert core.count_factors(frozen, active_only=True) == 2 * (2 + 4) + 1 * (1 + 4)


def test_bad_input():
    with pytest.raises(ConfigError, match="one entry per subspace each, found 2, 1 and 2"):
        core.count_trainable([1, 2], [1], [1, 2])
    with pytest.raises(ConfigError, match="must not be negative"):
        core.count_trainable([1, 2], [1, -1], [1, 2])
