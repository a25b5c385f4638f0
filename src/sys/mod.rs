//! What pagecast says to the kernel and the hypervisor directly: the home of unsafe code and of raw layouts. What
//! is public here is safe to call.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod slot_memory;
