"""Test that configs are validated when they are made, and that they survive JSON."""

import dataclasses
import json

import numpy as np
import pytest

from adamss import AdamssConfig, BudgetConfig, SubspaceEstimate
from adamss.errors import AdamssError, ConfigError, ConfigTypeError

BUDGET = {"target": 10, "end_step": 100}


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"rank": 0}, ConfigError, "rank must be at least 1, found 0"),
        ({"subspaces": -1}, ConfigError, "subspaces must be at least 1"),
        (
            {"subspaces": "guess"},
            ConfigError,
            "subspaces must be an integer, 'estimate' or a Sub.*found 'guess'",
        ),
        ({"subspaces": {"tau": -1}}, ConfigError, "tau must be positive"),
        ({"subspaces": {"tua": 1}}, ConfigError, "SubspaceEstimate has no setting tua"),
        (
            {"overrides": {"a": {"subspaces": {"minimum": 0}}}},
            ConfigError,
            r"overrides\['a'\]: minimum must be at",
        ),
        ({"subspace_rank": 0}, ConfigError, "subspace_rank must be at least 1"),
        ({"rank": 1.5}, ConfigTypeError, "rank must be an integer, found 1.5"),
        ({"rank": True}, ConfigTypeError, "rank must be an integer, found True"),
        ({"seed": -1}, ConfigError, "seed must be at least 0"),
        ({"targets": []}, ConfigError, "targets is empty"),
        ({"targets": ""}, ConfigError, "targets is an empty pattern"),
        ({"targets": "("}, ConfigError, "targets is not a regular expression"),
        ({"targets": "(" * 5000}, ConfigError, "targets is not a regular expression"),
        ({"targets": "a{99999999999999999999}"}, ConfigError, "targets is not a regular expression"),
        ({"targets": [1]}, ConfigTypeError, "targets must hold strings, found 1"),
        ({"targets": [""]}, ConfigError, "targets holds an empty name"),
        ({"targets": 3}, ConfigTypeError, "targets must be a list of names, found 3"),
        ({"exclude": None}, ConfigTypeError, "exclude must be a list of names, found None"),
        ({"exclude": "("}, ConfigError, "exclude is not a regular expression"),
        ({"overrides": ["a"]}, ConfigTypeError, "overrides must be a dictionary of settings by pattern"),
        ({"overrides": {"a": 3}}, ConfigTypeError, r"overrides holds 'a': 3; write"),
        ({"overrides": {"(": {}}}, ConfigError, "overrides is not a regular expression"),
        ({"overrides": {"a": {"seed": 1}}}, ConfigError, r"overrides\['a'\] has seed; the settings that"),
        ({"overrides": {"a": {"rank": 0}}}, ConfigError, r"overrides\['a'\]: rank must be at least 1"),
        ({"modules_to_save": "head"}, ConfigTypeError, r"modules_to_save must be a list.*write \['head'\]"),
        ({"segmentation": "k-means"}, ConfigError, "segmentation must be one of kmeans, .*'k-means'"),
        ({"basis": "own"}, ConfigError, "basis must be one of shared, per_subspace; found 'own'"),
        ({"initial_B": "zero"}, ConfigError, "initial_B must be one of"),
        ({"factor_dtype": "int8"}, ConfigError, "factor_dtype must be one of"),
        ({"include_bias": 1}, ConfigTypeError, "include_bias must be True or False, found 1"),
        ({"segmentation": "ksubspaces"}, ConfigError, "needs segmentation_dimension"),
        ({"segmentation_dimension": 3}, ConfigError, "dimension is for segmentation = 'ksubspaces'"),
        ({"budget": {"target": 3}}, ConfigTypeError, "budget must be an adamss.BudgetConfig"),
    ],
)
def test_bad_adamss_config(changes, kind, match):
    with pytest.raises(kind, match=match) as caught:
        AdamssConfig(**({"targets": ["query"]} | changes))
    assert isinstance(caught.value, AdamssError)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"target": 0}, ConfigError, "target must be at least 1"),
        ({"end_step": 5, "start_step": 5}, ConfigError, "end_step must come after start_step = 5, found 5"),
        ({"interval": 0}, ConfigError, "interval must be at least 1"),
        ({"minimum_per_layer": -1}, ConfigError, "minimum_per_layer must be at least 0, found -1"),
        ({"minimum_per_layer": 1.5}, ConfigTypeError, "minimum_per_layer must be an integer, found 1.5"),
        ({"minimum_per_layer": True}, ConfigTypeError, "minimum_per_layer must be an integer, found True"),
        ({"minimum_per_layer": None}, ConfigTypeError, "minimum_per_layer must be an integer, found None"),
        ({"start_step": -1}, ConfigError, "start_step must be at least 0"),
        ({"unit": "layers"}, ConfigError, "unit must be one of subspaces, parameters; found 'layers'"),
        ({"window": "never"}, ConfigError, "window must be one of"),
        ({"revive": "no"}, ConfigTypeError, "revive must be True or False"),
        ({"power": 0.0}, ConfigError, "power must be positive"),
        ({"power": "3"}, ConfigTypeError, "power must be a number"),
        ({"sensitivity_decay": 1.0}, ConfigError, r"sensitivity_decay must lie in \[0.0, 1.0\)"),
        ({"uncertainty_decay": float("nan")}, ConfigError, "uncertainty_decay must lie in"),
        ({"initial": 9}, ConfigError, "target = 10 is more than initial = 9"),
    ],
)
def test_bad_budget_config(changes, kind, match):
    with pytest.raises(kind, match=match):
        BudgetConfig(**(BUDGET | changes))


