"""The acknowledging half of the TCP peer of `paths.sink`, run as a process: sink.py MAP LINK MAC ADDRESS PORT.

Waits for what perf/sink.bpf.c notes, acknowledges it with frames of its own, and answers as a receiver of pagecast
would (src/transport/session.rs) without ever having seen a page: Welcome to the Hello, Ready to the stream's END,
Running to the Go. Runs in the peer's network namespace and ends with the signal that ends it.
"""

import ctypes
import json
import mmap
import os
import platform
import socket
import struct
import sys
import time

STATE = struct.Struct("=QQIIH6x")
PEER_MAC = bytes.fromhex("020000000077")
PEER_FIRST_SEQUENCE = 0x10000000
BPF_OBJ_GET = 7
BPF_SYSCALLS = {"x86_64": 321, "aarch64": 280}
# Between two looks: far less than a window of data takes.
PAUSE_S = 20e-6
# A stream has ended with 8 bytes of zeroes, its END record, after which nothing more comes.
QUIET_S = 0.002


def shared_memory(path):
    """The map's memory."""
    name = ctypes.create_string_buffer(path.encode())
    attributes = ctypes.create_string_buffer(struct.pack("=QII", ctypes.addressof(name), 0, 0), 16)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(BPF_SYSCALLS[platform.machine()], BPF_OBJ_GET, attributes, 16)
    if fd < 0:
        sys.exit(f"perf/sink.py: cannot open the map {path}: {os.strerror(ctypes.get_errno())}")
    return mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)


def message(**fields):
    """A message of pagecast's session."""
    body = json.dumps(fields).encode()
    return b"PCS1" + struct.pack("<I", len(body)) + body


def checksum(data):
    """The Internet's."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


class Peer:
    """One end of one connection, made of frames."""

    def __init__(self, link, mac, address, port):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.bind((link, 0))
        self.ethernet = mac + PEER_MAC + b"\x08\x00"
        self.address, self.port = socket.inet_aton(address), port
        self.sequence = PEER_FIRST_SEQUENCE + 1

    def send(self, to_address, to_port, acknowledged, payload=b""):
        """An acknowledgement, with data if there are any."""
        target = struct.pack("=I", to_address)
        flags = 0x18 if payload else 0x10
        tcp = struct.pack("!H", self.port) + struct.pack("=H", to_port) + struct.pack(
            "!IIBBHHH", self.sequence, acknowledged, 5 << 4, flags, 65535, 0, 0)
        pseudo = self.address + target + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp) + len(payload))
        tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp + payload)) + tcp[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp) + len(payload), 0, 0x4000, 64, socket.IPPROTO_TCP, 0)
        ip += self.address + target
        ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
        self.socket.send(self.ethernet + ip + tcp + payload)
        self.sequence += len(payload)


def main():
    """Acknowledges and answers until it is ended."""
    path, link, mac, address, port = sys.argv[1:]
    memory = shared_memory(path)
    peer = Peer(link, bytes.fromhex(mac.replace(":", "")), address, int(port))
    answers = [
        message(message="welcome", version=1),
        message(message="ready", pages=0, cpu_ns=0, verified=0, verify_ns=0),
        message(message="running"),
    ]
    acknowledged = STATE.unpack_from(memory)[2]
    print(f"listening on {address}:{port}", flush=True)
    said, since = 0, 0.0
    while True:
        packets, tail, following, to_address, to_port = STATE.unpack_from(memory)
        now = time.monotonic()
        if packets == 0:
            acknowledged = following
        elif following != acknowledged:
            acknowledged, since = following, now
            # The Hello and the Go are answered at once, the stream when it has ended.
            answer = answers[said] if said in (0, 2) else b""
            said += bool(answer)
            peer.send(to_address, to_port, acknowledged, answer)
            continue
        elif said == 1 and packets > 1 and tail == 0 and now - since > QUIET_S:
            peer.send(to_address, to_port, acknowledged, answers[said])
            said += 1
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
