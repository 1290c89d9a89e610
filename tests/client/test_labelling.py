import numpy as np
import pytest

from sonofed_client.adaptation.ranking import keys
from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.forecast import asks, refusals
from sonofed_client.enclave.labelling import MAX_SCORINGS
from sonofed_client.enclave.policy import STANDARD, read_policy
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import (
    ConfigurationError,
    OrderError,
    ParameterError,
    PolicyError,
    StudyDeniedError,
)
from sonofed_common.contract.records import Records
from sonofed_common.contract.selection import WHOLE, budget_count
from sonofed_common.contract.study import Embedding, Reconstruction, Selection, Study
from sonofed_common.runtime import derive_seed
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

KEY = "7" * 64
COMMON = {"study": "trial", "seed": 3}
NO_CUTS = np.empty((0, 2), dtype=np.uint64)
TIED = Selection(combine="radians", budgets=(0.2,))


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital") / "north"
    return write_dataset(folder, SCANNERS["riverside"], 20, 5, 32, 0.4)


@pytest.fixture
def opened(tmp_path, hospital):
    def open_it(rule="", oracle=False):
        policy = tmp_path / "policy.toml"
        text = STANDARD.read_text(encoding="utf-8")
        policy.write_text(text.replace("marked_share = 1.0", rule))
        return InProcessEnclave(
            SiteSettings(
                name="north",
                store=tmp_path / "store",
                policy=policy,
                data=SiteData(kind="table", path=hospital, test_fraction=0.4),
                coordinator_key=KEY,
                auto_approve=(KEY,),
                oracle=oracle,
                threads=1,
            )
        )

    return open_it


def pool(enclave):
    return [row.id for row in enclave.site.store.images("pool")]


def score(enclave, selection=None, centroids=None, **changes):
    selection = selection or Selection(strategy="random", budgets=(0.2,), **changes)
    parameters = actions.Score(
        **COMMON,
        bundle="0" * 64,
        image_size=32,
        classifier="shufflenet_v2",
        pairs="augmentation",
        settings=Embedding(dimension=8),
        reconstruction=Reconstruction(),
        selection=selection,
    )
    arrays = {} if centroids is None else {"centroids": centroids}
    enclave.perform("train.score", request(parameters, **arrays))


def before(enclave, count):
    """The cut that selects so many images, as an honest coordinator finds it."""
    kept = enclave.site.store.get("study/trial/scores")
    draw, seed = kept.config["settings"]["draw"], kept.config["seed"]
    hashed = sorted(derive_seed(seed, draw, i) for i in pool(enclave))
    return np.array([[hashed[count] if count < len(hashed) else 2**64 - 1, 0]], dtype=np.uint64)


def mark(enclave, cuts):
    message = request(actions.Select(**COMMON, stage="mark"), cuts=cuts)
    return enclave.perform("train.select", message).config["selected"]


def none_marked(enclave):
    with pytest.raises(OrderError, match="selection"):
        enclave.perform("query.annotations", request(actions.Annotations(**COMMON)))


def test_a_policy_bounds_what_a_study_may_have_labelled(opened):
    enclave = opened("marked_share = 0.5")
    images = len(pool(enclave))
    most = budget_count(0.5, images)
    score(enclave)
    for too_many in (most + 1, images):
        with pytest.raises(PolicyError, match="labelled") as refused:
            mark(enclave, before(enclave, too_many))
        assert refused.value.rule == "actions.train.select.marked_share"
        none_marked(enclave)
    assert mark(enclave, before(enclave, most)) == [most]
    # Other scores mark other images: all of them together count.
    score(enclave, draw=1)
    with pytest.raises(PolicyError, match="labelled"):
        mark(enclave, before(enclave, most))


def test_each_hospitals_own_budget_bounds_what_a_study_marks(opened):
    enclave = opened()
    images = len(pool(enclave))
    score(enclave, scope="per_site")
    (marked,) = mark(enclave, NO_CUTS)
    assert 0 < marked < images
    score(enclave, scope="per_site")
    assert mark(enclave, NO_CUTS) == [marked]
    with pytest.raises(StudyDeniedError, match="exceed the budget"):
        # One other draw may fall on the same images by chance; not all of them do.
        for draw in range(1, 50):
            score(enclave, scope="per_site", draw=draw)
            mark(enclave, NO_CUTS)
    none_marked(enclave)


def test_a_simulation_may_be_repeated_in_one_store(opened):
    enclave = opened(oracle=True)
    for draw in range(MAX_SCORINGS + 1):
        score(enclave, scope="per_site", draw=draw)
        assert mark(enclave, NO_CUTS)


