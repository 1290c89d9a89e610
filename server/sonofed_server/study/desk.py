"""What a coordinator wants of each study, and what became of it: files in the study's workspace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from sonofed_common.contract.bundle import MANIFEST, Bundle
from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import ConfigurationError, EngineError
from sonofed_common.contract.fit import bundle_misfit
from sonofed_common.contract.segmentation import needing_source_data
from sonofed_common.contract.study import Study, check_site_name, read_study
from sonofed_common.runtime import link_atomically, write_atomically
from sonofed_common.security import load_signing_key, public_hex, sha256
from sonofed_common.supervision.family import Identity
from sonofed_server.provisioning.enrolment import records
from sonofed_server.provisioning.project import Coordinator
from sonofed_server.study.failure import Failure, read_failure
from sonofed_server.study.workspace import StudyState, Workspace, identity_of

State = Literal["waiting", "running", "stopped", "failed", "completed"]

Source = tuple[Path, Path]
"""The source's file and the folder of its data, for a study that works on them."""


class Wish(Model):
    """Whether a study shall run, and how often it was begun in vain.

    Attributes
    ----------
    wanted : {"run", "stop", "nothing"}
        ``nothing`` leaves alone what runs, and begins nothing.
    attempts : int
        Starts since the study last finished a round.
    checkpoint : float
        Time of the checkpoint at the last start; a later one says that it got on.
    """

    wanted: Literal["run", "stop", "nothing"] = "run"
    attempts: int = 0
    checkpoint: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A study on the desk."""

    workspace: Workspace

    @property
    def name(self) -> str:
        """The study's name."""
        return self.workspace.root.name

    @property
    def wish(self) -> Wish:
        """What is wanted of it."""
        try:
            return Wish.model_validate_json(self._wish.read_bytes())
        except (OSError, ValidationError):
            return Wish(wanted="nothing")

    def want(self, wish: Wish) -> None:
        """Say what is wanted of it."""
        write_atomically(self._wish, wish.model_dump_json().encode())

    @property
    def failure(self) -> Failure | None:
        """The error that ended it, unless it is one after which it is begun again."""
        reason = read_failure(self.workspace)
        return None if reason is None or reason.error == EngineError.code else reason

    @property
    def checkpoint(self) -> float:
        """When its last round was saved."""
        try:
            return self.workspace.checkpoint.stat().st_mtime
        except OSError:
            return 0.0

    @property
    def process(self) -> Identity | None:
        """The process that works on it, or that last did."""
        try:
            return Identity.model_validate_json(self.workspace.process.read_bytes())
        except (OSError, ValidationError):
            return None

    @property
    def state(self) -> State:
        """Where it stands; what is running is seen by its process, so a death shows at once."""
        process = self.process
        if process is not None and process.alive:
            return "running"
        if self.workspace.results.exists():
            return "completed"
        if self.failure is not None:
            return "failed"
        return "waiting" if self.wish.wanted == "run" else "stopped"

    @property
    def _wish(self) -> Path:
        return self.workspace.root / "wish.json"


def entries(coordinator: Coordinator) -> list[Entry]:
    """Return all studies of a coordinator, by name."""
    found = sorted(p.parent for p in coordinator.studies.glob("*/study.toml"))
    return [Entry(Workspace(root)) for root in found]


def find(coordinator: Coordinator, name: str) -> Entry:
    """Return a study by its name.

    Raises
    ------
    ConfigurationError
        There is none.
    """
    for entry in entries(coordinator):
        if entry.name == name:
            return entry
    raise ConfigurationError(f"there is no study {name[:64]!r}; 'study list' names those there are")


