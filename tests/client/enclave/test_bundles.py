import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enclave_talk import (
    COMMON,
    NO_CUTS,
    RADIANS,
    blobs,
    encode,
    evaluation,
    fine_tuning,
    install,
    pooled,
    signed,
)

from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.store import Store
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.errors import BundleError, OrderError, ParameterError
from sonofed_common.contract.selection import WHOLE
from sonofed_common.contract.study import Reconstruction


def test_a_phase_before_what_it_needs_is_refused(site, bundle):
    enclave = InProcessEnclave(site)
    redraw = request(actions.Reconstruct(**pooled(bundle), settings=Reconstruction()))
    with pytest.raises(OrderError, match="ship"):
        enclave.perform("train.reconstruct", redraw)
    install(enclave, bundle)
    early = [
        ("train.embed", request(actions.Embed(**encode(bundle), round=0)), "reconstructions"),
        (
            "query.cluster",
            request(actions.Cluster(**encode(bundle)), centroids=np.eye(2, 8)),
            "embedding",
        ),
        (
            "train.score",
            request(actions.Score(**encode(bundle), selection=RADIANS), centroids=np.eye(2, 8)),
            "embedding",
        ),
        (
            "query.histogram",
            request(
                actions.Histogram(**COMMON, column="uncertainty", split=2),
                edges=WHOLE["uncertainty"],
                cuts=NO_CUTS,
            ),
            "scores",
        ),
        ("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS), "scores"),
        ("query.annotations", request(actions.Annotations(**COMMON)), "selection"),
        ("train.classifier", request(fine_tuning(bundle)), "selection"),
    ]
    for action, message, what in early:
        with pytest.raises(OrderError, match=what):
            enclave.perform(action, message)


def test_a_blob_that_was_tampered_with_is_refused_and_not_kept(site, bundle):
    enclave = InProcessEnclave(site)
    content = blobs(bundle)
    digest = max(content, key=lambda d: content[d].nbytes)
    content[digest] = content[digest].copy()
    content[digest][-1] ^= 1
    message = request(actions.Install(**COMMON), **signed(bundle), blobs=content)
    with pytest.raises(BundleError, match="damaged"):
        enclave.perform("train.install", message)
    reply = enclave.perform("query.missing", request(actions.Missing(**COMMON), **signed(bundle)))
    assert digest in reply.config["missing"]
    assert install(enclave, bundle).config == {"installed": bundle.id, "missing": []}


def test_a_manifest_that_was_tampered_with_is_refused(site, bundle):
    enclave = InProcessEnclave(site)
    parts = signed(bundle)
    changed = parts["manifest"].tobytes().replace(b'"image_size":32', b'"image_size":64')
    assert changed != parts["manifest"].tobytes()
    parts["manifest"] = np.frombuffer(changed, dtype=np.uint8)
    for action, parameters in (
        ("query.missing", actions.Missing(**COMMON)),
        ("train.install", actions.Install(**COMMON)),
    ):
        with pytest.raises(BundleError, match="signature"):
            enclave.perform(action, request(parameters, **parts))
        with pytest.raises(ParameterError, match="send both"):
            enclave.perform(action, request(parameters, manifest=parts["manifest"]))


def test_a_bundle_of_another_key_or_a_stranger_blob_is_refused(site, bundle, tmp_path):
    enclave = InProcessEnclave(site)
    provenance = bundle.manifest.provenance
    writer = BundleWriter(tmp_path / "b", name="other", kind="source", provenance=provenance)
    writer.add("a", b"a")
    foreign = writer.sign(Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match="another key"):
        install(enclave, foreign)
    stranger = {"0" * 64: np.zeros(3, dtype=np.uint8)}
    with pytest.raises(BundleError, match="not part"):
        enclave.perform(
            "train.install",
            request(actions.Install(**COMMON), **signed(bundle), blobs=stranger),
        )
    assert Store(site.store).names("b") == set()


def test_a_bundle_counts_as_installed_once_it_is_whole(site, bundle):
    enclave = InProcessEnclave(site)
    content = blobs(bundle)
    last = sorted(content)[-1]
    part = {d: b for d, b in content.items() if d != last}
    reply = enclave.perform(
        "train.install", request(actions.Install(**COMMON), **signed(bundle), blobs=part)
    )
    assert reply.config == {"installed": None, "missing": [last]}
    with pytest.raises(OrderError):
        enclave.perform("evaluate.classifier", request(evaluation(bundle)))
    reply = enclave.perform(
        "train.install",
        request(actions.Install(**COMMON), **signed(bundle), blobs={last: content[last]}),
    )
    assert reply.config == {"installed": bundle.id, "missing": []}
    assert (
        enclave.perform("evaluate.classifier", request(evaluation(bundle))).config["examples"] > 0
    )


def test_a_bundle_without_diffusion_says_so(site, bundle, coordinator, tmp_path):
    enclave = InProcessEnclave(site)
    provenance = bundle.manifest.provenance
    writer = BundleWriter(tmp_path / "b", name="bare", kind="source", provenance=provenance)
    writer.add("a", b"a")
    bare = writer.sign(coordinator)
    install(enclave, bare)
    with pytest.raises(ParameterError, match="no diffusion"):
        enclave.perform(
            "train.reconstruct",
            request(actions.Reconstruct(**pooled(bare), settings=Reconstruction())),
        )
