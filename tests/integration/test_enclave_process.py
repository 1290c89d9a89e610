"""A real enclave process, started by its command, behind its socket and its walls."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.supercore.task_identity import TaskIdentity
from safetensors import safe_open
from safetensors.torch import save

from sonofed_client.app import app
from sonofed_client.enclave.enclave import HANDLERS, InProcessEnclave
from sonofed_client.enclave.isolation import ENTERED, WRAPPERS, isolated
from sonofed_client.enclave.parts import send
from sonofed_client.enclave.refusals import KINDS, WINDOW_SECONDS
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.transport import SocketEnclave
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.relay import SOCKET_KEY
from sonofed_client.settings import read_site
from sonofed_common.contract import actions
from sonofed_common.contract import enclave_pb2 as messages
from sonofed_common.contract.actions import ACTIONS, request
from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.enclave_pb2_grpc import EnclaveStub
from sonofed_common.contract.errors import EngineError, OrderError, ParameterError
from sonofed_common.contract.manifest import DataProvenance, Provenance
from sonofed_common.contract.names import ACTION_NAMES
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.selection import WHOLE
from sonofed_common.contract.study_segmentation import Pretraining
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.security import public_hex
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

pytestmark = pytest.mark.slow

SIZE = 32
COMMON = {"study": "trial", "seed": 3}
START_SECONDS = 300
FUZZED = int(os.environ.get("SONOFED_FUZZED_REQUESTS", "2000"))
NOBODY = 65534
CONNECT = "import socket; socket.create_connection(('{}', 80), timeout=5)"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")


@pytest.fixture(scope="module")
def home():
    """A short path, for sockets, that other users may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="sonofed-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bundle(home):
    key = Ed25519PrivateKey.generate()
    data = DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1)
    provenance = Provenance(data=data, settings="0" * 64)
    writer = BundleWriter(home / "bundle", name="b", kind="source", provenance=provenance)
    segmenter = build_segmenter("unet", 2, SIZE, pretrained=False, seed=9)
    weights = {name: tensor.contiguous() for name, tensor in segmenter.state_dict().items()}
    writer.add("segmenters/source.safetensors", save(weights))
    writer.facts["segmentation"] = {
        "encoder": "unet",
        "classes": 2,
        "heads": ["unet", "aspp"],
        "class_ratio": [0.9, 0.1],
        "foreground_range": [0.01, 0.3],
        "flips": True,
    }
    return writer.sign(key), public_hex(key)


@pytest.fixture(scope="module")
def hospital(home):
    return write_dataset(home / "north", SCANNERS["riverside"], 20, 5, 64, 0.4)


@pytest.fixture(scope="module")
def write_site(home, hospital, bundle):
    def write(name, **more):
        folder = home / name
        folder.mkdir()
        settings = {
            "name": "north",
            "store": str(folder / "store"),
            "coordinator_key": bundle[1],
            "auto_approve": [bundle[1]],
            "image_key": "0" * 64,
            "oracle": True,
            "threads": 1,
            "socket": str(folder / "run" / "enclave.sock"),
            "data": {"kind": "table", "path": str(hospital), "test_fraction": 0.4},
            **more,
        }
        path = folder / "site.toml"
        path.write_text(tomli_w.dumps(settings))
        return path

    return write


@contextmanager
def process(site, *options, wrapper=()):
    """An enclave process that answers; its log is beside its settings."""
    command = [str(Path(sys.executable).with_name("sonofed-site")), "enclave", "--site", str(site)]
    log = site.with_suffix(".log")
    with log.open("ab") as file:
        began = file.tell()
        started = subprocess.Popen([*wrapper, *command, *options], stdout=file, stderr=file)
    try:
        until = time.monotonic() + START_SECONDS
        while b" answers" not in log.read_bytes()[began:]:
            assert started.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield started
    finally:
        started.kill()
        started.wait()


@pytest.fixture(scope="module")
def site(write_site):
    return write_site("site")


@pytest.fixture(scope="module")
def running(site):
    with process(site) as started:
        yield started


@pytest.fixture(scope="module")
def relay(running, site):
    return SocketEnclave(read_site(site).socket, patience=30)


@pytest.fixture(scope="module")
def stub(running, site):
    return EnclaveStub(grpc.insecure_channel(f"unix:{read_site(site).socket}"))


@pytest.fixture(scope="module")
def local(write_site):
    """The same hospital's enclave in this process."""
    return InProcessEnclave(read_site(write_site("local")))


