"""What `adamss.plots` draws, number for number, from models of every framework and from files."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

mpl = pytest.importorskip("matplotlib", reason="the extra plots brings matplotlib")
mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402

import adamss  # noqa: E402
from adamss import core, errors, plots  # noqa: E402
from adamss.backend import NumpyLinear, NumpyModel, get_backend  # noqa: E402
from adamss.backend.tensors import StoredTensor  # noqa: E402
from adamss.core import analysis  # noqa: E402
from adamss.core.fingerprint import unknown  # noqa: E402
from adamss.io import checkpoint  # noqa: E402
from adamss_conformance.cases import LAYERS, TARGETS, config, random_C  # noqa: E402
from adamss_conformance.driver import find_drivers  # noqa: E402

FRAMEWORKS = {"numpy": "numpy", "torch": "torch", "flax": "flax", "equinox": "equinox"}
INSTALLED = [name for name, needs in FRAMEWORKS.items() if importlib.util.find_spec(needs)]
QUERY, VALUE = "encoder.0.query", "encoder.0.value"
MASKS = {QUERY: [True, False, True], VALUE: [False, True, True]}
BUDGET = adamss.BudgetConfig(target=2, end_step=6, interval=2)


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    plt.close("all")


def adapted(name="numpy", dtype="float32", layers=LAYERS, **changes):
    """The small model of a framework with an update in every subspace, and two of the six frozen."""
    driver = find_drivers(name)[0]
    model = adamss.attach(driver.model(layers, dtype), config(**changes))
    backend, rng = get_backend(name), np.random.default_rng(0)
    new = {}
    for path, factors in backend.bank(model).only().layers.items():
        C = random_C(core.Factors(*map(driver.numpy, factors)), rng)
        new[path] = factors._replace(C=driver.array(C, dtype))
    model = backend.with_factors(model, "default", new)
    masks = {path: driver.array(np.asarray(mask)) for path, mask in MASKS.items()}
    return backend.set_active(model, masks) if layers is LAYERS else model


@pytest.fixture(scope="module", params=INSTALLED)
def model(request):
    return adapted(request.param)


@pytest.fixture
def file(tmp_path):
    """An adapter file; beside it in `base`, the weights of its model, whose paths have a prefix there."""
    (tmp_path / "base").mkdir()
    tensors = {
        f"bert.{path}.weight": np.ascontiguousarray(W.T, np.float32) for path, (W, _) in LAYERS.items()
    }
    save_file(tensors | {"bert.norm.weight": np.ones(3, np.float32)}, tmp_path / "base" / "model.safetensors")
    adamss.save(adapted(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def paths_of(model):
    """Return the adapted layers in the order of the model, which is the alphabet's in Equinox."""
    return [row.path for row in adamss.summary(model).rows]


def oracle(path, W=None):
    """Return |Z*| in its order, and the labels, by NumPy alone."""
    W = LAYERS[path][0] if W is None else W
    V = np.linalg.svd(W, full_matrices=False)[2][:6].T
    labels = core.segment(core.decompose(W, 6), 3)
    order = np.argsort(labels, kind="stable")
    return np.abs(V @ V.T)[np.ix_(order, order)], np.bincount(labels), labels[order]


