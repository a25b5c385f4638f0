//! Looking into the dirty log without clearing it, for policies that want to, within the share of time that looks may take.

use std::time::Duration;

use super::cadence::Cadence;
use super::clock::Clock;
use crate::forecast::Peek;
use crate::guest::{DirtyLog, GuestError};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// The log as a policy peeks into it. Where looks are limited, one is taken of all of the log and kept until the next may be.
pub(super) struct LogPeek<'a> {
    log: &'a mut dyn DirtyLog,
    peeks: &'a mut Peeks,
    cadence: &'a Cadence,
    clock: &'a Clock,
    /// Why the last look failed, if it did.
    pub(super) failed: Option<GuestError>,
}

/// The last look at all of the log, since the sample before.
#[derive(Default)]
pub(super) struct Peeks {
    seen: Option<PageSet>,
    next: Duration,
}

impl Peeks {
    /// The log was cleared: what was seen in it is in the forecast now.
    pub(super) fn forget(&mut self) {
        if let Some(seen) = &mut self.seen {
            seen.clear();
        }
    }
}

impl<'a> LogPeek<'a> {
    /// Peeks into `log`.
    pub(super) fn new(
        log: &'a mut dyn DirtyLog,
        peeks: &'a mut Peeks,
        cadence: &'a Cadence,
        clock: &'a Clock,
    ) -> Self {
        LogPeek { log, peeks, cadence, clock, failed: None }
    }

    fn look_at_all(&mut self, nr_pages: u64) -> Result<(), GuestError> {
        let seen = self.peeks.seen.get_or_insert_with(|| PageSet::empty(nr_pages));
        let now = self.clock.elapsed();
        if now >= self.peeks.next {
            self.log.peek(0..nr_pages, seen)?;
            self.peeks.next = now + self.cadence.rest(self.clock.elapsed() - now);
        }
        Ok(())
    }
}

impl Peek for LogPeek<'_> {
    fn peek(&mut self, first: Pfn, count: u64, into: &mut PageSet) {
        let looked = match self.cadence.share {
            None => self.log.peek(first.0..first.0 + count, into),
            Some(_) => self.look_at_all(into.nr_pages()),
        };
        match (looked, &self.peeks.seen) {
            (Err(error), _) => self.failed = Some(error),
            (Ok(()), Some(seen)) => into.union(seen),
            (Ok(()), None) => {}
        }
    }
}
