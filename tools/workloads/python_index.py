#!/usr/bin/env python3
"""Builds an inverted index of skewed words in plain Python, and prunes it now and then."""

import random, time

random.seed(5)
words = {}
docs = []
print("ready", flush=True)
e = time.time() + 200
while time.time() < e:
    d = [("t%d" % int(random.paretovariate(0.7) % 200000)) for _ in range(20000)]
    for w in d:
        words.setdefault(w, []).append(len(docs))
    docs.append(d)
    if len(docs) > 150:
        docs = docs[50:]
    if random.random() < 0.02:
        words = {w: l[-50:] for w, l in words.items()}
    time.sleep(0.005)