class TestOrdering:
    def check(self, ax, path):
        Z, sizes, labels = oracle(path)
        np.testing.assert_allclose(ax.images[0].get_array(), Z, atol=1e-5)
        ends = np.cumsum(sizes)
        across, *squares = ax.collections[:3]
        assert [line[0][1] for line in across.get_segments()] == ends[:-1].tolist()
        expected = [
            [[a, y], [b, y]]
            for side in (0, 1)
            for a, b in zip(ends - sizes, ends, strict=True)
            for y in [[a, b][side]]
        ]
        assert [s.tolist() for lines in squares for s in lines.get_segments()] == expected
        assert f"{float(analysis.inside_over_between(Z, labels)):.2f}" in ax.get_title(loc="left")
        assert path in ax.get_title(loc="left")

    @pytest.mark.parametrize("layer", [QUERY, "query"])
    def test_it_is_that_of_numpy(self, model, layer):
        self.check(plots.ordering(model, layer), QUERY)

    def test_without_a_name_it_is_the_first_layer(self):
        self.check(plots.ordering(adapted()), VALUE)

    def test_a_merged_model_shows_its_base(self):
        merged = adamss.merge(adapted())
        assert not np.allclose(merged[QUERY].W, LAYERS[QUERY][0], atol=0.1)
        self.check(plots.ordering(merged, QUERY), QUERY)

    def test_from_a_file_and_its_base(self, file):
        self.check(plots.ordering(file, QUERY, base=file.with_name("base")), QUERY)

    def test_from_weights_without_an_adapter(self, file):
        base = file.with_name("base")
        ax = plots.ordering(base, QUERY, rank=6, subspaces=3)
        self.check(ax, QUERY)
        assert "by kmeans" in ax.get_title(loc="left")
        contiguous = plots.ordering(base, QUERY, rank=6, subspaces=2, segmentation="contiguous")
        assert [line[0][1] for line in contiguous.collections[0].get_segments()] == [10]

    def test_many_columns_are_pooled_and_very_many_thinned(self, monkeypatch):
        W = np.random.default_rng(0).standard_normal((8, 2 * plots.CELLS))
        wide = adamss.attach(
            NumpyModel({"up": NumpyLinear(W)}), adamss.AdamssConfig(targets=["up"], rank=6, subspaces=3)
        )
        Z, _, _ = oracle(None, W)
        means = Z.reshape(plots.CELLS, 2, plots.CELLS, 2).mean((1, 3))
        np.testing.assert_allclose(plots.ordering(wide).images[0].get_array(), means, atol=1e-6)
        monkeypatch.setattr(plots, "LARGEST_FORMED", plots.CELLS)
        thinned = plots.ordering(wide).images[0]
        np.testing.assert_allclose(thinned.get_array(), Z[::2, ::2], atol=1e-6)
        assert thinned.get_extent() == [0, len(Z), len(Z), 0]


class TestSpectrum:
    def check(self, ax, paths, rank=6):
        assert len(ax.lines) == len(paths) + 1, "the last one marks R"
        for path, line, text in zip(paths, ax.lines, ax.get_legend().get_texts(), strict=False):
            S = np.linalg.svd(LAYERS[path][0], compute_uv=False)
            np.testing.assert_allclose(line.get_ydata(), S / S[0], atol=1e-6)
            assert line.get_xdata().tolist() == [*range(1, len(S) + 1)]
            assert line.get_markevery() == [rank - 1]
            assert text.get_text().endswith(f": {np.sum(S[:rank] ** 2) / np.sum(S**2):.0%}")
        assert list(ax.lines[-1].get_xdata()) == [rank, rank]

    def test_it_is_that_of_numpy(self, model):
        self.check(plots.spectrum(model, [QUERY, VALUE]), paths_of(model))

    def test_from_files(self, file):
        base = file.with_name("base")
        self.check(plots.spectrum(file, r".*query", base=base), [QUERY])
        # Those in numbered blocks.
        self.check(plots.spectrum(base, rank=4), [QUERY, VALUE], rank=4)
        assert len(plots.spectrum(base, ["head"], rank=4).lines) == 2

    def test_many_layers_share_a_line_of_the_legend(self):
        rng = np.random.default_rng(0)
        layers = {
            f"layer.{i}.{kind}": (rng.standard_normal((6, 8)), None)
            for i in range(5)
            for kind in ("query", "value")
        }
        ax = plots.spectrum(adapted(layers=layers, rank=4, modules_to_save=[]))
        spectra = {path: np.linalg.svd(W, compute_uv=False) ** 2 for path, (W, _) in layers.items()}
        for kind, text in zip(("query", "value"), ax.get_legend().get_texts(), strict=True):
            energies = [S[:4].sum() / S.sum() for path, S in spectra.items() if path.endswith(kind)]
            assert text.get_text() == f"{kind}: {min(energies):.0%} to {max(energies):.0%}"
        assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines[:-1]}) == 2

    def test_layers_of_different_ranks_and_a_zero_weight(self):
        layers = {"a": NumpyLinear(np.zeros((5, 6))), "b": NumpyLinear(np.eye(5, 6))}
        settings = adamss.AdamssConfig(targets=["a", "b"], rank=3, subspaces=2, overrides={"b": {"rank": 2}})
        ax = plots.spectrum(adamss.attach(NumpyModel(layers), settings))
        assert [line.get_markevery() for line in ax.lines] == [[2], [1]]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a: 0%", "b: 40%"]


