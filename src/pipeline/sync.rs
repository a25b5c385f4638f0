//! The one place that chooses between std and loom. Code that is model-checked takes its atomics, cells and
//! reference counts from here; built with `--cfg loom` they are loom's, which explores every interleaving and
//! every value a load may see, and which works only inside `loom::model`.

#[cfg(loom)]
pub use loom::{
    cell::UnsafeCell,
    hint::spin_loop,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::yield_now,
};

#[cfg(not(loom))]
pub use std::{
    hint::spin_loop,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::yield_now,
};

/// `std::cell::UnsafeCell` with loom's interface: access happens inside a closure, so that loom can see where it
/// begins and ends.
#[cfg(not(loom))]
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    /// A cell that holds `value`.
    pub const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    /// Calls `access` with a pointer to read the value through. Whoever dereferences it answers for there being
    /// no writer meanwhile.
    #[inline(always)]
    pub fn with<R>(&self, access: impl FnOnce(*const T) -> R) -> R {
        access(self.0.get())
    }

    /// Calls `access` with a pointer to write the value through. Whoever dereferences it answers for there being
    /// nobody else at the value meanwhile.
    #[inline(always)]
    pub fn with_mut<R>(&self, access: impl FnOnce(*mut T) -> R) -> R {
        access(self.0.get())
    }
}
