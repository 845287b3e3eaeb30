"""Compare the factors with a loop over subspaces in float64 NumPy, in the notation of the paper."""

import numpy as np
import pytest
from core_helpers import awkward_weights
from hypothesis import given
from hypothesis import strategies as st

from adamss import core
from adamss.config import INITIAL_B
from adamss.core import Factors
from adamss.core.analysis import spectral_norms
from adamss.core.factors import factors_from_directions, outline, select
from adamss.errors import ArrayTypeError, ArrayValueError, ConfigError
from adamss_conformance import cases
from adamss_conformance.drivers.numpy import NumpyDriver
from adamss_conformance.laws.linear import assert_finite_differences, assert_update
from adamss_conformance.tolerances import assert_agrees


@st.composite
def problems(draw):
    """Draw a weight, its decomposition and labels, with K up to n and R up to min(d, n)."""
    W = draw(awkward_weights(10, 12)).astype(np.float64)
    decomposition = core.decompose(W, draw(st.integers(1, min(W.shape))))
    method = draw(st.sampled_from(["kmeans", "contiguous", "random"]))
    return W, decomposition, core.segment(decomposition, draw(st.integers(1, W.shape[1])), method)


def random_factors(decomposition, labels, r, basis, seed=0):
    """Return factors with random B and C, and every second subspace frozen."""
    rng = np.random.default_rng(seed)
    f = core.initial_factors(decomposition, labels, r, basis=basis)
    bases = np.repeat(core.basis_ranks(f), f.ranks)
    B = np.where(np.arange(f.B.shape[0])[:, None] < bases, rng.standard_normal(f.B.shape), 0)
    C = np.where(np.arange(f.C.shape[0])[:, None] < f.ranks[labels], rng.standard_normal(f.C.shape), 0)
    return f._replace(B=B, C=C, active=np.arange(len(f.ranks)) % 2 == 0)


def per_subspace(f):
    """Yield (columns I_k, A_k, B_k, C_k) of each subspace, the objects of the paper."""
    start = 0
    for k, (rank, R) in enumerate(zip(f.ranks, core.basis_ranks(f), strict=True)):
        columns = np.flatnonzero(f.labels == k)
        A = f.A[0 if f.A.shape[0] == 1 else k][:, :R]
        yield columns, A, f.B[:R, start : start + rank], f.C[:rank, columns]
        start += rank


def delta_by_loop(f):
    update = np.zeros((f.A.shape[1], f.labels.size))
    for columns, A, B, C in per_subspace(f):
        update[:, columns] = A @ B @ C
    return update


def agrees(actual, expected, what, scale=None):
    assert_agrees(actual, expected, dtype="float64", what=what, scale=scale)


BASES = st.sampled_from(["shared", "per_subspace"])
INITIAL = st.sampled_from(INITIAL_B)


