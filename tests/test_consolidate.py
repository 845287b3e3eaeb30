"""Test on the NumPy reference that `adamss.consolidate` folds frozen subspaces into the weights and loses nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adamss
from adamss import core
from adamss.backend import NumpyLinear, NumpyModel, get_backend
from adamss.errors import ArrayTypeError, ArrayValueError, StateError
from adamss.io.checkpoint import read
from adamss_conformance.cases import magnitudes
from adamss_conformance.tolerances import assert_agrees

PATHS = ("block.query", "block.value")


def base_model(dtype="float64", d=6, n=9, bias=True, seed=0):
    rng = np.random.default_rng(seed)

    def layer():
        b = rng.standard_normal(n).astype(dtype) if bias else None
        return NumpyLinear(rng.standard_normal((d, n)).astype(dtype), b)

    return NumpyModel({path: layer() for path in (*PATHS, "head")})


def trained(base, seed=0, **settings):
    """Return the adapted model, with an update in every subspace."""
    options = {"targets": ["query", "value"], "rank": 4, "subspaces": 3, "subspace_rank": 2}
    options |= {"modules_to_save": ["head"]}
    model = adamss.attach(base, adamss.AdamssConfig(**options | settings))
    rng = np.random.default_rng(seed)
    before = {path: model.bank.only().layers[path] for path in PATHS}
    new = {p: f._replace(C=rng.standard_normal(f.C.shape).astype(f.C.dtype)) for p, f in before.items()}
    return get_backend("numpy").with_factors(model, "default", new)


def frozen(model, masks):
    """Return the model with these subspaces frozen: (K,) booleans by path, True for frozen."""
    return get_backend("numpy").set_active(model, {path: ~np.asarray(mask) for path, mask in masks.items()})


def some_frozen(model):
    """Freeze the second and third subspaces of the first layer, and the first subspace of the second layer."""
    return frozen(model, {PATHS[0]: [False, True, True], PATHS[1]: [True, False, False]})


@pytest.mark.parametrize(
    ("path", "mask", "error", "message"),
    [
        ("nowhere", [True], StateError, "'nowhere' is no adapted layer"),
        (PATHS[0], [True], ArrayValueError, rf"{PATHS[0]}: the mask has shape \(1,\), not \(3,\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(path, mask, error, message):
    with pytest.raises(error, match=message):
        frozen(trained(base_model()), {path: mask})


def inputs(model, seed=5):
    W = model[PATHS[0]].W
    return np.random.default_rng(seed).standard_normal((4, W.shape[0])).astype(W.dtype)


def magnitude(model, x):
    """Return the largest sum of magnitudes of an output's terms, which the rounding error is relative to."""
    sizes = []
    for path in PATHS:
        W, b, f = abs(model[path].W), model[path].b, model.bank.only().layers[path]
        terms = core.delta(magnitudes(f))
        rows = np.concatenate([W, np.zeros((1, W.shape[1])) if b is None else abs(b)[None, :]])
        rows[: terms.shape[0]] += terms
        sizes.append((np.concatenate([abs(x), np.ones((len(x), 1))], axis=1) @ rows).max())
    return max(sizes)


def assert_same_outputs(actual, expected, x, what):
    scale, dtype = magnitude(expected, x), str(x.dtype)
    for path in expected.layers:
        assert actual[path](x).dtype == x.dtype
        assert_agrees(actual[path](x), expected[path](x), dtype=dtype, what=f"{what}: {path}", scale=scale)


def assert_same_factors(actual, expected):
    for path in PATHS:
        pairs = zip(
            core.Factors._fields,
            actual.bank.only().layers[path],
            expected.bank.only().layers[path],
            strict=True,
        )
        for name, a, b in pairs:
            assert np.array_equal(a, b), f"{path}: {name}"


def assert_same_weights(actual, expected):
    for path in expected.layers:
        assert np.array_equal(actual[path].W, expected[path].W), path
        assert np.array_equal(actual[path].b, expected[path].b), path


@st.composite
def models(draw):
    """Draw a base model, and an adapted model of any shape with at least one frozen subspace."""
    sizes = {"d": draw(st.integers(1, 8)), "n": draw(st.integers(1, 9)), "bias": draw(st.booleans())}
    base = base_model(draw(st.sampled_from(["float32", "float64"])), **sizes, seed=draw(st.integers(0, 99)))
    options = {"rank": draw(st.integers(1, 5)), "subspaces": draw(st.integers(1, 4))}
    options |= {"subspace_rank": draw(st.integers(1, 3)), "include_bias": draw(st.booleans())}
    options |= {"basis": draw(st.sampled_from(["shared", "per_subspace"])), "segmentation": "contiguous"}
    model = trained(base, **options)
    masks = {}
    for path in PATHS:
        K = model.bank.only().layers[path].ranks.size
        masks[path] = draw(st.lists(st.booleans(), min_size=K, max_size=K))
    if not any(map(any, masks.values())):
        masks[PATHS[0]][0] = True
    if all(map(all, masks.values())):
        masks[PATHS[1]][0] = False  # if nothing were left to train, consolidating would be merging
    return base, frozen(model, masks)


