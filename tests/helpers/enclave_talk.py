"""What a coordinator asks of an enclave in the tests, and all that it answers."""

import csv

import numpy as np

from sonofed_client.enclave.store import Store
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.selection import WHOLE
from sonofed_common.contract.study import Embedding, Finetuning, Reconstruction, Selection

IMAGES = 20
COMMON = {"study": "trial", "seed": 3}
NETWORK = "shufflenet_v2"
WHOLE_POOL = np.array([[2**63, 0]], dtype=np.uint64)
NO_CUTS = np.empty((0, 2), dtype=np.uint64)


def rewrite(folder, change):
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in map(change, rows) if row is not None]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask", "label", "patient", "device"])
        writer.writeheader()
        writer.writerows(rows)


def signed(bundle):
    return {
        name: np.frombuffer((bundle.folder / f"manifest.{end}").read_bytes(), dtype=np.uint8)
        for name, end in (("manifest", "json"), ("signature", "sig"))
    }


def blobs(bundle):
    return {d: np.frombuffer(bundle.blob(d), dtype=np.uint8) for d in bundle.manifest.blobs}


def install(enclave, bundle):
    message = request(actions.Install(**COMMON), **signed(bundle), blobs=blobs(bundle))
    return enclave.perform("train.install", message)


def pooled(bundle):
    return {**COMMON, "bundle": bundle.id, "image_size": 32}


def encode(bundle):
    return {
        **pooled(bundle),
        "classifier": NETWORK,
        "pairs": "reconstruction",
        "settings": Embedding(dimension=8, rounds=1),
        "reconstruction": Reconstruction(steps=1),
    }


def conversation(bundle, selection):
    """The requests of a whole study of one site, each made from the reply before it."""
    reply = yield "query.describe", request(actions.Describe(**COMMON, study_digest="0" * 64))
    reply = yield "query.missing", request(actions.Missing(**COMMON), **signed(bundle))
    yield (
        "train.install",
        request(actions.Install(**COMMON), **signed(bundle), blobs=blobs(bundle)),
    )
    redraw = actions.Reconstruct(**pooled(bundle), settings=Reconstruction(steps=1))
    reply = yield "train.reconstruct", request(redraw)
    assert reply.config["state"] == "done"
    reply = yield "train.embed", request(actions.Embed(**encode(bundle), round=0))
    student = reply.group("student")
    ask = actions.Cluster(**encode(bundle))
    reply = yield "query.cluster", request(ask, student=student)
    centroids = np.eye(2, 8, dtype=reply.arrays["sum"].dtype)
    yield "query.cluster", request(ask, centroids=centroids)
    scoring = actions.Score(**encode(bundle), selection=selection)
    yield "train.score", request(scoring, centroids=centroids)
    for column in ("uncertainty", "informativeness"):
        question = actions.Histogram(**COMMON, column=column, split=8)
        yield "query.histogram", request(question, edges=WHOLE[column], cuts=NO_CUTS)
    yield "train.select", request(actions.Select(**COMMON, stage="mark"), cuts=WHOLE_POOL)
    yield "query.annotations", request(actions.Annotations(**COMMON))
    yield "train.classifier", request(fine_tuning(bundle))
    yield "evaluate.classifier", request(evaluation(bundle))


def fine_tuning(bundle, **changes):
    settings = Finetuning(rounds=1, local_epochs=1)
    values = {"classifier": NETWORK, "round": 0, "budget": 0, "settings": settings} | changes
    return actions.TrainClassifier(**pooled(bundle), **values)


def evaluation(bundle, **changes):
    values = {"classifier": NETWORK, "batch_norm": "site", "replicates": 20} | changes
    return actions.EvaluateClassifier(**pooled(bundle), **values)


RADIANS = Selection(combine="radians", budgets=(1.0,))


def talk(enclave, bundle, selection=RADIANS):
    script, replies = conversation(bundle, selection), []
    action, message = next(script)
    while True:
        replies.append((action, enclave.perform(action, message)))
        try:
            action, message = script.send(replies[-1][1])
        except StopIteration:
            return replies


BRANCHES = ("source", "target")


def forget_labels(folder):
    """Take the label of every image but each patient's first."""
    seen = set()

    def forget(row):
        first = row["patient"] not in seen
        seen.add(row["patient"])
        return row if first else {**row, "label": ""}

    rewrite(folder, forget)


def secrets_of(site, size=32):
    """What may not leave a site, as bytes: names, ids, patients, paths and rows of pixels."""
    rows = Store(site.store).images()
    found = {t.encode() for row in rows for t in (row.id, row.name, row.group)}
    found |= {str(site.data.path).encode(), str(site.store).encode()}
    found |= {int(row.id, 16).to_bytes(8, end) for row in rows for end in ("little", "big")}
    kept = Store(site.store).get(f"pixels/{size}")
    for image in kept.arrays["pixels"] if kept else ():
        line = max(image[0], key=lambda pixels: len(np.unique(pixels)))
        if len(np.unique(line)) > size // 2:
            found |= {line.tobytes(), (line / np.float32(255)).tobytes()}
    return found
