import numpy as np
import pytest
from enclave_talk import (
    COMMON,
    IMAGES,
    NO_CUTS,
    RADIANS,
    encode,
    fine_tuning,
    forget_labels,
    install,
    pooled,
    talk,
)

from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.handlers import reconstruction
from sonofed_client.enclave.policy import STANDARD
from sonofed_client.enclave.starts import start_of
from sonofed_client.enclave.store import Store
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import OrderError
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study import Reconstruction, Selection


def test_slices_do_not_change_reconstructions(site, bundle, tmp_path):
    site = site.model_copy(update={"image_key": "0" * 64})
    settings = Reconstruction(steps=1, batch_size=4)
    done = []
    for store, slice_seconds in (("whole", 60), ("slices", 1e-9)):
        enclave = InProcessEnclave(site.model_copy(update={"store": tmp_path / store}))
        install(enclave, bundle)
        ask = request(
            actions.Reconstruct(**pooled(bundle), settings=settings, slice_seconds=slice_seconds)
        )
        for _ in range(IMAGES):
            reply = enclave.perform("train.reconstruct", ask)
            if reply.config["state"] == "done":
                break
            assert 0 <= reply.config["done"] < reply.config["total"] and not reply.metrics
        done.append(to_bytes(reply))
    assert done[0] == done[1]


def test_old_reconstructions_go_but_none_of_the_pool_at_hand(site, bundle, monkeypatch):
    monkeypatch.setattr(reconstruction, "JOB_CACHE_BYTES", 0)
    enclave, store = InProcessEnclave(site), Store(site.store)
    install(enclave, bundle)
    pool = len(store.images("pool"))
    kept, models = set(), 8
    for guidance in range(models):
        settings = Reconstruction(steps=1, guidance=guidance)
        before = kept
        enclave.perform(
            "train.reconstruct", request(actions.Reconstruct(**pooled(bundle), settings=settings))
        )
        kept = store.names("reconstruction/")
        assert len(kept - before) == pool
    assert pool <= len(kept) < models * pool
    # The pool's images are a few bytes larger than their pixels, and floats four times as large.
    assert len(kept) >= 3 * pool


def test_old_embeddings_go(site, bundle, monkeypatch):
    monkeypatch.setattr(Store.trim, "__defaults__", (2000,))
    enclave, store = InProcessEnclave(site), Store(site.store)
    install(enclave, bundle)
    seen = set()
    for seed in range(4):
        values = encode(bundle) | {"pairs": "augmentation", "seed": seed}
        reply = enclave.perform("train.embed", request(actions.Embed(**values, round=0)))
        ask = request(actions.Cluster(**values), student=reply.group("student"))
        reply = enclave.perform("query.cluster", ask)
        seen |= store.names("embedding/")
        centroids = np.eye(2, 8, dtype=reply.arrays["sum"].dtype)
        again = enclave.perform(
            "query.cluster", request(actions.Cluster(**values), centroids=centroids)
        )
        assert again.arrays["counts"].sum() == reply.config["examples"]
    assert 1 <= len(store.names("embedding/")) < len(seen) == 4


def describe(enclave, digest):
    message = request(actions.Describe(**COMMON, study_digest=digest * 64))
    enclave.perform("query.describe", message)


def test_another_study_of_the_same_name_finds_nothing_of_the_first(site, bundle):
    enclave, store = InProcessEnclave(site), Store(site.store)
    talk(enclave, bundle)
    kept = store.names("study/trial/")
    assert {"study/trial/selected", "study/trial/embedding"} < kept
    store.put("study/trial-2/selected", Records(config={"ids": []}))
    describe(enclave, "0")
    assert store.names("study/trial/") == kept
    describe(enclave, "1")
    assert store.names("study/") == {"study/trial/digest", "study/trial-2/selected"}


def test_a_selection_that_begins_forgets_the_one_before(site, bundle):
    enclave = InProcessEnclave(site)
    talk(enclave, bundle)
    scoring = actions.Score(**encode(bundle), selection=RADIANS)
    enclave.perform("train.score", request(scoring, centroids=np.eye(2, 8)))
    with pytest.raises(OrderError, match="selection"):
        enclave.perform("query.annotations", request(actions.Annotations(**COMMON)))


@pytest.mark.parametrize("oracle", [True, False])
def test_an_oracle_is_not_waited_for_where_it_knows_no_label(own, bundle, oracle):
    own = own.model_copy(update={"oracle": oracle})
    forget_labels(own.data.path)
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    everything = Selection(strategy="random", scope="per_site", budgets=(1.0,))
    enclave.perform("train.score", request(actions.Score(**encode(bundle), selection=everything)))
    enclave.perform("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS))
    pool = Store(own.store).images("pool")
    known = sum(row.label is not None for row in pool)
    assert 0 < known < len(pool)
    reply = enclave.perform("query.annotations", request(actions.Annotations(**COMMON)))
    expected = (known, known) if oracle else (0, len(pool))
    assert (reply.metrics["done"], reply.metrics["total"]) == expected


def test_first_rounds_are_clipped_from_what_every_site_starts_with(site, bundle, tmp_path):
    clip = 1e-3
    policy = tmp_path / "policy.toml"
    text = STANDARD.read_text(encoding="utf-8")
    policy.write_text(text.replace("numbers = 80_000_000", f"numbers = 80_000_000, clip = {clip}"))
    enclave = InProcessEnclave(site.model_copy(update={"policy": policy}))
    install(enclave, bundle)
    embed = actions.Embed(**encode(bundle) | {"pairs": "augmentation"}, round=0)
    everything = Selection(strategy="random", scope="per_site", budgets=(1.0,))
    enclave.perform("train.score", request(actions.Score(**encode(bundle), selection=everything)))
    enclave.perform("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS))
    for action, parameters, group in (
        ("train.embed", embed, "student"),
        ("train.classifier", fine_tuning(bundle), "weights"),
    ):
        reply = enclave.perform(action, request(parameters)).group(group)
        start = Records(dict(start_of(enclave.site, parameters, request(parameters)))).group(group)
        floats = [n for n, a in start.items() if a.dtype.kind == "f"]
        change = sum(((reply[n].astype(float) - start[n]) ** 2).sum() for n in floats) ** 0.5
        # Changes this small lose up to some percent of themselves to float32.
        assert reply.keys() == start.keys() and 0.5 * clip < change < 1.5 * clip
        assert enclave.ledger.entries()[-1]["privacy"][f"{group}/* clip"] == clip
