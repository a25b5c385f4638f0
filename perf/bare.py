#!/usr/bin/env python3
"""What any migration has to do: a guest's size of memory through one TCP connection, each page touched once at each end.

usage: bare.py receive ADDRESS BYTES    prints the port, then a line of JSON
       bare.py send ADDRESS:PORT BYTES [CONGESTION]  prints a line of JSON
       bare.py sendfile ADDRESS:PORT BYTES [CONGESTION]  the same by sendfile(2), so that nothing is copied at this end

Unlike iperf3, which sends the same 128 KiB from its cache again and again and reads into the same buffer, the bytes come
from memory and go to memory. No page is looked at, no page number is sent, nothing is tracked.
"""

import json
import mmap
import os
import socket
import sys
import time

PIECE = 256 << 10


def memory(size, fd=None):
    """A block of random bytes that is there; of the file `fd`, if it is given."""
    if fd is None:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        os.truncate(fd, size)
        block = mmap.mmap(fd, size)
    some = os.urandom(1 << 20)
    for begin in range(0, size, len(some)):
        block[begin:begin + len(some)] = some[:size - begin]
    return memoryview(block)


def receive(listener, into):
    """Takes in all, once both ends are ready; gives the seconds that it took."""
    connection, _ = listener.accept()
    connection.sendall(b"!")
    begun, at = time.monotonic(), 0
    while at < len(into):
        got = connection.recv_into(into[at:at + PIECE])
        if got == 0:
            sys.exit("bare.py: the sender is gone")
        at += got
    took = time.monotonic() - begun
    connection.sendall(b"!")
    return took


def send(address, port, congestion, out_of, fd=None):
    """Sends all, from the file `fd` if it is given, and waits until it has arrived; gives the seconds that it took."""
    connection = socket.create_connection((address, int(port)))
    if congestion:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    connection.recv(1)
    begun, at = time.monotonic(), 0
    while at < len(out_of):
        if fd is None:
            at += connection.send(out_of[at:at + PIECE])
        else:
            at += os.sendfile(connection.fileno(), fd, at, min(PIECE, len(out_of) - at))
    connection.recv(1)
    return time.monotonic() - begun


def main():
    """Is one end."""
    what, where, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    congestion = sys.argv[4] if len(sys.argv) > 4 else None
    if what == "receive":
        listener = socket.create_server((where, 0))
        print("listening on port", listener.getsockname()[1], flush=True)
    fd = os.memfd_create("bare") if what == "sendfile" else None
    block, before = memory(size, fd), time.process_time()
    if what == "receive":
        took = receive(listener, block)
    else:
        took = send(*where.rsplit(":", 1), congestion, block, fd)
    print(json.dumps({"bytes_per_s": size / took, "cpu_s_per_gb": (time.process_time() - before) / size * 1e9}))


if __name__ == "__main__":
    main()