def check(coordinator: Coordinator, study: Study, bundle: Path, source: Source | None) -> list[str]:
    """Check before a study starts what can be known before.

    Parameters
    ----------
    coordinator : Coordinator
        Of the project.
    study : Study
        Which is to start.
    bundle : Path
        Folder of the source's signed bundle.
    source : pair of Path or None
        See `Source`.

    Returns
    -------
    list of str
        What was found to be right.

    Raises
    ------
    ConfigurationError
        A hospital of the cohort is not enrolled or its record is damaged, the name is no folder's,
        the bundle lacks what the study works with, or the study needs the source's data and the
        source is not named, or another one.
    BundleError
        The bundle is not signed by this coordinator, or incomplete.
    DataMissingError, SiteEmptyError, DataUnreadableError
        The source's data is not there, or none of it can be read.
    """
    try:
        check_site_name(study.name)
    except ValueError:
        raise ConfigurationError(
            f"the study's name {study.name[:64]!r} is no plain name; use letters, digits, _ . -"
        ) from None
    known, damaged = records(coordinator)
    for site in study.cohort.sites:
        if site in damaged:
            raise ConfigurationError(damaged[site])
    enrolled = {site for site, record in known.items() if not record.revoked}
    if absent := [site for site in study.cohort.sites if site not in enrolled]:
        raise ConfigurationError(f"not enrolled: {', '.join(absent)}; enrol them first")
    key = public_hex(load_signing_key(coordinator.signing_key))
    opened = Bundle.open(bundle, key)
    if (reason := bundle_misfit(study, opened.manifest)) is not None:
        raise ConfigurationError(reason)
    if source is None and (needing := needing_source_data(study)):
        raise ConfigurationError(
            f"phase '{needing[0]}' works on the source's labelled images; name the source's file "
            "by --source, and the folder of its data by --data"
        )
    return [
        f"study {study.name}: phases {', '.join(study.phases)}",
        f"cohort: {', '.join(study.cohort.sites)}; quorum {study.cohort.smallest}, all enrolled",
        f"bundle {opened.manifest.name} ({opened.id[:12]}): complete, signed by this coordinator",
        *([] if source is None else [_check_source(source, opened)]),
    ]


def _check_source(source: Source, bundle: Bundle) -> str:
    # The other commands need no torch, and start faster without.
    from sonofed_server.source.data import read_data
    from sonofed_server.source.settings import read_source
    from sonofed_server.study.source import check_trained

    file, data = source
    settings = read_source(file)
    check_trained(settings, bundle.manifest.provenance.settings, str(file))
    reading = read_data(settings, data)
    return f"source {settings.name}: trained this bundle; {len(reading.samples)} images"


def put_on(coordinator: Coordinator, file: Path, bundle: Path, source: Source | None) -> Entry:
    """Lay out the workspace of a study; the same study again is the same entry.

    Parameters
    ----------
    coordinator : Coordinator
        Of the project.
    file : Path
        The study, TOML.
    bundle : Path
        Folder of the source's signed bundle, which stays where it is.
    source : pair of Path or None
        See `Source`.

    Raises
    ------
    ConfigurationError, BundleError, DataMissingError, SiteEmptyError, DataUnreadableError
        See `check`; or another study of this name is there, or this one with another bundle.
    """
    study = read_study(file)
    check(coordinator, study, bundle, source)
    workspace = Workspace(coordinator.studies / study.name)
    if workspace.study.exists() and read_study(workspace.study).digest() != study.digest():
        raise ConfigurationError(
            f"another study is named {study.name} here; choose another name for this one"
        )
    if _began_with_another(workspace, study, sha256((bundle / MANIFEST).read_bytes())):
        raise ConfigurationError(
            f"study {study.name} began with another bundle; name that one, or choose another name "
            "for a study with this one"
        )
    workspace.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    link_atomically(workspace.bundle, bundle)
    link_atomically(workspace.key, coordinator.signing_key)
    if source is not None:
        from sonofed_server.source.settings import read_source
        from sonofed_server.study.source import write_source

        write_source(workspace, read_source(source[0]), source[1])
    # The study's file makes it an entry: it comes last.
    write_atomically(workspace.study, file.read_bytes())
    return Entry(workspace)


def check_bundle(entry: Entry) -> None:
    """Check before a study goes on that its bundle is the one that it began with.

    Raises
    ------
    ConfigurationError
        It is another.
    BundleError
        It is gone.
    """
    bundle = Bundle.open(entry.workspace.bundle, check_blobs=False)
    if _began_with_another(entry.workspace, read_study(entry.workspace.study), bundle.id):
        folder = entry.workspace.bundle.resolve()
        raise ConfigurationError(
            f"study {entry.name} began with another bundle than {folder} holds now; put that one "
            "back, or run a study of another name with this one"
        )


def _began_with_another(workspace: Workspace, study: Study, bundle: str) -> bool:
    # The folder may have got another bundle since, or be gone.
    if workspace.checkpoint.exists():
        identity = identity_of(study, bundle)
        return not StudyState.load(workspace.checkpoint, identity).facts
    linked = workspace.bundle / MANIFEST
    return linked.exists() and sha256(linked.read_bytes()) != bundle