class TestSizes:
    def check(self, ax, paths=TARGETS):
        assert [f"encoder.0.{text.get_text()}" for text in ax.get_yticklabels()] == [*paths]
        bars = iter(ax.patches)
        for row, path in enumerate(paths):
            _, sizes, _ = oracle(path)
            trained = [
                sorted((n for n, on in zip(sizes, MASKS[path], strict=True) if on == wanted), reverse=True)
                for wanted in (True, False)
            ]
            start = 0
            for color, widths in zip((plots.ACTIVE, plots.FROZEN), trained, strict=True):
                for width in widths:
                    bar = next(bars)
                    assert (bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) == (
                        start,
                        width,
                        row,
                    )
                    assert bar.get_facecolor() == to_rgba(color)
                    start += width
        assert next(bars, None) is None
        assert [text.get_text() for text in ax.texts] == ["2 of 3"] * 2
        assert "4 trained (dark), 2 frozen (light)" in ax.get_title(loc="left")

    def test_they_are_those_of_numpy(self, model):
        self.check(plots.sizes(model), paths_of(model))

    def test_from_a_file_or_a_folder_with_it(self, file):
        self.check(plots.sizes(file))
        self.check(plots.sizes(str(file.parent)))

    def test_each_matrix_of_a_layer_of_several(self, tmp_path):
        one, two = (np.asarray([0, 0, 1]), np.asarray([0, 1, 1]) + 2)
        arrays = {
            "C": np.ones((1, 6)),
            "labels": np.concatenate([one, two]).astype(np.uint8),
            "M": np.ones((4, 4)),
        }
        arrays |= {"ranks": np.ones(4, np.uint8), "active": np.asarray([True, False, True, True])}
        stored = {name: StoredTensor.of(array) for name, array in arrays.items()}
        layer = checkpoint.StoredLayer(base=unknown((4, 6)), blocks=2, **stored)
        settings = adamss.AdamssConfig(targets=["experts"], rank=2, subspaces=2)
        checkpoint.write(
            tmp_path / "experts.safetensors", checkpoint.Checkpoint(settings, {"experts": layer})
        )
        ax = plots.sizes(tmp_path / "experts.safetensors")
        assert [text.get_text() for text in ax.get_yticklabels()] == ["experts[0]", "experts[1]"]
        assert [bar.get_width() for bar in ax.patches] == [2, 1, 2, 1]
        assert [text.get_text() for text in ax.texts] == ["1 of 2", "2 of 2"]

    def test_names_of_a_file_are_no_formulas(self, tmp_path):
        hostile = {r"$\frac{0$.$x$": NumpyLinear(np.eye(4)), "a\x1b[2J" + 300 * "b": NumpyLinear(np.eye(4))}
        settings = adamss.AdamssConfig(targets=".*", rank=4, subspaces=2)
        adamss.save(adamss.attach(NumpyModel(hostile), settings), tmp_path / "adapter.safetensors")
        ax = plots.sizes(tmp_path / "adapter.safetensors")
        ax.figure.savefig(tmp_path / "sizes.svg")
        assert ax.get_yticklabels()[0].get_text() == r"\$\frac{0\$.\$x\$"


def entry(step, active, **more):
    return {"step": step, plots.ALLOCATION: {"step": step, "active": active, **more}}


LOG = [
    entry(0, {"b.10": 3, "b.2": 3}, budget=BUDGET.to_dict()),
    {"step": 1, "loss": 1.0},
    entry(2, {"b.2": 1}),
    entry(4, {"b.10": 1}),
    {"step": 5, "loss": 1.0},
]


