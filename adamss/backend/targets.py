"""Matching of settings that name modules, such as `targets` and `modules_to_save`, against the paths of a model."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable

from adamss.errors import AdamssWarning, TargetError

__all__ = ["DEFAULT_TARGETS", "match", "near_matches"]

_ATTENTION = ("q_proj", "v_proj")

DEFAULT_TARGETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral"), _ATTENTION),
    **dict.fromkeys(("stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _ATTENTION),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm"), ("query_key_value",)),
    **dict.fromkeys(("RefinedWebModel", "RefinedWeb", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "vit": ("query", "value", "q_proj", "v_proj"),  # as transformers 4 and 5 call them
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""Default targets by ``config.model_type``, as in PEFT 0.21 for AdaMSS. Names that a model lacks are ignored."""

_INDEX = re.compile(r"\[\d+(,\d+)*\]$")
"""Index at the end of the path of a layer in a stack, as in ``layers.query[3]``."""


def match(
    targets: str | Iterable[str], paths: Iterable[str], *, name: str, required: bool = True
) -> list[str]:
    """Return the paths that the targets match, in the order of the paths.

    Parameters
    ----------
    targets
        Names, or one regular expression for the whole path. A name matches whole components at the end of a path:
        ``"query"`` matches ``"0.query"``, but not ``"0.prequery"``. The index of a layer in a stack
        (``"layers.query[3]"``) may be omitted.
    paths
        Module paths of the model.
    name
        Name of the setting, for messages.
    required
        Whether it is an error if nothing matches. If False, a warning is issued instead.

    Returns
    -------
    list of str
        Matching paths.

    Raises
    ------
    TargetError
        If nothing matches and a match is required. The message lists near matches.

    Warns
    -----
    AdamssWarning
        If some of the names match nothing, which may be a typing error.
    """
    paths = list(paths)
    if isinstance(targets, str):
        pattern = re.compile(targets)
        found = [path for path in paths if pattern.fullmatch(path) or pattern.fullmatch(_INDEX.sub("", path))]
        if not found:
            hint = near_matches([targets], paths)
            if any(_ends_with(path, targets) for path in paths):
                hint = f"a string is an expression for the whole path; a list of names is [{targets!r}]"
            message = f"{name} = {targets!r} matches no module; {hint}"
            if required:
                raise TargetError(message)
            warnings.warn(message, AdamssWarning, stacklevel=5)
        return found
    targets = tuple(targets)
    matches = {target: [path for path in paths if _ends_with(path, target)] for target in targets}
    unmatched = [target for target, found in matches.items() if not found]
    if required and len(unmatched) == len(targets):
        raise TargetError(f"{name} = {list(targets)} match no module; {near_matches(targets, paths)}")
    if unmatched:
        hint = near_matches(unmatched, paths)
        warnings.warn(f"{name}: {', '.join(unmatched)} match no module; {hint}", AdamssWarning, stacklevel=3)
    wanted = {path for found in matches.values() for path in found}
    return [path for path in paths if path in wanted]


def near_matches(targets: Iterable[str], paths: Iterable[str]) -> str:
    """Return a phrase for messages that lists names and paths of modules that resemble the targets."""
    paths = [path for path in paths if path]
    names = dict.fromkeys(part for path in paths for part in (path.rpartition(".")[2], path))
    close = dict.fromkeys(
        candidate
        for target in targets
        for candidate in difflib.get_close_matches(target, names, n=4, cutoff=0.5)
    )
    if close:
        return f"near matches: {', '.join(close)}"
    last = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    some = [name for name in last if not name.isdigit()] or list(last)
    return (
        f"the model has modules called {', '.join(some[:12])}" if some else "the model has no named modules"
    )


def _ends_with(path: str, target: str) -> bool:
    ends = (path, _INDEX.sub("", path))
    return any(end == target or end.endswith(f".{target}") for end in ends)
