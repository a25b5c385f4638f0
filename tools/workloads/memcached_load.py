#!/usr/bin/env python3
"""Sets and gets 600,000 skewed keys of memcached on port 21211, pipelined: SEED SECONDS."""

import socket, random, time, sys

random.seed(int(sys.argv[1]))
s = socket.create_connection(("127.0.0.1", 21211))
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
f = s.makefile("rb")
N = 600000
e = time.time() + float(sys.argv[2])
v = b"x" * 900
while time.time() < e:
    buf = b""
    g = 0
    for _ in range(64):
        k = int(N * random.random() ** 3)
        if random.random() < 0.3:
            l = random.randrange(50, 900)
            buf += b"set k%d 0 0 %d noreply\r\n%s\r\n" % (k, l, v[:l])
        else:
            buf += b"get k%d\r\n" % k
            g += 1
    s.sendall(buf)
    while g:
        l = f.readline()
        if l == b"END\r\n":
            g -= 1
