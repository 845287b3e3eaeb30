"""The verbs on models: attach, summary, save, load, merge, detach, ...

Written once for all frameworks. Each finds the backend from the type of the model, and checks all that can
be checked before anything is changed, so that a call that fails leaves the model as it was.
"""

from adamss.verbs.activating import activate, adapters, routed
from adamss.verbs.attaching import attach, detach, disabled, summary, trainable_parameters
from adamss.verbs.exchange import from_peft, to_lora, to_peft
from adamss.verbs.files import load, push_to_hub, save
from adamss.verbs.merging import consolidate, merge, merge_and_unload, unmerge

__all__ = [
    "activate",
    "adapters",
    "attach",
    "consolidate",
    "detach",
    "disabled",
    "from_peft",
    "load",
    "merge",
    "merge_and_unload",
    "push_to_hub",
    "routed",
    "save",
    "summary",
    "to_lora",
    "to_peft",
    "trainable_parameters",
    "unmerge",
]
