//! The `pagecast` program.

fn main() {}