def signed(bundle):
    return {
        name: np.frombuffer((bundle.folder / f"manifest.{end}").read_bytes(), dtype=np.uint8)
        for name, end in (("manifest", "json"), ("signature", "sig"))
    }


def installation(bundle):
    blobs = {d: np.frombuffer(bundle.blob(d), dtype=np.uint8) for d in bundle.manifest.blobs}
    return request(actions.Install(**COMMON), **signed(bundle), blobs=blobs)


def description():
    return request(actions.Describe(**COMMON, study_digest="0" * 64))


def pretraining(bundle, epochs=2, batch=8):
    settings = Pretraining(rounds=1, local_epochs=epochs, patch_size=8, batch_size=batch)
    return request(
        actions.Pretrain(**COMMON, bundle=bundle.id, image_size=SIZE, round=0, settings=settings)
    )


def test_names_and_actions_agree():
    assert set(ACTION_NAMES) == ACTIONS.keys() == HANDLERS.keys()


def test_replies_are_those_of_an_enclave_in_process(relay, local, bundle):
    bundle, _ = bundle
    conversation = [
        ("query.describe", description()),
        ("query.missing", request(actions.Missing(**COMMON), **signed(bundle))),
        ("train.install", installation(bundle)),
        ("query.missing", request(actions.Missing(**COMMON), **signed(bundle))),
        ("train.pretrain", pretraining(bundle)),
        ("train.pretrain", pretraining(bundle)),
    ]
    for action, message in conversation:
        assert to_bytes(relay.perform(action, message)) == to_bytes(local.perform(action, message))


def test_flower_reaches_the_enclave_by_the_word_of_its_node(running, site):
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
    here = UserConfig({SOCKET_KEY: str(read_site(site).socket)})
    context = Context(1, 1, here, RecordDict(), UserConfig())

    def ask(action, records):
        message = Message(to_recorddict(records), 1, action)
        message.metadata.__dict__["_message_id"] = "1"
        return from_recorddict(app(message, context).content)

    ask("query.describe", description())
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        reply = ask("query.describe", description())
        taken.append(time.perf_counter() - began)
    assert reply.config["site"] == "north"
    print(f"median of a description through Flower: {1000 * statistics.median(taken):.1f} ms")
    refused = ask("train.pretrain", Records(config=COMMON))
    assert refused.config["error"] == "parameters"


def test_the_relay_starts_about_as_fast_as_flower_alone():
    def cost(code):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    heavy = "sys.modules.keys() & {'torch', 'sqlalchemy', 'pydantic'}"
    flower, relay = "import flwr.clientapp", "import sys, sonofed_client.app, sonofed_client.relay"
    relay += f", sonofed_client.enclave.transport; assert not {heavy}"
    ratios = [cost(relay) / cost(flower) for _ in range(3)]
    assert min(ratios) <= 1.3


def test_errors_cross_as_they_are(relay, local, bundle):
    bundle, _ = bundle
    question = actions.Histogram(**COMMON, column="uncertainty", split=8)
    cuts = np.empty((0, 2), dtype=np.uint64)
    early = request(question, edges=WHOLE["uncertainty"], cuts=cuts)
    for error, action, message in (
        (OrderError, "query.histogram", early),
        (ParameterError, "query.describe", Records(config=COMMON)),
        (ParameterError, "train.pretrain", Records(config=COMMON)),
    ):
        with pytest.raises(error) as one:
            local.perform(action, message)
        with pytest.raises(error) as other:
            relay.perform(action, message)
        assert one.value.message == other.value.message


def test_a_record_that_was_changed_on_its_way_is_refused_and_noted(stub, site):
    parts = list(send(description(), "query.missing"))
    parts[1].data = parts[1].data[:-1] + b"X"
    status = stub.Submit(iter(parts))
    assert status.state == messages.FAILED and status.failure.code == "parameters"
    large = messages.Part(head=messages.Head(action="query.missing", size=2**62))
    assert stub.Submit(iter([large])).failure.code == "parameters"
    assert stub.Submit(iter(list(send(description(), "a"))[:-1])).failure.code == "parameters"
    assert stub.Submit(iter([])).failure.code == "parameters"
    assert stub.Describe(messages.Request(records=b"{")).failure.code == "parameters"
    settings = read_site(site)
    entries = open_ledger(open_store(settings)).entries()
    # They are of one kind: the first stands at once, the others as a count a little later.
    assert [e["outcome"] for e in entries if not e["action"]].count("refused") >= 1


