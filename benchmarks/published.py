"""Published results on ChestX-ray14, with their sources, and when a result of ours may stand beside them.

Owns numbers only: those of Wang et al., CheXNet and the data sheet were read in their text; of the other references only
the mean is here, which public compilations give alike. Knows nothing of how ours are computed.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from thoraxrt.export.nih import LABELS

__all__ = [
    "DATA_SHEET",
    "REFERENCES",
    "TABLE_4",
    "TABLE_7",
    "DataSheet",
    "LocalisationReference",
    "Reference",
    "comparable",
]

OFFICIAL_TEST_IMAGES: Final = 25_596
"""The images of `test_list.txt`."""


class Reference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AUROC of a published network: its mean over the 14 findings, and of each finding where that was read.

    `split`: `official` is the published `test_list.txt`; `random` another split by patient, whose images nobody else has.
    """

    name: str
    network: str
    source: str
    url: str
    split: Literal["official", "random"]
    mean: float
    aurocs: dict[str, float] = {}


class LocalisationReference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of Wang et al.'s tables: by threshold, accuracy and average false positives of each of `findings`.

    `overlap` says whether the thresholds are T(IoBB) or T(IoU); see `thoraxrt.benchmarks.localisation`.
    """

    name: str
    source: str
    url: str
    overlap: Literal["iobb", "iou"]
    findings: tuple[str, ...]
    thresholds: tuple[float, ...]
    accuracy: tuple[tuple[float, ...], ...]
    average_false_positives: tuple[tuple[float, ...], ...]


class DataSheet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What NIH's data sheet says of the data set.

    `counts` are the images with each finding, in the order of LABELS, `no_finding` those with none;
    `co_occurrence[i][j]` those with both, and on its diagonal those with that finding *alone*.
    """

    source: str
    images: int
    patients: int
    counts: tuple[int, ...]
    no_finding: int
    co_occurrence: tuple[tuple[int, ...], ...]


def comparable(reference: Reference, split: str, images: int) -> bool:
    """Whether an AUROC of ours on `images` images of `split` may be compared with a published one.

    Only where both are of the whole official test list: another split has other images, mostly with other prevalences,
    and part of the list is another list.
    """
    return reference.split == "official" and split == "test" and images == OFFICIAL_TEST_IMAGES


_WANG: Final = "Wang et al., ChestX-ray8, CVPR 2017, arXiv 1705.02315v5"
_WANG_URL: Final = "https://arxiv.org/abs/1705.02315v5"
_COMPARED: Final = "mean as compared in Table 6 of arXiv 2210.12843"

REFERENCES: Final = (
    Reference(
        name="Wang 2017",
        network="ResNet-50",
        source=f"{_WANG}, Table 17",
        url=_WANG_URL,
        split="official",
        mean=0.7451,
        aurocs=dict(
            zip(
                LABELS,
                (
                    *(0.7003, 0.8100, 0.7585, 0.6614, 0.6933, 0.6687, 0.6580),
                    *(0.7993, 0.7032, 0.8052, 0.8330, 0.7859, 0.6835, 0.8717),
                ),
                strict=True,
            )
        ),
    ),
    Reference(
        name="CheXNet",
        network="DenseNet-121",
        source="Rajpurkar et al., CheXNet, arXiv 1711.05225v3, Table 2",
        url="https://arxiv.org/abs/1711.05225v3",
        split="random",
        mean=0.8414,
        aurocs=dict(
            zip(
                LABELS,
                (
                    *(0.8094, 0.9248, 0.8638, 0.7345, 0.8676, 0.7802, 0.7680),
                    *(0.8887, 0.7901, 0.8878, 0.9371, 0.8047, 0.8062, 0.9164),
                ),
                strict=True,
            )
        ),
    ),
    Reference(
        name="Yao 2018",
        network="ResNet and DenseNet",
        source=f"Yao et al., Weakly Supervised Medical Diagnosis, arXiv 1803.07703, {_COMPARED}",
        url="https://arxiv.org/abs/1803.07703",
        split="official",
        mean=0.761,
    ),
    Reference(
        name="Guendel 2018",
        network="DenseNet-121",
        source=f"Guendel et al., Location Aware Dense Networks, arXiv 1803.04565, {_COMPARED}",
        url="https://arxiv.org/abs/1803.04565",
        split="official",
        mean=0.807,
    ),
    Reference(
        name="Baltruschat 2019",
        network="ResNet-38 with age, sex and view",
        source=f"Baltruschat et al., Scientific Reports 9:6381, 2019, arXiv 1803.02315, {_COMPARED}",
        url="https://arxiv.org/abs/1803.02315",
        split="official",
        mean=0.806,
    ),
)

_BOXED: Final = LABELS[:8]

