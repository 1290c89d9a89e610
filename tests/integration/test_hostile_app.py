"""A real SuperLink and SuperNode, and a Flower app that ships its own Python to a hospital."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.transport import SocketEnclave
from sonofed_client.enclave.wall import open_ledger, open_studies
from sonofed_client.relay import SOCKET_KEY
from sonofed_client.settings import read_site
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import StudyWaitingError
from sonofed_common.contract.records import to_bytes
from sonofed_common.contract.study import Study
from sonofed_common.security import public_hex
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be two users"),
]

RELAY_USER, RELAY_GROUP = 65534, 61234
"""The SuperNode's user, and the group that may use the enclave's socket."""

WAIT_SECONDS = 500
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
STUDY = Study(name="trial", seed=3, phases=("enrol", "ship"), cohort={"sites": ["north"]})

SERVER = """
    import json, time
    from pathlib import Path
    from flwr.app import Message, RecordDict, ConfigRecord
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid, context):
        config = context.run_config
        if config["study"]:
            from sonofed_common.contract import actions
            from sonofed_common.contract.recorddict import to_recorddict
            from sonofed_common.contract.study import Study
            study = Study.model_validate_json(config["study"])
            facts = {"study": study.name, "seed": study.seed, "study_digest": study.digest()}
            content = to_recorddict(actions.request(actions.Describe(**facts, content=study)))
        else:
            content = RecordDict({"orders": ConfigRecord({})})
        while not (nodes := list(grid.get_node_ids())):
            time.sleep(0.2)
        (sent,) = grid.push_messages([Message(content, nodes[0], config["type"])])
        while not (replies := list(grid.pull_messages([sent]))):
            time.sleep(0.2)
        content = replies[0].content if replies[0].has_content() else RecordDict()
        found = {k: v for record in content.config_records.values() for k, v in record.items()}
        if content.array_records:
            from sonofed_common.contract.recorddict import from_recorddict
            found = {"config": json.dumps(from_recorddict(content).config)}
        path = Path(config["out"])
        path.with_suffix(".part").write_text(json.dumps(found or {"error": str(replies[0].error)}))
        path.with_suffix(".part").rename(path)