def test_few_images_are_not_marked_where_the_policy_has_a_smallest_count(opened):
    enclave = opened("min_count = 3")
    score(enclave)
    with pytest.raises(PolicyError, match="so few"):
        mark(enclave, before(enclave, 1))
    none_marked(enclave)
    assert mark(enclave, before(enclave, 3)) == [3]


def test_scores_have_one_selection(opened):
    enclave = opened()
    score(enclave)
    for _ in range(2):
        assert mark(enclave, before(enclave, 3)) == [3]
    with pytest.raises(ParameterError, match="score again"):
        mark(enclave, before(enclave, 2))
    score(enclave)
    assert mark(enclave, before(enclave, 2)) == [2]


def alike(enclave):
    """Let all images of the pool have the same embedding, and so the same scores."""
    rows = np.zeros((len(pool(enclave)), 8), dtype=np.float32)
    rows[:, 0] = 1
    kept = {"embedding": rows, "representativeness": np.full(len(rows), 0.5, dtype=np.float32)}
    enclave.site.store.put("study/trial/embedding", Records(kept))


def centroids(number):
    angle = 0.1 * (number + 1)
    return np.array([[np.cos(angle), np.sin(angle)] + [0] * 6, [0] * 7 + [1]])


def tie_breakers(enclave):
    scores = enclave.site.store.get("study/trial/scores").arrays
    total = scores["uncertainty"].astype(float) + scores["representativeness"]
    tied = int(keys(total)[0])
    question = actions.Histogram(**COMMON, column="identity", split=2**16, tied=tied)
    message = request(question, edges=WHOLE["identity"], cuts=NO_CUTS)
    counts = enclave.perform("query.histogram", message).arrays["counts"][0]
    assert counts.sum() == len(pool(enclave))
    return {int(place) for place in np.flatnonzero(counts)}


def test_what_breaks_ties_of_one_scoring_says_nothing_of_another(opened):
    enclave = opened()
    alike(enclave)
    found = []
    for number in (0, 1, 0):
        score(enclave, TIED, centroids(number))
        found.append(tie_breakers(enclave))
    assert found[0] == found[2] and found[0] != found[1]
    ids = {int(i, 16) >> 48 for i in pool(enclave)}
    assert ids not in found
    laboratory = opened(oracle=True)
    score(laboratory, TIED, centroids(1))
    assert tie_breakers(laboratory) == ids


def test_a_pool_is_scored_in_few_different_ways(opened):
    enclave = opened()
    alike(enclave)
    for number in range(MAX_SCORINGS):
        score(enclave, TIED, centroids(number))
    with pytest.raises(StudyDeniedError, match="takes no others"):
        score(enclave, TIED, centroids(MAX_SCORINGS))
    score(enclave, TIED, centroids(0))
    # What is bounded is a content, under whatever name and however often it is described.
    for digest in ("1", "2", "1"):
        described = request(actions.Describe(**COMMON, study_digest=digest * 64))
        enclave.perform("query.describe", described)
        alike(enclave)
        score(enclave, TIED, centroids(MAX_SCORINGS + (digest == "2")))
    assert len(enclave.site.store.names("labelling/")) == 3


def test_a_person_reads_how_many_images_may_be_labelled(tmp_path):
    def shown(share, scope):
        own = tmp_path / "policy.toml"
        text = STANDARD.read_text(encoding="utf-8")
        own.write_text(text.replace("marked_share = 1.0", f"marked_share = {share}"))
        values = {"strategy": "random", "budgets": (0.1, 0.25), "scope": scope}
        phases = ("enrol", "ship", "select", "annotate")
        cohort = {"sites": ["north"]}
        study = Study(name="trial", phases=phases, cohort=cohort, selection=values)
        policy = read_policy(own)
        (line,) = [line for line in asks(study, policy, 43) if "at most, whatever" in line]
        return line, refusals(study, policy)

    for share, scope, most in ((1.0, "global", 43), (0.5, "global", 22), (1.0, "per_site", 11)):
        line, refused = shown(share, scope)
        assert f": {most} of this site's 43" in line and not refused
    line, refused = shown(0.2, "per_site")
    assert ": 9 of this site's 43" in line and "marked_share = 0.2" in refused[0]


def test_only_the_selection_marks_images(tmp_path):
    own = tmp_path / "policy.toml"
    text = STANDARD.read_text(encoding="utf-8")
    other = '[actions."train.score"]'
    own.write_text(text.replace(other, f"{other}\nmarked_share = 0.5"))
    with pytest.raises(ConfigurationError, match="marked_share is of train"):
        read_policy(own)
