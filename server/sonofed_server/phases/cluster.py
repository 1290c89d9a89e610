"""Cluster: federated spherical k-means of the embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

from sonofed_common.contract.actions import Cluster, request
from sonofed_server.phases.clustering_math import initial_centroids, largest_move, update_centroids
from sonofed_server.study.run import StudyRun


def cluster(run: StudyRun) -> None:
    """Sum moments, place centroids, and move them until they rest or the iterations are used up."""
    settings, state, exchange = run.study.clustering, run.state, run.exchange
    parameters = Cluster(**run.encode)
    moments: list[Any] = []
    for site, reply in exchange.ask(
        "query.cluster", request(parameters, student=state.group("student"))
    ):
        moments.append((reply.arrays["sum"], reply.arrays["second"], int(reply.config["examples"])))
        run.site_facts(site).update(images=moments[-1][2], embedding=reply.metrics)
    total, second, count = (sum(column) for column in zip(*moments, strict=True))
    centroids = initial_centroids(total, second, count, settings.clusters)
    counts = np.zeros(settings.clusters, dtype=np.int64)
    converged = False
    for iteration in range(settings.iterations):
        sums = np.zeros_like(centroids)
        counts = np.zeros(settings.clusters, dtype=np.int64)
        for _, reply in exchange.ask("query.cluster", request(parameters, centroids=centroids)):
            sums += reply.arrays["sums"]
            counts += reply.arrays["counts"]
        updated = update_centroids(sums, counts, centroids)
        move = largest_move(centroids, updated)
        centroids = updated
        run.events.progress("cluster", iteration + 1, settings.iterations, move=round(move, 6))
        if converged := move <= settings.tolerance:
            break
    run.events.progress("cluster", settings.iterations, settings.iterations)
    state.arrays["centroids"] = centroids
    run.events.emit("clustered", converged=converged, iterations=iteration + 1)
    state.facts["converged"] = converged
    state.facts["clusters"] = [int(c) for c in counts]