TABLE_4: Final = LocalisationReference(
    name="Wang 2017, ChestX-ray8",
    source=f"{_WANG}, Table 4",
    url=_WANG_URL,
    overlap="iobb",
    findings=_BOXED,
    thresholds=(0.1, 0.25, 0.5, 0.75, 0.9),
    accuracy=(
        (0.7277, 0.9931, 0.7124, 0.7886, 0.4352, 0.1645, 0.7500, 0.4591),
        (0.5500, 0.9794, 0.5424, 0.5772, 0.2823, 0.0506, 0.5583, 0.3469),
        (0.2833, 0.8767, 0.3333, 0.4227, 0.1411, 0.0126, 0.3833, 0.1836),
        (0.1666, 0.7260, 0.2418, 0.3252, 0.1176, 0.0126, 0.2583, 0.1020),
        (0.1333, 0.6849, 0.2091, 0.2520, 0.0588, 0.0126, 0.2416, 0.0816),
    ),
    average_false_positives=(
        (0.8323, 0.3506, 0.7998, 0.5589, 0.6423, 0.6047, 0.9055, 0.4776),
        (0.9167, 0.4553, 0.8598, 0.6077, 0.6707, 0.6158, 0.9614, 0.5000),
        (1.0203, 0.5630, 0.9268, 0.6585, 0.6941, 0.6189, 1.0132, 0.5285),
        (1.0619, 0.6616, 0.9603, 0.6921, 0.7043, 0.6199, 1.0569, 0.5396),
        (1.0752, 0.7226, 0.9797, 0.7124, 0.7144, 0.6199, 1.0732, 0.5437),
    ),
)

TABLE_7: Final = LocalisationReference(
    name="Wang 2017, ChestX-ray8",
    source=f"{_WANG}, Table 7",
    url=_WANG_URL,
    overlap="iou",
    findings=_BOXED,
    thresholds=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    accuracy=(
        (0.6888, 0.9383, 0.6601, 0.7073, 0.4000, 0.1392, 0.6333, 0.3775),
        (0.4722, 0.6849, 0.4509, 0.4796, 0.2588, 0.0506, 0.3500, 0.2346),
        (0.2444, 0.4589, 0.3006, 0.2764, 0.1529, 0.0379, 0.1666, 0.1326),
        (0.0944, 0.2808, 0.2026, 0.1219, 0.0705, 0.0126, 0.0750, 0.0714),
        (0.0500, 0.1780, 0.1111, 0.0650, 0.0117, 0.0126, 0.0333, 0.0306),
        (0.0222, 0.0753, 0.0457, 0.0243, 0.0000, 0.0126, 0.0166, 0.0306),
        (0.0055, 0.0273, 0.0196, 0.0000, 0.0000, 0.0000, 0.0083, 0.0204),
    ),
    average_false_positives=(
        (0.8943, 0.5996, 0.8343, 0.6250, 0.6666, 0.6077, 1.0203, 0.4949),
        (0.9827, 0.7205, 0.9096, 0.6849, 0.6941, 0.6158, 1.0793, 0.5173),
        (1.0417, 0.7815, 0.9472, 0.7236, 0.7073, 0.6168, 1.1067, 0.5325),
        (1.0783, 0.8140, 0.9705, 0.7489, 0.7164, 0.6189, 1.1239, 0.5427),
        (1.0884, 0.8354, 0.9919, 0.7571, 0.7215, 0.6189, 1.1291, 0.5478),
        (1.0935, 0.8506, 1.0051, 0.7632, 0.7226, 0.6189, 1.1321, 0.5478),
        (1.0965, 0.8577, 1.0090, 0.7663, 0.7226, 0.6199, 1.1331, 0.5488),
    ),
)

DATA_SHEET: Final = DataSheet(
    source=f"NIH's data sheet (README_CHESTXRAY.pdf), the counts, and those with none, in {_WANG}, Table 16",
    images=112_120,
    patients=30_805,
    counts=(11535, 2772, 13307, 19871, 5746, 6323, 1353, 5298, 4667, 2303, 2516, 1686, 3385, 227),
    no_finding=60_412,
    co_occurrence=(
        (4212, 369, 3269, 3259, 727, 585, 243, 772, 1222, 221, 423, 220, 495, 40),
        (369, 1094, 1060, 583, 99, 108, 36, 48, 169, 127, 44, 51, 111, 7),
        (3269, 1060, 3959, 3990, 1244, 909, 253, 995, 1287, 592, 359, 188, 848, 21),
        (3259, 583, 3990, 9552, 1151, 1544, 571, 943, 1220, 979, 447, 345, 749, 33),
        (727, 99, 1244, 1151, 2138, 894, 62, 424, 602, 128, 212, 115, 448, 25),
        (585, 108, 909, 1544, 894, 2706, 63, 340, 428, 131, 115, 166, 410, 10),
        (243, 36, 253, 571, 62, 63, 307, 34, 114, 330, 21, 11, 45, 2),
        (772, 48, 995, 943, 424, 340, 34, 2199, 222, 33, 746, 80, 289, 9),
        (1222, 169, 1287, 1220, 602, 428, 114, 222, 1314, 162, 103, 79, 251, 4),
        (221, 127, 592, 979, 128, 131, 330, 33, 162, 634, 30, 9, 64, 3),
        (423, 44, 359, 447, 212, 115, 21, 746, 103, 30, 895, 36, 151, 4),
        (220, 51, 188, 345, 115, 166, 11, 80, 79, 9, 36, 727, 176, 8),
        (495, 111, 848, 749, 448, 410, 45, 289, 251, 64, 151, 176, 1127, 8),
        (40, 7, 21, 33, 25, 10, 2, 9, 4, 3, 4, 8, 8, 110),
    ),
)
