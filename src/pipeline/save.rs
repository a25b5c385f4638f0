//! A migration into a stream that somebody else receives: one lane, into whatever the descriptor is, without a word back.
//!
//! Until the end record is written every way out, an error or an abort, leaves the guest to whoever suspended it, with its
//! dirty log off and nothing mapped.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::lanes::{Lanes, Wire};
use super::live::{Ending, Live, Observer, at};
use super::outcome::{Migration, MigrationError, Phase};
use super::outlet::Outlet;
use super::settings::Settings;
use crate::guest::{GuestControl, GuestError};
use crate::stream::end;
use crate::sys::cpu;
use crate::transport::stream_out::{Kind, StreamOut};

/// A guest whose stream a stock receiver understands.
pub trait SavableGuest: GuestControl {
    /// What comes before the first page: headers, static records, STATIC_DATA_END.
    fn head(&mut self) -> Result<Vec<u8>, GuestError>;
    /// What comes between the last page and END, of the suspended guest.
    fn tail(&mut self) -> Result<Vec<u8>, GuestError>;
}

/// Saves `guest` into `out`, `live` or with the guest suspended from the start. One lane, whatever `settings` say. `abort` is
/// looked at all the time. The descriptor is as it was afterwards, but that a pipe may be larger.
pub fn save<G: SavableGuest + ?Sized>(
    guest: &mut G,
    settings: &Settings,
    out: OwnedFd,
    live: bool,
    abort: &AtomicBool,
    observer: &mut dyn Observer,
) -> Result<Migration, MigrationError> {
    let begun = Instant::now();
    let setup = |error| MigrationError::Setup(format!("cannot write to the stream: {error}"));
    let again = out.try_clone().map_err(setup)?;
    let stream = Arc::new(StreamOut::new(again).map_err(setup)?);
    let outlet = match stream.kind() {
        Kind::Socket => Outlet::Socket(Arc::new(TcpStream::from(out))),
        _ => Outlet::Stream(stream.clone()),
    };
    let mut lanes = Lanes::start(guest, settings, &[outlet], Wire::Standard)?;
    let prepare = begun.elapsed();
    let control_cpu = cpu::thread_cpu_time();
    let mut run = Run { live: Live::new(guest, settings, abort, observer), stream: &stream };
    match run.save(&mut lanes, live) {
        Ok(mut migration) => {
            migration.prepare = prepare;
            migration.cpu.control = cpu::thread_cpu_time().saturating_sub(control_cpu);
            Ok(migration)
        }
        Err(error) => Err(run.live.call_off(&mut lanes, error, &str::to_owned)),
    }
}

struct Run<'a, G: SavableGuest + ?Sized> {
    live: Live<'a, G>,
    stream: &'a StreamOut,
}

impl<G: SavableGuest + ?Sized> Run<'_, G> {
    fn save(&mut self, lanes: &mut Lanes, live: bool) -> Result<Migration, MigrationError> {
        self.live.enter(Phase::Prepare);
        let head = self.live.guest.head().map_err(|source| at(Phase::Prepare, source))?;
        self.write(&head)?;
        if live {
            self.live.guest.set_log_dirty(true).map_err(|source| at(Phase::Prepare, source))?;
        }
        let sent = self.live.run(lanes, live, Instant::now())?;
        let all_sent = sent.sent;
        self.live.enter(Phase::HandOver);
        let tail = self.live.guest.tail().map_err(|source| at(Phase::HandOver, source))?;
        self.write(&tail)?;
        self.write(&end())?;
        let ending = Ending { hand_over: all_sent.elapsed(), ..Ending::default() };
        if live {
            // It is of no use any more, whether or not it can be ended.
            let _ = self.live.guest.set_log_dirty(false);
        }
        Ok(sent.migration(lanes, self.live.settings, &ending))
    }

    fn write(&self, bytes: &[u8]) -> Result<(), MigrationError> {
        let give_up = || self.live.abort.load(Ordering::Acquire);
        self.stream.write_all(bytes, &give_up).map_err(|error| {
            let phase = self.live.phase;
            if give_up() {
                return MigrationError::Aborted { phase, reason: "interrupted".to_owned() };
            }
            MigrationError::Send { phase, reason: format!("the stream to the receiver broke: {error}") }
        })
    }
}