@settings(max_examples=40)
@given(models(), st.booleans())
def test_outputs_and_gradients_are_those_of_before(pair, keep_base):
    _, model = pair
    after = adamss.consolidate(model, keep_base=keep_base)
    x = inputs(model)
    assert_same_outputs(after, model, x, "consolidated")
    assert_same_factors(after, model)
    assert adamss.summary(after) == adamss.summary(model)
    for path in PATHS:
        before, layer = model[path], after[path]
        dy = np.random.default_rng(6).standard_normal((len(x), before.W.shape[1])).astype(x.dtype)
        expected = core.linear_vjp(dy, x, before.W, model.bank.only().layers[path])
        actual = core.linear_vjp(dy, x, layer.W, *layer.computed)
        scales = core.linear_vjp(
            abs(dy), abs(x), abs(before.W), magnitudes(model.bank.only().layers[path]), revive=True
        )
        for name in ("x", "B", "C"):
            one, other, scale = (getattr(each, name) for each in (actual, expected, scales))
            what = f"{path}: gradient of {name}"
            assert_agrees(one, other, dtype=str(x.dtype), what=what, scale=scale.max())


@settings(max_examples=40)
@given(models())
def test_the_weight_holds_the_frozen_subspaces_and_only_those(pair):
    """W = W0 + sum of A_k B_k C_k over the frozen k; the weight of a layer without any is W0 to the bit."""
    base, model = pair
    after = adamss.consolidate(model)
    for path in PATHS:
        f = model.bank.only().layers[path]
        own = ~f.active[f.labels]
        update = np.where(own, core.delta(f), 0)
        terms = core.delta(magnitudes(f)).max()
        d = base[path].W.shape[0]
        scale = terms + abs(base[path].W).max()
        dtype = str(update.dtype)
        assert_agrees(after[path].W, base[path].W + update[:d], dtype=dtype, what="W", scale=scale)
        assert np.array_equal(after[path].W[:, ~own], base[path].W[:, ~own])
        if update.shape[0] > d:
            b = base[path].b
            assert_agrees(after[path].b, b + update[d], dtype=dtype, what="b", scale=terms + abs(b).max())
        else:
            assert np.array_equal(after[path].b, base[path].b)
        assert after[path].W.dtype == base[path].W.dtype


@settings(max_examples=40)
@given(models())
def test_detach_unmerge_and_disabled_give_the_base_to_the_bit(pair):
    base, model = pair
    after = adamss.consolidate(model)
    assert_same_weights(adamss.detach(after), base)
    with adamss.disabled(after) as plain:
        assert_same_weights(plain, base)
    merged = adamss.merge(after)
    assert_same_weights(merged, adamss.merge(model))
    again = adamss.unmerge(merged)
    assert_same_weights(again, model)
    assert_same_factors(again, model)
    assert_same_weights(adamss.detach(merged), base)
    assert_same_weights(adamss.consolidate(again), after)
    assert_same_weights(model, replace(model, layers={**base.layers, "head": model["head"]}))


@settings(max_examples=40)
@given(models(), st.booleans(), st.booleans())
def test_the_file_is_that_of_before(tmp_path_factory, pair, training, keep_base):
    """The file has every subspace and the fingerprint of W0, up to rounding where W0 is restored by subtraction."""
    base, model = pair
    folder = tmp_path_factory.mktemp("files")
    adamss.save(model, folder / "before.safetensors", training=training)
    after = adamss.consolidate(model, keep_base=keep_base)
    adamss.save(after, folder / "after.safetensors", training=training)
    before, written = read(folder / "before.safetensors"), read(folder / "after.safetensors")
    for path in PATHS:
        assert written.layers[path].tensors() == before.layers[path].tensors()
    assert not keep_base or written == before
    loaded = adamss.load(base, folder / "after.safetensors")
    assert_same_outputs(loaded, model, inputs(model), "loaded")
    for path in PATHS:
        assert np.array_equal(loaded.bank.only().layers[path].active, model.bank.only().layers[path].active)
    assert_same_outputs(adamss.consolidate(loaded), model, inputs(model), "loaded and consolidated")


