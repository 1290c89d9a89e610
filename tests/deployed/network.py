"""Machines apart: a namespace of the network for each, joined to the coordinator's by a link."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SUBNET, OUT = "10.213", "out"


def shell(*words):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def lacking():
    """What this machine lacks for namespaces, in words, or nothing."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs ip (iproute2), to make network namespaces"
    probe = f"sonofed-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"this machine makes no network namespaces: {made.stderr.strip()[:100]}"
    try:
        names = (*("type", "veth", "peer", "name"), f"sfp{os.getpid()}")
        added = subprocess.run(
            ["ip", "-n", probe, "link", "add", "sonofed", *names], capture_output=True, text=True
        )
    finally:
        shell("ip", "netns", "del", probe)
    return "" if added.returncode == 0 else "this machine has no veth"


def needs_namespaces():
    reason = lacking()
    return pytest.mark.skipif(bool(reason), reason=reason or "never")


class Machines:
    """The coordinator and hospitals, each with a network of its own.

    Parameters
    ----------
    names : list of str
        Of the hospitals.
    slow : mapping of str to mapping
        Options of `deployed.slow_link` for hospitals that have such a link instead of veth.
    """

    address, listen = f"{SUBNET}.0.1", "0.0.0.0"

    def __init__(self, names, slow=None):
        self._names, self._slow = list(names), slow or {}
        self._mark = os.getpid()
        self._links = []

    def __enter__(self):
        try:
            for name in ("coordinator", *self._names):
                shell("ip", "netns", "add", self.space(name))
                shell("ip", "-n", self.space(name), "link", "set", "lo", "up")
            hub = self.space("coordinator")
            shell("ip", "-n", hub, "address", "add", f"{self.address}/32", "dev", "lo")
            for name in self._names:
                self._join(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self._links:
            process.terminate()
            process.wait()
        for name in ("coordinator", *self._names):
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True)

    def space(self, name):
        return f"sf{self._mark}-{name}"

    def at(self, name):
        """What a command begins with that runs there."""
        return ("ip", "netns", "exec", self.space(name))

    def cut(self, name):
        """Take a hospital's link down."""
        shell("ip", "-n", self.space("coordinator"), "link", "set", self._device(name), "down")

    def mend(self, name):
        """Set a hospital's link up again."""
        shell("ip", "-n", self.space("coordinator"), "link", "set", self._device(name), "up")
        # A route goes with its link.
        self._lead_to(name)

    def _device(self, name):
        return f"to{self._names.index(name)}"

    def _own(self, name):
        return f"{SUBNET}.{self._names.index(name) + 1}.2"

    def _lead_to(self, name):
        hub, own = self.space("coordinator"), self._own(name)
        way = ("dev", self._device(name), "src", self.address)
        shell("ip", "-n", hub, "route", "replace", own, *way)

    def _join(self, name):
        hub, there, device = self.space("coordinator"), self.space(name), self._device(name)
        if name in self._slow:
            self._links.append(self._start(hub, there, device, self._slow[name]))
        else:
            peer = ("type", "veth", "peer", "name", OUT, "netns", there)
            shell("ip", "-n", hub, "link", "add", device, *peer)
        own = self._own(name)
        shell("ip", "-n", there, "address", "add", f"{own}/32", "dev", OUT)
        for space, link in ((hub, device), (there, OUT)):
            shell("ip", "-n", space, "link", "set", link, "up")
        self._lead_to(name)
        shell("ip", "-n", there, "route", "add", self.address, "dev", OUT, "src", own)

    def _start(self, hub, there, device, options):
        words = [f"--{name}={value}" for name, value in options.items()]
        program = Path(__file__).with_name("slow_link.py")
        process = subprocess.Popen([sys.executable, program, hub, device, there, OUT, *words])
        for space, link in ((hub, device), (there, OUT)):
            while subprocess.run(
                ["ip", "-n", space, "link", "show", link], capture_output=True
            ).returncode:
                assert process.poll() is None, "the slow link ended; see its error above"
                time.sleep(0.1)
        return process
