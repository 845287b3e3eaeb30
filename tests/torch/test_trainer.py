"""Test `AdamssCallback` in the Trainer of transformers."""

import copy
import os
import pickle
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch_support import assert_same_state

import adamss
import adamss_torch
from adamss import errors

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from adamss_torch.bank import without_weights  # noqa: E402
from adamss_torch.transformers import ADAPTER_FILE, AdamssCallback  # noqa: E402

STEPS = 8
SCHEDULE = adamss.BudgetConfig(target=3, start_step=1, end_step=6, interval=2)


@pytest.fixture(autouse=True)
def _one_thread_and_no_warnings_of_others():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"transformers\.|accelerate\.|torch\.")
        yield


class Sentences(torch.utils.data.Dataset):
    """Random tokens with a label that depends on the first of them."""

    def __init__(self, count=24, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(5, 50, (count, 8), generator=generator)
        self.labels = self.tokens[:, 0] % 3

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


class Plain(nn.Module):
    """A model that is not from transformers and returns its loss in a dictionary."""

    def __init__(self):
        super().__init__()
        self.body = bert().bert
        self.head = nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids, labels=None):
        if self.training:
            self.seen += 1
        logits = self.head(self.body(input_ids).last_hidden_state.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def adapted(model=None, *, budget=SCHEDULE, head="classifier", **changes):
    settings = {"targets": ["query", "value"], "rank": 8, "subspaces": 3, "subspace_rank": 2} | changes
    config = adamss.AdamssConfig(modules_to_save=[head], budget=budget, **settings)
    return adamss.attach(bert() if model is None else model, config)


def trainer_of(model, folder, *callbacks, steps=STEPS, optimizers=(None, None), **options):
    settings = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "seed": 3}
    settings |= {"weight_decay": 0.1, "save_steps": 3, "logging_steps": 1}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True} | options
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(os.fspath(folder), **settings),
        train_dataset=Sentences(),
        eval_dataset=Sentences(8, seed=1),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def trained(model, folder, *, resume=None, **options):
    callback = AdamssCallback()
    trainer = trainer_of(model, folder, callback, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def ours(model):
    return {name: t for name, t in model.state_dict().items() if ".adamss." in name or "classifier" in name}


def logits(model):
    return model.eval()(Sentences()[3]["input_ids"][None]).logits


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


class TestBudget:
    def test_the_schedule_is_kept_and_logged(self, tmp_path):
        trainer, callback = trained(adapted(), tmp_path)
        active = [entry["adamss/active"] for entry in trainer.state.log_history if "loss" in entry]
        # Allocations are at steps 3, 5 and 6. At step 3, 8/125 of the reduction from 12 to 3 is still left.
        assert active == [12, 12, 4, 4, 3, 3, 3, 3]
        assert adamss.summary(trainer.model).total.active == callback.controller.active_count == 3

    def test_it_is_that_of_a_loop_of_ones_own(self, tmp_path):
        trainer, _ = trained(adapted(), tmp_path, lr_scheduler_type="constant", max_grad_norm=0)
        model = adapted()
        # The second Trainer has the same seed, and so the same batches and dropout.
        again = trainer_of(model, tmp_path / "2", lr_scheduler_type="constant", max_grad_norm=0)
        optimizer = again.create_optimizer()
        budget = adamss_torch.BudgetController(model, optimizer)
        again.train()
        assert budget.active_count == 3
        assert_same_state(ours(trainer.model), ours(model))

    def test_without_a_schedule_all_are_trained(self, tmp_path):
        trainer, callback = trained(adapted(budget=None), tmp_path)
        assert callback.controller is None
        assert adamss.summary(trainer.model).total.active == 12
        assert not any("adamss/active" in entry for entry in trainer.state.log_history)

    def test_a_schedule_of_the_callback_and_its_allocations(self, tmp_path):
        told = []
        callback = AdamssCallback(adamss.BudgetConfig(target=5, end_step=4), on_allocation=told.append)
        trainer_of(adapted(budget=None), tmp_path, callback).train()
        assert [allocation.active for allocation in told][-1] == 5 == callback.controller.active_count

    def test_a_training_that_is_too_short_says_so(self, tmp_path):
        with pytest.warns(adamss.AdamssWarning, match="3 subspaces was not reached: training ended after 4"):
            trained(adapted(), tmp_path, steps=4)

    def test_reporters_see_the_log_where_it_leads(self, tmp_path):
        class Reporter(transformers.TrainerCallback):
            def on_log(self, args, state, control, logs, **kwargs):
                seen.append(dict(logs))

        for leads in (False, True):
            seen, callback = [], AdamssCallback()
            trainer = trainer_of(adapted(), tmp_path, Reporter(), callback)
            if leads:
                callback.lead(trainer)
            trainer.train()
            assert any("adamss/active" in logs for logs in seen) == leads

    def test_another_training_with_the_same_trainer(self, tmp_path):
        callback = AdamssCallback()
        trainer = trainer_of(adapted(), tmp_path, callback)
        trainer.train()
        trainer.train()
        assert callback.controller.active_count == 3
        assert callback.controller.step == STEPS

    def test_another_training_after_one_that_failed(self, tmp_path):
        class Fails(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise RuntimeError("out of memory")

        callback, fails = AdamssCallback(), Fails()
        trainer = trainer_of(adapted(), tmp_path, callback, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.train()
        trainer.remove_callback(fails)
        with pytest.warns(errors.AdamssWarning, match="ended after 2 optimiser steps"):
            trainer.train()
        assert callback.controller.active_count == 3
        assert callback.controller.step == STEPS


class TestPictures:
    def test_the_history_has_every_change_and_can_be_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        from adamss import plots

        told = []
        callback = AdamssCallback(on_allocation=told.append)
        trainer = trainer_of(adapted(), tmp_path, callback)
        trainer.train()
        trainer.save_state()
        drawn = [
            plots.active(source)
            for source in (trainer.state.log_history, tmp_path, tmp_path / "checkpoint-6")
        ]
        # Allocations at 3, 5 and 6, of which the last changes nothing; the last step known of is 8.
        for ax, last in zip(drawn, (8, 8, 6), strict=True):
            assert ax.lines[0].get_xydata().tolist() == [[0, 12], [3, 4], [5, 3], [last, 3]]
            steps, budget = ax.lines[1].get_data()
            schedule = [adamss.core.budget_at(step, SCHEDULE, 12) for step in range(7)]
            assert [budget[list(steps).index(step)] for step in range(7)] == schedule
            (image,) = ax.figure.axes[1].collections
            counts = [
                [3, *(int(each.masks[path].sum()) for each in told[:2])] for path in sorted(told[0].masks)
            ]
            assert image.get_array().tolist() == counts
        of_allocations = plots.active(told)
        assert of_allocations.lines[0].get_xydata().tolist()[:-1] == [[3, 4], [5, 3], [6, 3]]
        assert of_allocations.lines[1].get_ydata().tolist() == [4, 3, 3]
        of_checkpoints = plots.active([tmp_path / "checkpoint-6" / ADAPTER_FILE, tmp_path / "checkpoint-3"])
        assert of_checkpoints.lines[0].get_xydata().tolist()[:-1] == [[3, 4], [6, 3]]

    def test_resuming_goes_on_with_the_history(self, tmp_path):
        from adamss import plots

        whole, _ = trained(adapted(), tmp_path)
        again, _ = trained(adapted(), tmp_path / "2", resume=tmp_path / "checkpoint-3")
        histories = [
            [e[plots.ALLOCATION] for e in t.state.log_history if plots.ALLOCATION in e]
            for t in (whole, again)
        ]
        assert histories[0] == histories[1]
        assert [entry["step"] for entry in histories[0]] == [0, 3, 5]

    def test_tensorboard_gets_pictures_and_numbers(self, tmp_path, monkeypatch):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        pytest.importorskip("matplotlib")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
        callback = AdamssCallback()
        trainer = trainer_of(adapted(), tmp_path, callback, report_to="tensorboard")
        callback.lead(trainer, pictures=True)
        trainer.train()
        events = accumulator.EventAccumulator(str(tmp_path / "board"), {"images": 0, "scalars": 0})
        events.Reload()
        assert [image.step for image in events.Images("adamss/sizes")] == [0, STEPS]
        assert [image.step for image in events.Images("adamss/active")] == [3, 5]
        assert all(image.encoded_image_string[1:4] == b"PNG" for image in events.Images("adamss/active"))
        for name in ("active", "parameters", "budget"):
            logged = [entry[f"adamss/{name}"] for entry in trainer.state.log_history if "loss" in entry]
            assert [scalar.value for scalar in events.Scalars(f"train/adamss/{name}")] == logged
        costs = callback.controller.plan.costs
        assert logged_parameters(trainer)[0] == sum(costs)
        kept = callback.controller.plan.join(callback.controller.masks).tolist()
        assert logged_parameters(trainer)[-1] == sum(c for c, on in zip(costs, kept, strict=True) if on)

    def test_nothing_is_drawn_where_nothing_is_reported(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        callback = AdamssCallback()
        trainer = trainer_of(adapted(), tmp_path, callback)
        callback.lead(trainer, pictures=True)
        trainer.train()

    def test_what_pictures_lack_is_said_before_the_training(self, tmp_path, monkeypatch):
        callback = AdamssCallback()
        trainer = trainer_of(adapted(), tmp_path, callback)
        trainer.args.report_to = ["wandb"]
        with pytest.raises(errors.ConfigError, match=r"report_to = \['wandb'\]; add 'tensorboard'"):
            callback.lead(trainer, pictures=True)
        pytest.importorskip("tensorboard")
        callback = AdamssCallback()
        trainer = trainer_of(adapted(), tmp_path, callback, report_to="tensorboard")
        monkeypatch.setattr("adamss_torch.transformers.find_spec", lambda name: None)
        with pytest.raises(errors.MissingBackendError, match=r"pip install 'adamss\[plots\]'"):
            callback.lead(trainer, pictures=True)


def logged_parameters(trainer):
    return [entry["adamss/parameters"] for entry in trainer.state.log_history if "loss" in entry]


class TestFiles:
    def test_checkpoints_hold_what_is_trained(self, tmp_path):
        trainer, _ = trained(adapted(), tmp_path)
        whole = sum(tensor.nbytes for tensor in bert().state_dict().values())
        trainer.save_model(tmp_path / "final")
        for folder in (tmp_path / "checkpoint-6", tmp_path / "final"):
            names = {path.name for path in folder.iterdir()}
            assert {"model.safetensors", ADAPTER_FILE} <= names
            assert "config.json" not in names
            content = load_file(folder / "model.safetensors")
            assert content.keys() == without_weights(ours(trainer.model)).keys()
            assert sum(tensor.nbytes for tensor in content.values()) < whole
        loaded = adamss.load(bert(), tmp_path / "final" / ADAPTER_FILE)
        assert_close(logits(loaded), logits(trainer.model))

    def test_one_of_several_adapters_is_trained_saved_and_resumed(self, tmp_path):
        def both():
            old = {"targets": ["dense"], "rank": 4, "subspaces": 2, "modules_to_save": ["classifier"]}
            model = adamss.attach(bert(), adamss.AdamssConfig(**old), name="old")
            settings = {"targets": ["query", "value"], "rank": 8, "subspaces": 3, "budget": SCHEDULE}
            return adamss.attach(
                model, adamss.AdamssConfig(modules_to_save=["classifier"], **settings), name="new"
            )

        trainer, callback = trained(both(), tmp_path)
        assert callback.controller.active_count == adamss.summary(trainer.model, name="new").total.active == 3
        resumed, _ = trained(both(), tmp_path / "again", resume=tmp_path / "checkpoint-6")
        assert_same_state(ours(resumed.model), ours(trainer.model))
        trainer.save_model(tmp_path / "final")
        loaded = adamss.load(bert(), tmp_path / "final" / ADAPTER_FILE)
        assert_close(logits(loaded), logits(trainer.model))
        with pytest.raises(errors.StateError, match="no adapter is called 'other'"):
            trainer_of(both(), tmp_path, AdamssCallback(name="other"))

    @pytest.mark.parametrize("was_a_model", [False, True])
    def test_a_folder_is_no_model(self, tmp_path, was_a_model):
        if was_a_model:
            bert().save_pretrained(tmp_path)
        trainer_of(adapted(), tmp_path, AdamssCallback()).save_model(tmp_path)
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)

    def test_a_merged_model_is_saved_whole(self, tmp_path):
        trainer, _ = trained(adapted(), tmp_path)
        adamss.merge(trainer.model)
        trainer.model.save_pretrained(tmp_path / "merged")
        content = load_file(tmp_path / "merged" / "model.safetensors")
        assert bert().state_dict().keys() <= content.keys()
        name = "bert.encoder.layer.0.attention.self.query.weight"
        assert not torch.equal(content[name], bert().state_dict()[name])
        assert (tmp_path / "merged" / "config.json").exists()
        adamss.detach(trainer.model)
        trainer.model.save_pretrained(tmp_path / "base")
        assert load_file(tmp_path / "base" / "model.safetensors").keys() == bert().state_dict().keys()

    def test_a_model_attached_anew_is_saved_as_ever(self, tmp_path):
        trainer, _ = trained(adapted(), tmp_path)
        model = adapted(adamss.detach(trainer.model))
        model.save_pretrained(tmp_path / "own")
        assert (tmp_path / "own" / "config.json").exists()
        assert bert().state_dict().keys() <= load_file(tmp_path / "own" / "model.safetensors").keys()

    @pytest.mark.parametrize("verb", [adamss.detach, adamss.merge_and_unload])
    def test_nothing_is_left_on_a_model_without_adapters(self, tmp_path, verb):
        model = adapted()
        model._keys_to_ignore_on_save = {"position_ids"}
        trainer, _ = trained(model, tmp_path)
        trainer.train()
        model = verb(model)
        assert not any(type(value).__module__.startswith("adamss") for value in vars(model).values())
        assert model._keys_to_ignore_on_save == {"position_ids"}
        assert "save_pretrained" not in vars(model)

    def test_a_consolidated_model(self, tmp_path):
        trainer, _ = trained(adapted(), tmp_path)
        expected = logits(trainer.model)
        adamss.consolidate(trainer.model)
        trainer.save_model(tmp_path / "final")
        assert not (tmp_path / "final" / "config.json").exists()
        assert_close(logits(adamss.load(bert(), tmp_path / "final" / ADAPTER_FILE)), expected)
        again = adapted()
        again.load_state_dict(load_file(tmp_path / "final" / "model.safetensors"), strict=False)
        assert_close(logits(again), expected)

    def test_a_consolidated_model_takes_its_own_checkpoint(self, tmp_path):
        trainer, _ = trained(adapted(), tmp_path)
        model = adamss.consolidate(trainer.model)
        options = {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True}
        again = trainer_of(model, tmp_path / "again", AdamssCallback(), **options)
        again.train()
        again.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
        assert adamss.summary(model).total.active > 0

    def test_what_an_adapter_cannot_be_saved_with(self, tmp_path):
        trainer = trainer_of(adapted(), tmp_path, AdamssCallback())
        for options in ({"push_to_hub": True}, {"variant": "fp16"}):
            with pytest.raises(errors.ConfigError, match=next(iter(options))):
                trainer.model.save_pretrained(tmp_path / "own", **options)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_saves_itself(self, tmp_path, duplicate):
        trainer, _ = trained(adapted(), tmp_path)
        twin = duplicate(trainer.model)
        with torch.no_grad():
            twin.classifier.weight.zero_()
        twin.save_pretrained(tmp_path / "twin")
        assert not load_file(tmp_path / "twin" / "model.safetensors")["classifier.weight"].any()

    def test_a_model_that_is_none_of_transformers(self, tmp_path):
        model = adapted(Plain(), head="head")
        trained(model, tmp_path)
        content = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
        assert "seen" in content, "buffers move in training"
        assert "body.embeddings.word_embeddings.weight" not in content
        assert (tmp_path / "checkpoint-6" / ADAPTER_FILE).exists()
        again, _ = trained(adapted(Plain(), head="head"), tmp_path, resume=tmp_path / "checkpoint-6")
        assert_same_state(again.model.state_dict(), model.state_dict())


class TestResuming:
    @pytest.mark.parametrize("step", [3, 6])
    @pytest.mark.parametrize("revive", [False, True])
    def test_the_bits_are_those_of_the_uninterrupted_training(self, tmp_path, step, revive):
        budget = adamss.BudgetConfig(**(SCHEDULE.to_dict() | {"revive": revive, "window": "running"}))
        options = {"gradient_accumulation_steps": 2}
        whole, _ = trained(adapted(budget=budget), tmp_path, **options)
        options["resume"] = tmp_path / f"checkpoint-{step}"
        again, callback = trained(adapted(budget=budget), tmp_path / "2", **options)
        assert callback.controller.step == STEPS
        assert_same_state(ours(whole.model), ours(again.model))
        losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("step", [3, 6])
    def test_an_optimizer_that_is_there_before_the_checkpoint(self, tmp_path, step):
        schedule = adamss.BudgetConfig(target=1, start_step=1, end_step=5, interval=2)

        def trainer(folder):
            model = adapted(budget=schedule)
            own = torch.optim.AdamW(adamss.trainable_parameters(model), lr=2e-2)
            return trainer_of(model, folder, AdamssCallback(), optimizers=(own, None))

        whole = trainer(tmp_path)
        whole.train()
        expected = {name: tensor.clone() for name, tensor in ours(whole.model).items()}
        again = trainer(tmp_path / "2")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_state(ours(again.model), expected)
        # The same Trainer resumes again, as in a notebook.
        whole.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_state(ours(whole.model), expected)

    @pytest.mark.parametrize("budget", [SCHEDULE, None])
    def test_other_base_weights(self, tmp_path, budget):
        trained(adapted(budget=budget), tmp_path)
        base = bert()
        with torch.no_grad():
            base.bert.encoder.layer[1].attention.self.query.weight.mul_(2)
        with pytest.raises(errors.StateError, match=r"other base weights.*layer\.1"):
            trained(adapted(base, budget=budget), tmp_path, resume=tmp_path / "checkpoint-3")

    def test_the_callback_can_be_pickled(self, tmp_path):
        _, callback = trained(adapted(), tmp_path)
        assert pickle.loads(pickle.dumps(callback)).controller is None
        assert copy.deepcopy(callback).budget == callback.budget

    def test_a_checkpoint_without_a_budget(self, tmp_path):
        trained(adapted(budget=None), tmp_path)
        with pytest.warns(adamss.AdamssWarning, match="step 3 holds no state of a budget"):
            trained(adapted(), tmp_path, resume=tmp_path / "checkpoint-3", steps=12)

    def test_the_best_model_is_loaded_at_the_end(self, tmp_path):
        class Worse(transformers.TrainerCallback):
            """A callback that makes each evaluation worse than the one before."""

            def on_evaluate(self, args, state, control, metrics, **kwargs):
                metrics["eval_loss"] = float(state.global_step)

        best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
        trainer = trainer_of(adapted(), tmp_path, Worse(), AdamssCallback(), **best)
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
        stored = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
        assert_same_state(
            dict(sorted(without_weights(ours(trainer.model)).items())), dict(sorted(stored.items()))
        )
        assert adamss.summary(trainer.model).total.active == 4


class TestTheTrainersOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"bf16": True},
            {"gradient_accumulation_steps": 3},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"optim": "sgd"},
            {"optim": "adafactor"},
            {"max_grad_norm": 0.01},
            {"save_only_model": True},
            {"torch_compile": True, "torch_compile_backend": "eager"},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_the_budget_is_kept(self, tmp_path, options):
        trainer, callback = trained(adapted(), tmp_path, **options)
        assert callback.controller.step == STEPS
        assert adamss.summary(trainer.model).total.active == 3
        start, end = (ours(model) for model in (adapted(), trainer.model))
        assert not torch.equal(start["classifier.weight"], end["classifier.weight"])
        assert any(end[name].any() for name in end if name.endswith(".C"))
        base = {name: tensor for name, tensor in bert().state_dict().items() if "classifier" not in name}
        assert_same_state({name: trainer.model.state_dict()[name] for name in base}, base)


def test_the_trainer_on_two_processes(tmp_path, on_two_processes):
    """Both processes decide the same, checkpoints are written once, and resuming is exact to the bit."""
    output = on_two_processes("trainer_under_accelerate.py", tmp_path)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}, output[-5000:]
    assert (tmp_path / "run" / "checkpoint-6" / ADAPTER_FILE).exists()


