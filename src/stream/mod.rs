//! Stream.