def test_a_client_that_dies_finds_its_job_done(stub, relay, site, bundle):
    bundle, _ = bundle
    relay.perform("query.describe", description())
    relay.perform("train.install", installation(bundle))
    message = pretraining(bundle, epochs=5)
    client = f"""
from pathlib import Path
from sonofed_client.enclave.parts import read
from sonofed_client.enclave.transport import SocketEnclave
request = read(memoryview(Path({str(site.with_name("request"))!r}).read_bytes()))
SocketEnclave(Path({str(read_site(site).socket)!r})).perform("train.pretrain", request)
"""
    site.with_name("request").write_bytes(to_bytes(message))
    store = open_store(read_site(site))
    child = subprocess.Popen([sys.executable, "-c", client])
    until = time.monotonic() + START_SECONDS
    while not store.names("queue/"):
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    status = stub.Submit(send(message, "train.pretrain"))
    while status.state in (messages.WAITING, messages.RUNNING):
        *_, status = stub.Watch(messages.Job(id=status.job))
    assert status.state == messages.DONE and status.percent == 100
    ledger = open_ledger(store)
    sent = [e for e in ledger.entries() if e["action"] == "train.pretrain"][-1]
    job = messages.Job(id=status.job)
    assert b"".join(part.data for part in stub.Fetch(job))
    # It has left: asked once more it passes the wall once more, and the work is not done again.
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Fetch(job))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    relay.perform("train.pretrain", message)
    again = [e for e in ledger.entries() if e["action"] == "train.pretrain"][-1]
    assert again["number"] > sent["number"] and again["sha256"] == sent["sha256"]
    assert not store.names("queue/")


def test_a_job_is_cancelled(stub, relay, site, bundle):
    bundle, _ = bundle
    relay.perform("query.describe", description())
    relay.perform("train.install", installation(bundle))
    long = stub.Submit(send(pretraining(bundle, epochs=500), "train.pretrain"))
    waiting = stub.Submit(send(pretraining(bundle, epochs=501), "train.pretrain"))
    assert waiting.state == messages.WAITING
    # A description does not wait for either.
    assert relay.perform("query.describe", description()).config["site"] == "north"
    for job in (waiting.job, long.job):
        stub.Cancel(messages.Job(id=job))
        while (status := stub.Cancel(messages.Job(id=job))).state == messages.RUNNING:
            time.sleep(0.05)
        assert status.state == messages.FAILED and "cancelled" in status.failure.sentence
    assert not open_store(read_site(site)).names("queue/")
    assert stub.Cancel(messages.Job(id="no job")).state == messages.UNKNOWN
    assert [s.state for s in stub.Watch(messages.Job(id="no job"))] == [messages.UNKNOWN]


