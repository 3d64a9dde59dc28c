"""What TorchXRayVision's weights mean: findings, operating points, the input's scale and geometry.

Facts about the published weights, from TorchXRayVision 1.5.7 (Cohen et al., arXiv 2111.00595). Knows
nothing of files; `thoraxrt.export.checkpoint` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from thoraxrt.engine.preprocess import Exact, PreprocessSpec
from thoraxrt.export.graph import Normalisation

__all__ = ["FINDINGS", "PUBLISHED", "normalisation", "preprocess"]

FINDINGS: Final = (
    "Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema", "Fibrosis", "Effusion",
    "Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass", "Hernia", "Lung Lesion", "Fracture",
    "Lung Opacity", "Enlarged Cardiomediastinum",
)  # fmt: skip
"""The 18 outputs in order. A network trained on one data set answers for some of them only."""


def normalisation(channels: int) -> Normalisation:
    """(2 v - 1) 1024 for pixels v in 0..1 (`torchxrayvision.utils.normalize`), in each channel."""
    return Normalisation(mean=(0.5,) * channels, std=(1 / 2048,) * channels)


def preprocess(input_size: int) -> PreprocessSpec:
    """The centre square, resized to `input_size` pixels a side; TorchXRayVision's resize is scikit-image's."""
    return PreprocessSpec(square=True, resize=Exact(width=input_size, height=input_size))


_ = math.nan
_DENSENET = "-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"

PUBLISHED: Final[Mapping[str, tuple[float, ...]]] = {
    "nih-pc-chex-mimic_ch-google-openi-kaggle" + _DENSENET: (
        0.07422872, 0.038290843, 0.09814756, 0.0098118475, 0.023601074, 0.0022490358, 0.010060724, 0.103246614, 0.056810737,
        0.026791653, 0.050318155, 0.023985857, 0.01939503, 0.042889766, 0.053369623, 0.035975814, 0.20204692, 0.05015312,
    ),
    "nih" + _DENSENET: (
        0.039117552, 0.0034529066, 0.11396341, 0.0057298196, 0.00045666535, 0.0018880932, 0.012037827, 0.038744126,
        0.0037213727, 0.014730946, 0.016149804, 0.054241467, 0.037198864, 0.0004403434, _, _, _, _,
    ),
    "pc" + _DENSENET: (
        0.031012505, 0.013347598, 0.081435576, 0.001262615, 0.002587246, 0.0035944257, 0.0023071, 0.055412333, 0.044385884,
        0.042766232, 0.043258056, 0.037629247, 0.005658899, 0.0091741895, _, 0.026507627, _, _,
    ),
    "chex" + _DENSENET: (
        0.1988969, 0.05710573, _, 0.0531293, 0.1435217, _, _, 0.27212676, 0.07749717,
        _, 0.19712369, _, _, _, 0.09932402, 0.09273402, 0.3270967, 0.10888247,
    ),
    "kaggle" + _DENSENET: (_, _, _, _, _, _, _, _, 0.13486601, _, _, _, _, _, _, _, 0.13511065, _),
    "mimic_nb" + _DENSENET: (
        0.08558747, 0.011884617, _, 0.0040595434, 0.010733786, _, _, 0.118761964, 0.022924708,
        _, 0.06358637, _, _, _, 0.022143636, 0.017476924, 0.1258702, 0.014020768,
    ),
    "mimic_ch" + _DENSENET: (
        0.09121389, 0.010573786, _, 0.005023008, 0.003698257, _, _, 0.08001232, 0.037242252,
        _, 0.05006329, _, _, _, 0.019866971, 0.03823637, 0.11303808, 0.0069147074,
    ),
    "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt": (
        0.51570356, 0.50444704, 0.53787947, 0.50723547, 0.5025118, 0.5035252, 0.5038076, 0.51862943, 0.5078151,
        0.50724894, 0.5056339, 0.510706, 0.5053923, 0.5020846, _, 0.5080557, 0.5138526, _,
    ),
}  # fmt: skip
"""The operating points of `FINDINGS`, probabilities in 0..1, by published file; NaN where it has none.

The files hold none themselves. Where the point is NaN, TorchXRayVision's `op_norm` answers 0.5 for every
image: the output was not trained (in the DenseNets these are the outputs without a name).
"""
