//! Where a lane's bytes go.

use std::net::TcpStream;
use std::sync::Arc;

use crate::sys::socket;
use crate::transport::stream_out::StreamOut;

/// A lane's way out.
#[derive(Clone)]
pub enum Outlet {
    /// A socket, to be sent to through io_uring.
    Socket(Arc<TcpStream>),
    /// A pipe or a file, to be written to.
    Stream(Arc<StreamOut>),
}

impl Outlet {
    /// Bytes that have been written to it and are still on this side: in the pipe, or not acknowledged.
    pub fn buffered(&self) -> u64 {
        match self {
            Outlet::Socket(socket) => socket::unacknowledged(socket),
            Outlet::Stream(stream) => stream.buffered(),
        }
    }
}
