"""Jobs: what is kept of a request, when, and until when."""

import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from sonofed_client.enclave.jobs import Jobs, State
from sonofed_client.enclave.parts import receive, send
from sonofed_client.enclave.store import Store
from sonofed_common.contract.errors import StudyWaitingError
from sonofed_common.contract.records import Records

WAIT_SECONDS = 60.0


class Site:
    """Work that goes on until it is let go."""

    def __init__(self):
        self.begun, self.free = threading.Semaphore(0), threading.Semaphore(0)
        self.refuses = False

    def admit(self, action, request):
        self.confirm()
        return self.confirm

    def confirm(self):
        if self.refuses:
            raise StudyWaitingError("the study waits")

    def perform(self, action, request):
        self.begun.release()
        assert self.free.acquire(timeout=WAIT_SECONDS)
        return request


@pytest.fixture
def site():
    return Site()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def jobs(site, store):
    return Jobs(site, store, lambda: "images")


def asked(action="train.embed", **config):
    return receive(send(Records(config=config), action))


def ended(jobs, job):
    changes, until = 0, time.monotonic() + WAIT_SECONDS
    while not job.state.over and time.monotonic() < until:
        changes = jobs.wait(job, changes, 1.0)
    return job.state


def test_nothing_of_a_refused_request_is_written(jobs, store, site):
    site.refuses = True
    with pytest.raises(StudyWaitingError):
        jobs.submit(asked())
    assert not store.names("queue/") and not any(store.folder.glob("blobs/*/*"))
    # One that is over in moments is refused by its work.
    assert jobs.submit(asked("query.missing")).state is State.WAITING


def test_no_work_begins_before_the_start(jobs, site):
    job = jobs.submit(asked())
    assert not site.begun.acquire(timeout=0.2) and job.state is State.WAITING
    jobs.start()
    site.free.release()
    assert ended(jobs, job) is State.DONE


def test_a_cancelled_job_leaves_the_record_of_the_next_one_alone(jobs, store, site):
    jobs.start()
    first = jobs.submit(asked())
    assert site.begun.acquire(timeout=WAIT_SECONDS)
    jobs.cancel(first)
    assert not store.names("queue/")
    second = jobs.submit(asked())
    site.free.release()
    assert site.begun.acquire(timeout=WAIT_SECONDS) and second.state is State.RUNNING
    # Killed now, it is taken up again.
    assert len(store.names("queue/")) == 2
    again = Jobs(site, store, lambda: "images")
    assert again.find(second.id).state is State.WAITING
    site.free.release()
    assert ended(jobs, second) is State.DONE and not store.names("queue/")


def test_a_job_that_waits_holds_what_came_and_no_more(jobs):
    tracemalloc.start()
    received = asked("query.missing", lists=[[] for _ in range(20_000)])
    size = len(received.file)
    job = jobs.submit(received)
    del received
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert job.state is State.WAITING and len(job.request) == size and held < size


@pytest.mark.parametrize("action", ["train.embed", "query.missing"])
def test_a_reply_stays_where_the_study_was_denied_after_the_work(jobs, site, action):
    jobs.start()
    site.free.release()
    job = jobs.submit(asked(action))
    assert ended(jobs, job) is State.DONE
    site.refuses = True
    if action == "train.embed":
        with pytest.raises(StudyWaitingError):
            jobs.submit(asked(action))
    with pytest.raises(StudyWaitingError):
        jobs.take(job.id)
    site.refuses = False
    assert jobs.take(job.id) is None


def test_progress_is_told_in_steps_of_ten_percent(jobs, site):
    jobs.start()
    told = {}
    for total in (7, 13):
        job = jobs.submit(asked(total=total))
        assert site.begun.acquire(timeout=WAIT_SECONDS)
        told[total] = []
        for done in range(total + 1):
            jobs.progress({"event": "progress", "done": done, "total": total})
            told[total].append(job.percent)
        site.free.release()
        ended(jobs, job)
    assert told[7] == [0, 10, 20, 40, 50, 70, 80, 100]
    assert all(percent % 10 == 0 for percent in told[13]) and told[13][6] == 40


def test_a_reply_is_taken_once(jobs, site):
    jobs.start()
    site.free.release()
    job = jobs.submit(asked("query.missing", n=1))
    assert ended(jobs, job) is State.DONE
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(jobs.take, [job.id] * 8))
    assert [r.config for r in replies if r is not None] == [{"n": 1}]
    assert jobs.take("no job") is None