class TestActive:
    def test_a_log(self):
        ax = plots.active(LOG)
        assert ax.lines[0].get_xydata().tolist() == [[0, 6], [2, 4], [4, 2], [5, 2]]
        steps = [0, 1, 2, 3, 4, 5, 6]
        assert ax.lines[1].get_xdata().tolist() == steps
        assert ax.lines[1].get_ydata().tolist() == [core.budget_at(step, BUDGET, 6) for step in steps]
        below = ax.figure.axes[1]
        (mesh,) = below.collections
        assert [text.get_text() for text in below.get_yticklabels()] == ["2", "10"], (
            "numbers are sorted as such"
        )
        assert mesh.get_array().tolist() == [[3, 1, 1], [3, 3, 1]]
        assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 2, 4, 5]
        assert ax.get_shared_x_axes().joined(ax, below)

    def test_a_budget_of_parameters_is_no_number_of_subspaces(self):
        budget = BUDGET.to_dict() | {"unit": "parameters", "target": 60}
        assert len(plots.active([entry(0, {"b": 3}, budget=budget)]).lines) == 1
        told = [SimpleNamespace(step=1, budget=60, masks={"b": np.ones(3, bool)})]
        assert len(plots.active(told).lines) == 1

    def test_allocations_of_jax(self):
        jnp = pytest.importorskip("jax.numpy")
        budget = pytest.importorskip("adamss_jax.budget", exc_type=ImportError)

        def allocation(step, counts):
            total = jnp.asarray(sum(counts))
            active = {name: jnp.asarray(count) for name, count in zip("ab", counts, strict=True)}
            return budget.Allocation(
                jnp.asarray(step), total, active, total, jnp.asarray(False), jnp.asarray(0)
            )

        ax = plots.active([allocation(0, (3, 3)), allocation(4, (1, 2))])
        assert ax.lines[0].get_xydata().tolist()[:-1] == [[0, 6], [4, 3]]
        assert ax.lines[1].get_xydata().tolist() == [[0, 6], [4, 3]]

    @pytest.mark.parametrize("names", ["checkpoint-{}/adapter.safetensors", "run2/adapter-{}.safetensors"])
    def test_checkpoints_in_the_order_of_their_steps(self, tmp_path, names):
        model = adapted(budget=BUDGET)
        for step, mask in ((10, [True, False, False]), (4, [True, True, False])):
            path = tmp_path / names.format(step)
            path.parent.mkdir(exist_ok=True)
            masks = {each: np.asarray(mask) for each in TARGETS}
            adamss.save(get_backend("numpy").set_active(model, masks), path)
        folder = tmp_path if "checkpoint" in names else tmp_path / "run2"
        for source in (folder, sorted(folder.iterdir())):
            ax = plots.active(source)
            assert ax.lines[0].get_xydata().tolist() == [[4, 4], [10, 2]]
            assert ax.lines[0].get_linestyle() == "None", "nobody knows what was in between"
            (mesh,) = ax.figure.axes[1].collections
            assert mesh.get_array().tolist() == [[2, 1], [2, 1]]
            assert mesh.get_coordinates()[0, :, 0].tolist() == [1, 7, 13]
            assert ax.lines[1].get_ydata()[0] == 6
            assert ax.lines[1].get_xydata()[-1].tolist() == [10, 2]

    def test_on_axes_of_ones_own(self):
        figure, (left, right) = plt.subplots(1, 2)
        assert plots.active(LOG, ax=left) is left
        alone = plt.figure().add_axes((0.1, 0.1, 0.8, 0.8))
        assert plots.active(LOG, ax=alone) is alone
        for ax, below in ((left, figure.axes[2]), (alone, alone.figure.axes[1])):
            assert below.get_position().y1 < ax.get_position().y0
        assert right.get_position().y0 < left.get_position().y0


PICTURES = {name: getattr(plots, name) for name in plots.__all__}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_drawn_where_it_is_told_to_and_its_file_never_changes(name, tmp_path):
    source = LOG if name == "active" else adapted()
    ax = plt.figure().add_subplot()
    before = plt.get_fignums()
    assert PICTURES[name](source, ax=ax) is ax
    assert plt.get_fignums() == before
    for suffix in ("svg", "pdf"):
        files = [tmp_path / f"{number}.{suffix}" for number in range(2)]
        for path in files:
            PICTURES[name](source).figure.savefig(path)
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", PICTURES)
def test_missing_matplotlib_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        errors.MissingBackendError, match=rf"plots\.{name} needs matplotlib: pip install 'adamss\[plots\]'"
    ):
        PICTURES[name]("nowhere")