class TestInitialFactors:
    @given(problems(), st.integers(1, 4), BASES, INITIAL)
    def test_start_is_zero_and_shapes_are_canonical(self, problem, r, basis, initial_B):
        W, decomposition, labels = problem
        f = core.initial_factors(decomposition, labels, r, basis=basis, initial_B=initial_B)
        core.check_factors(f, shape=W.shape)
        sizes = np.bincount(labels)
        R = decomposition.S.size
        limits = np.minimum(R, sizes) if basis == "per_subspace" else np.full(sizes.size, R)
        assert f.ranks.tolist() == np.minimum(np.minimum(r, sizes), limits).tolist()
        assert core.basis_ranks(f).tolist() == limits.tolist()
        assert f.A.shape == (1 if basis == "shared" else sizes.size, W.shape[0], limits.max())
        assert not core.delta(f).any()
        assert all(np.isfinite(array).all() for array in f[:3])
        for _, A, B, _ in per_subspace(f):
            agrees(A.T @ A, np.eye(A.shape[1]), "A_k^T A_k")
            if initial_B != "weighted":
                agrees(B.T @ B, np.eye(B.shape[1]), "B_k^T B_k")

    @given(problems(), BASES)
    def test_basis_contains_the_columns_of_its_subspace(self, problem, basis):
        W, decomposition, labels = problem
        f = core.initial_factors(decomposition, labels, 1, basis=basis)
        W_hat = (decomposition.U * decomposition.S) @ decomposition.V.T
        scale = max(1.0, np.abs(W).max())
        for columns, A, _, _ in per_subspace(f):
            own = W_hat[:, columns]
            agrees(A @ (A.T @ own), own, "A A^T W_hat[:, I_k]", scale=scale)

    @given(problems(), BASES)
    def test_full_rank_reproduces_the_columns(self, problem, basis):
        """The paper's identity: A_k B_w B_z C_k = W_hat[:, I_k] when r_k = rank(V_k)."""
        W, decomposition, labels = problem
        full = max(np.bincount(labels).max(), decomposition.S.size)
        f = core.initial_factors(
            decomposition, labels, int(full), basis=basis, initial_B="weighted", reconstruct=True
        )
        W_hat = (decomposition.U * decomposition.S) @ decomposition.V.T
        scale = max(1.0, np.abs(W).max())
        agrees(core.delta(f), W_hat, "A B_w B_z C", scale=10 * scale)

    @given(problems(), st.integers(1, 4), BASES)
    def test_B_of_a_qr_spans_what_the_paper_says(self, problem, r, basis):
        """B_k spans the first r_k columns of S(k) V(k)^T Z*(k); if those are dependent, Q adds any directions."""
        _, decomposition, labels = problem
        f = core.initial_factors(decomposition, labels, r, basis=basis, initial_B="qr")
        W_hat = (decomposition.U * decomposition.S) @ decomposition.V.T
        for columns, A, B, _ in per_subspace(f):
            V_k = decomposition.V[columns]
            first = A.T @ W_hat[:, columns] @ (V_k @ V_k.T)[:, : B.shape[1]]
            agrees(B @ (B.T @ first), first, "B B^T S V^T Z*", scale=max(1.0, np.abs(W_hat).max()))

    @given(problems(), BASES, st.sampled_from(["orthonormal", "weighted"]))
    def test_B_spans_the_leading_directions(self, problem, basis, initial_B):
        """B_k spans A_k^T W_hat[:, I_k] Q_k, with Q_k the leading right singular vectors of V_k^T, here by LAPACK."""
        _, decomposition, labels = problem
        f = core.initial_factors(decomposition, labels, 1, basis=basis, initial_B=initial_B)
        W_hat = (decomposition.U * decomposition.S) @ decomposition.V.T
        for columns, A, B, _ in per_subspace(f):
            V_k = decomposition.V[columns]
            U, S, Vh = np.linalg.svd(V_k, full_matrices=False)
            if (S.size > 1 and S[0] - S[1] < 1e-3 * S[0]) or S[0] < 1e-8:
                continue  # the leading direction is not unique
            expected = (
                Vh[0]
                if basis == "shared" and initial_B == "orthonormal"
                else A.T @ W_hat[:, columns] @ U[:, 0]
            )
            size = np.linalg.norm(expected)
            if size < 1e-8:
                continue
            if initial_B == "orthonormal":
                expected = expected / size
            sign = np.sign(expected @ B[:, 0])
            np.testing.assert_allclose(sign * B[:, 0], expected, atol=1e-8 * max(1.0, size))

    def test_bad_options(self):
        decomposition = core.decompose(np.eye(4), 4)
        labels = np.asarray([0, 0, 1, 1])
        for options, match in (
            ({"basis": "own"}, "basis must be one of shared, per_subspace; found 'own'"),
            ({"initial_B": "zero"}, "initial_B must be one of"),
        ):
            with pytest.raises(ConfigError, match=match):
                core.initial_factors(decomposition, labels, 1, **options)
        for rank in (0, 1.5, True):
            with pytest.raises(ConfigError, match="subspace_rank must be an integer"):
                core.initial_factors(decomposition, labels, rank)
        for bad in ([0, 0, 2, 2], [-1, 0, 1, 1]):
            with pytest.raises(ArrayValueError, match="labels must use every number"):
                core.initial_factors(decomposition, np.asarray(bad), 1)
        with pytest.raises(ArrayValueError, match=r"labels must have shape \(4,\)"):
            core.initial_factors(decomposition, labels[:3], 1)


