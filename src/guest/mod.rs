//! Where pages come from and go to: one module for each kind of guest.
//!
//! * [`arena`]: the embedded guest, a deterministic machine that checks its own memory; needs no Xen.

pub mod arena;
