"""Test the scripts of the paper's tables end to end, on tiny models and data sets and without network access."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets", reason="the paper extra brings datasets")
pytest.importorskip("math_verify", reason="the paper extra brings math-verify")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = [f"word{number}" for number in range(20)]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Give this module its own cache of datasets, and one thread."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = ["[UNK]", "[PAD]", "[EOS]", "Question", "Solution", ":", "The", "answer", "is", *WORDS]
    tokens += [str(digit) for digit in range(10)]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )


def saved(model, *more, folder):
    for part in (model, *more):
        part.save_pretrained(folder)
    return folder


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def written(folder, name, **splits):
    """Write a data set as `save_to_disk` does."""
    parts = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(folder / name)


# --- GLUE -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glue(script, tokenizer, tmp_path_factory):
    """Return the script, and a folder with a model and three tasks: two from `save_to_disk` and one as CSV."""
    folder, draw = tmp_path_factory.mktemp("glue"), random.Random(0)
    config = transformers.RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **SIZES)
    torch.manual_seed(0)
    saved(transformers.RobertaModel(config), tokenizer, folder=folder / "model")

    def rows(count, label, *columns):
        made = [{name: " ".join(draw.choices(WORDS, k=6)) for name in columns} for _ in range(count)]
        return [row | {"label": label(row), "idx": 0} for row in made]

    def first(row):
        return int(next(iter(row.values())).split()[0] in WORDS[::2])

    pair = ("sentence1", "sentence2")
    written(folder / "data", "rte", train=rows(80, first, *pair), validation=rows(24, first, *pair))
    score = lambda row: float(len(row["sentence1"]) % 5)  # noqa: E731
    written(folder / "data", "stsb", train=rows(40, score, *pair), validation=rows(20, score, *pair))
    (folder / "data" / "cola").mkdir()
    for split, count in (("train", 40), ("validation", 20)):
        made = datasets.Dataset.from_list(rows(count, first, "sentence"))
        made.to_csv(folder / "data" / "cola" / f"{split}.csv")
    where = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--epochs", "2"]
    return script("paper.glue"), [*where, "--subspaces", "3", "--seeds", "0"]


def lines(capsys):
    """Return the printed text, and the cells of the table by method and task."""
    printed = capsys.readouterr().out
    cells = [line.split("  ") for line in printed.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    return printed, {tuple(line[:2]): line[2:] for line in cells[4:] if len(line) == 10}


def test_glue(glue, capsys, tmp_path):
    module, where = glue
    methods = ["AdaMSS_base", "AdaMSS", "LoRA r=1", "PiSSA r=8", "full"]
    arguments = [*where, "--output", str(tmp_path), "--target", "4", "--device-batch", "16"]
    assert module.main([*arguments, "--methods", "AdaMSS_base", "--tasks", "STS-B", "CoLA"]) == 0
    assert set(lines(capsys)[1]) == {("AdaMSS_base", "STS-B"), ("AdaMSS_base", "CoLA")}
    assert module.main([*arguments, "--methods", *methods, "--tasks", "RTE"]) == 0
    printed, table = lines(capsys)
    assert len(table) == 5
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(record["scores"].values())).all() for record in records)
    mean, deviation, _median, seeds, paper, trained, paper_trained, diverged = table["AdaMSS_base", "RTE"]
    assert (deviation, seeds, paper, paper_trained, diverged) == ("-", "1", "77.20", "0.042M", "-")
    assert float(mean) == pytest.approx(records[2]["scores"]["RTE"], abs=0.005)
    # Query and value of two layers have 24 outputs and three subspaces with R = 24: 4 x (24 + 3 x 24).
    assert trained == "384"
    assert float(table["AdaMSS", "RTE"][5]) < 384
    assert table["LoRA r=1", "RTE"][5] == str(4 * (24 + 24 + 24))
    assert "scrambled" in printed
    assert not list(tmp_path.glob("runs/*/checkpoint-*"))


def test_a_journal_saves_the_runs_that_it_has(glue, capsys, tmp_path, monkeypatch):
    module, where = glue
    arguments = [*where, "--output", str(tmp_path), "--methods", "AdaMSS_base", "--tasks", "CoLA"]
    assert module.main(arguments) == 0
    before = capsys.readouterr().out
    monkeypatch.setattr(module, "fit", None)
    for more in ([], ["--report"], ["--seeds", "0", "0", "--device-batch", "8"]):
        assert module.main([*arguments, *more]) == 0
        assert capsys.readouterr().out == before
    # With --report, runs that the journal lacks are not made.
    assert module.main([*arguments, "--report", "--seeds", "0", "1", "--tasks", "CoLA", "QNLI"]) == 0
    _, table = lines(capsys)
    assert (table["AdaMSS_base", "CoLA"][3], table["AdaMSS_base", "QNLI"][3]) == ("1", "0")


@pytest.mark.parametrize("method", ["AdaMSS", "PiSSA r=8"])
def test_an_interrupted_run_goes_on_and_gives_the_same_table(
    glue, script, capsys, tmp_path, monkeypatch, method
):
    module, where = glue
    common = script("paper.common")
    arguments = [*where, "--methods", method, "--tasks", "RTE", "--target", "4", "--epochs", "3", "--output"]
    assert module.main([*arguments, str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr().out
    step, taken = common.FineTuning.training_step, []

    def interrupted(self, *given, **options):
        taken.append(self.state.global_step)
        if len(taken) == 8:  # in the third epoch, of three steps each
            raise KeyboardInterrupt
        return step(self, *given, **options)

    monkeypatch.setattr(common.FineTuning, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.main([*arguments, str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "runs.jsonl").exists()
    (last,) = tmp_path.glob("parts/runs/*/checkpoint-6")
    broken = last.with_name("checkpoint-7")  # like a checkpoint that was not finished
    broken.mkdir()
    taken.extend([0] * 8)
    capsys.readouterr()
    assert module.main([*arguments, str(tmp_path / "parts")]) == 0
    assert capsys.readouterr().out == whole
    assert taken[16:] == [6, 7, 8]
    (first,), (second,) = (
        [json.loads(line) for line in (tmp_path / name / "runs.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert first["scores"] == second["scores"] and first["trained"] == second["trained"]
    assert (first["resumed"], second["resumed"]) == (False, True)


def test_a_run_that_diverges_is_listed_and_in_no_mean(glue, capsys, tmp_path, monkeypatch):
    module, where = glue
    fit = module.fit

    def spoiled(model, run, **options):
        if run.seed == 1:
            with torch.no_grad():
                next(p for p in model.classifier.parameters() if p.requires_grad).fill_(torch.nan)
        return fit(model, run, **options)

    monkeypatch.setattr(module, "fit", spoiled)
    arguments = [*where, "--seeds", "0", "1", "--methods", "AdaMSS_base", "--tasks", "RTE"]
    assert module.main([*arguments, "--output", str(tmp_path)]) == 0
    printed, table = lines(capsys)
    assert "diverged, in no mean: RTE, AdaMSS_base, seed 1, at step 1" in printed
    assert table["AdaMSS_base", "RTE"][3] == "1" and table["AdaMSS_base", "RTE"][-1] == "1"
    assert "nan" not in printed


def test_what_is_missing_is_said_in_one_line_and_all_else_is_done(glue, capsys, tmp_path):
    module, where = glue
    broken = datasets.Dataset.from_list([{"question": "word1", "label": 0}])
    written(tmp_path, "qnli", train=broken.to_list(), validation=broken.to_list())
    (tmp_path / "sst2").mkdir()
    broken.rename_column("question", "sentence").to_csv(tmp_path / "sst2" / "train.csv")
    arguments = [*where, "--methods", "AdaMSS_base", "LoRA r=8", "--output", str(tmp_path)]
    for more, told in (
        (["--tasks", "RTE", "--model", str(tmp_path / "none")], ["Tokenizer: there is no"]),
        (["--tasks", "RTE", "--model", str(tmp_path)], ["could not be loaded"]),
        (["--tasks", "QNLI", "--data", str(tmp_path)], ["qnli has no column sentence in train"]),
        (["--tasks", "SST-2", "--data", str(tmp_path)], ["sst2 has no part validation"]),
        (["--tasks", "QNLI", "CoLA", "MRPC", "--epochs", "1"], ["set qnli: there is no", "set mrpc: there"]),
    ):
        capsys.readouterr()
        assert module.main([*arguments, *more]) == 2
        printed, errors = capsys.readouterr()
        messages = [line for line in errors.splitlines() if "--data" in line or "--model" in line]
        assert len(messages) == len(told)
        assert all(part in message for part, message in zip(told, messages, strict=True)), messages
    cells = [line.split() for line in printed.splitlines() if "CoLA  " in line]
    assert len(cells) == 2 and all(line[-5] == "1" for line in cells)


@pytest.mark.parametrize(
    "given",
    [
        "--device-batch 0",
        "--device-batch 5",
        "--epochs 0",
        "--seeds -1",
        "--seeds 4294967296",
        "--subspaces 0",
        "--target 0",
        "--workers -1",
    ],
)
def test_bad_input_is_refused_in_one_line(glue, capsys, given):
    with pytest.raises(SystemExit, match="2"):
        glue[0].main(given.split())
    assert given.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_correlation_with_a_constant_is_zero(script):
    pearson = script("paper.glue").pearson
    assert pearson(np.ones(4), np.arange(4.0)) == 0.0
    assert pearson(np.arange(4.0), 2 * np.arange(4.0)) == pytest.approx(1)


# --- Images -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(script, tmp_path_factory):
    """Return the script, and a folder with a tiny ViT and a data set of dark and light images in folders."""
    folder, draw = tmp_path_factory.mktemp("image"), np.random.default_rng(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    torch.manual_seed(0)
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    saved(transformers.ViTModel(config), processor, folder=folder / "model")
    for part, count in (("train", 40), ("test", 10)):
        for label, low in (("dark", 0), ("light", 150)):
            where = folder / "data" / "Pets" / part / label
            where.mkdir(parents=True)
            for number in range(count // 2):
                values = draw.integers(low, low + 100, size=(20, 30, 3)).astype(np.uint8)
                Image.fromarray(values).save(where / f"{number}.png")
    where = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--tasks", "Pets"]
    return script("paper.image"), [*where, "--seeds", "7", "--subspaces", "3"]


def test_a_budget_that_never_falls_is_said(image, capsys, tmp_path):
    module, where = image
    arguments = [*where, "--methods", "AdaMSS r_k=3", "--epochs", "1", "--output", str(tmp_path)]
    for target, said in (("12", True), ("11", False)):
        assert module.main([*arguments, "--target", target]) == 0
        printed, errors = capsys.readouterr()
        message = "the budget never falls, so that AdaMSS is AdaMSS_base: its target is not below the 12 sub"
        assert (message in printed) is (message in errors) is said


def test_image(image, capsys, tmp_path):
    module, where = image
    methods = ["AdaMSS_base r_k=3", "AdaMSS r_k=3", "linear probe", "full"]
    arguments = [*where, "--target", "4", "--epochs", "4", "--segmentation", "contiguous"]
    arguments += ["--learning-rate", "5e-3"]
    assert module.main([*arguments, "--methods", *methods, "--output", str(tmp_path)]) == 0
    _printed, table = lines(capsys)
    trained = {name: float(cells[5].replace(",", "")) for (name, _), cells in table.items()}
    assert trained["AdaMSS_base r_k=3"] == 4 * 3 * (24 + 3 * 24)
    assert 0 < trained["AdaMSS r_k=3"] < trained["AdaMSS_base r_k=3"]
    assert trained["linear probe"] == 0
    given = [*where, "--epochs", "1", "--variant", "paper", "--subspaces", "estimate"]
    assert module.main([*given, "--methods", "AdaMSS_base r_k=1", "--output", str(tmp_path)]) == 0
    assert float(table["full", "Pets"][0]) > 75  # the two classes differ in mean brightness


def test_a_training_image_is_a_part_and_a_test_image_the_centre(image):
    module, _ = image
    picture = Image.new("RGB", (30, 20))
    picture.paste((255, 255, 255), (4, 0, 26, 20))
    assert np.asarray(module.cropped(picture, (16, 16), training=False)).min() == 255
    random.seed(0)
    for _ in range(200):
        left, top, right, bottom = module.random_box(30, 20)
        assert 0 <= left < right <= 30 and 0 <= top < bottom <= 20
        assert 0.05 < (right - left) * (bottom - top) / 600 <= 1
    assert module.cropped(picture, (16, 16), training=True).size == (16, 16)


# --- Generation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generation(script, tokenizer, tmp_path_factory):
    """Return the script, and a folder with a tiny Llama, training examples as JSON lines, and questions.

    The answer to all questions is 7.
    """
    folder, draw = tmp_path_factory.mktemp("generation"), random.Random(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=1, eos_token_id=2, pad_token_id=1, **SIZES
    )
    torch.manual_seed(0)
    saved(transformers.LlamaForCausalLM(config), tokenizer, folder=folder / "model")

    def question():
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 8)))

    (folder / "data" / "MetaMathQA").mkdir(parents=True)
    rows = [{"query": question(), "response": "The answer is : 7"} for _ in range(160)]
    (folder / "data" / "MetaMathQA" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written(folder / "data", "gsm8k", test=[{"question": question(), "answer": "So. #### 7"}] * 5)
    written(
        folder / "data",
        "MATH",
        test=[{"problem": question(), "solution": r"It is $\boxed{\frac{14}{2}}$."}] * 5,
    )
    where = ["--model", str(folder / "model"), "--data", str(folder / "data"), "--seeds", "0"]
    where += ["--subspaces", "3", "--answer-length", "8", "--answer-batch", "2", "--examples", "120"]
    return script("paper.generation"), where


def test_generation_learns_to_answer_and_goes_on_where_it_was(
    generation, script, capsys, tmp_path, monkeypatch
):
    module, where = generation
    arguments = [*where, "--dtype", "fp32", "--methods", "full", "--learning-rate", "1e-2", "--epochs", "2"]
    monkeypatch.setattr(module, "TABLE", replace(module.TABLE, save_steps=10))
    training_step, steps = script("paper.common").FineTuning.training_step, []

    def step(self, *given, **options):
        steps.append(self.state.global_step)
        return training_step(self, *given, **options)

    assert module.main([*arguments, "--output", str(tmp_path / "whole")]) == 0
    whole, table = lines(capsys)
    monkeypatch.setattr(script("paper.common").FineTuning, "training_step", step)
    assert table["full", "GSM8K"][0] == table["full", "MATH"][0] == "100.00"
    decode, calls = transformers.PreTrainedTokenizerFast.batch_decode, []

    def interrupted(self, *given, **options):
        calls.append(len(given[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(self, *given, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "batch_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.main([*arguments, "--output", str(tmp_path / "parts")])
    assert len(steps) == 60
    capsys.readouterr()
    assert module.main([*arguments, "--output", str(tmp_path / "parts"), "--answer-batch", "3"]) == 0
    assert capsys.readouterr().out == whole
    # Nothing was trained again, and saved answers were not generated again.
    assert len(steps) == 60 and calls == [2, 2, 3, 3, 2]


def test_generation_in_bfloat16(generation, capsys, tmp_path):
    module, where = generation
    methods = ["AdaMSS*_base", "AdaMSS*", "AdaMSS_base"]
    arguments = [*where, "--examples", "40", "--questions", "2", "--segmentation", "contiguous"]
    arguments += ["--output", str(tmp_path)]
    assert module.main([*arguments, "--methods", *methods]) == 0
    _printed, table = lines(capsys)
    trained = {name: float(cells[5].replace(",", "")) for (name, _), cells in table.items()}
    wide, narrow = 2 * (24 + 12 + 12 + 24 + 24 + 32 + 32), 2 * (24 + 12)
    # The counts are those of C and of B. R is 24, but 12 for keys and values.
    assert trained["AdaMSS_base"] == 3 * (narrow + 3 * 2 * (24 + 12))
    assert trained["AdaMSS*_base"] == 3 * (wide + 3 * 2 * (24 + 12 + 12 + 24 * 4))
    assert trained["AdaMSS*"] < trained["AdaMSS*_base"]


def test_full_fine_tuning_moves_the_weights_in_bfloat16_too(generation, tmp_path, monkeypatch):
    module, where = generation
    before = transformers.AutoModelForCausalLM.from_pretrained(where[1]).state_dict()
    after, answering, fit, solutions = {}, [], module.fit, module.solutions

    def fitted(*given, **options):
        trainer = fit(*given, **options)
        after.update(copy.deepcopy(trainer.model.state_dict()))
        return trainer

    def answered(model, *given):
        answering.append(model.dtype)
        return solutions(model, *given)

    monkeypatch.setattr(module, "fit", fitted)
    monkeypatch.setattr(module, "solutions", answered)
    assert module.main([*where, "--methods", "full", "--examples", "40", "--output", str(tmp_path)]) == 0
    name = "model.layers.1.mlp.down_proj.weight"
    rounded = before[name].bfloat16().float()  # the values if the model were loaded in bfloat16
    moved = (after[name] != before[name]) & (after[name] != rounded)
    assert moved.float().mean() > 0.95
    assert answering == [torch.bfloat16] * 2


def test_a_last_step_that_is_not_finite_is_a_run_that_diverged(
    generation, script, capsys, tmp_path, monkeypatch
):
    module, where = generation
    common = script("paper.common")
    step = common.FineTuning.training_step

    def spoiled(self, model, *given, **options):
        loss = step(self, model, *given, **options)
        if self.state.global_step == self.state.max_steps - 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(common.FineTuning, "training_step", spoiled)
    arguments = [*where, "--methods", "AdaMSS_base", "--examples", "8", "--output", str(tmp_path)]
    assert module.main(arguments) == 0
    assert (
        "diverged, in no mean: MetaMathQA, AdaMSS_base, seed 0, at the last step" in capsys.readouterr().out
    )


def run_of(module, method, *given, table=None):
    table = table or module.TABLE
    arguments = module.parser().parse_args(given)
    return module.Run(
        table=table, arguments=arguments, task="MetaMathQA", method=table.methods[method], seed=0
    )


@pytest.mark.parametrize(
    ("method", "options", "weights", "scores"),
    [
        ("AdaMSS*", "--answer-batch 8 --device-batch 1 --workers 2 --seeds 4", False, False),
        ("AdaMSS*", "--data ./data/../data", False, False),
        ("AdaMSS*", "--data other", True, True),
        ("AdaMSS*", "--questions 10", False, True),
        ("AdaMSS*", "--answer-length 10", False, True),
        ("AdaMSS*", "--length 10", True, True),
        ("AdaMSS*", "--examples 10", True, True),
        ("AdaMSS*", "--target 10", True, True),
        ("AdaMSS*_base", "--target 10", False, False),
        ("AdaMSS*_base", "--subspaces 4", True, True),
        ("AdaMSS*_base", "--variant paper", True, True),
        ("LoRA*", "--target 10 --subspaces 4 --variant paper --segmentation ncut", False, False),
        ("full", "--subspaces 4", False, False),
        ("full", "--learning-rate 1", True, True),
        ("full", "--dtype fp32", True, True),
    ],
)
def test_a_run_is_known_by_what_determines_it(
    script, tmp_path, monkeypatch, method, options, weights, scores
):
    module = script("paper.generation")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    one, other = (run_of(module, method, "--data", "data", *more) for more in ([], options.split()))
    assert (one.folder != other.folder, one.key != other.key) == (weights, scores)


@pytest.mark.parametrize("setting", ["warmup", "clip", "batch", "budget", "methods", "rows"])
def test_a_setting_that_is_edited_makes_another_run(script, setting):
    module = script("paper.generation")
    table, name = module.TABLE, "AdaMSS*"
    row = next(iter(table.rows))
    rates = {"MetaMathQA": module.settings.Rates(1e-5, 1e-5, 0.0)}
    edited = {
        "warmup": 0.5,
        "clip": 0.5,
        "batch": 8,
        "budget": replace(table.budget, power=2.0),
        "methods": {name: replace(table.methods[name], rank=2)},
        "rows": {row: replace(table.rows[row], rates=rates)},
    }[setting]
    other = replace(table, **{setting: edited})
    assert run_of(module, name).folder != run_of(module, name, table=other).folder


def test_batches_of_questions_do_not_change_the_answers(generation, tmp_path):
    module, where = generation
    model = transformers.AutoModelForCausalLM.from_pretrained(where[1])
    asked = ["word1 word2", "word3", "word4 word5 word6 word7 word8"]
    found = []
    for batch in ("1", "3"):
        run = run_of(module, "full", *where, "--answer-batch", batch)
        found.append(module.solutions(model, run, asked, tmp_path / f"{batch}.json"))
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4. The answer is: 4", "4"),
        ("#### 12\nThe answer is: 12", "12"),
        ("16 eggs\n#### 1,234", "1,234"),
        ("The answer is: 3\nno, The answer is: $5$.", "5"),
        (r"thus $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{x^{2}+1}", "x^{2}+1"),
        (r"The answer is: $\boxed{\left(1,\,2\right)}$", "(1,2)"),
        (r"so \boxed 2, and $\boxed 23$.", "23"),
        (r"\boxed{1} and \fbox \frac{1}{2} of it", r"\frac{1}{2}"),
        ("#### 7\nQuestion: another\nSolution: The answer is: 9", "7"),
        ("The answer is: 2xy", "2xy"),
        ("she has 3 and then -7.5 left", "-7.5"),
        ("I do not know", ""),
        (r"cut off \boxed{1", "1"),
        ("The answer is: .5", ".5"),
    ],
)
def test_the_final_answer_is_found(script, text, answer):
    assert script("paper.generation").answer_of(text) == answer


@pytest.mark.parametrize(
    ("right", "answer", "equal"),
    [
        ("18", "18", True),
        ("1,234", "1234", True),
        ("72", "72.0", True),
        ("72", "73", False),
        ("6", "-6", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", r"\dfrac{2}{4}", True),
        (r"5\text{ cm}", "5", True),
        (r"5\text{ cm}^2", "5", True),
        ("2", "2xy", False),
        ("2", "2ab", False),
        ("2ab", "2ba", True),
        ("x^2+2", "x^2+2xy", False),
        ("x^2", "x^2+3m", False),
        ("2516_8", "2516", False),
        ("2516_8", "2516_7", False),
        ("2516_8", "2516_{8}", True),
        ("1011_2", "1011_{10}", False),
        (r"90^\circ", "90", True),
        (r"3\sqrt{2}", r"\sqrt{18}", True),
        (r"11,\! 111,\! 100", "11111100", True),
        ("(1,2)", r"\left( 1, 2 \right)", True),
        ("(1,2)", "(2,1)", False),
        ("[1,2)", "[1,2]", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"\text{Evelyn}", "Bob", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("5", "", False),
        ("", "5", False),
    ],
)
def test_equal_answers(script, right, answer, equal):
    module = script("paper.generation")
    assert module.same_answer(module.tidy(right), module.tidy(answer)) is equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 18 dollars", "18"),
        ("#### $18 apples in all.", "18"),
        ("The answer is: 2xy", "2xy"),
    ],
)
def test_words_behind_a_number_are_no_part_of_it(script, text, answer):
    assert script("paper.generation").answer_of(text, words=False) == answer


def test_the_right_answer_of_gsm8k_is_behind_the_mark(script, tmp_path):
    written(tmp_path, "gsm8k", test=[{"question": "", "answer": "The answer is 3, or 4.\n#### 1,234"}])
    assert script("paper.generation").questions(tmp_path, "GSM8K", None) == [("", "1,234")]


# --- Parameters -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parameters(script):
    return script("paper.parameters")


def test_counts_of_roberta(parameters, capsys):
    base = parameters.settings.GLUE_METHODS["AdaMSS_base"]
    assert parameters.count("RoBERTa-base", base) == 42_432
    assert parameters.count("RoBERTa-large", base) == 97_152
    assert parameters.main(["--quick"]) == 0
    assert "attached to 1 of 24 layers of RoBERTa-large: 4,048 trained, 4,048 by" in capsys.readouterr().out


def test_the_counts_of_language_models_are_those_of_c_alone(parameters):
    printed = {
        (model, method): row.published[method].parameters
        for model, row in parameters.settings.GENERATION.items()
        for method in ("AdaMSS*_base", "AdaMSS_base")
    }
    inferred = {("Mistral-7B", "AdaMSS*_base"): "4M", ("Mistral-7B", "AdaMSS_base"): "0.5M"}
    assert {cell for cell, figure in printed.items() if figure == "-"} == inferred.keys()
    for (model, name), figure in (printed | inferred).items():
        method = parameters.settings.GENERATION_METHODS[name]
        assert parameters.agrees(parameters.count(model, method, only_C=True), figure)
    row = parameters.settings.GENERATION["Mistral-7B"]
    own = parameters.lines_of("Mistral-7B", row, parameters.settings.GENERATION_METHODS)
    assert [line[-2:] for line in own if line[1] == "AdaMSS_base"] == [["-", "-"]] * 2


@pytest.mark.parametrize(
    ("model", "method"),
    [("RoBERTa-base", "AdaMSS"), ("RoBERTa-large", "AdaMSS"), ("ViT-base", "AdaMSS r_k=3")],
)
def test_the_inferred_targets_average_to_what_is_printed(parameters, model, method):
    rows = parameters.settings.GLUE | parameters.settings.IMAGE
    methods = parameters.settings.GLUE_METHODS | parameters.settings.IMAGE_METHODS
    share = parameters.budget_share(model, methods[method], rows[model].target)
    average = share * parameters.count(model, methods[method])
    assert parameters.agrees(average, rows[model].published[method].parameters)


@pytest.mark.parametrize(
    ("steps", "subspaces", "expected"), [(1000, 240, (200, 1, 1000, 100)), (3, 12, (12, 1, 3, 3))]
)
def test_a_schedule_fits_the_training(parameters, steps, subspaces, expected):
    made = parameters.settings.IMAGE_BUDGET.config(steps, subspaces)
    assert (made.target, made.start_step, made.end_step, made.interval) == expected
