"""Hold the Frobenius or spectral norm of every weight matrix of a PyTorch model on its target while it trains."""

from specscale import schedules
from specscale.apply import apply_norm_scaling, is_norm_scaled, remove_norm_scaling
from specscale.block import Block
from specscale.constraints import Cap, Normalize, Orthogonal
from specscale.errors import NonFiniteWeightError
from specscale.initialization import orthogonal_init_
from specscale.layers import LayerRule
from specscale.reports import Audit, Certificate, singular_values, spectral_norms
from specscale.scaler import NormScaler
from specscale.solvers import SVD, Power
from specscale.state_dicts import plain_state_dict
from specscale.targets import Relative
from specscale.views import MatrixView

__all__ = [
    "SVD",
    "Audit",
    "Block",
    "Cap",
    "Certificate",
    "LayerRule",
    "MatrixView",
    "NonFiniteWeightError",
    "NormScaler",
    "Normalize",
    "Orthogonal",
    "Power",
    "Relative",
    "apply_norm_scaling",
    "is_norm_scaled",
    "orthogonal_init_",
    "plain_state_dict",
    "remove_norm_scaling",
    "schedules",
    "singular_values",
    "spectral_norms",
]