"""

CLIENT = '''
    import hashlib, os, signal, socket
    from pathlib import Path

    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def steal(message, context):
        knows = context.run_config
        site, data, store = (Path(knows[k]) for k in ("site", "images", "store"))
        pid, path = int(knows["pid"]), Path(str(context.node_config["enclave"]))
        got = {"who": f"{os.getuid()} {sorted(os.getgroups())}"}

        def attempt(name, work):
            try:
                got[name] = f"GOT {work()!r}"[:300]
            except BaseException as error:
                code = getattr(error, "code", "")
                code = code if isinstance(code, str) else ""
                got[name] = f"{type(error).__name__} {code}: {error}"[:300]

        attempt("list the images", lambda: os.listdir(data))
        attempt("read an image", (data / knows["image"]).read_bytes)
        attempt("read the settings", site.read_bytes)
        attempt("read the catalogue", (store / "store.sqlite").read_bytes)
        attempt("read the keys", (store / "keys.json").read_bytes)
        attempt("read the master key", store.with_name("store.master.key").read_bytes)
        attempt("read the memory", lambda: open(f"/proc/{pid}/mem", "rb").read(1))
        attempt("read the environment", lambda: open(f"/proc/{pid}/environ", "rb").read(1))
        attempt("go through its root", lambda: os.listdir(f"/proc/{pid}/root/"))
        attempt("end the enclave", lambda: os.kill(pid, signal.SIGTERM))
        attempt("take the socket away", path.unlink)
        attempt("put another there", lambda: socket.socket(socket.AF_UNIX).bind(
            str(path.with_name("other.sock"))))
        attempt("become root", lambda: os.setuid(0))

        def own_enclave(store=store, name="own.toml"):
            """The client's own modules, on the hospital's folders."""
            from sonofed_client.enclave.opening import open_enclave
            own = Path(os.environ["HOME"]) / name
            own.write_text(
                f"name = 'north'\\nstore = '{store}'\\ncoordinator_key = '{'0' * 64}'\\n"
                f"auto_approve = ['{'0' * 64}']\\n[data]\\nkind = 'table'\\npath = '{data}'\\n"
            )
            return open_enclave(str(own))

        attempt("open the site", lambda: __import__(
            "sonofed_client.enclave.opening", fromlist=["open_enclave"]).open_enclave(str(site)))
        attempt("open the store", own_enclave)
        attempt("open the images", lambda: own_enclave(Path(os.environ["HOME"]) / "s", "o.toml"))

        import grpc
        import numpy as np
        from sonofed_client.enclave.parts import read, send
        from sonofed_client.enclave.transport import SocketEnclave
        from sonofed_common.contract import enclave_pb2 as messages
        from sonofed_common.contract.enclave_pb2_grpc import EnclaveStub
        from sonofed_common.contract.records import Records

        enclave = SocketEnclave(path, patience=20)
        stub = EnclaveStub(grpc.insecure_channel(f"unix:{path}"))
        common = {"study": "trial", "seed": 3}

        def ask(action, records=Records(config=common)):
            reply = enclave.perform(action, records)
            return reply.config, reply.metrics, {k: a.shape for k, a in reply.arrays.items()}

        def submit(parts):
            status = stub.Submit(iter(parts))
            if status.failure.code:
                raise RuntimeError(f"{status.failure.code}: {status.failure.sentence}")
            return status

        kept = read(memoryview(bytes.fromhex(knows["replayed"])))
        again = dict(kept.config)
        head = lambda size: messages.Part(head=messages.Head(action="train.score", size=size))
        attempt("undeclared", lambda: ask("query.images"))
        attempt("python", lambda: ask("eval", Records(config={**common, "code": "1"})))
        attempt("other phase", lambda: ask("query.annotations"))
        attempt("parameters", lambda: ask("query.missing", Records(config={**common, "all": 1})))
        attempt("arrays", lambda: ask("train.score", Records({"x": np.zeros(9)}, common)))
        attempt("other study", lambda: ask("query.describe", Records(
            config={**again, "study": "mine"})))
        attempt("replay", lambda: ask("query.describe", kept))
        attempt("oversized", lambda: submit([head(2**50)]))
        junk = b"x" * 64
        sealed = messages.Part(sha256=hashlib.sha256(junk).digest())
        attempt("malformed", lambda: submit([head(64), messages.Part(data=junk), sealed]))
        attempt("no record", lambda: submit([messages.Part(data=b"x")]))
        attempt("a job of nobody", lambda: list(stub.Fetch(messages.Job(id="0" * 64))))
        return Message(RecordDict({"loot": ConfigRecord(got)}), reply_to=message)
'''


def closed(path):
    """The outermost folder above a path that other users cannot pass through, if there is one."""
    above = [*reversed(path.parents), path]
    return next((p for p in above if not p.stat().st_mode & stat.S_IXOTH), None)


def as_relay(command):
    """The command as the SuperNode's user, who is let through to Python and to this code."""
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT}
    needed |= {Path(p).resolve() for p in os.environ.get("PYTHONPATH", "").split(":") if p}
    needed.add(Path(sysconfig.get_path("purelib")).resolve())
    hidden = sorted((str(closed(p)), str(p)) for p in needed if closed(p))
    # In a mount namespace of its own, closed folders are replaced by open ones with these in them.
    script = ["set -e", "keep=$(mktemp -d)"]
    for number, (_, path) in enumerate(hidden):
        script.append(f"mkdir $keep/{number}; mount --bind {path} $keep/{number}")
    script += [f"mount -t tmpfs -o mode=755 tmpfs {f}" for f in sorted({f for f, _ in hidden})]
    for number, (_, path) in enumerate(hidden):
        script.append(f"mkdir -p {path}; mount --bind $keep/{number} {path}")
        script.append(f"umount $keep/{number}")
    user = ["--reuid", str(RELAY_USER), "--regid", str(RELAY_USER), "--groups", str(RELAY_GROUP)]
    script.append('exec "$@"')
    shell = ["unshare", "--mount", "sh", "-c", "\n".join(script), "sh"]
    return [*shell, "setpriv", *user, "--no-new-privs", "--", *map(str, command)]