def test_models_and_schedules_of_the_wrong_kind(tmp_path):
    with pytest.raises(errors.StateError, match="no adapters"):
        trainer_of(bert(), tmp_path, AdamssCallback())
    with pytest.raises(errors.StateError, match="merged"):
        trainer_of(adamss.merge(adapted()), tmp_path, AdamssCallback())
    with pytest.raises(errors.ConfigTypeError, match="BudgetConfig"):
        AdamssCallback({"target": 3})


@pytest.mark.parametrize("name", ["bf16", "interrupted half way and resumed"])
def test_the_script_trains_the_demos_task(script, tiny_tokenizer, tmp_path, capsys, name):
    pytest.importorskip("scipy")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    arguments = ["--model", os.fspath(tmp_path / "bert"), "--steps", "12", "--only", name]
    assert script("trainer").main(arguments) == 0
    assert name in capsys.readouterr().out


class FormOfItsOwn(transformers.Trainer):
    """A Trainer that writes checkpoints as sentence-transformers does, module by module.

    When such a checkpoint is read, no module is adapted.
    """

    def _save(self, output_dir=None, state_dict=None):
        os.makedirs(output_dir, exist_ok=True)
        save_file({"body.weight": torch.zeros(2)}, f"{output_dir}/model.safetensors")


def test_a_trainer_whose_checkpoints_cannot_be_read_back(tmp_path):
    callback, made = AdamssCallback(), trainer_of(adapted(Plain(), head="head"), tmp_path, AdamssCallback())
    arguments = made.args.set_save("steps", steps=2)
    trainer = FormOfItsOwn(made.model, arguments, train_dataset=Sentences(), callbacks=[callback])
    with pytest.raises(errors.StateError, match="this Plain writes its checkpoints in a form of its own"):
        trainer.train()
    with pytest.warns(adamss.AdamssWarning, match="the target of 3 subspaces was not reached"):
        callback.controller.remove()
