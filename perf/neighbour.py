#!/usr/bin/env python3
"""The traffic of a neighbour on the link that `perf/colocated` watches: a bulk TCP stream and a request/response pair.

usage: perf/neighbour.py receive ADDRESS PORT     counts the stream at PORT, answers requests at PORT + 1
       perf/neighbour.py stream ADDRESS PORT [BYTES_PER_S]
       perf/neighbour.py ask ADDRESS PORT

Each runs until its standard input is closed, which it also is when the process that started it dies, and then prints
one JSON line of what it saw. Times are CLOCK_MONOTONIC in nanoseconds, one clock for all network namespaces of a
machine.
"""

import json
import os
import socket
import sys
import threading
import time

MESSAGE = bytes(1024)
PAUSE_S = 0.001
BLOCK_BYTES = 64 << 10
BUCKET_NS = 10_000_000
# From <asm-generic/socket.h>: the kernel spaces a socket's packets to keep to a rate.
SO_MAX_PACING_RATE = 47


def _read_exactly(connection, size):
    """The next `size` bytes; nothing when the other end is gone."""
    parts = []
    while size > 0 and (part := connection.recv(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts) if size == 0 else b""


def _count(listener, buckets):
    """Counts what arrives, by buckets of 10 ms."""
    connection, _ = listener.accept()
    block = bytearray(1 << 20)
    while got := connection.recv_into(block):
        bucket = time.monotonic_ns() // BUCKET_NS
        buckets[bucket] = buckets.get(bucket, 0) + got


def _answer(listener):
    """Sends each request back."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while request := _read_exactly(connection, len(MESSAGE)):
        connection.sendall(request)


def _stream(connection, rate):
    """Sends as fast as the link takes it, or at `rate`."""
    if rate:
        connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
    block = bytes(BLOCK_BYTES)
    while True:
        connection.sendall(block)


def _ask(connection, asked):
    """Asks, waits for the answer, and pauses for a moment: [when, how long] of each."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        before = time.monotonic_ns()
        connection.sendall(MESSAGE)
        if not _read_exactly(connection, len(MESSAGE)):
            return
        asked.append([before, time.monotonic_ns() - before])
        time.sleep(PAUSE_S)


def _start(work, ended, *arguments):
    """Works on a thread of its own, and notes when that ends, as it does only when the other end is gone."""
    def run():
        try:
            work(*arguments)
            ended.append(f"{work.__name__.strip('_')}: the other end left")
        except OSError as error:
            ended.append(f"{work.__name__.strip('_')}: {error.strerror}")
    threading.Thread(target=run, daemon=True).start()


def main():
    role, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ended = []
    seen = {"ended": ended}
    if role == "receive":
        buckets = {}
        _start(_count, ended, socket.create_server((address, port)), buckets)
        _start(_answer, ended, socket.create_server((address, port + 1)))
        seen |= {"bucket_ns": BUCKET_NS, "buckets": buckets}
    elif role == "stream":
        rate = int(sys.argv[4]) if len(sys.argv) > 4 else 0
        _start(_stream, ended, socket.create_connection((address, port)), rate)
    elif role == "ask":
        asked = []
        _start(_ask, ended, socket.create_connection((address, port + 1)), asked)
        seen |= {"asked": asked}
    else:
        sys.exit(f"perf/neighbour.py: {role} is none of receive, stream, ask")
    print("ready", flush=True)
    while sys.stdin.buffer.read(4096):
        pass
    # Copies, each made at one go: the threads that fill them go on.
    copies = {name: value if isinstance(value, int) else value.copy() for name, value in seen.items()}
    print(json.dumps(copies), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
