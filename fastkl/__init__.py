"""KL divergence between a language model and its circuits, straight from logits."""

from fastkl.backends import available_backends
from fastkl.functional import kl_div, kl_div_many
from fastkl.measure import measure_kl_div

__all__ = ["__version__", "available_backends", "kl_div", "kl_div_many", "measure_kl_div"]
__version__ = "0.1.0"
