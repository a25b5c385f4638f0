#!/usr/bin/env python3
"""Groups, maps, sorts and merges a data frame of 1.5 million rows."""

import numpy as np, pandas as pd, time

r = np.random.default_rng(3)
n = 1500000
df = pd.DataFrame({"k": r.integers(0, 20000, n), "v": r.random(n), "w": r.random(n)})
print("ready", flush=True)
e = time.time() + 200
while time.time() < e:
    g = df.groupby("k").agg({"v": "mean", "w": "max"})
    df["z"] = df.k.map(g.v) - df.v
    s = df.sort_values("z")
    t = s.head(100000).merge(g, left_on="k", right_index=True)
    df.loc[t.index[:1000], "v"] += 0.1
    time.sleep(0.3)
