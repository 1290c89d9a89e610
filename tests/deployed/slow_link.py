"""A slow link between two network namespaces: each packet waits for its turn, and then travels.

It stands in for ``tc netem``, which many kernels lack; all it needs is root and ``/dev/net/tun``.

Use: ``python slow_link.py SPACE DEVICE SPACE DEVICE --rate=BITS --delay=SECONDS``
"""

import argparse
import fcntl
import os
import select
import struct
import subprocess
import time
from collections import deque

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
LONGEST_QUEUE_SECONDS = 0.5
PACKET_BYTES = 65_536


class Direction:
    """Packets from one end to the other.

    Parameters
    ----------
    rate : float
        Bits a second.
    delay : float
        Seconds that a packet travels.
    """

    def __init__(self, rate, delay):
        self._rate, self._delay = rate, delay
        self._free = 0.0
        self._under_way = deque()

    def send(self, packet, now):
        begins = max(now, self._free)
        # A full queue drops, which is how a sender learns of the rate.
        if begins - now > LONGEST_QUEUE_SECONDS:
            return
        self._free = begins + 8 * len(packet) / self._rate
        self._under_way.append((self._free + self._delay, packet))

    def arrived(self, now):
        while self._under_way and self._under_way[0][0] <= now:
            yield self._under_way.popleft()[1]

    def wait(self, now):
        """Seconds until the next packet arrives."""
        return max(0.0, self._under_way[0][0] - now) if self._under_way else 1.0


def open_end(space, device):
    """Make a device in a namespace, and return a descriptor of what is sent into it."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    own = f"sf{os.getpid()}t{descriptor}"[:15]
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", own.encode(), IFF_TUN | IFF_NO_PI))
    subprocess.run(["ip", "link", "set", own, "netns", space, "name", device], check=True)
    return descriptor


def main():
    parser = argparse.ArgumentParser()
    for name in ("space", "device", "other_space", "other_device"):
        parser.add_argument(name)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--delay", type=float, required=True)
    wanted = parser.parse_args()
    one = open_end(wanted.space, wanted.device)
    other = open_end(wanted.other_space, wanted.other_device)
    ways = {one: Direction(wanted.rate, wanted.delay), other: Direction(wanted.rate, wanted.delay)}
    ends = {one: other, other: one}
    while True:
        now = time.monotonic()
        ready, _, _ = select.select(list(ends), [], [], min(w.wait(now) for w in ways.values()))
        now = time.monotonic()
        for end in ready:
            ways[end].send(os.read(end, PACKET_BYTES), now)
        for end, way in ways.items():
            for packet in way.arrived(now):
                try:
                    os.write(ends[end], packet)
                except OSError:
                    # The device is down or full: the packet is lost, as on any link.
                    continue


if __name__ == "__main__":
    main()
