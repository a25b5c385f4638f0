#!/usr/bin/env python3
"""Groups, joins and updates a table of 2.5 million rows in DuckDB, in memory."""

import duckdb, time

c = duckdb.connect(":memory:")
c.execute("PRAGMA threads=2; PRAGMA memory_limit='1500MB'")
c.execute(
    "create table t as select range i, (random()*1000)::int k, random() v, md5(range::varchar) s from range(2500000)"
)
print("ready", flush=True)
e = time.time() + 200
while time.time() < e:
    c.execute("select k, sum(v), max(s) from t group by k order by 2 desc limit 5").fetchall()
    c.execute(
        "create or replace table u as select k, substr(s,1,3) p, avg(v) a from t where v<0.3 group by 1,2"
    ).fetchall()
    c.execute("update t set v=random() where k=%d" % (int(time.time() * 10) % 1000))
    c.execute(
        "select count(*) from t a join u b on a.k=b.k and substr(a.s,1,3)=b.p where a.v>b.a and a.i%7=0"
    ).fetchall()
    time.sleep(0.2)
