"""Single-device layers of linear-attention models. Sequence parallelism is an argument they hand to the op.

Every file here is imported, so that a mixer is known by being one of them.
"""

from importlib import import_module
from pkgutil import iter_modules

from lasp.layers.attention import LinearAttention
from lasp.layers.decay import ConstantDecay, alibi_slopes, retnet_log_decay, transnormer_log_decay
from lasp.layers.deltanet import DeltaNet
from lasp.layers.feature_maps import FEATURE_MAPS, feature_map
from lasp.layers.feedforward import FEEDFORWARDS, feedforward
from lasp.layers.gates import GatedHeadNorm, LowRank, SteppedDecay
from lasp.layers.gla import GatedLinearAttention
from lasp.layers.mamba2 import Mamba2
from lasp.layers.mixer import LayerContext, LayerState, Mixer, MixerConfig
from lasp.layers.norms import NORMS, RMSNorm, SimpleRMSNorm, norm
from lasp.layers.positions import LRPE, Rotary, sinusoids
from lasp.layers.registry import FAMILIES, MIXERS
from lasp.layers.short_convolution import ShortConvolution
from lasp.layers.softmax_attention import SoftmaxAttention
from lasp.layers.state import RecurrentState

__all__ = [
    "FAMILIES",
    "FEATURE_MAPS",
    "FEEDFORWARDS",
    "LRPE",
    "MIXERS",
    "NORMS",
    "ConstantDecay",
    "DeltaNet",
    "GatedHeadNorm",
    "GatedLinearAttention",
    "LayerContext",
    "LayerState",
    "LinearAttention",
    "LowRank",
    "Mamba2",
    "Mixer",
    "MixerConfig",
    "RMSNorm",
    "RecurrentState",
    "Rotary",
    "ShortConvolution",
    "SimpleRMSNorm",
    "SoftmaxAttention",
    "SteppedDecay",
    "alibi_slopes",
    "feature_map",
    "feedforward",
    "norm",
    "retnet_log_decay",
    "sinusoids",
    "transnormer_log_decay",
]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
