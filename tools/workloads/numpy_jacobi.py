#!/usr/bin/env python3
"""Jacobi iterations between two arrays of 72 MiB, and a ring of 40 smaller copies of the result."""

import time

import numpy as np

n = 3072
a, b = np.random.rand(n, n), np.zeros((n, n))
ring = [np.zeros((n // 4, n // 4)) for _ in range(40)]
print("ready", flush=True)
end = time.time() + 200
step = 0
while time.time() < end:
    b[1:-1, 1:-1] = 0.25 * (a[:-2, 1:-1] + a[2:, 1:-1] + a[1:-1, :-2] + a[1:-1, 2:])
    a, b = b, a
    if step % 10 == 0:
        ring[step // 10 % 40][:] = a[::4, ::4]
    step += 1