def test_matplotlib_is_not_imported_before_it_draws():
    code = "import sys, adamss.plots; assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def two_active():
    model = adamss.attach(
        NumpyModel({"a": NumpyLinear(np.eye(4))}), adamss.AdamssConfig(targets=["a"], rank=4), name="x"
    )
    model = adamss.attach(model, adamss.AdamssConfig(targets=["a"], rank=4), name="y")
    return adamss.activate(model, ["x", "y"])


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plots.ordering(adapted(), "qwery"), errors.TargetError, r"near matches: query"),
        (lambda: plots.ordering(adapted(), ""), errors.TargetError, r"layer = \[''\] match no module"),
        (lambda: plots.ordering(two_models(), "query"), errors.TargetError, r"'query' matches 2 layers"),
        (lambda: plots.spectrum(adapted(), "("), errors.ConfigError, "no regular expression"),
        (lambda: plots.sizes(adapted(), "query"), errors.TargetError, r"a list of names is \['query'\]"),
        (lambda: plots.sizes(NumpyModel({})), errors.StateError, "plots.sizes: the model has no adapters"),
        (lambda: plots.sizes(two_active()), errors.StateError, "'x', 'y' 2 are active"),
        (lambda: plots.sizes([]), errors.BackendError, "no backend knows"),
        (lambda: plots.ordering(adapted(), base="b"), errors.ConfigError, "a model has its own weights"),
        (lambda: plots.active([]), errors.ConfigError, "the list is empty"),
        (lambda: plots.active(3), errors.ConfigTypeError, "found int"),
        (lambda: plots.active([3]), errors.ConfigTypeError, "int is no allocation"),
        (lambda: plots.active([{"loss": 1.0}]), errors.CheckpointError, "the log has no allocations"),
        (lambda: plots.active([entry(0, {"a": "b"})]), errors.CheckpointError, "cannot be read"),
    ],
)
def test_bad_input_is_refused(draw, error, message):
    before = plt.get_fignums()
    with pytest.raises(error, match=message):
        draw()
    assert plt.get_fignums() == before


def two_models():
    layers = {f"{i}.query": NumpyLinear(np.eye(4)) for i in range(2)}
    return adamss.attach(NumpyModel(layers), adamss.AdamssConfig(targets=["query"], rank=4))


def test_bad_files_are_refused(file):
    folder = file.parent
    with pytest.raises(errors.ConfigError, match=r"has no base weights; name .* by base \(--base\)"):
        plots.spectrum(file)
    with pytest.raises(errors.CheckpointError, match="not written by adamss"):
        plots.sizes(folder / "base" / "model.safetensors")
    with pytest.raises(errors.CheckpointNotFoundError):
        plots.active(folder / "nothing-3.safetensors")
    with pytest.raises(errors.ConfigError, match=r"the step of .* is unknown"):
        plots.active([file])
    (folder / "empty").mkdir()
    with pytest.raises(errors.CheckpointNotFoundError, match=r"neither trainer_state.json nor checkpoints"):
        plots.active(folder / "empty")
    for text, message in (
        ("{", "no state of a Trainer"),
        (json.dumps({"log_history": []}), "has no allocations"),
    ):
        (folder / "trainer_state.json").write_text(text)
        with pytest.raises(errors.CheckpointError, match=message):
            plots.active(folder)


def test_weights_that_do_not_fit_are_refused(file):
    base = file.with_name("base")
    with pytest.raises(errors.ConfigError, match="a path of weights has its own weights"):
        plots.spectrum(base, base=base)
    save_file({"norm.weight": np.ones(3, np.float32)}, file.with_name("norm.safetensors"))
    with pytest.raises(errors.TargetError, match="there is no matrix to draw"):
        plots.spectrum(file.with_name("norm.safetensors"))
    other = {f"{path}.weight": np.ones(W.T.shape, np.float32) for path, (W, _) in LAYERS.items()}
    save_file(other, file.with_name("other.safetensors"))
    with pytest.raises(errors.CheckpointError, match="not the one that the adapter was trained on"):
        plots.spectrum(file, base=file.with_name("other.safetensors"))
    save_file({"head.weight": np.ones((5, 16), np.float32)}, file.with_name("head.safetensors"))
    with pytest.raises(errors.CheckpointError, match=r"encoder\.0"):
        plots.spectrum(file, base=file.with_name("head.safetensors"))
