"""Stage II of ADAptation: a hospital's images redrawn in the source's style (arXiv 2507.00474)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity

from sonofed_common.models.sampling import reconstruct

__all__ = ["quality", "reconstruct"]


def quality(
    originals: Tensor,
    reconstructions: Tensor,
    features_original: Tensor | None = None,
    features_reconstructed: Tensor | None = None,
) -> dict[str, float]:
    """How far reconstructions are from their originals.

    Parameters
    ----------
    originals, reconstructions : Tensor
        (B, 1, S, S), in [0, 1], S at least 11.
    features_original, features_reconstructed : Tensor, optional
        (B, F) features of a classifier or an encoder.

    Returns
    -------
    dict of str to float
        Means over the images: ``ssim`` in [-1, 1], ``psnr`` in dB, and with features
        ``feature_distance``, one minus cosine, in [0, 2].
    """
    from sonofed_common.monai import PSNRMetric, SSIMMetric

    ssim = SSIMMetric(spatial_dims=2, data_range=1.0)(reconstructions, originals)
    psnr = PSNRMetric(max_val=1.0)(reconstructions, originals)
    means = {"ssim": float(ssim.mean()), "psnr": float(psnr.mean())}
    if features_original is not None and features_reconstructed is not None:
        cosine = cosine_similarity(features_original, features_reconstructed)
        means["feature_distance"] = float((1 - cosine).mean())
    return means
