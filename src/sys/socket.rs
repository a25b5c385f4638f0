//! Socket calls that std does not have.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, sockopt};

/// Puts a connection under the TCP congestion control `name`, whose module the kernel looks for if it is allowed to.
pub fn set_congestion<Fd: AsFd>(socket: Fd, name: &str) -> io::Result<()> {
    Ok(sockopt::set_tcp_congestion(socket, name)?)
}

/// Errs if a connection cannot be put under the congestion control `name`.
pub fn check_congestion(name: &str) -> io::Result<()> {
    set_congestion(rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?, name)
}

/// The congestion control of a connection.
pub fn congestion(stream: &TcpStream) -> io::Result<String> {
    Ok(sockopt::tcp_congestion(stream)?)
}

/// Cuts a TCP connection at once: what is unsent is dropped, and with it the kernel's hold on the pages it was to
/// be sent from. The other side sees a reset.
pub fn disconnect(stream: &TcpStream) -> io::Result<()> {
    let unspecified = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    let length = size_of_val(&unspecified) as libc::socklen_t;
    // SAFETY: connect(2) reads `length` bytes of an address that outlives the call.
    let rc = unsafe { libc::connect(stream.as_raw_fd(), &unspecified, length) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Acknowledges now what was read, and does not wait 40 to 200 ms for an answer to put that on: the other side's zero-copy
/// sends keep their pages until then, and its last ones are in the downtime.
pub fn acknowledge(stream: &TcpStream) -> io::Result<()> {
    Ok(sockopt::set_tcp_quickack(stream, true)?)
}

/// Bytes that are on the socket and have not been acknowledged; 0 if the kernel does not tell.
pub fn unacknowledged(stream: &TcpStream) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ of a socket) writes one int, and the descriptor is open for as long as `stream` is borrowed.
    let rc = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if rc == 0 { bytes.max(0) as u64 } else { 0 }
}

/// Gives a connection up when what was sent has not been acknowledged for `patience`.
pub fn set_user_timeout(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    Ok(sockopt::set_tcp_user_timeout(stream, patience.as_millis() as u32)?)
}

/// Has the kernel notice within half a minute that the other side's host is gone, even while nothing is sent.
pub fn watch_for_death(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepcnt(stream, 4)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}
