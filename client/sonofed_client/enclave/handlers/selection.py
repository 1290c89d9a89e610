"""Answer counts about the scores of the pool, mark what is selected, count its labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sonofed_client.adaptation.selector import PoolSelector
from sonofed_client.enclave.labelling import admit_marks
from sonofed_client.enclave.site import Site
from sonofed_common.contract.actions import Annotations, Histogram, Parameters, Select
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Array, Records
from sonofed_common.contract.selection import RankTable, ranked_columns
from sonofed_common.contract.study import Selection


def histogram(site: Site, parameters: Histogram, request: Records) -> Records:
    """Counts (m, split) of the pool's keys in the parts of intervals."""
    if not {"edges", "cuts"} <= request.arrays.keys():
        raise ParameterError("a histogram needs edges and cuts; send both")
    counts = _selector(site, parameters).counts(
        parameters.column,
        np.array(request.arrays["edges"]),
        parameters.split,
        np.array(request.arrays["cuts"]),
        parameters.tied,
    )
    return Records({"counts": counts})


def select(site: Site, parameters: Select, request: Records) -> Records:
    """Keep the pooled ranks, or mark the selection of every budget and reply with its sizes."""
    if parameters.stage == "rank":
        ranks = Records(request.group("ranks"))
        _selector(site, parameters, ranks)
        name = site.study_artifact(parameters.study, "ranks")
        kept = site.store.get(name)
        if kept is not None and kept.digest() != ranks.digest():
            raise ParameterError("these scores have their pooled ranks; score again for others")
        site.store.put(name, ranks)
        return Records()
    if "cuts" not in request.arrays:
        raise ParameterError("marking a selection needs the cuts; send them")
    cuts, selector = np.array(request.arrays["cuts"]), _selector(site, parameters)
    chosen = selector.select(cuts)
    name, marked = site.study_artifact(parameters.study, "selected"), Records({"cuts": cuts})
    before = site.store.get(name)
    if before is not None and before.digest() != marked.digest():
        raise ParameterError("these scores have their selection; score again for another")
    counted = admit_marks(site, parameters.study, selector.settings, chosen)
    site.store.put_many({**counted, name: Records({"cuts": cuts}, {"ids": chosen})})
    if site.settings.oracle:
        labels = {row.id: row.label for row in site.store.images("pool")}
        known = [(i, labels[i]) for i in chosen[-1]]
        site.store.annotate([(i, label) for i, label in known if label is not None], "oracle")
    return Records(config={"selected": [len(ids) for ids in chosen]})


def count_annotations(site: Site, parameters: Annotations, request: Records) -> Records:
    """How many of the selected images have a label, of those that can get one.

    An expert can label every image. An oracle has given all the labels it has when the selection
    was marked, so ``total`` then leaves out the images without one: nobody need wait for them.
    """
    done = len(labelled(site, parameters.study, -1))
    total = done if site.settings.oracle else len(selected(site, parameters.study)[-1])
    return Records(metrics={"done": done, "total": total})


def selected(site: Site, study: str) -> list[list[str]]:
    """Selected image ids of each budget, most informative first.

    Raises
    ------
    OrderError
        Nothing was selected yet.
    """
    chosen = site.need(site.study_artifact(study, "selected"), "selection").config["ids"]
    return [[str(i) for i in ids] for ids in chosen]


def labelled(site: Site, study: str, budget: int) -> dict[str, int]:
    """Labels given so far to the images of one budget, by image id."""
    chosen = selected(site, study)
    if budget >= len(chosen):
        raise ParameterError(f"the study has {len(chosen)} budgets; there is no number {budget}")
    labels = site.store.annotations()
    return {i: labels[i] for i in chosen[budget] if i in labels}


def _selector(site: Site, parameters: Parameters, ranks: Records | None = None) -> PoolSelector:
    kept = site.need(site.study_artifact(parameters.study, "scores"), "scores")
    settings = Selection.model_validate(kept.config["settings"])
    selector = PoolSelector(
        [row.id for row in site.store.images("pool")],
        settings,
        int(kept.config["seed"]),
        **{name: np.array(scores) for name, scores in kept.arrays.items()},
        secret=site.tie_secret(parameters.study, kept),
    )
    ranks = ranks or site.store.get(site.study_artifact(parameters.study, "ranks"))
    if ranks is not None:
        columns = ranked_columns(settings)
        selector.set_ranks({column: _rank_table(ranks.group(column)) for column in columns})
    return selector


def _rank_table(arrays: Mapping[str, Array]) -> RankTable:
    if not {"starts", "cumulative"} <= arrays.keys():
        raise ParameterError("pooled ranks need starts and cumulative counts; send both")
    return RankTable(np.array(arrays["starts"]), np.array(arrays["cumulative"]))
