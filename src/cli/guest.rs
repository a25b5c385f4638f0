//! `pagecast guest`: an embedded guest in a process of its own.

use std::path::PathBuf;

use clap::Args;

use super::options::GuestOptions;
use super::{Exit, Failure, die_with_parent, interrupted};
use crate::destination::incoming;
use crate::guest::arena::host::{ControlSocket, Host};
use crate::sys::console;
use crate::sys::descriptors;

#[derive(Args)]
pub struct GuestArguments {
    #[command(flatten)]
    guest: GuestOptions,
    /// Where to listen for commands (a UNIX socket)
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// End when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,
    /// Take over a guest that is being received (descriptor of the receiver's channel)
    #[arg(long, hide = true, value_name = "FD")]
    incoming: Option<i32>,
}

pub fn run(arguments: &GuestArguments) -> Result<Exit, Failure> {
    if arguments.die_with_parent {
        die_with_parent()?;
    }
    if let Some(fd) = arguments.incoming {
        let channel = descriptors::inherited(fd).map_err(|error| {
            let hint = "it is for the receiver to use; start `pagecast receive` instead";
            Failure::usage(format!("--incoming {fd}: {error}; {hint}"))
        })?;
        return match incoming::run(channel, &arguments.socket) {
            Ok(true) => Ok(Exit::Done),
            Ok(false) => Ok(Exit::Failed),
            Err(error) => Err(Failure::failed(error)),
        };
    }
    let nr_pages = arguments.guest.nr_pages().map_err(Failure::usage)?;
    let control = ControlSocket::bind(&arguments.socket).map_err(Failure::failed)?;
    let host = Host::boot(nr_pages, arguments.guest.spec(), control).map_err(Failure::failed)?;
    let quit = interrupted()?;
    let ending = host.clone();
    let watch = std::thread::Builder::new().name("guest-signals".to_owned()).spawn(move || {
        while !quit.load(std::sync::atomic::Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        ending.end();
    });
    watch.map_err(|error| Failure::failed(format!("cannot start a thread: {error}")))?;
    host.listen().map_err(Failure::failed)?;
    console::say(format_args!("guest running, control socket {}", arguments.socket.display()));
    host.serve();
    Ok(Exit::Done)
}
