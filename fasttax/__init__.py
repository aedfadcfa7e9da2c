"""fasttax: exact token-level KL, diagonal Fisher and EWC, fast enough to leave on in every alignment run."""

from fasttax import functional as functional
from fasttax import kl as _kl
from fasttax._library import load_native as _load_native

token_kl = _kl.token_kl
_load_native()
__version__ = "0.1.0"