class TestWithoutTheBase:
    @pytest.mark.parametrize(
        "verb", [adamss.detach, adamss.merge, lambda model: adamss.disabled(model).__enter__()]
    )
    def test_what_needs_it_raises(self, verb):
        model = adamss.consolidate(some_frozen(trained(base_model())), keep_base=False)
        with pytest.raises(StateError, match=r"the base weights were dropped \(keep_base=False\)"):
            verb(model)

    @pytest.mark.parametrize("keep_later", [False, True])
    def test_it_does_not_come_back(self, keep_later):
        """After one call has dropped the base, a later call cannot keep it."""
        model = adamss.consolidate(some_frozen(trained(base_model())), keep_base=False)
        later = adamss.consolidate(frozen(model, {PATHS[0]: [True] * 3}), keep_base=keep_later)
        with pytest.raises(StateError, match="detach: the base weights were dropped"):
            adamss.detach(later)


MORE = {PATHS[0]: [True, True, True], PATHS[1]: [True, False, True]}


@pytest.mark.parametrize("options", [{}, {"basis": "per_subspace"}, {"include_bias": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("keep_base", [True, False])
def test_what_is_frozen_later_is_folded_by_the_next_call(options, dtype, keep_base):
    """If W0 is kept, two calls give bit for bit the weights of one call, because W0 + update is rounded only once."""
    base = base_model(dtype)
    model = trained(base, **options)
    first = adamss.consolidate(some_frozen(model), keep_base=keep_base)
    later = adamss.consolidate(frozen(first, MORE), keep_base=keep_base)
    assert_same_outputs(later, model, inputs(model), "consolidated twice")
    if keep_base:
        assert_same_weights(later, adamss.consolidate(frozen(model, MORE)))
        assert_same_weights(adamss.detach(later), base)


def test_training_goes_on_in_the_rest():
    """After a change of C in the trained subspaces, outputs, file, `detach` and `merge` all reflect it."""
    base = base_model()
    model = some_frozen(trained(base))
    after = adamss.consolidate(model)

    def moved(model):
        before = {path: model.bank.only().layers[path] for path in PATHS}
        new = {p: f._replace(C=np.where(f.active[f.labels], f.C + 1, f.C)) for p, f in before.items()}
        return get_backend("numpy").with_factors(model, "default", new)

    x = inputs(model)
    assert_same_outputs(moved(after), moved(model), x, "trained on")
    assert abs(moved(after)[PATHS[0]](x) - after[PATHS[0]](x)).max() > 0.1
    assert_same_weights(adamss.merge(moved(after)), adamss.merge(moved(model)))
    assert_same_weights(adamss.detach(moved(after)), base)


class TestErrors:
    @pytest.mark.parametrize("keep_base", [False, True])
    def test_merged(self, keep_base):
        merged = adamss.merge(some_frozen(trained(base_model())), keep_base=keep_base)
        with pytest.raises(StateError, match=r"consolidate: the updates are merged; call adamss\.unmerge"):
            adamss.consolidate(merged)

    def test_half_precision(self):
        model = some_frozen(trained(base_model("float16")))
        with pytest.raises(ArrayTypeError, match=r"^block\.query: consolidating into float16 would round"):
            adamss.consolidate(model)

    def test_not_finite(self):
        """The error names the layer, and no layer is changed."""
        base = base_model("float32")
        model = some_frozen(trained(base))
        f = model.bank.only().layers[PATHS[1]]
        f.C[:, f.labels == 0] = np.float32(3e38)
        f.B[...] *= 1e3
        with (
            pytest.raises(ArrayValueError, match=r"^block\.value: the update holds NaN or infinity"),
            np.errstate(all="ignore"),
        ):
            adamss.consolidate(model)
        assert_same_weights(adamss.detach(model), base)

    def test_not_finite_where_it_is_not_folded(self):
        """Subspaces that are still trained are not folded, so their values are not checked."""
        model = some_frozen(trained(base_model("float32")))
        f = model.bank.only().layers[PATHS[1]]
        f.C[:, f.labels != 0] = np.nan
        assert np.isfinite(adamss.consolidate(model)[PATHS[1]].W).all()


def test_what_a_weight_holds_cannot_be_thawed():
    model = adamss.consolidate(some_frozen(trained(base_model())))
    with pytest.raises(StateError, match=r"^block\.query: the mask thaws subspace 1, whose update the"):
        frozen(model, {PATHS[0]: [False, False, True]})
    frozen(model, {PATHS[0]: [True, True, True]})
