"""The labelled source data at the coordinator: what trains branches and calibrates them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tomli_w

from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import Events, write_atomically
from sonofed_server.source.segmentation_data import SegmentationSet, load_segmentation
from sonofed_server.source.settings import SegmenterTraining, SourceSettings
from sonofed_server.study.workspace import Workspace


class SourceFile(Model):
    """``source.toml`` of a workspace."""

    root: Path
    settings: SourceSettings


@dataclass(frozen=True)
class StudySource:
    """What a study knows of its source.

    Attributes
    ----------
    settings : SourceSettings
        Those that trained the study's source bundle.
    segmenter : SegmenterTraining
        Their section ``segmentation``.
    data : SegmentationSet
        The labelled images, split as they were for the bundle.
    """

    settings: SourceSettings
    segmenter: SegmenterTraining
    data: SegmentationSet


def write_source(workspace: Workspace, settings: SourceSettings, root: Path) -> None:
    """Tell a study where its labelled source data is: the phases at the coordinator need it.

    Parameters
    ----------
    workspace : Workspace
        Gets the file ``source.toml``.
    settings : SourceSettings
        Those that trained the study's source bundle.
    root : Path
        Data folder that the settings' paths start from.
    """
    values = {
        "root": str(root.resolve()),
        "settings": settings.model_dump(mode="json", exclude_none=True),
    }
    write_atomically(workspace.source, tomli_w.dumps(values).encode())


def check_trained(settings: SourceSettings, digest: str, name: str) -> None:
    """Refuse settings that are not those that trained a study's source bundle.

    Parameters
    ----------
    settings : SourceSettings
        The study is to use.
    digest : str
        SHA-256 of those of the bundle, from its provenance: with others, images held out here
        might have been trained on there.
    name : str
        Of the settings' file.

    Raises
    ------
    ConfigurationError
        They are others.
    """
    if settings.digest() != digest:
        raise ConfigurationError(
            f"{name} holds other settings than those that trained the study's source bundle; "
            "copy those, or train the source again"
        )


def read_study_source(workspace: Workspace, digest: str, events: Events) -> StudySource:
    """Read ``source.toml`` and load the data that it names.

    Parameters
    ----------
    workspace : Workspace
        Of the study.
    digest : str
        See `check_trained`.
    events : Events
        Gets the counts.

    Raises
    ------
    ConfigurationError
        The file is absent, does not validate, has no section ``segmentation``, or holds other
        settings than those of the bundle.
    DataMissingError, OneClassError
        See `load_segmentation`.
    """
    path = workspace.source
    if not path.exists():
        raise ConfigurationError(
            f"{path} is missing: this study trains on labelled source data at the coordinator; "
            "write the file with the data's root and the source's settings"
        )
    file = validate(SourceFile, read_toml(path), path.name)
    if file.settings.segmentation is None:
        raise ConfigurationError(f"{path.name}: the settings have no section 'segmentation'")
    check_trained(file.settings, digest, path.name)
    data = load_segmentation(file.settings, file.root, events)
    return StudySource(file.settings, file.settings.segmentation, data)