def test_a_second_enclave_on_the_same_store_is_refused(running, site):
    command = [str(Path(sys.executable).with_name("sonofed-site")), "enclave", "--site", str(site)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode == 20 and "another enclave" in done.stderr


def test_a_relay_says_that_the_enclave_is_gone(home):
    with pytest.raises(EngineError, match="start it"):
        SocketEnclave(home / "nowhere.sock", patience=1).perform("query.describe", description())


def epochs_done(checkpoint):
    try:
        with safe_open(checkpoint, framework="np") as file:
            return len(json.loads(file.metadata()["losses"]))
    except (OSError, IndexError):
        return 0


def test_a_killed_enclave_takes_its_job_up(home, write_site, local, bundle):
    bundle, _ = bundle
    (home / "key").write_text("ab" * 32)
    manage = f"readlink /proc/self/ns/net >> {home}/asked; cat {home}/key"
    site = write_site("killed", master_key={"command": ["sh", "-c", manage]})
    settings = read_site(site)
    message = pretraining(bundle, epochs=6, batch=4)
    checkpoints = settings.store / "checkpoints"
    with process(site) as started:
        relay = SocketEnclave(settings.socket)
        relay.perform("query.describe", description())
        relay.perform("train.install", installation(bundle))
        stub = EnclaveStub(grpc.insecure_channel(f"unix:{settings.socket}"))
        job = stub.Submit(send(message, "train.pretrain")).job
        until = time.monotonic() + START_SECONDS
        while not list(checkpoints.glob("*.safetensors")):
            assert time.monotonic() < until
            time.sleep(0.005)
        started.send_signal(signal.SIGKILL)
        started.wait()
    (checkpoint,) = checkpoints.glob("*.safetensors")
    before = epochs_done(checkpoint)
    assert 1 <= before < 6
    with process(site):
        # Nobody asks: the enclave goes on by itself, and not from the beginning.
        stub = EnclaveStub(grpc.insecure_channel(f"unix:{settings.socket}"))
        statuses = [s for s in stub.Watch(messages.Job(id=job)) if checkpoint.exists()]
        assert all(s.percent >= 10 * (10 * before // 6) for s in statuses if s.percent)
        reply = SocketEnclave(settings.socket).perform("train.pretrain", message)
        assert not open_store(settings).names("queue/")
    assert b"taken up" in site.with_suffix(".log").read_bytes()
    local.perform("query.describe", description())
    local.perform("train.install", installation(bundle))
    assert to_bytes(reply) == to_bytes(local.perform("train.pretrain", message))
    # The command that gives the master key may need the network: it never ran without.
    assert set((home / "asked").read_text().split()) == {str(Path("/proc/self/ns/net").readlink())}


def network(pid):
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def assert_powerless(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    assert re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\t(\w+)$", status, re.M) == ["0" * 16] * 5
    assert "NoNewPrivs:\t1" in status


@root_only
def test_the_enclave_has_no_network(running):
    assert network(running.pid) != network(os.getpid())
    assert_powerless(running.pid)
    lines = Path(f"/proc/{running.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in lines] == ["lo"]
    for address in ("127.0.0.1", "192.0.2.1", "8.8.8.8"):
        inside = ["nsenter", f"--net=/proc/{running.pid}/ns/net", sys.executable, "-c"]
        tried = subprocess.run([*inside, CONNECT.format(address)], capture_output=True, text=True)
        assert tried.returncode and "Network is unreachable" in tried.stderr


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=" ".join)
def test_the_wrappers_take_the_network_away(wrapper):
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us have namespaces of our own")
    probe = (
        "import sys, socket; from sonofed_client.enclave.isolation import isolated\n"
        "print(isolated()); socket.create_connection(('192.0.2.1', 80), timeout=5)"
    )
    tried = subprocess.run([*wrapper, sys.executable, "-c", probe], capture_output=True, text=True)
    assert tried.stdout == "True\n" and "Network is unreachable" in tried.stderr
    back = ["nsenter", f"--net=/proc/{os.getpid()}/ns/net", "true"]
    tried = subprocess.run([*wrapper, *back], capture_output=True, text=True)
    assert tried.returncode and "ermi" in tried.stderr


@root_only
@pytest.mark.parametrize("can_drop", [True, False])
def test_an_enclave_that_is_started_without_a_network_cannot_get_one_back(write_site, can_drop):
    site = write_site(f"started-apart-{can_drop}")
    # With the mark of a process that was begun again, it believes that it tried.
    marked = () if can_drop else ("env", f"{ENTERED}=1")
    with process(site, wrapper=("unshare", "--net", *marked)) as started:
        assert network(started.pid) != network(os.getpid())
        if can_drop:
            assert_powerless(started.pid)
    entries = open_ledger(open_store(read_site(site))).entries()
    warned = b"keeps its capabilities" in site.with_suffix(".log").read_bytes()
    noted = any("keeps its capabilities" in e["message"] for e in entries)
    assert warned == noted == (not can_drop)


@pytest.mark.skipif(isolated(), reason="there is no network to stay on")
def test_without_isolation_there_is_a_warning_and_a_line_in_the_ledger(write_site):
    site = write_site("open")
    with process(site, "--no-isolation") as started:
        assert network(started.pid) == network(os.getpid())
        stub = EnclaveStub(grpc.insecure_channel(f"unix:{read_site(site).socket}"))
        for _ in range(50):
            assert stub.Submit(iter([])).failure.code == "parameters"
        started.terminate()
        assert started.wait(30) == 0
    assert b"WITHOUT network isolation" in site.with_suffix(".log").read_bytes()
    entry, *refused = open_ledger(open_store(read_site(site))).entries()
    assert entry["outcome"] == "note" and "without network isolation" in entry["message"]
    # What was counted is written before the process ends.
    assert [(e["outcome"], e["repeats"]) for e in refused] == [("refused", 0), ("refused", 49)]


@root_only
def test_another_user_reads_neither_store_nor_keys(running, site):
    settings = read_site(site)
    secrets = [p for p in settings.store.rglob("*") if p.is_file()]
    secrets += [p for p in settings.store.parent.iterdir() if "key" in p.name]
    assert any("key" in p.name for p in secrets) and len(secrets) > 3
    for path in [settings.store, *secrets]:
        tool = "ls" if path.is_dir() else "cat"
        got = subprocess.run([tool, path], user=NOBODY, group=NOBODY, extra_groups=[])
        assert got.returncode, path
    # The store's own modes would do: they do not lean on those of the folders above.
    assert all(not stat.S_IMODE(p.stat().st_mode) & 0o077 for p in secrets)


@root_only
def test_the_socket_is_for_its_owner_and_group(running, site):
    socket = read_site(site).socket
    assert stat.S_IMODE(socket.stat().st_mode) == 0o660 and stat.S_ISSOCK(socket.stat().st_mode)
    socket.parent.chmod(0o755)
    for group, expected in ((NOBODY, "refused"), (socket.stat().st_gid, "connected")):
        child = os.fork()
        if not child:
            import socket as sockets

            os.setgroups([])
            os.setgid(group)
            os.setuid(NOBODY)
            try:
                sockets.socket(sockets.AF_UNIX).connect(str(socket))
                os._exit(0)
            except PermissionError:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert ("refused" if status else "connected") == expected


def mutated(data, dice):
    """Bytes like these, but not quite."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(5):
            case 0:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del data[at : at + dice.randrange(1, 9)]
            case 2:
                data[at:at] = dice.randbytes(dice.randrange(1, 9))
            case 3:
                data[at:at] = data[at : at + dice.randrange(1, 33)]
            case _:
                del data[at:]
    return bytes(data)


HOSTILE = (
    -1,
    0,
    2**70,
    1e308,
    float("nan"),
    True,
    None,
    "",
    "../../etc/passwd",
    "\0\x1b[2J",
    "F64",
)
HOSTILE += ("x" * 10_000, [], {}, [2**40], [0, 2**63], [8, 0], [[[[[[]]]]]], {"a": {"b": 1}})
NAMES = ("eval", "query.images", "QUERY.MISSING", "query.missing\0", "../x", "\x1b[2J", "__class__")


def changed(values, dice):
    """A configuration with another value, one value less or one more."""
    values, value = dict(values), dice.choice(HOSTILE)
    name = dice.choice([*values, *NAMES])
    if dice.random() < 0.3:
        values.pop(name, None)
    else:
        values[name] = value
    return values


def rebuilt(file, dice):
    """A file whose header is JSON, but says something else than before."""
    size = int.from_bytes(file[:8], "little")
    header, body = json.loads(file[8 : 8 + size]), file[8 + size :]
    texts = json.loads(header["__metadata__"]["records"])
    arrays = [name for name in header if name != "__metadata__"]
    match dice.randrange(6):
        case 0 | 1 | 2:
            texts["config"] = changed(texts["config"], dice)
        case 3 if arrays:
            fact = dice.choice(("dtype", "shape", "data_offsets"))
            header[dice.choice(arrays)][fact] = dice.choice(HOSTILE)
        case 4 if arrays:
            header[dice.choice(NAMES)] = header.pop(dice.choice(arrays))
        case _:
            texts = changed(texts, dice)
    header["__metadata__"] = {"records": json.dumps(texts)}
    encoded = json.dumps(header).encode()
    length = len(encoded)
    if dice.random() < 0.1:
        length = dice.choice((0, 1, length - 1, length + 9, 2**32, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + encoded + body


def spoiled(file, dice):
    """A file that is spoiled in its meaning, in its bytes, or not at all."""
    kind = dice.random()
    return rebuilt(file, dice) if kind < 0.55 else mutated(file, dice) if kind < 0.9 else file


def seeds(bundle):
    """Actions and requests that an enclave takes, or nearly."""
    question = actions.Histogram(**COMMON, column="uncertainty", split=8)
    cuts = np.empty((0, 2), dtype=np.uint64)
    asked = [
        ("query.annotations", request(actions.Annotations(**COMMON))),
        ("query.histogram", request(question, edges=WHOLE["uncertainty"], cuts=cuts)),
        ("query.missing", request(actions.Missing(**COMMON), **signed(bundle))),
        ("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=cuts)),
        ("query.describe", description()),
    ]
    return [(action.encode(), to_bytes(records)) for action, records in asked]


def attempt(requests, jobs, dice):
    """One call of the protocol and its encoded messages, spoiled somewhere."""
    call = dice.choice(("Submit",) * 5 + ("Describe", "Describe", "Watch", "Fetch", "Cancel"))
    if call == "Describe":
        file = spoiled(to_bytes(description()), dice)
        encoded = messages.Request(records=file).SerializeToString()
        return call, [encoded if dice.random() < 0.8 else mutated(encoded, dice)]
    if call != "Submit":
        job = dice.choice([*jobs, "0" * 64, "", "x" * 10_000])
        encoded = messages.Job(id=job).SerializeToString()
        return call, [encoded if dice.random() < 0.7 else mutated(encoded, dice)]
    action, file = dice.choice(requests)
    # Sealed after they were spoiled, most get past the digest, to the decoder and the wall.
    file, size = spoiled(file, dice), dice.random()
    if size < 0.2:
        action = dice.choice([*NAMES, *ACTION_NAMES]).encode()
    elif size < 0.25:
        action = mutated(action, dice)
    size = len(file)
    if dice.random() < 0.05:
        size = dice.choice((0, 8, size - 1, size + 1, 2**31, 2**40, 2**64 - 1))
    head = messages.Head(action=action.decode(errors="replace"), size=size)
    cut = dice.randrange(len(file) + 1) if dice.random() < 0.2 else len(file)
    pieces = [messages.Part(data=piece) for piece in (file[:cut], file[cut:]) if piece]
    digest = hashlib.sha256(file).digest()
    last = messages.Part(sha256=digest if dice.random() < 0.95 else mutated(digest, dice))
    encoded = [p.SerializeToString() for p in (messages.Part(head=head), *pieces, last)]
    if dice.random() < 0.15:
        at = dice.randrange(len(encoded))
        encoded[at] = mutated(encoded[at], dice)
    match dice.randrange(40):
        case 0:
            dice.shuffle(encoded)
        case 1:
            encoded.append(dice.choice(encoded))
        case 2:
            del encoded[dice.randrange(len(encoded))]
    return call, encoded


def test_mutated_requests_neither_stop_it_nor_get_data(running, relay, site, bundle):
    bundle, _ = bundle
    rows = open_store(read_site(site)).images()
    secrets = {text.encode() for row in rows for text in (row.id, row.name, row.group)}
    secrets |= {str(read_site(site).data.path).encode(), str(read_site(site).store).encode()}
    (key,) = (p for p in read_site(site).store.parent.iterdir() if "master" in p.name)
    secrets |= {key.read_bytes().strip(), bytes.fromhex(key.read_text())}
    requests = seeds(bundle)
    log = site.with_suffix(".log")
    logged = log.stat().st_size
    noted = len(open_ledger(open_store(read_site(site))).entries())
    found, codes = [], set()

    def attack(seed):
        dice, jobs = random.Random(seed), deque(maxlen=8)
        channel = grpc.insecure_channel(
            f"unix:{read_site(site).socket}", [("grpc.use_local_subchannel_pool", 1)]
        )
        for _ in range(FUZZED // 4):
            call, parts = attempt(requests, jobs, dice)
            kind = {"Submit": "stream_unary", "Watch": "unary_stream", "Fetch": "unary_stream"}
            method = getattr(channel, kind.get(call, "unary_unary"))(
                f"/sonofed.enclave.v1.Enclave/{call}"
            )
            try:
                reply = method(iter(parts) if call == "Submit" else parts[0], timeout=60)
                replies = list(reply) if call in ("Watch", "Fetch") else [reply]
                if call == "Submit" and (job := messages.Status.FromString(replies[0]).job):
                    jobs.append(job)
            except grpc.RpcError as error:
                codes.add(error.code())
                replies = [error.details().encode()]
            found.extend(s for s in secrets for r in replies if s in r)
        channel.close()

    began = time.monotonic()
    attackers = [threading.Thread(target=attack, args=(seed,)) for seed in range(4)]
    for attacker in attackers:
        attacker.start()
    for attacker in attackers:
        attacker.join()
    print(f"{FUZZED / (time.monotonic() - began):.0f} mutated requests a second")
    assert not found
    assert codes <= {grpc.StatusCode.NOT_FOUND}
    assert relay.perform("query.describe", description()).config["site"] == "north"
    assert running.poll() is None
    with log.open("rb") as file:
        file.seek(logged)
        text = file.read()
    assert not [s for s in secrets if s in text] and b"Traceback" not in text
    # However many were refused, the ledger grows by so many entries a minute and no more.
    entries = open_ledger(open_store(read_site(site))).entries()[noted:]
    # One window was open before, and one closes after.
    windows = 2 + (time.monotonic() - began) // WINDOW_SECONDS
    held = sum(e["outcome"] in ("refused", "failed") for e in entries)
    assert held <= (2 * KINDS + 1) * windows
