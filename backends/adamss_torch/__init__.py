"""The PyTorch backend of `adamss`.

`adamss.attach` and its sister verbs find it by themselves. The layer it adapts stays the user's own
`torch.nn.Linear`; the adapter is its child module `adamss`, an `Adapter`.
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
