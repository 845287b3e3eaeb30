r"""Reproduce Table 3 of the paper: language models trained on MetaMathQA and tested on GSM8K and MATH.

The models are trained for one epoch on the first 100,000 examples. They answer the test questions by greedy decoding
in batches, with prompts padded on the left. The paper does not state the prompt, the choice of examples, their
length, the warm-up or the schedule of the budget. These are chosen here (`settings`). ::

    python benchmarks/paper/generation.py --row LLaMA-2-7B --methods "AdaMSS*_base" --seeds 0
    python benchmarks/paper/generation.py --model path/to/mistral --row Mistral-7B --data path/to/sets

``--data`` is a folder with ``MetaMathQA`` (columns query and response), ``gsm8k`` (question, answer; part ``test``)
and ``MATH`` (problem, solution; part ``test``). The answers are kept beside the journal.

A model's text is cut off where it starts another "Question:". The answer is the text after the last "The answer is",
else after the last "####", else in the last ``\boxed``, else the last number. An answer is right if it is the same
text as the reference, apart from spaces and spacing commands, or if math-verify finds the two equal. math-verify
compares fractions, decimals, roots, sets, intervals, matrices, and expressions that simplify to each other. Units in
``\text``, currency and degree signs are ignored, and 50 % equals both 50 and 1/2. Numbers with a base (``2516_8``)
are compared as text. Answers of GSM8K are numbers, so there the words after a number are ignored ("18 dollars").

Full fine-tuning trains float32 weights whatever ``--dtype`` is, because rounding to bfloat16 would lose most updates.
It takes 16 bytes a parameter for weights, gradients and AdamW's averages. The answers are generated in ``--dtype``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the packages paper and demo

import torch
from arguments import positive
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from paper import settings
from paper.common import Run, Table, adapted, complete, counted, data_set, fit, pretrained

TRAINING_SET = "MetaMathQA"
TABLE = Table(
    title="Table 3 (generation)",
    rows=settings.GENERATION,
    methods=settings.GENERATION_METHODS,
    tasks=(TRAINING_SET,),
    columns=settings.GENERATION_TASKS,
    seeds=settings.CHOSEN_GENERATION_SEEDS,
    epochs=settings.GENERATION_EPOCHS,
    batch=settings.GENERATION_BATCH,
    device_batch=settings.GENERATION_BATCH,
    warmup=settings.CHOSEN_GENERATION_WARMUP,
    clip=settings.CHOSEN_GENERATION_CLIP,
    budget=settings.CHOSEN_GENERATION_BUDGET,
    constants={"projections": (settings.QUERY_AND_VALUE, settings.SEVEN)},
    training_options=("examples", "length"),
    scoring_options=("questions", "answer_length"),
    dtype="bf16",
    save_steps=1000,
    note="A star: all seven projections are adapted. The paper's counts are those of C alone (parameters.py). "
    "The rates and ranks of LoRA, PiSSA and full fine-tuning are chosen, the paper's are not known.",
)


# --- Answers ----------------------------------------------------------------------------------------------


_LATEX = LatexExtractionConfig()
# With units, math-verify would take letters for units and read 2ab as 2.
EXTRACTION = (
    replace(_LATEX, normalization_config=replace(_LATEX.normalization_config, units=False)),
    ExprExtractionConfig(),
)


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\boxed ...``; None if it is missing or incomplete."""
    found = re.split(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text)
    if len(found) == 1:
        return None
    inside = found[-1]
    if not inside.startswith("{"):
        return re.split(r"[\s$]", inside)[0]
    depth = 0
    for place, character in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return inside[1:place]
    return None


def answer_of(text: str, *, words: bool = True) -> str:
    """Return the final answer in a text that a model wrote; empty if it has none.

    Parameters
    ----------
    text : str
    words : bool
        Whether words after a number belong to the answer.
    """
    found = _answer_of(text.partition("Question:")[0])
    return found if words else re.sub(r"(?<=\d)\s+[A-Za-z]{2,}(?:\s+[A-Za-z]+)*$", "", found)


def _answer_of(text: str) -> str:
    for marker in ("The answer is", "####"):
        if marker in text:
            line = text.rpartition(marker)[2].strip(": \n").partition("\n")[0]
            return tidy(boxed(line) or line)
    found = boxed(text)
    if found is not None:
        return tidy(found)
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return tidy(numbers[-1]) if numbers else ""


def tidy(answer: str) -> str:
    r"""Return an answer without enclosing dollar signs, a final point, spacing commands, and a unit in ``\text``."""
    answer = answer.lstrip(" $").rstrip(" $.")
    answer = re.sub(r"(?<!\\)\\(?:[!,;:]|left(?![a-z])|right(?![a-z]))\s*", "", answer)
    answer = re.sub(r"(?<!\\)\\(?: |q?quad(?![a-z]))|~", " ", answer)
    unit = r"(?<=[\d})])\s*\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$"
    return re.sub(unit, "", answer.strip()).strip()


def same_answer(right: str, answer: str) -> bool:
    """Return whether two answers are equal, as text or as mathematics."""
    if not answer:
        return False
    texts = [re.sub(r"_\{(\w+)\}", r"_\1", text.replace(" ", "")) for text in (right, answer)]
    if texts[0] == texts[1]:
        return True
    if any(re.search(r"[0-9A-F]_", text) for text in texts):
        return False  # math-verify ignores the base of a number, so only equal texts count
    return verify(*(parse(f"${text}$", EXTRACTION) for text in (right, answer)))