@pytest.fixture(scope="module")
def home():
    folder = Path(tempfile.mkdtemp(prefix="sonofed-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "relay").mkdir()
    os.chown(folder / "relay", RELAY_USER, RELAY_USER)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def environment(home):
    return {
        **os.environ,
        "HOME": str(home / "relay"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }


@contextmanager
def started(command, log, answers, **more):
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, process_group=0, **more
        )
    try:
        until = time.monotonic() + WAIT_SECONDS
        while not answers():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def site(home):
    """A hospital as docs/security.md has it: folders and settings closed to the relay's user."""
    images = write_dataset(home / "images", SCANNERS["riverside"], 20, 5, 64, 0.4)
    images.chmod(0o750)
    folder = home / "north"
    folder.mkdir()
    settings = {
        "name": "north",
        "store": str(folder / "store"),
        "coordinator_key": public_hex(Ed25519PrivateKey.generate()),
        "socket": str(home / "run" / "enclave.sock"),
        "data": {"kind": "table", "path": str(images), "test_fraction": 0.4},
    }
    path = folder / "site.toml"
    path.write_text(tomli_w.dumps(settings))
    path.chmod(0o640)
    return path


@pytest.fixture(scope="module")
def enclave(home, site, environment):
    log = home / "enclave.log"
    command = [BIN / "sonofed-site", "enclave", "--site", site]
    with started(command, log, lambda: b" answers" in log.read_bytes(), group=RELAY_GROUP) as it:
        yield it


@pytest.fixture(scope="module")
def federation(home, site, enclave, environment):
    """A SuperLink, and the hospital's SuperNode under a user of its own."""
    port, runtime = free_port(), free_port()
    link = [
        *(BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)),
        "--disable-runtime-dependency-installation",
    ]
    node_config = f'{SOCKET_KEY}="{read_site(site).socket}"'
    node = [
        *(BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"),
        *("--host", "127.0.0.1", "--port", str(runtime), "--node-config", node_config),
    ]
    coordinator = {**environment, "FLWR_HOME": str(home / "coordinator")}
    relay = {**environment, "FLWR_HOME": str(home / "relay" / "flower")}
    with (
        started(link, home / "link.log", lambda: listens(port), env=coordinator),
        started(as_relay(node), home / "node.log", lambda: listens(runtime), env=relay, cwd=home),
    ):
        yield port, coordinator


def run_app(home, federation, name, client, **config):
    """Run an app on the federation; what its client answered."""
    port, environment = federation
    app, out = home / name, home / f"{name}.json"
    (app / "hostile").mkdir(parents=True)
    (app / "hostile" / "__init__.py").touch()
    (app / "hostile" / "server.py").write_text(dedent(SERVER))
    (app / "hostile" / "client.py").write_text(dedent(CLIENT))
    config = {"out": str(out), "study": "", "type": "query", **config}
    components = {"serverapp": "hostile.server:app", "clientapp": client}
    project = {"name": name, "version": "1.0.0", "license": "Apache-2.0", "dependencies": []}
    flower = {"publisher": "stranger", "components": components, "config": config}
    pyproject = {"project": project, "tool": {"flwr": {"app": flower}}}
    (app / "pyproject.toml").write_text(tomli_w.dumps(pyproject))
    link = {"address": f"127.0.0.1:{port}", "insecure": True}
    connections = Path(environment["FLWR_HOME"]) / "config.toml"
    connections.parent.mkdir(exist_ok=True)
    connections.write_text(tomli_w.dumps({"superlink": {"lab": link}}))
    command = [BIN / "flwr", "run", app, "lab", "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    until = time.monotonic() + WAIT_SECONDS
    while not out.exists():
        logs = [home / f"{log}.log" for log in ("link", "node")]
        assert time.monotonic() < until, [log.read_text()[-3000:] for log in logs]
        time.sleep(0.2)
    return json.loads(out.read_text())


def description():
    facts = {"study": STUDY.name, "seed": STUDY.seed, "study_digest": STUDY.digest()}
    return request(actions.Describe(**facts, content=STUDY))


@pytest.fixture(scope="module")
def approved(site, enclave):
    """The hospital approved a study, and has answered one request of it."""
    settings = read_site(site)
    with pytest.raises(StudyWaitingError):
        SocketEnclave(settings.socket).perform("query.describe", description())
    ledger = open_ledger(open_store(settings))
    open_studies(settings, ledger).approve(f"sha256:{STUDY.digest()}")
    return SocketEnclave(settings.socket).perform("query.describe", description())


def entries(site):
    return open_ledger(open_store(read_site(site))).entries()


def test_the_relay_of_another_user_passes_on_what_the_hospital_approved(
    home, site, approved, federation
):
    before = len(entries(site))
    study = STUDY.model_dump_json()
    app = "sonofed_client.app:app"
    reply = run_app(home, federation, "honest", app, type="query.describe", study=study)
    assert json.loads(reply["config"]) == approved.config
    (entry,) = entries(site)[before:]
    assert (entry["outcome"], entry["action"], entry["study"]) == (
        "sent",
        "query.describe",
        "trial",
    )


OUTSIDE = {
    "list the images",
    "read an image",
    "read the settings",
    "read the catalogue",
    "read the keys",
    "read the master key",
    "read the memory",
    "read the environment",
    "go through its root",
    "end the enclave",
    "take the socket away",
    "put another there",
    "become root",
    "open the site",
    "open the store",
    "open the images",
}
"""Tries that never reach the enclave: the system refuses them, and no ledger sees them."""

REFUSED = {
    "undeclared": "unknown-action",
    "python": "unknown-action",
    "other phase": "study-denied",
    "parameters": "parameters",
    "arrays": "parameters",
    "other study": "parameters",
    "oversized": "parameters",
    "malformed": "parameters",
    "no record": "parameters",
}
"""Tries that the enclave refuses, each counted in its ledger."""


def test_an_app_that_ships_its_own_python_gets_nothing(home, site, approved, enclave, federation):
    settings = read_site(site)
    image = next(settings.data.path.rglob("*.png")).relative_to(settings.data.path)
    before = len(entries(site))
    loot = run_app(
        home,
        federation,
        "hostile",
        "hostile.client:app",
        site=str(site),
        images=str(settings.data.path),
        image=str(image),
        store=str(settings.store),
        pid=enclave.pid,
        replayed=to_bytes(description()).hex(),
    )
    assert loot.pop("who") == f"{RELAY_USER} [{RELAY_GROUP}]"
    for name in OUTSIDE:
        assert not loot[name].startswith("GOT"), (name, loot[name])
    for name in OUTSIDE - {"open the images"}:
        assert "ermi" in loot[name], (name, loot[name])
    for name, code in REFUSED.items():
        assert f"{code}: " in loot[name], (name, loot[name])
    assert "NOT_FOUND" in loot["a job of nobody"]
    # A repeated request is answered as before, and stands in the ledger once more.
    assert loot["replay"].startswith(f"GOT ({approved.config!r}"[:60])
    assert loot.keys() == OUTSIDE | REFUSED.keys() | {"replay", "a job of nobody"}
    told = entries(site)[before:]
    # Several are of one kind: they stand as a count, once the minute is over.
    until = time.monotonic() + WAIT_SECONDS
    while sum(max(1, e["repeats"]) for e in told if e["outcome"] == "refused") < len(REFUSED):
        assert time.monotonic() < until, told
        time.sleep(1)
        told = entries(site)[before:]
    (sent,) = [e for e in told if e["outcome"] == "sent"]
    assert sent["action"] == "query.describe"
    assert sent["sha256"] == entries(site)[before - 1]["sha256"]
    assert enclave.poll() is None
    open_ledger(open_store(settings)).verify()
    rows = open_store(settings).images()
    secrets = {text for row in rows for text in (row.id, row.name)}
    # What the system says of a file names it; what the enclave says names none.
    answers = json.dumps([loot[name] for name in (*REFUSED, "replay", "a job of nobody")])
    assert not [s for s in secrets if s in answers]
