"""What SonoFed takes from MONAI; nothing else imports MONAI.

MONAI loads all of itself at once, and for parts that are not used here transformers, with torch's
compiler, and matplotlib. A process of SonoFed would spend more than half of its start on them, so
they are out of sight while MONAI is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "DenseNet121",
    "DiceCELoss",
    "Down",
    "EfficientNetBN",
    "PSNRMetric",
    "SSIMMetric",
    "TwoConv",
    "UpCat",
    "compute_dice",
    "get_edge_surface_distance",
    "resnet18",
    "resnet50",
]


@contextmanager
def _without(*packages: str) -> Iterator[None]:
    """Have an import of packages that are not loaded yet fail, as if they were not installed."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _without("transformers", "matplotlib"):
    from monai.losses.dice import DiceCELoss
    from monai.metrics import PSNRMetric, SSIMMetric, compute_dice
    from monai.metrics.utils import get_edge_surface_distance
    from monai.networks.nets import DenseNet121, EfficientNetBN, resnet18, resnet50
    from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
