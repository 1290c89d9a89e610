"""Jobs: what an enclave was asked to do, one after the other, whoever waits for it and dies."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.metadata import version
from queue import SimpleQueue

from structlog.contextvars import bind_contextvars, clear_contextvars

from sonofed_client.enclave.enclave import JOBS
from sonofed_client.enclave.interface import Worker
from sonofed_client.enclave.parts import Received, read
from sonofed_client.enclave.store import Store
from sonofed_common.contract.errors import EngineError, SonoFedError
from sonofed_common.contract.names import ACTION_NAMES
from sonofed_common.contract.records import Records
from sonofed_common.log import named
from sonofed_common.runtime import Event
from sonofed_common.security import sha256

LONG = JOBS | {"train.reconstruct", "train.score", "train.synthesise"}
"""Actions that a restarted enclave takes up by itself; the others are over in moments, and whoever
waits for one asks again."""

ATTEMPTS = 3
"""A job that was running this often when the enclave died is not taken up again: it may be why.
What it had finished stays, so that a new request goes on from there."""

WAITING_JOBS = 256
KEPT_JOBS = 1000
KEPT_BYTES = 1024**3
QUEUE = "queue/"
VERSION = version("sonofed")

log = logging.getLogger(__name__)


class State(IntEnum):
    """States of a job, as numbered in the protocol."""

    UNKNOWN = 0
    WAITING = 1
    RUNNING = 2
    DONE = 3
    FAILED = 4

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self not in (State.WAITING, State.RUNNING)


@dataclass(eq=False)
class Job:
    """One job.

    Attributes
    ----------
    id : str
        Hash of the action, the request and the site's images.
    action : str
        As asked.
    record : str
        Name of its own in the store; a job that is asked again has another.
    request : memoryview or None
        As it came: what it holds is what was counted. None once it runs, or if the store has it.
    state : State
        Where it is.
    percent : int
        Share of the present task that is done, rounded down to tens.
    reply : Records or None
        What may leave; gone once it was taken, for the ledger counts each time that it leaves.
    confirm : callable or None
        Refuses the reply where the hospital has changed its mind since.
    error : SonoFedError or None
        Why it failed.
    """

    id: str
    action: str
    record: str
    request: memoryview | None
    state: State = State.WAITING
    percent: int = 0
    reply: Records | None = None
    confirm: Callable[[], None] | None = None
    error: SonoFedError | None = None
    cancelled: bool = False
    changes: int = field(default=0, repr=False)


class _CancelledError(Exception):
    pass


class Jobs:
    """Runs jobs in one thread, in the order of their arrival, once started.

    Parameters
    ----------
    enclave : Worker
        Does the work.
    store : Store
        Keeps the requests of long jobs until they are over.
    snapshot : callable
        Digest of the site's images.

    Notes
    -----
    A request that returns while its job waits or runs finds that job; so does one whose reply was
    not fetched yet, if the work is of the kind that gives the same again. Everything else (a count,
    the next slice of a reconstruction, a reply that has left before) passes the wall anew, and so
    stands in the ledger each time.

    What a long job has finished is kept by its handler, epoch by epoch or image by image, under
    a name that is made of the request: taken up after a restart it goes on from there.
    """

    def __init__(self, enclave: Worker, store: Store, snapshot: Callable[[], str]) -> None:
        self._enclave, self._store, self._snapshot = enclave, store, snapshot
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._unfinished: set[Job] = set()
        self._changed = threading.Condition()
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._running: Job | None = None
        self._take_up()

    def start(self) -> None:
        """Begin to work."""
        threading.Thread(target=self._work, name="jobs", daemon=True).start()

    def submit(self, received: Received) -> Job:
        """Accept a request, or find the job that it made before.

        Raises
        ------
        EngineError
            Too many jobs wait.
        StoreError
            The request of a long job cannot be kept.
        SonoFedError
            The enclave refuses a long job's request, and nothing of it is kept.
        """
        action = received.action
        facts = [VERSION, action, received.sha256, self._snapshot()]
        key = sha256(json.dumps(facts).encode())
        if action in LONG:
            self._enclave.admit(action, received.records)
        with self._changed:
            known = self._jobs.get(key)
            if known is not None and self._serves(known):
                return known
            if len(self._unfinished) >= WAITING_JOBS:
                raise EngineError("too many jobs wait at this site; ask again later")
            job = Job(key, action, _record(key), received.file)
            self._unfinished.add(job)
            self._jobs[key] = job
            self._jobs.move_to_end(key)
            self._forget()
        if action in LONG:
            try:
                self._store.put_bytes(f"{job.record}/request", received.file, received.sha256)
                self._record(job, 0, time.time())
            except SonoFedError as error:
                self._end(job, error=error)
                raise
            if job.state.over:
                self._strike(job)
        self._queue.put(job)
        return job

    def find(self, job: str) -> Job | None:
        """Return a job by its id."""
        with self._changed:
            return self._jobs.get(job)

    def states(self) -> list[State]:
        """State of each job that is kept."""
        with self._changed:
            return [job.state for job in self._jobs.values()]

    def wait(self, job: Job, changes: int, seconds: float) -> int:
        """Wait until a job has changed more often than ``changes``, or for some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: job.changes > changes, seconds)
            return job.changes

    def take(self, job: str) -> Records | None:
        """Return a job's reply, once: who asks again gets it from the site's store, or anew.

        Raises
        ------
        SonoFedError
            The hospital does not approve it any more; the reply is gone.
        """
        with self._changed:
            known = self._jobs.get(job)
            if known is None:
                return None
            reply, known.reply = known.reply, None
            confirm, known.confirm = known.confirm, None
        if reply is not None and confirm is not None:
            confirm()
        return reply

    def cancel(self, job: Job) -> None:
        """Drop a job that waits; stop one that runs when it next reports its progress."""
        with self._changed:
            job.cancelled = True
            if job.state is State.WAITING:
                self._settle(job, error=_cancelled())
        self._strike(job)

    def progress(self, event: Event) -> None:
        """Take note of how far the running job is; a listener of the site's events."""
        job = self._running
        if job is None or event["event"] != "progress":
            return
        if job.cancelled:
            raise _CancelledError
        # In steps of ten: single percents would tell how many batches a pool of some size has.
        percent = 10 * int(10 * event["done"] / event["total"]) if event["total"] else 0
        with self._changed:
            if percent != job.percent:
                job.percent = percent
                self._change(job)

    def _serves(self, job: Job) -> bool:
        if not job.state.over:
            return not job.cancelled
        return job.action in JOBS and job.state is State.DONE and job.reply is not None

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            with self._changed:
                if job.state.over:
                    continue
                job.state = State.RUNNING
                self._change(job)
            self._running = job
            bind_contextvars(action=job.action if job.action in ACTION_NAMES else "unknown")
            began = time.monotonic()
            try:
                self._end(job, reply=self._perform(job))
                log.info("job done", extra={"seconds": round(time.monotonic() - began, 1)})
            except SonoFedError as error:
                log.warning("job not done: %s", error)
                self._end(job, error=error)
            except _CancelledError:
                log.warning("job cancelled")
                self._end(job, error=_cancelled())
            except Exception as error:
                # The text of an error that we did not write may name a file or a patient.
                frames = "".join(traceback.format_tb(error.__traceback__))
                log.error("job failed: %s", type(error).__name__, extra={"frames": frames})
                sentence = "the site could not do the work; its own log says why"
                self._end(job, error=SonoFedError(sentence))
            finally:
                self._running = None
                clear_contextvars()

    def _perform(self, job: Job) -> Records:
        request = self._request(job)
        bind_contextvars(**named(request.config))
        job.confirm = self._enclave.admit(job.action, request)
        log.info("job begins")
        return self._enclave.perform(job.action, request)

    def _request(self, job: Job) -> Records:
        """Return a job's request; for a long job, after its beginning was put on record."""
        record = self._store.get(f"{job.record}/job") if job.action in LONG else None
        if record is not None:
            attempts = int(record.config["attempts"])
            if attempts >= ATTEMPTS:
                raise EngineError("the site's enclave died of this job; its own log says more")
            self._record(job, attempts + 1, record.config["accepted"])
        request, job.request = job.request, None
        if request is None:
            request = memoryview(self._store.get_bytes(f"{job.record}/request") or b"")
        return read(request)

    def _end(
        self, job: Job, *, reply: Records | None = None, error: SonoFedError | None = None
    ) -> None:
        self._strike(job)
        with self._changed:
            self._settle(job, reply, error)

    def _strike(self, job: Job) -> None:
        """Take a job off the record of those that are not over."""
        if job.action not in LONG:
            return
        try:
            self._store.remove(f"{job.record}/")
        except Exception as failure:
            log.error("the record of a job stays: %s", type(failure).__name__)

    def _settle(
        self, job: Job, reply: Records | None = None, error: SonoFedError | None = None
    ) -> None:
        job.request, job.reply, job.error = None, reply, error
        if reply is None:
            job.confirm = None
        job.state = State.DONE if error is None else State.FAILED
        self._unfinished.discard(job)
        job.percent = 100 if error is None else job.percent
        self._change(job)
        self._forget()

    def _change(self, job: Job) -> None:
        job.changes += 1
        self._changed.notify_all()

    def _forget(self) -> None:
        """Drop the oldest replies and jobs over the limits, the newest never."""
        over = [job for job in self._jobs.values() if job.state.over]
        held = sum(job.reply.nbytes for job in over if job.reply is not None)
        for job in over[:-1]:
            if held > KEPT_BYTES and job.reply is not None:
                held -= job.reply.nbytes
                job.reply = job.confirm = None
        for job in over[: max(0, len(self._jobs) - KEPT_JOBS)]:
            del self._jobs[job.id]

    def _record(self, job: Job, attempts: int, accepted: float) -> None:
        facts = {"action": job.action, "attempts": attempts, "accepted": accepted}
        self._store.put(f"{job.record}/job", Records(config=facts))

    def _take_up(self) -> None:
        """Queue the jobs that were accepted before a restart and are not over."""
        records: dict[str, Records] = {}
        for name in self._store.names(QUEUE):
            own, _, what = name.rpartition("/")
            record = self._store.get(name) if what == "job" else None
            if record is not None:
                records[own] = record
        for own, record in sorted(records.items(), key=lambda item: item[1].config["accepted"]):
            key = own.removeprefix(QUEUE).partition("/")[0]
            self._jobs[key] = Job(key, str(record.config["action"]), own, None)
            self._unfinished.add(self._jobs[key])
            self._queue.put(self._jobs[key])
        for name in self._store.names(QUEUE):
            if name.rpartition("/")[0] not in records:
                self._store.remove(name)
        if records:
            log.warning("%d jobs were not over; they are taken up", len(records))


def _record(job: str) -> str:
    return f"{QUEUE}{job}/{secrets.token_hex(4)}"


def _cancelled() -> EngineError:
    return EngineError("the job was cancelled; send the request again to have it done")
