"""What a segmentation comparison can show of a study: segmenters by the names of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.records import Array
from sonofed_common.contract.study import Study
from sonofed_common.contract.study_segmentation import PLAIN_MEAN, Infusion, SiteNorm
from sonofed_server.study.workspace import StudyState

CONTROL = "control"
CONTROLS = ("source-only", "bn-adapted", "supervised")
MIRRORED = "mirrored "


@dataclass(frozen=True)
class MaskRow:
    """Segmenters to test together at every site.

    Attributes
    ----------
    bundle : str
        Id of an installed bundle.
    branches : tuple of str
        Of that bundle.
    arrays : dict of str to ndarray
        Of the infusion head.
    infusion : Infusion
        How the branches become one.
    batch_norm : {"site", "mixed", "global"}
        Normalisation statistics: the site's, the weights', or their mean.
    """

    bundle: str
    branches: tuple[str, ...]
    arrays: dict[str, Array]
    infusion: Infusion = PLAIN_MEAN
    batch_norm: SiteNorm | Literal["global"] = "site"


def row_names(study: Study) -> list[str]:
    """Everything that a finished study can be asked to show.

    Returns
    -------
    list of str
        Branches before pseudo-labelling by their names (``source``; ``target``, or one
        ``target-<site>`` for each hospital), and of several ``mean`` and ``infusion``; the same
        after pseudo-labelling with ``adapted`` before the name; and all of these with ``mirrored``
        before it, where each branch's prediction is its mean over image and mirrored image.
    """
    names = ["source"]
    if "supervise" in study.phases:
        shared = study.supervision.branches == "shared"
        names += ["target"] if shared else [f"target-{site}" for site in study.cohort.sites]
    if len(names) > 1:
        names += ["mean", "infusion"] if "ensemble" in study.phases else ["mean"]
    adapted = names if "pseudo_label" in study.phases else []
    names = [*names, *(f"adapted {name}" for name in adapted)]
    return [*names, *(f"{MIRRORED}{name}" for name in names)]


def row_of(study: Study, state: StudyState, source_bundle: str, name: str) -> MaskRow:
    """Return the row of a finished study that has one of its `row_names`.

    Raises
    ------
    ConfigurationError
        The row is of a branch that the study could not train.
    """
    seen = name.removeprefix(MIRRORED)
    mirrored = {"mirrored": True} if seen != name else {}
    what = seen.removeprefix("adapted ")
    origin = "branches" if what == seen else "adapted"
    known = state.facts.get(origin, {"bundle": source_bundle, "names": ["source"]})
    names: Sequence[str] = known["names"]
    if what == "infusion":
        arrays = state.group(f"ensemble/{origin}")
        infusion = study.infusion.model_copy(update=mirrored)
        return MaskRow(known["bundle"], tuple(names), arrays, infusion, study.segmenter_batch_norm)
    if what != "mean" and what not in names:
        raise ConfigurationError(
            f"study {study.name} has no branch '{what}': its site took no part in the pretraining"
        )
    chosen = tuple(names) if what == "mean" else (what,)
    plain = PLAIN_MEAN.model_copy(update=mirrored)
    return MaskRow(known["bundle"], chosen, {}, plain, study.segmenter_batch_norm)