class TestUpdate:
    @given(cases.problems())
    def test_delta_is_the_sum_over_subspaces(self, problem):
        f = problem.factors
        expected, scale = delta_by_loop(f), delta_by_loop(cases.magnitudes(f)).max()
        agrees(core.delta(f), expected, "delta", scale=scale)
        agrees(core.contract(f) @ core.expand(f), expected, "M E", scale=scale)

    @given(cases.problems())
    def test_linear_and_merge_are_the_product_with_the_updated_weight(self, problem):
        """With d + 1 rows in A the update is that of inputs with a one appended, but those are never formed."""
        assert_update(NumpyDriver(), core.linear, problem, "float64")
        x, W, b, f, _ = problem
        b = np.zeros(W.shape[1]) if b is None else b
        merged = core.merge(W, b, f)
        scale = core.linear(np.abs(x), np.abs(W), np.abs(b), cases.magnitudes(f)).max(initial=1e-6)
        expected = core.linear(x, W, b, f)
        agrees(x @ merged.W + merged.b, expected, "merged y", scale=scale)

    @given(cases.problems(empty=False))
    def test_vjp_equals_finite_differences(self, problem):
        assert_finite_differences(NumpyDriver(), problem)

    @given(cases.problems())
    def test_frozen_subspaces_that_may_return_get_the_gradient_of_active_ones_and_padding_none(self, problem):
        x, W, _, f, dy = problem
        found = core.linear_vjp(dy, x, W, f, revive=True)
        expected = core.linear_vjp(dy, x, W, f._replace(active=np.ones_like(f.active)))
        assert all(np.array_equal(actual, wanted) for actual, wanted in zip(found, expected, strict=True))
        bases = np.repeat(core.basis_ranks(f), f.ranks)
        assert not found.B[np.arange(f.B.shape[0])[:, None] >= bases].any()
        assert not found.C[np.arange(f.C.shape[0])[:, None] >= f.ranks[f.labels]].any()

    @pytest.mark.parametrize(("dtype", "value"), [("float16", 6e4), ("float32", 3e38), ("float64", 1.7e308)])
    def test_inputs_that_overflow_the_update_give_the_output_of_the_base_at_the_start(self, dtype, value):
        """Infinity in ``x M`` times C = 0, and a sum of both infinities, would be NaN; only a NaN of x may show."""
        W = np.eye(64, dtype=dtype) * 2.0**-10
        W[:, 1] = -W[:, 0]
        decomposition = core.decompose(W, 64)
        f = core.initial_factors(decomposition, core.segment(decomposition, 3), 2)
        f = f._replace(B=np.sign(f.B).astype(f.B.dtype) * 8)
        x = np.full((2, 64), value, dtype)
        x[0, ::2] *= -1
        assert np.array_equal(core.linear(x, W, None, f), x @ W)
        assert np.isfinite(core.linear_vjp(np.ones((2, 64), dtype), x / 64, W, f).C).all()
        x[1, 0] = np.nan
        assert np.isnan(core.linear(x, W, None, f)[1]).all()


