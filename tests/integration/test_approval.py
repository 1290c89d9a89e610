import tomllib

import pytest
import tomli_w

from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.studies import Studies
from sonofed_client.enclave.wall import open_ledger, open_studies
from sonofed_client.settings import read_site
from sonofed_common.contract.errors import StudyDeniedError, StudyWaitingError
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events
from sonofed_common.security import load_or_create_signing_key, public_hex
from sonofed_simulations.engines.inline import run_inline


@pytest.fixture
def laid_out(laboratory, tmp_path):
    """A short study, and two sites of which the first wants to be asked."""

    def make(deadline):
        values = laboratory.scenario.study.model_dump(mode="json") | {"phases": ["enrol", "ship"]}
        values["cohort"]["deadline_seconds"] = deadline
        study = Study.model_validate(values)
        sites = laboratory.prepare_sites(0, tmp_path / "sites")
        settings = tomllib.loads(sites[0].read_text())
        settings |= {"oracle": False, "auto_approve": []}
        sites[0].write_text(tomli_w.dumps(settings))
        workspace = laboratory.workspace(study, laboratory.root / "source", tmp_path / "study")
        return workspace, sites, study

    return make


def deciding(site, study, state):
    """Events by which a person at the site decides once the study waits there."""

    def decide(event):
        if event["event"] == "study-waiting":
            settings = read_site(site)
            studies = open_studies(settings, open_ledger(open_store(settings)))
            known = studies.one(study.name)
            assert known.content == study
            decide = studies.approve if state == "approved" else studies.deny
            decide(known.key)

    return Events(listeners=[decide])


def test_a_study_waits_for_a_hospital_and_goes_on_once_it_approves(laid_out):
    workspace, sites, study = laid_out(20.0)
    results = run_inline(workspace, sites, deciding(sites[0], study, "approved"))
    assert [phase.name for phase in results.phases] == ["enrol", "ship"]
    assert results.missing_sites == ()
    text = workspace.events.read_text()
    assert text.count('"study-waiting"') == 1


def test_a_hospital_that_denies_is_missing_at_once(laid_out):
    workspace, sites, study = laid_out(60.0)
    with pytest.raises(StudyDeniedError, match="below the quorum"):
        run_inline(workspace, sites, deciding(sites[0], study, "denied"))


def test_a_hospital_that_does_not_decide_is_missing_at_the_deadline(laid_out, laboratory):
    workspace, sites, _ = laid_out(3.0)
    with pytest.raises(StudyWaitingError, match="1 of 2 sites"):
        run_inline(workspace, sites, Events())
    key = public_hex(load_or_create_signing_key(laboratory.key))
    (known,) = Studies(read_site(sites[0]).store, key).known()
    assert known.state == "waiting"
