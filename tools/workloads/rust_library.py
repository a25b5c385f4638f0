#!/usr/bin/env python3
"""Prints a Rust library of 1500 generic functions, each used with one type."""

import random

random.seed(4)
TYPES = ["u32", "String", "(u8,i64)", "char", "Vec<u8>", "Option<i16>"]
print("use std::collections::*;")
for i in range(1500):
    print(
        f"""pub fn f{i}<T: Ord + Clone + std::hash::Hash + std::fmt::Debug>(v: &[T], k: usize) -> BTreeMap<String, Vec<T>> {{
    let mut m: BTreeMap<String, Vec<T>> = BTreeMap::new();
    let mut h: HashMap<T, usize> = HashMap::new();
    for (i, x) in v.iter().enumerate() {{
        *h.entry(x.clone()).or_insert(0) += i * {i + 1} % (k + 1);
        m.entry(format!("{{:?}}{{}}", x, i % {i % 13 + 2})).or_default().push(x.clone());
    }}
    let mut w: Vec<_> = h.into_iter().collect();
    w.sort();
    for (x, n) in w {{
        if n % {i % 7 + 2} == 0 {{
            m.entry(n.to_string()).or_default().push(x);
        }}
    }}
    m
}}
pub fn g{i}(v: &[{random.choice(TYPES)}]) -> usize {{
    f{i}(v, {i}).values().map(|x| x.len()).sum()
}}"""
    )
