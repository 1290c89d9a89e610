"""The laboratory: lays out the data, the source's bundle and the sites of a simulated study."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from sonofed_client.enclave.opening import open_enclave
from sonofed_client.enclave.policy import policy_text_of_all
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.contract.study import Study
from sonofed_common.data.readers import read
from sonofed_common.runtime import Events, derive_seed, link_atomically, write_atomically
from sonofed_common.security import load_or_create_signing_key, public_hex, sha256
from sonofed_server.source.training import train_source
from sonofed_server.study.source import write_source
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.locks import alone
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS
from sonofed_simulations.scenarios.scenario import Hospital, PhantomData, Scenario

PHANTOM_SIZE = 128


@dataclass(frozen=True)
class Laboratory:
    """A folder that holds everything a scenario needs, made once and reused.

    Attributes
    ----------
    scenario : Scenario
        What is simulated.
    root : Path
        Holds ``phantoms/``, ``source/``, ``sites/``, ``branches/`` and the studies.
    data : Path or None
        Folder of the real data sets.
    events : Events
        Progress.
    """

    scenario: Scenario
    root: Path
    data: Path | None
    events: Events

    def __post_init__(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise ConfigurationError(f"{self.root.name} is a file; name a folder for the output")

    @property
    def key(self) -> Path:
        """The simulated coordinator's signing key."""
        return self.root / "coordinator.pem"

    def alone(self, part: str = "laboratory") -> AbstractContextManager[None]:
        """Hold a part of the folder, whose path inside it is given; see `locks.alone`."""
        return alone(self.root / f"{part}.lock", self.events)

    def prepare_source(self, folder: Path | None = None) -> Path:
        """Train the source's models unless that is done, and return the bundle.

        Parameters
        ----------
        folder : Path, optional
            Of the bundle; default ``source/`` of the laboratory.

        Raises
        ------
        DataMissingError
            The scenario uses real data sets and one of them is not there.
        """
        self.check_data()
        if self.scenario.source_phantoms is not None:
            self._phantoms("source", self.scenario.source_phantoms)
        key = load_or_create_signing_key(self.key)
        folder = folder or self.root / "source"
        return train_source(self.scenario.source, self.source_data, folder, key, self.events)

    @property
    def source_data(self) -> Path:
        """Folder that the source's data path starts from."""
        if self.scenario.source_phantoms is not None or self.data is None:
            return self.root / "phantoms"
        return self.data

    def prepare_sites(self, seed: int, folder: Path | None = None) -> list[Path]:
        """Write and open every site, so that bad data is met before a study starts.

        Parameters
        ----------
        seed : int
            Seed of the patient-level splits into pool and test images.
        folder : Path, optional
            Where the sites' stores are; default ``sites/`` of the laboratory.

        Returns
        -------
        list of Path
            Settings files in the order of the cohort.

        Raises
        ------
        DataMissingError
            The scenario uses real data sets and one of them is not there.
        """
        self.check_data()
        paths = []
        names = self.scenario.hospitals
        for name in self.events.track(names, "hospitals", len(names)):
            settings, path = self.site(name, seed, folder)
            values = settings.model_dump(mode="json", exclude_none=True)
            if settings.policy is not None:
                write_atomically(settings.policy, policy_text_of_all().encode())
            write_atomically(path, tomli_w.dumps(values).encode())
            open_enclave(str(path))
            paths.append(path)
        return paths

    def site(self, name: str, seed: int, folder: Path | None = None) -> tuple[SiteSettings, Path]:
        """Settings of one site as the scenario is now, and the file that `prepare_sites` writes."""
        folder = (folder or self.root / "sites").resolve()
        coordinator = public_hex(load_or_create_signing_key(self.key))
        shares = "synthesise" in self.scenario.study.phases
        settings = SiteSettings(
            name=name,
            store=folder / name / "store",
            data=self._site_data(name, self.scenario.hospitals[name], seed),
            coordinator_key=coordinator,
            image_key=sha256(f"{self.scenario.name} {name}".encode()),
            oracle=True,
            auto_approve=(coordinator,),
            policy=folder / name / "policy.toml" if shares else None,
            threads=self.scenario.threads,
        )
        return settings, folder / name / f"site-{seed}.toml"

    def workspace(self, study: Study, bundle: Path, root: Path) -> Workspace:
        """Lay out the workspace of a study; what the same study saved is kept, to resume it.

        All studies of the laboratory share the segmenters that they train at the coordinator.
        """
        root.mkdir(parents=True, exist_ok=True)
        workspace = Workspace(root.resolve())
        values = study.model_dump(mode="json", exclude_none=True)
        write_atomically(workspace.study, tomli_w.dumps(values).encode())
        shutil.copyfile(self.key, workspace.key)
        workspace.key.chmod(0o600)
        write_source(workspace, self.scenario.source, self.source_data)
        shared = self.root / "branches"
        shared.mkdir(exist_ok=True)
        link_atomically(workspace.bundle, bundle)
        if workspace.checkpoint.exists():
            identity = identity_of(study, Bundle.open(bundle, check_blobs=False).id)
            if not StudyState.load(workspace.checkpoint, identity).facts:
                # What another scenario left in this folder.
                workspace.checkpoint.unlink()
        link_atomically(workspace.cache, shared)
        return workspace

    def write_phantoms(self) -> None:
        """Write the phantoms of the source and of the hospitals, each in a folder of its name."""
        wanted = {name: hospital.phantoms for name, hospital in self.scenario.hospitals.items()}
        for name, phantoms in {"source": self.scenario.source_phantoms, **wanted}.items():
            if phantoms is not None:
                self._phantoms(name, phantoms)

    def check_data(self) -> None:
        """Look whether the real data sets are there.

        Raises
        ------
        DataMissingError
            The scenario uses them and one is not there.
        """
        if not self.scenario.needs_data:
            return
        if self.data is None:
            raise DataMissingError(
                f"scenario '{self.scenario.name}' uses real data; give its folder with --data"
            )
        source = self.scenario.source.data
        wanted = [] if self.scenario.source_phantoms is not None else [(source.kind, source.path)]
        wanted += [(h.kind, h.path) for h in self.scenario.hospitals.values() if h.kind is not None]
        for kind, path in wanted:
            if not (self.data / path).exists():
                # The reader knows best what it misses.
                read(kind, self.data / path)

    def _site_data(self, name: str, hospital: Hospital, seed: int) -> SiteData:
        if hospital.phantoms is not None:
            path, kind = self._phantoms(name, hospital.phantoms), "table"
        else:
            assert self.data is not None and hospital.kind is not None
            path, kind = (self.data / hospital.path).resolve(), hospital.kind
        return SiteData(
            kind=kind,
            path=path,
            devices=hospital.devices,
            test_fraction=hospital.test_fraction,
            split_seed=seed,
        )

    def _phantoms(self, name: str, wanted: PhantomData) -> Path:
        folder = write_dataset(
            self.root / "phantoms" / name,
            SCANNERS[wanted.scanner],
            wanted.images,
            derive_seed(self.scenario.name, name) % 2**31,
            PHANTOM_SIZE,
            wanted.malignant_fraction,
            wanted.anatomy,
            self.events,
        )
        return folder.resolve()
