"""Labelling: how often a study may score a pool, and how much of it it may mark for the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sonofed_common.contract.errors import PolicyError, StudyDeniedError
from sonofed_common.contract.records import Records
from sonofed_common.contract.selection import budget_count
from sonofed_common.contract.study import Selection

if TYPE_CHECKING:
    from sonofed_client.enclave.site import Site

MAX_SCORINGS = 8
"""Most different scores of one study: it needs one, and another where it had to embed again. Each
set of centroids that a coordinator chooses gives scores of its own."""


def most_marked(selection: Selection, share: float, images: int) -> int:
    """Return how many images of a pool a study may have marked at most.

    Parameters
    ----------
    selection : Selection
        The study's: with scope ``per_site`` its largest budget is a limit of each site.
    share : float
        Largest share of the pool that the site's policy allows.
    images : int
        Size of the pool.
    """
    own = selection.budgets[-1] if selection.scope == "per_site" else 1.0
    return budget_count(min(share, own), images)


def admit_scores(site: Site, study: str, scores: Records) -> None:
    """Count the different scores of a study.

    Raises
    ------
    StudyDeniedError
        The pool was scored in as many ways before.
    """
    kept, digest = _kept(site, study), scores.digest()
    # An oracle's ties are broken by the ids; simulations may be repeated as often as one likes.
    if site.settings.oracle or digest in kept["scores"]:
        return
    if len(kept["scores"]) >= MAX_SCORINGS:
        raise StudyDeniedError(
            f"this hospital's images were scored in {MAX_SCORINGS} different ways for this study; "
            "it takes no others"
        )
    kept["scores"].append(digest)
    site.store.put(_name(site, study), Records(config=kept))


def admit_marks(
    site: Site, study: str, selection: Selection, chosen: Sequence[Sequence[str]]
) -> dict[str, Records]:
    """Check a selection against policy and study before anything of it is kept.

    Parameters
    ----------
    site : Site
        Its policy holds.
    study : str
        Name of the study.
    selection : Selection
        The settings that the images were scored with.
    chosen : sequence of sequences of str
        Image ids of each budget; the last holds all.

    Returns
    -------
    dict of str to Records
        What must be kept together with the selection: the images marked so far.

    Raises
    ------
    PolicyError
        A budget selects too few images, or the study has marked more than the policy allows.
    StudyDeniedError
        It has marked more than its own largest budget.
    """
    rule = site.policy.actions["train.select"]
    if any(0 < len(ids) < rule.min_count for ids in chosen):
        raise PolicyError(
            "this site's policy does not let so few images be selected",
            "actions.train.select.min_count",
        )
    kept = _kept(site, study)
    # In simulations, where no expert labels, one study is repeated in one store.
    before = [] if site.settings.oracle else kept["marked"]
    kept["marked"] = sorted({*before, *chosen[-1]})
    images, count = len(site.store.images("pool")), len(kept["marked"])
    if count > budget_count(rule.marked_share, images):
        raise PolicyError(
            "this site's policy does not let the study have so many images labelled",
            "actions.train.select.marked_share",
        )
    if count > most_marked(selection, 1.0, images):
        raise StudyDeniedError("the selections of the study exceed the budget that was approved")
    return {_name(site, study): Records(config=kept)}


def _kept(site: Site, study: str) -> dict[str, list[str]]:
    kept = site.store.get(_name(site, study))
    return {"scores": [], "marked": []} if kept is None else dict(kept.config)


def _name(site: Site, study: str) -> str:
    # By content, and not among the study's artifacts: those go when another takes its name.
    described = site.store.get(site.study_artifact(study, "digest"))
    content = study if described is None else f"sha256:{described.config['digest']}"
    return f"labelling/{content}"
