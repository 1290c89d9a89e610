"""Describe the site; receive and check bundles."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from sonofed_client.enclave.site import Site
from sonofed_common.contract.actions import Describe, Install, Missing
from sonofed_common.contract.bundle import Manifest, check_blob, verify_manifest
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Records
from sonofed_common.security import sha256

ROUNDING = 10


def describe(site: Site, parameters: Describe, request: Records) -> Records:
    """Name, versions, device and counts rounded to tens: enough to plan a study.

    What another study under the same name left here goes: none of it belongs to this one.
    """
    kept = site.study_artifact(parameters.study, "digest")
    before = site.store.get(kept)
    if before is None or before.config["digest"] != parameters.study_digest:
        site.store.remove(site.study_artifact(parameters.study, ""))
        site.store.put(kept, Records(config={"digest": parameters.study_digest}))
    pool, test = (len(site.store.images(part)) for part in ("pool", "test"))
    return Records(
        config={
            "site": site.settings.name,
            "study": parameters.study_digest,
            "snapshot": site.snapshot,
            "versions": {
                "python": platform.python_version(),
                "torch": version("torch"),
                "sonofed": version("sonofed"),
            },
            "device": torch.cuda.get_device_name() if site.device.type == "cuda" else "cpu",
        },
        metrics={"pool": _rounded(pool), "test": _rounded(test)},
    )


def _rounded(count: int) -> int:
    return max(round(count, -1), ROUNDING) if count else 0


def missing(site: Site, parameters: Missing, request: Records) -> Records:
    """Digests of a bundle that this site lacks, after its signature was checked."""
    return Records(config={"missing": _lacking(site, _manifest(site, request))})


def install(site: Site, parameters: Install, request: Records) -> Records:
    """Check and keep blobs; the bundle counts as installed once none is missing."""
    manifest = _manifest(site, request)
    for digest, blob in request.group("blobs").items():
        data = blob.tobytes()
        check_blob(manifest, digest, data)
        site.store.put_bytes(f"blob/{digest}", data)
    lacking = _lacking(site, manifest)
    bundle = sha256(request.arrays["manifest"].tobytes())
    if not lacking:
        arrays = {name: request.arrays[name] for name in ("manifest", "signature")}
        site.store.put(f"bundle/{bundle}", Records(arrays))
    return Records(config={"installed": None if lacking else bundle, "missing": lacking})


def _manifest(site: Site, request: Records) -> Manifest:
    if not {"manifest", "signature"} <= request.arrays.keys():
        raise ParameterError("a bundle comes with its manifest and signature; send both")
    return verify_manifest(
        request.arrays["manifest"].tobytes(),
        request.arrays["signature"].tobytes(),
        site.settings.coordinator_key,
    )


def _lacking(site: Site, manifest: Manifest) -> list[str]:
    have = {name.removeprefix("blob/") for name in site.store.names("blob/")}
    return sorted(manifest.missing(have))
