"""The PyTorch backend of `adamss`.

`adamss.attach` and the other verbs find this backend by themselves. An adapted layer stays the user's own
`torch.nn.Linear`; its adapters, one `Adapter` for each name, lie in its child module ``adamss``.
"""

from adamss.errors import MissingBackendError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingBackendError("adamss_torch needs PyTorch: pip install 'adamss[torch]'") from error

from adamss_torch.adapter import Adapter
from adamss_torch.backend import TorchBackend
from adamss_torch.budget import Allocation, BudgetController
from adamss_torch.frozen import hold_frozen

__all__ = ["Adapter", "Allocation", "BudgetController", "TorchBackend", "hold_frozen"]