def test_is_frozen_and_keyword_only():
    config = AdamssConfig(targets=("query", "value"), budget=BudgetConfig(**BUDGET))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3
    with pytest.raises(TypeError):
        AdamssConfig(["query"])
    assert config == AdamssConfig(targets=["query", "value"], budget=BudgetConfig(**BUDGET))
    assert len({config, AdamssConfig(targets=["query", "value"], budget=BudgetConfig(**BUDGET))}) == 1


@pytest.mark.parametrize("targets", ["a.*b", ["query", "value"]])
@pytest.mark.parametrize(
    "changes", [None, {"unit": "parameters", "revive": True}, {"window": "running", "initial": 12}], ids=str
)
def test_travels_through_json(targets, changes):
    budget = None if changes is None else BudgetConfig(**BUDGET, minimum_per_layer=2, **changes)
    config = AdamssConfig(
        targets=targets, modules_to_save=["head"], basis="per_subspace", seed=3, budget=budget
    )
    assert AdamssConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "subspaces", ["estimate", SubspaceEstimate(tau=0.1, maximum=12, exponent=4), 7], ids=str
)
def test_the_way_to_the_number_of_subspaces_travels_through_json(subspaces):
    config = AdamssConfig(targets=["query"], subspaces=subspaces, overrides={"a.b": {"subspaces": subspaces}})
    again = AdamssConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    expected = SubspaceEstimate() if subspaces == "estimate" else subspaces
    assert again.subspaces == again.for_layer("a.b").subspaces == expected
    assert (
        AdamssConfig.from_file(json.loads(json.dumps(config.to_dict()))).for_layer("a.b").subspaces
        == expected
    )


def test_the_settings_of_the_paper_and_of_its_code():
    paper, reference = AdamssConfig.paper(targets=["q"]), AdamssConfig.reference(targets=["q"], subspaces=3)
    assert (paper.subspaces, paper.rank, paper.subspace_rank) == (
        SubspaceEstimate(tau=0.01, minimum=10),
        100,
        1,
    )
    assert (paper.segmentation, paper.basis, paper.initial_B, paper.include_bias) == (
        ("ncut", "per_subspace", "qr", False)
    )
    assert (reference.subspaces, reference.rank, reference.subspace_rank) == (3, 100, 1)
    assert (reference.segmentation, reference.basis, reference.include_bias) == ("kmeans", "shared", True)


def test_budget_travels_through_json():
    budget = BudgetConfig(**BUDGET, minimum_per_layer=np.int64(3))
    settings = json.loads(json.dumps(budget.to_dict()))
    assert settings["minimum_per_layer"] == 3
    assert settings.keys() == {field.name for field in dataclasses.fields(BudgetConfig)}
    assert BudgetConfig.from_dict(settings) == budget


def test_files_from_before_minimum_per_layer_are_read():
    """Such files have no `minimum_per_layer`. The default of 0 is what their budgets did."""
    settings = AdamssConfig(targets=["query"], budget=BudgetConfig(**BUDGET, interval=7)).to_dict()
    del settings["budget"]["minimum_per_layer"]
    config = AdamssConfig.from_dict(json.loads(json.dumps(settings)))
    assert config.budget == BudgetConfig(**BUDGET, interval=7, minimum_per_layer=0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"targets": ["a"], "rnk": 3}, "AdamssConfig has no setting rnk"),
        ({"targets": ["a"], "budget": {"target": 3}}, "BudgetConfig needs end_step"),
    ],
)
def test_from_dict_names_what_is_wrong(settings, match):
    with pytest.raises(ConfigError, match=match):
        AdamssConfig.from_dict(settings)