class TestMerge:
    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
    def test_is_the_rounded_sum(self, dtype):
        rng = np.random.default_rng(0)
        W = rng.standard_normal((8, 6)).astype(dtype)
        decomposition = core.decompose(W, 4)
        f = random_factors(decomposition, core.segment(decomposition, 2), 2, "shared")
        merged = core.merge(W, None, f)
        exact = W.astype(np.float64) + core.delta(f)
        assert merged.b is None
        assert np.array_equal(merged.W, exact.astype(dtype))
        expected = np.linalg.norm(merged.W.astype(np.float64) - exact) / np.linalg.norm(core.delta(f))
        assert float(merged.lost) == pytest.approx(expected, rel=1e-6, abs=1e-12)

    def test_zero_update_loses_nothing(self):
        W = np.eye(4, dtype=np.float16)
        f = core.initial_factors(core.decompose(W, 2), np.asarray([0, 0, 1, 1]), 1)
        merged = core.merge(W, None, f)
        assert np.array_equal(merged.W, W)
        assert float(merged.lost) == 0.0

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
    def test_what_is_not_finite_is_refused(self, value):
        W = np.eye(4, dtype=np.float16)
        f = core.initial_factors(core.decompose(W, 2), np.asarray([0, 0, 1, 1]), 1)
        with pytest.raises(ArrayValueError, match="NaN or infinity, or overflows"), np.errstate(all="ignore"):
            core.merge(W, None, f._replace(C=np.full_like(f.C, value)))


class TestFromDirections:
    @given(problems(), st.integers(1, 4), BASES, st.booleans())
    def test_keeps_the_update_and_an_orthonormal_basis(self, problem, r, basis, with_U):
        _, decomposition, labels = problem
        f = random_factors(decomposition, labels, r, basis)
        M = core.contract(f)
        U = decomposition.U if with_U else None
        g = factors_from_directions(M, f.C, f.labels, f.ranks, f.active, U=U)
        core.check_factors(g)
        A = g.A[0]
        assert A.shape[1] == min(A.shape[0], max(M.shape[1], U.shape[1] if with_U else 0))
        agrees(A.T @ A, np.eye(A.shape[1]), "A^T A")
        agrees(core.delta(g), core.delta(f), "delta", scale=100.0)
        assert np.array_equal(g.active, f.active)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"A": np.zeros((3, 4, 2))}, r"A must hold 1 or K = 2 bases, or a divisor of K, found 3"),
        ({"A": np.zeros((4, 2))}, "3 axes"),
        ({"A": np.zeros((1, 7, 2))}, r"A must have d = 4 rows"),
        ({"B": np.zeros((3, 2))}, "B must have P = 2 rows, found 3"),
        ({"C": np.zeros((1, 5))}, "C must have n = 3 columns, found 5"),
        ({"labels": np.asarray([0, 1, 2])}, r"labels must lie in 0 \.\. 1, found 0 \.\. 2"),
        ({"ranks": np.asarray([1, 2])}, "ranks must sum to the q = 2 columns of B, found 3"),
        ({"ranks": np.asarray([2, 0])}, "ranks must not exceed the r = 1 rows of C, found 2"),
        ({"active": np.ones(3, bool)}, "active must have K = 2 entries, found 3"),
        ({"C": np.zeros((0, 3))}, "no axis may be empty"),
    ],
)
def test_check_factors_names_what_does_not_fit(changes, match):
    good = Factors(
        A=np.zeros((1, 4, 2)),
        B=np.zeros((2, 2)),
        C=np.zeros((1, 3)),
        labels=np.asarray([0, 1, 0]),
        ranks=np.asarray([1, 1]),
        active=np.ones(2, bool),
    )
    core.check_factors(good, shape=(4, 3))
    with pytest.raises(ArrayValueError, match=f"^query: .*{match}"):
        core.check_factors(good._replace(**changes), shape=(4, 3), name="query")


