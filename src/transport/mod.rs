//! Getting bytes to the other side.
//!
//! * [`session`]: what two pagecasts say to each other around the stream.
//! * [`pacer`]: when the next send may start under a bandwidth cap.
//! * [`ledger`]: which bytes the kernel may still read.
//! * [`stream_out`]: a pipe or a file instead of a socket.

pub mod ledger;
pub mod pacer;
pub mod session;
pub mod stream_out;
