//! `pagecast take-back`: settles by hand a hand-over that cannot be settled otherwise.

use std::path::PathBuf;

use clap::Args;

use super::{Exit, Failure};
use crate::guest::arena::client::ArenaGuest;
use crate::sys::console;

#[derive(Args)]
pub struct TakeBackArguments {
    /// The control socket of the guest at the source
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// That the destination's host is down for good, or the guest stopped there: otherwise it will run twice
    #[arg(long, required = true)]
    destination_is_gone: bool,
}

pub fn run(arguments: &TakeBackArguments) -> Result<Exit, Failure> {
    debug_assert!(arguments.destination_is_gone, "clap insists on it");
    let guest = ArenaGuest::connect(&arguments.socket).map_err(Failure::failed)?;
    guest.take_back().map_err(Failure::failed)?;
    console::say(format_args!("the guest at {} was told to run on here", arguments.socket.display()));
    Ok(Exit::Done)
}
