"""KL divergence between a language model and its circuits, straight from logits."""

from fastkl import first_calls as first_calls  # imported for its side effect
from fastkl.backends import available_backends, unavailable_backends
from fastkl.functional import js_div, kl_div, kl_div_many
from fastkl.kl_statistics import KLStatistics
from fastkl.measure import measure_kl_div
from fastkl.modules import JSDivLoss, KLDivLoss

__all__ = [
    "JSDivLoss",
    "KLDivLoss",
    "KLStatistics",
    "__version__",
    "available_backends",
    "js_div",
    "kl_div",
    "kl_div_many",
    "measure_kl_div",
    "unavailable_backends",
]
__version__ = "0.1.0"
