"""Test the conformance suite: right backends pass, and each wrong backend fails the law that should find it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adamss_conformance import LAWS, Capabilities, Driver
from adamss_conformance.cases import VARIANTS, adjusted_rand_index
from adamss_conformance.driver import find_drivers
from adamss_conformance.laws import law_of
from adamss_conformance.suite import BackendSuite

HERE = Path(__file__).parent

WRONG = {
    "StartsOff": 1,
    "BaseMutated": 2,
    "OriginalsLost": 2,
    "DeltaTransposed": 3,
    "SegmentPermuted": 3,
    "SilentUpcast": 3,
    "WrongDeviceDriver": 3,
    "GradientOfBScaled": 4,
    "MergedTwice": 5,
    "PaddingTrained": 6,
    "FoldedTwice": 5,
    "MaskOffByOne": 7,
    "ReducesTooFar": 7,
    "ChoosesTheWorst": 7,
    "FrozenDecayed": 8,
    "GradientOfFrozen": 8,
    "LabelsMadeAnew": 9,
    "PrecisionLost": 10,
    "ForgetsAverages": 10,
    "CompilesMasks": 11,
    "GlobalSeedTouched": 12,
    "DecomposesRounded": 13,
}
"""Classes of `wrong.py`, with the law that must find the mistake."""

CASES = len(VARIANTS) + 1
"""Number of cases of law 12: one for each variant, and one for the seed."""


def run(*arguments: str, cwd: Path = HERE) -> subprocess.CompletedProcess[str]:
    """Run the suite in a separate process, as a user would."""
    plugins = ("-p", "no:cacheprovider", "-p", "adamss_conformance.plugin")
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--pyargs", "adamss_conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def table(output: str) -> dict[int, tuple[int, int, int]]:
    """Return the numbers of held, failed and not applicable cases of each law, from the printed summary."""
    rows = re.findall(r"^ +(\d+)  .*?(\d+) +(\d+) +(\d+)$", output, flags=re.MULTILINE)
    return {
        int(law): (int(held), int(failed), int(not_applicable)) for law, held, failed, not_applicable in rows
    }


@pytest.mark.parametrize(("name", "law"), WRONG.items())
def test_what_is_wrong_is_found_by_its_law(name, law):
    done = run("--adamss-backend", f"wrong:{name}", "-k", f"test_law_{law:02d}_")
    laws = table(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    assert laws[law][1] > 0, done.stdout
    assert "FAILED" in done.stdout


def test_what_is_right_holds_every_law_that_applies():
    done = run("--adamss-backend", "numpy")
    laws = table(done.stdout)
    assert done.returncode == 0, done.stdout
    assert list(laws) == list(LAWS)
    assert all(failed == 0 for _, failed, _ in laws.values())
    assert [law for law, (held, _, _) in laws.items() if held == 0] == [11]
    assert "compiles: NumPy compiles nothing" in done.stdout
    assert "bfloat16: NumPy has no bfloat16" in done.stdout


@pytest.mark.parametrize("name", ["Shy", "Resigned"])
def test_a_case_left_out_for_a_reason_of_its_own_fails(name):
    done = run("--adamss-backend", f"wrong:{name}", "-k", "law_12")
    assert done.returncode == 1
    assert table(done.stdout)[12] == (0, CASES, 0)
    assert "left out for a reason that the capability table does not give" in done.stdout


def test_behind_the_other_door_what_is_right_passes_and_what_is_left_out_fails(tmp_path):
    """A subclass of `BackendSuite` that overrides the fixture `driver` needs no plugin."""
    (tmp_path / "test_shy.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "import pytest, wrong\n"
        "from adamss_conformance import BackendSuite\n"
        "class TestRight(BackendSuite):\n"
        "    @pytest.fixture\n"
        "    def driver(self):\n"
        "        return wrong.NumpyDriver()\n"
        "class TestShy(BackendSuite):\n"
        "    @pytest.fixture\n"
        "    def driver(self):\n"
        "        return wrong.Shy()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "law_12 or law_11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert f"{CASES} failed, {CASES} passed, 26 skipped" in done.stdout, done.stdout


def test_a_device_that_is_absent_is_named():
    done = run("--adamss-backend", "wrong:OnTheMoon", "-k", "law_07")
    assert done.returncode == 0, done.stdout
    assert "moon: not run on moon, because this machine has no such device" in done.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mlx", "no driver for a backend called 'mlx' (there are equinox, flax, jax, numpy, strict, torch)"),
        ("no_such_module:Backend", "No module named 'no_such_module'"),
        ("wrong:np", "wrong:np is neither a Backend nor an adamss_conformance.Driver"),
        ("wrong:Missing", "wrong:Missing is neither a Backend nor"),
        (
            "broken:Driver",
            "--adamss-backend broken:Driver: RuntimeError: the driver of the device is too old",
        ),
    ],
)
def test_a_backend_that_cannot_be_had_is_a_failure(target, message):
    done = run("--adamss-backend", target)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr


def test_no_backend_named_is_a_failure():
    done = run()
    assert done.returncode != 0
    assert "name a backend" in done.stdout + done.stderr


def test_every_law_has_a_test_and_every_test_a_law():
    tests = [name for name in dir(BackendSuite) if name.startswith("test_")]
    assert {law_of(name) for name in tests} == set(LAWS)
    assert None not in {law_of(name) for name in tests}


def test_capabilities_need_reasons():
    complete = find_drivers("numpy")[0].capabilities
    assert complete.missing["compiles"] == "NumPy compiles nothing"
    with pytest.raises(ValueError, match="lacking without a reason: float16"):
        Capabilities(**{**vars(complete), "dtypes": ("float64", "float32")})
    with pytest.raises(ValueError, match="a reason for what is not lacking: float16"):
        Capabilities(**{**vars(complete), "missing": {**complete.missing, "float16": "none"}})


@pytest.mark.parametrize(
    ("capability", "call"),
    [
        ("gradients", lambda driver: driver.gradients(None, None, None, None, None, None)),
        ("compiles", lambda driver: driver.compile(None)),
        ("optimisers", lambda driver: driver.train(None, {}, steps=1, optimiser="sgd", rate=0.1)),
        ("budget", lambda driver: driver.training(None, {}, optimiser="sgd", rate=0.1, budget=None)),
    ],
)
def test_a_driver_that_promises_what_it_has_not_is_told_what_to_write(capability, call):
    class Boaster(Driver):
        name, backend_name = "boaster", "numpy"
        capabilities = find_drivers("numpy")[0].capabilities

        def model(self, layers, dtype): ...

        def call(self, model, path, x): ...

    with pytest.raises(TypeError, match=f"Boaster: its capabilities promise '{capability}'"):
        call(Boaster())


def test_adjusted_rand_index():
    labels = np.asarray([0, 0, 1, 1, 2, 2])
    assert adjusted_rand_index(labels, (labels + 1) % 3) == 1.0
    # By Hubert and Arabie's definition: 1 pair is together in both groupings, 3 pairs in each, of 15 pairs.
    other = np.asarray([0, 0, 1, 2, 2, 1])
    assert adjusted_rand_index(labels, other) == pytest.approx((1 - 9 / 15) / (3 - 9 / 15))
    assert adjusted_rand_index(np.zeros(4, int), np.zeros(4, int)) == 1.0