# --- Data -------------------------------------------------------------------------------------------------


def prompt(question: str) -> str:
    """Return the prompt for a question."""
    return f"Question: {question.strip()}\nSolution:"


@cache
def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of a model, with a padding token."""
    tokenizer = pretrained(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


@cache
def training_set(folder: Path | None, model: str, examples: int, length: int) -> Any:
    """Return the training examples as token ids; labels are -100 outside the solution, which excludes them."""
    tokenizer = tokenizer_of(model)
    needs = {"train": ("query", "response")}
    rows = data_set(folder, TRAINING_SET, "meta-math/MetaMathQA", needs=needs)["train"]

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        given = tokenizer(prompt(row["query"]))["input_ids"]
        if given and given[-1] == tokenizer.eos_token_id:
            given = given[:-1]
        learnt = tokenizer(f" {row['response'].strip()}", add_special_tokens=False)["input_ids"]
        learnt += [tokenizer.eos_token_id]
        labels = [-100] * len(given) + learnt
        ids = (given + learnt)[:length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels[:length]}

    rows = rows.select(range(min(examples, len(rows))))
    encoded = rows.map(encode, remove_columns=rows.column_names, keep_in_memory=True)
    # If the question fills the whole length, the example has no solution to learn.
    return encoded.filter(lambda row: row["labels"][-1] >= 0, keep_in_memory=True)


@cache
def questions(folder: Path | None, task: str, most: int | None) -> list[tuple[str, str]]:
    """Return the test questions with their right answers; only the first `most` if given."""
    if task == "GSM8K":
        needs = {"test": ("question", "answer")}
        rows = data_set(folder, "gsm8k", "openai/gsm8k", "main", needs=needs)["test"]
        pairs = [(row["question"], tidy(row["answer"].rpartition("####")[2])) for row in rows]
    else:
        needs = {"test": ("problem", "solution")}
        rows = data_set(folder, "MATH", "DigitalLearningGmbH/MATH-lighteval", needs=needs)["test"]
        pairs = [(row["problem"], tidy(boxed(row["solution"]) or "")) for row in rows]
    return pairs[:most]


# --- Runs -------------------------------------------------------------------------------------------------


@torch.no_grad()
def solutions(model: nn.Module, run: Run, asked: Sequence[str], file: Path) -> list[str]:
    """Return the model's text after each prompt, by greedy decoding.

    The texts are saved to `file` after each batch. Those in the file are not generated again.
    """
    tokenizer, arguments = tokenizer_of(run.model), run.arguments
    tokenizer.padding_side = "left"
    model.eval()
    done: list[str] = json.loads(file.read_text()) if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    batches = range(len(done), len(asked), arguments.answer_batch)
    for first in tqdm(batches, desc=file.stem, unit="batch", disable=None):
        texts = [prompt(text) for text in asked[first : first + arguments.answer_batch]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=arguments.answer_length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = written[:, inputs["input_ids"].shape[1] :]
        done += tokenizer.batch_decode(new, skip_special_tokens=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(done, indent=0))
        unfinished.replace(file)
    return done[: len(asked)]


def score(run: Run) -> dict[str, Any]:
    """Train on MetaMathQA, and return the share of right answers on each test set, in per cent."""
    arguments = run.arguments
    asked = {task: questions(arguments.data, task, arguments.questions) for task in TABLE.columns}
    data = training_set(arguments.data, run.model, arguments.examples, arguments.length)
    set_seed(run.seed)
    full, asking = run.method.kind == "full", torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    dtype = torch.float32 if full else asking
    model = pretrained(AutoModelForCausalLM, run.model, dtype=dtype)
    targets = settings.SEVEN if run.method.starred else settings.QUERY_AND_VALUE
    model = adapted(model, run, targets=targets)
    collate = DataCollatorForSeq2Seq(tokenizer_of(run.model))
    tokenizer_of(run.model).padding_side = "right"
    trainer = fit(model, run, data=data, collate=collate, autocast=full)
    if full:
        trainer.model.to(asking)
    scores = {}
    for task, pairs in asked.items():
        file = run.folder / f"{task}-{arguments.answer_length}.json"
        written = solutions(trainer.model, run, [question for question, _ in pairs], file)
        right = [
            same_answer(wanted, answer_of(text, words=task != "GSM8K"))
            for (_, wanted), text in zip(pairs, written, strict=True)
        ]
        scores[task] = 100 * sum(right) / len(right)
    return {"scores": scores, **counted(trainer)}


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of this command."""
    parser = TABLE.parser("Table 3 of the paper: MetaMathQA, then GSM8K and MATH.")
    add = parser.add_argument
    tokens = "tokens (default: %(default)s)"
    add("--examples", type=positive, default=settings.GENERATION_EXAMPLES, help="default: %(default)s")
    add("--length", type=positive, default=settings.CHOSEN_GENERATION_LENGTH, help=tokens)
    add("--answer-length", type=positive, default=settings.CHOSEN_GENERATION_ANSWER, help=tokens)
    add("--answer-batch", type=positive, default=32, help="questions at a time (default: %(default)s)")
    add("--questions", type=positive, metavar="N", help="ask the first N of each set (default: all)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do the missing runs and print the table."""
    return complete(argv, TABLE, parser(), score)


if __name__ == "__main__":
    sys.exit(main())
