"""A cable between two hosts that is slow and long: it carries frames at a rate, and each arrives later.

    relay.py DEVICE DEVICE SECONDS BYTES_PER_SECOND

Makes two virtual Ethernet devices, says so, and carries frames between them until it is killed. Not every
kernel has netem, which does the same.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x2, 0x1000
LONGEST = 1 << 16


def make_device(name):
    """Return the file that a device's frames are read from and written to."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


def carry(files, delay, rate):
    """Carry frames both ways, each way one after the other."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    on_the_way = {file: deque() for file in files}
    is_free_at = dict.fromkeys(files, 0.0)
    other = dict(zip(files, files[::-1], strict=True))
    while True:
        first = min((frames[0][0] for frames in on_the_way.values() if frames), default=None)
        patience = None if first is None else max(0.0, 1e3 * (first - time.monotonic()))
        for file, _ in poll.poll(patience):
            with suppress(OSError):  # the device is down
                frame = os.read(file, LONGEST)
                is_free_at[file] = max(is_free_at[file], time.monotonic()) + len(frame) / rate
                on_the_way[file].append((is_free_at[file] + delay, frame))
        now = time.monotonic()
        for file, frames in on_the_way.items():
            while frames and frames[0][0] <= now:
                with suppress(OSError):
                    os.write(other[file], frames.popleft()[1])


if __name__ == "__main__":
    ends = [make_device(name) for name in sys.argv[1:3]]
    print("made", flush=True)
    carry(ends, *map(float, sys.argv[3:]))
