"""The error catalogue: every failure a user can meet, with its code and exit code."""

from __future__ import annotations

from typing import ClassVar


class SonoFedError(Exception):
    """A failure that the user can act on.

    Parameters
    ----------
    message : str
        One clear sentence: what, where, what to do. It may cross the network, so it never holds
        an image, a file name, a patient id, an embedding or a single score of a hospital.

    Attributes
    ----------
    code : str
        Stable name in the catalogue.
    exit_code : int
        Exit status of the command that met it.
    """

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class DataMissingError(SonoFedError):
    """A data folder or one of its required files does not exist."""

    code, exit_code = "data-missing", 10


class SiteEmptyError(SonoFedError):
    """A site has no usable image."""

    code, exit_code = "site-empty", 11


class OneClassError(SonoFedError):
    """Labelled data of one class only, where at least two are needed."""

    code, exit_code = "one-class", 12


class DataUnreadableError(SonoFedError):
    """No file of a set could be read (single bad files are skipped and reported)."""

    code, exit_code = "data-unreadable", 13


class ConfigurationError(SonoFedError):
    """A study, source, site or scenario file does not validate."""

    code, exit_code = "configuration", 20


class BundleError(SonoFedError):
    """A bundle is incomplete, tampered with, or signed by somebody else."""

    code, exit_code = "bundle", 30


class UnknownActionError(SonoFedError):
    """A site was asked for something it does not do."""

    code, exit_code = "unknown-action", 40


class ParameterError(SonoFedError):
    """An action came with parameters or records that do not validate."""

    code, exit_code = "parameters", 41


class OrderError(SonoFedError):
    """An action came before what it needs (for example selection before embedding)."""

    code, exit_code = "order", 42


class CollapseError(SonoFedError):
    """Training collapsed to a constant solution."""

    code, exit_code = "collapse", 50


class DivergenceError(SonoFedError):
    """Training produced a loss or weights that are not finite."""

    code, exit_code = "divergence", 51


class QuorumError(SonoFedError):
    """Fewer sites than the quorum answered before the deadline."""

    code, exit_code = "quorum", 60


class EngineError(SonoFedError):
    """The federation runtime could not be started or died."""

    code, exit_code = "engine", 70


class PolicyError(SonoFedError):
    """A hospital's egress policy refuses what was asked, or what would have left.

    Attributes
    ----------
    rule : str
        Clause of the policy, for the hospital's ledger; it does not cross the network.
    """

    code, exit_code = "policy", 80

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class StudyWaitingError(SonoFedError):
    """A hospital has not yet decided on a study; ask again later."""

    code, exit_code = "study-waiting", 81


class StudyDeniedError(SonoFedError):
    """A hospital refuses a study, or a request goes beyond the study that it approved."""

    code, exit_code = "study-denied", 82


class LedgerError(SonoFedError):
    """A ledger was changed, cut or cannot be written."""

    code, exit_code = "ledger", 83


class StoreError(SonoFedError):
    """A site's store is damaged, full, or not to be opened with the master key that was given."""

    code, exit_code = "store", 84


class EnrolmentError(SonoFedError):
    """A request or a kit is not what it says, is not signed by whom it names, or is not wanted."""

    code, exit_code = "enrolment", 90


class DeploymentError(SonoFedError):
    """A process of the deployment runs already, does not run, or cannot be started."""

    code, exit_code = "deployment", 91


CATALOGUE: dict[str, type[SonoFedError]] = {
    error.code: error
    for error in (
        SonoFedError,
        DataMissingError,
        SiteEmptyError,
        OneClassError,
        DataUnreadableError,
        ConfigurationError,
        BundleError,
        UnknownActionError,
        ParameterError,
        OrderError,
        CollapseError,
        DivergenceError,
        QuorumError,
        EngineError,
        PolicyError,
        StudyWaitingError,
        StudyDeniedError,
        LedgerError,
        StoreError,
        EnrolmentError,
        DeploymentError,
    )
}


def error_from_code(code: str, message: str) -> SonoFedError:
    """Rebuild an error that crossed a process or network border.

    Parameters
    ----------
    code : str
        A code of the catalogue; an unknown one gives the base class.
    message : str
        The sentence that came with it.
    """
    return CATALOGUE.get(code, SonoFedError)(message)