@pytest.mark.parametrize("basis", ["shared", "per_subspace"])
@pytest.mark.parametrize("initial_B", INITIAL_B)
def test_every_framework_computes_the_same(xp, to_numpy, basis, initial_B):
    """The same functions run on the arrays of each framework, and the same factors give the same numbers."""
    W = np.random.default_rng(0).standard_normal((9, 12)).astype(np.float32)
    x, dy = (
        np.random.default_rng(s).standard_normal((5, k)).astype(np.float32) for s, k in ((1, 9), (2, 12))
    )

    def run(W, x, dy, C):
        decomposition = core.decompose(W, 6)
        f = core.initial_factors(
            decomposition, core.segment(decomposition, 4), 2, basis=basis, initial_B=initial_B
        )
        f = f._replace(C=f.C + C[: f.C.shape[0], :], active=f.labels[:4] >= 0)
        return f, {
            "labels": f.labels,
            "M": core.contract(f),
            "delta": core.delta(f),
            "y": core.linear(x, W, None, f),
            **core.linear_vjp(dy, x, W, f)._asdict(),
            "merged": core.merge(W, None, f).W,
            "norms": spectral_norms(f),
        }

    C = np.ones((2, 12), np.float32)
    _, expected = run(W, x, dy, C)
    factors, actual = run(*(xp.asarray(array) for array in (W, x, dy, C)))
    assert {type(array) for array in (*factors, *actual.values())} == {type(xp.asarray(W))}
    for name, array in actual.items():
        assert_agrees(to_numpy(array), expected[name], dtype="float32", what=name)


@pytest.mark.parametrize("r", [1, 3, 20])
def test_leading_directions_of_subspaces_of_every_size(xp, to_numpy, r):
    """The test covers both Gram matrices that they may come from, and columns that are equal or zero."""
    rng = np.random.default_rng(0)
    sizes = [1, 5, 16, 17, 30, 51, 6, 6]
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    W = rng.standard_normal((60, labels.size)).astype(np.float32)
    W[:, labels == 6] = 0
    W[:, labels == 7] = W[:, labels == 7][:, :1]
    decomposition = core.decompose(W, 40)
    on_framework = core.Decomposition(*(xp.asarray(array) for array in decomposition))
    f = core.initial_factors(on_framework, xp.asarray(labels), r, reconstruct=True)
    B, C, ranks = to_numpy(f.B), to_numpy(f.C), to_numpy(f.ranks)
    assert ranks.tolist() == np.minimum(sizes, r).tolist()
    for k, own in enumerate(np.split(B, np.cumsum(ranks)[:-1], axis=1)):
        V_k = decomposition.V[labels == k]
        assert_agrees(own.T @ own, np.eye(ranks[k]), dtype="float32", what=f"B_{k}^T B_{k}")
        best = np.sum(np.linalg.svd(V_k.astype(np.float64), compute_uv=False)[: ranks[k]] ** 2)
        assert np.sum((V_k @ own) ** 2) == pytest.approx(best, rel=1e-5, abs=1e-12)
        # The rows of C_k are the right singular vectors, so that B_k C_k is the best approximation of its rank.
        fit = (V_k @ own) @ own.T
        Q_k = C[: ranks[k], labels == k].T
        assert_agrees(Q_k @ (Q_k.T @ fit), fit, dtype="float32", what=f"Q_{k}")


class TestPadding:
    """Layers of one stack share a shape, so B may have more columns, and C more rows, than the ranks need."""

    @given(cases.problems(), st.integers(1, 2), st.integers(0, 2))
    def test_more_columns_and_rows_change_nothing(self, problem, columns, rows):
        x, W, _, f, dy = problem
        padded = f._replace(
            B=np.pad(f.B, ((0, 0), (0, columns))), C=np.pad(f.C, ((0, rows), (0, 0)), constant_values=7.0)
        )
        agrees(core.delta(padded), core.delta(f), "delta", scale=10.0)
        agrees(core.linear(x, W, None, padded), core.linear(x, W, None, f), "y", scale=10.0)
        for revive in (False, True):
            expected = core.linear_vjp(dy, x, W, f, revive=revive)
            actual = core.linear_vjp(dy, x, W, padded, revive=revive)
            q, height = f.B.shape[1], f.C.shape[0]
            agrees(actual.B[:, :q], expected.B, "dB", scale=100.0)
            agrees(actual.C[:height], expected.C, "dC", scale=100.0)
            assert not actual.B[:, q:].any()
            assert not actual.C[height:].any()


