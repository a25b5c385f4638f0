#!/usr/bin/env python3
"""Transactions of updates, look-ups and inserts on an SQLite table in memory."""

import sqlite3, random, time

random.seed(9)
c = sqlite3.connect(":memory:")
c.execute("create table t(id integer primary key, k int, v text)")
c.execute("create index i on t(k)")
for b in range(40):
    c.executemany(
        "insert into t(k,v) values(?,?)",
        [(random.randrange(1000000), "x" * random.randrange(20, 300)) for _ in range(15000)],
    )
print("ready", flush=True)
e = time.time() + 200
while time.time() < e:
    with c:
        for _ in range(300):
            i = int(600000 * random.random() ** 2) + 1
            x = random.random()
            if x < 0.5:
                c.execute("update t set v=? where id=?", ("y" * random.randrange(20, 300), i))
            elif x < 0.7:
                c.execute("update t set k=? where id=?", (random.randrange(1000000), i))
            elif x < 0.9:
                c.execute("select count(*) from t where k between ? and ?", (i, i + 300)).fetchone()
            else:
                c.execute("insert into t(k,v) values(?,?)", (i, "z" * 100))
    time.sleep(0.003)
