#!/usr/bin/env python3
"""SET, INCR, HSET, ZADD, LPUSH and GET on skewed keys of redis on port 26379, pipelined: SEED SECONDS."""

import socket, random, time, sys

random.seed(int(sys.argv[1]))
s = socket.create_connection(("127.0.0.1", 26379))
f = s.makefile("rb")
e = time.time() + float(sys.argv[2])
n = 0


def cmd(*a):
    return b"*%d\r\n" % len(a) + b"".join(b"$%d\r\n%s\r\n" % (len(x), x) for x in a)


while time.time() < e:
    buf = b""
    for _ in range(50):
        k = b"%d" % int(300000 * random.random() ** 2.5)
        x = random.random()
        if x < 0.4:
            buf += cmd(b"SET", b"s" + k, b"v" * random.randrange(20, 600))
        elif x < 0.6:
            buf += cmd(b"INCR", b"c" + k)
        elif x < 0.75:
            buf += cmd(b"HSET", b"h" + k, b"f%d" % random.randrange(30), b"y" * random.randrange(100))
        elif x < 0.85:
            buf += cmd(b"ZADD", b"z" + k[-2:], b"%d" % random.randrange(100000), k)
        elif x < 0.9:
            buf += cmd(b"LPUSH", b"l" + k[-3:], b"q" * 50)
        else:
            buf += cmd(b"GET", b"s" + k)
    s.sendall(buf)
    for _ in range(50):
        l = f.readline()
        if l[:1] == b"$" and l != b"$-1\r\n":
            f.read(int(l[1:]) + 2)
