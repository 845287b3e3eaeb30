"""Law 14 for long histories: random sequences of calls on up to three adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import adamss
from adamss import core
from adamss.errors import StateError
from adamss_conformance import cases
from adamss_conformance.cases import INPUTS, LAYERS, TARGETS, config
from adamss_conformance.driver import Driver
from adamss_conformance.laws.helpers import case, on_host, outputs_of
from adamss_conformance.tolerances import assert_agrees

__all__ = ["WALKS", "WalkLaws"]

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"modules_to_save": []},
    "b": {"targets": ["query"], "subspaces": 2, "seed": 5, "modules_to_save": []},
    "c": {"basis": "per_subspace", "include_bias": True, "modules_to_save": []},
}
WALKS = 150
"""Number of random walks in a thorough run; by default it is a third."""

DTYPE = "float64"
names = st.sampled_from(sorted(SETTINGS))
weights = st.tuples(*[st.sampled_from([0.5, -2.0, 1.0, None])] * len(SETTINGS))


class Walk(RuleBasedStateMachine):
    """A model, together with a record in NumPy of what each adapter and each row should compute.

    Parameters
    ----------
    driver
        Driver of the backend under test.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver
        self.model = driver.model(LAYERS, DTYPE)
        self.deltas: dict[str, dict[str, np.ndarray]] = {}
        self.weights: dict[str, float] = {}
        self.merged: set[str] = set()
        self.partly: set[str] = set()
        self.rng = np.random.default_rng(0)
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.folder.cleanup()

    @property
    def held(self) -> set[str]:
        """Names of the adapters whose update the weights hold, wholly or partly."""
        return self.merged | self.partly

    def refused(self, verb: Any) -> None:
        """Make a call that must fail; the invariants then check that it changed nothing."""
        with pytest.raises(StateError):
            verb()

    def look(self, *changed: str) -> None:
        """Record the updates of the adapters that were changed, and check that those of the others are the same."""
        for name, each in self.driver.backend.bank(self.model).adapters.items():
            deltas = {path: core.delta(on_host(self.driver, f)) for path, f in each.layers.items()}
            if name not in changed:
                for path, delta in deltas.items():
                    assert np.array_equal(delta, self.deltas[name][path]), f"{name} has changed in {path}"
            self.deltas[name] = deltas

    # ---- the calls of a walk --------------------------------------------------------------------------

    @rule(name=names)
    def attach(self, name: str) -> None:
        if name in self.deltas or self.held:
            return self.refused(lambda: adamss.attach(self.model, config(**SETTINGS[name]), name=name))
        self.model = adamss.attach(self.model, config(**SETTINGS[name]), name=name)
        self.weights = {name: 1.0}
        self.look(name)
        return self.train(name, seed=10)  # an update of zero would hide mistakes

    @rule(name=names, seed=st.integers(0, 9))
    def train(self, name: str, seed: int) -> None:
        """Change C of an adapter, as an optimiser would, unless the weights hold some of its update."""
        if name not in self.deltas or name in self.held:
            return
        new = {}
        for number, (path, factors) in enumerate(
            self.driver.backend.bank(self.model).adapters[name].layers.items()
        ):
            f = on_host(self.driver, factors)
            C = cases.random_C(f, np.random.default_rng([seed, number])) * 0.3
            new[path] = factors._replace(C=self.driver.array(C, DTYPE))
        self.model = self.driver.backend.with_factors(self.model, name, new)
        self.look(name)

    @rule(name=names, first=st.booleans())
    def freeze(self, name: str, first: bool) -> None:
        if name not in self.deltas or name in self.held:
            return
        layers = self.driver.backend.bank(self.model).adapters[name].layers
        masks = {}
        for path, factors in layers.items():
            mask = np.ones(factors.ranks.shape, bool)
            mask[0 if first else -1] = False
            masks[path] = self.driver.array(mask)
        self.model = self.driver.backend.set_active(self.model, masks, name)

    @rule(chosen=weights)
    def activate(self, chosen: tuple[float | None, ...]) -> None:
        all_of_them = dict(zip(SETTINGS, chosen, strict=True))
        what = {
            name: weight for name, weight in all_of_them.items() if weight is not None and name in self.deltas
        }
        # The weights hold updates scaled by the adapters' weights, which therefore must not change.
        moves = any(what.get(name) != self.weights[name] for name in self.held)
        if not self.deltas or moves:
            return self.refused(lambda: adamss.activate(self.model, what))
        self.model = adamss.activate(self.model, what)
        self.weights = dict(what)
        return None

    @rule(name=names)
    def merge(self, name: str) -> None:
        if name not in self.deltas or name in self.merged:
            return self.refused(lambda: adamss.merge(self.model, name=name))
        self.model = adamss.merge(self.model, name=name)
        self.weights.setdefault(name, 1.0)
        self.partly.discard(name)
        self.merged.add(name)
        return None

    @rule(name=names)
    def unmerge(self, name: str) -> None:
        if name not in self.merged:
            return self.refused(lambda: adamss.unmerge(self.model, name=name))
        self.model = adamss.unmerge(self.model, name=name)
        self.merged.discard(name)
        return None

    @rule(name=names)
    def consolidate(self, name: str) -> None:
        each = self.driver.backend.bank(self.model).adapters.get(name)
        frozen = each is not None and any(not self.driver.numpy(f.active).all() for f in each.layers.values())
        if not frozen or name in self.merged or name not in self.weights:
            return self.refused(lambda: adamss.consolidate(self.model, name=name))
        self.model = adamss.consolidate(self.model, name=name)
        self.partly.add(name)
        return None

    @rule(name=names)
    def save_and_load(self, name: str) -> None:
        if name not in self.deltas:
            return None
        path = Path(self.folder.name) / name
        adamss.save(self.model, path, name=name, training=True)
        if self.held:
            return self.refused(lambda: adamss.load(self.model, path, name="another"))
        self.detach(name)
        self.model = adamss.load(self.model, path, name=name)
        self.weights = {name: 1.0}
        return self.look(name)

    @rule(name=names)
    def detach(self, name: str) -> None:
        if name not in self.deltas:
            return self.refused(lambda: adamss.detach(self.model, name=name))
        self.model = adamss.detach(self.model, name=name)
        del self.deltas[name]
        self.weights.pop(name, None)
        self.merged.discard(name)
        self.partly.discard(name)
        return None

    @precondition(
        lambda self: self.deltas and not self.held and "routes" not in self.driver.capabilities.missing
    )
    @rule(places=st.lists(st.integers(0, 3), min_size=7, max_size=7))
    def route(self, places: list[int]) -> None:
        there = [*self.deltas, None]
        rows = [there[place % len(there)] for place in places]
        with adamss.routed(self.model, rows) as mixed:
            outputs = outputs_of(self.driver, mixed, DTYPE)
        for path in TARGETS:
            each = {name: self.expected(path, [name] if name else []) for name in {*rows}}
            expected = np.stack([each[name][row] for row, name in enumerate(rows)])
            assert_agrees(
                outputs[path], expected, dtype=DTYPE, what=f"{path}, routed {rows}", scale=self.scale
            )

    # ---- the invariants -------------------------------------------------------------------------------

    scale = max(float(np.abs(INPUTS[path] @ LAYERS[path][0]).max()) for path in TARGETS)

    def expected(
        self, path: str, active: Iterable[str], weights: dict[str, float] | None = None
    ) -> np.ndarray:
        """Return the expected outputs of a layer with the updates of these adapters."""
        (W, b), x = LAYERS[path], INPUTS[path]
        y = x @ W if b is None else x @ W + b
        for name in active:
            if path in self.deltas[name]:
                delta = self.deltas[name][path] * (weights or {}).get(name, 1.0)
                y = y + x @ delta[: len(W)] + (delta[len(W) :].sum(0) if len(delta) > len(W) else 0)
        return y

    @invariant()
    def outputs_are_those_of_the_active(self) -> None:
        outputs = outputs_of(self.driver, self.model, DTYPE)
        for path in TARGETS:
            expected = self.expected(path, self.weights, self.weights)
            assert_agrees(
                outputs[path], expected, dtype=DTYPE, what=f"{path}, {self.weights}", scale=self.scale
            )

    @invariant()
    def the_model_says_so(self) -> None:
        said = adamss.adapters(self.model)
        assert {name: each.weight for name, each in said.items() if each.active} == self.weights
        assert {name for name, each in said.items() if each.merged} == self.merged
        assert said.keys() == self.deltas.keys()


class WalkLaws:
    """Tests that each adapter computes its own update after any sequence of calls."""

    def test_law_14_random_walks(self, driver: Driver) -> None:
        """Attach, train, activate, route, merge, consolidate, save and detach adapters in any order."""
        with case(driver, DTYPE, "models", "consolidates"):
            run_state_machine_as_test(
                lambda: Walk(driver),  # type: ignore[arg-type]
                settings=settings(
                    max_examples=WALKS if cases.THOROUGH else WALKS // 3,
                    stateful_step_count=20,
                    derandomize=True,
                    deadline=None,
                    database=None,
                    suppress_health_check=[*HealthCheck],
                ),
            )