@st.composite
def partitions(draw):
    """Draw factors whose subspaces differ in rank and size, some of them frozen, and any mask over the subspaces."""
    f = draw(cases.problems()).factors
    K = f.ranks.size
    some = st.lists(st.booleans(), min_size=K, max_size=K)
    return f, np.asarray(draw(some | st.sampled_from([[False] * K, [True] * K])))


class TestSelection:
    @given(partitions(), st.integers(0, 2))
    def test_says_where_the_chosen_subspaces_stand(self, partition, padding):
        """In a stack, B may have more columns than the sum of the ranks; these belong to no subspace."""
        f, chosen = partition
        layer = outline(f._replace(B=np.pad(f.B, ((0, 0), (0, padding)))))
        part = select(layer.labels, layer.ranks, chosen)
        assert part.subspaces.tolist() == np.flatnonzero(chosen).tolist()
        assert part.directions.tolist() == np.flatnonzero(np.repeat(chosen, f.ranks)).tolist()
        own = part.labels >= 0
        assert own.tolist() == chosen[f.labels].tolist()
        assert part.subspaces[part.labels[own]].tolist() == f.labels[own].tolist()
        assert set(part.labels[~own].tolist()) <= {-1}
        assert part.labels.dtype == f.labels.dtype

    @given(partitions())
    def test_the_update_of_the_chosen_is_that_of_their_parts(self, partition):
        """The backends rely on this form: B and C of some subspaces, and labels of -1 for all other columns."""
        f, chosen = partition
        part = select(f.labels, f.ranks, chosen)
        A = f.A if len(f.A) == 1 else f.A[part.subspaces]
        own = part.labels >= 0
        g = f._replace(
            A=A,
            B=f.B[:, part.directions],
            C=f.C[:, own],
            labels=part.labels[own],
            ranks=f.ranks[part.subspaces],
        )
        if chosen.any():
            expected = np.where(own, delta_by_loop(f), 0)[:, own]
            # The rounding error is relative to the magnitudes of the summed terms.
            scale = delta_by_loop(cases.magnitudes(f)).max()
            agrees(core.delta(g), expected, "delta", scale=scale)
        agrees(core.delta(core.only(f, chosen)), np.where(own, core.delta(f), 0), "the update of only these")


def test_outline_is_in_numpy_whatever_the_framework(xp):
    f = random_factors(core.decompose(np.eye(6), 4), np.asarray([0, 1, 2, 1, 0, 0]), 2, "shared")
    arrays = as_float32(f)
    layer = outline(Factors(*map(xp.asarray, arrays)))
    for name, array, expected in zip(Factors._fields, layer, arrays, strict=True):
        assert isinstance(array, np.ndarray), name
        assert array.shape == expected.shape, name
        if name in "ABC":
            assert not array.any(), name
            assert array.strides == (0,) * array.ndim, f"{name} takes memory"
        else:
            assert np.array_equal(array, expected), name
            assert array.dtype == expected.dtype, name


def as_float32(f):
    return Factors(*(a.astype({"f": "float32", "i": "int32", "b": bool}[a.dtype.kind]) for a in f))


def test_outline_of_a_tracer_is_refused():
    jax = pytest.importorskip("jax")
    f = random_factors(core.decompose(np.eye(6), 4), np.asarray([0, 1, 2, 1, 0, 0]), 2, "shared")
    with pytest.raises(ArrayTypeError, match=r"^block\.q: values are needed here"):
        jax.jit(lambda f: outline(f, name="block.q").labels)(Factors(*map(jax.numpy.asarray, as_float32(f))))
