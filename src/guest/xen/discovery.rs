//! Finding the pages of a domain without asking for each page number.
//!
//! A few frames of every chunk tell which chunks are populated, and those are asked for in full. That nothing was
//! overlooked is proved by a count: Xen's `tot_pages` of a domain is the number of its RAM pages, exactly, as long as
//! nobody holds frames that the guest has given up. Only if the sum falls short is everything asked for.
//! (Measured on Xen 4.17.7 with a PVH guest of 128 MiB: 67 calls in place of 1,020 when one frame of a chunk is probed;
//! that missed a chunk of which only the last eight pages are there, so the last frame is probed as well.)

use std::time::Instant;

use serde::Serialize;

use super::XenError;
use super::hypervisor::{Hypervisor, MAX_TYPES};
use super::population::{Asker, Change, Population};
use super::shared::Shared;
use crate::page::Pfn;
use crate::sys::xen::abi::DomId;

/// What finding the pages came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DiscoveryCost {
    /// Page numbers that the domain may use.
    pub nr_pfns: u64,
    /// Pages found.
    pub populated: u64,
    /// Frames that Xen counts for the domain.
    pub tot_pages: u64,
    /// Both are equal (or differ by as much as they did at first), which proves that no page was overlooked.
    pub proved: bool,
    /// All page numbers had to be asked for.
    pub walked_all: bool,
    /// Calls of getpageframeinfo3.
    pub calls: u64,
    /// Page numbers asked for in them.
    pub frames_asked: u64,
    /// Calls that asking for every page number would have taken.
    pub calls_of_full_walk: u64,
    /// Time that it took.
    pub seconds: f64,
}

/// The first and the last page of each chunk for which `wanted` holds.
fn probes(population: &Population, wanted: impl Fn(usize) -> bool) -> Vec<Pfn> {
    let mut probes = Vec::new();
    for chunk in (0..population.known().nr_chunks()).filter(|chunk| wanted(*chunk)) {
        let mut pages = population.chunk_pages(chunk);
        let first = pages.next();
        probes.extend(first.into_iter().chain(pages.next_back()));
    }
    probes
}

/// Finds the pages of a domain of which nothing is known, as of epoch `epoch`.
pub(super) fn discover(
    hypervisor: &dyn Hypervisor,
    domid: DomId,
    population: &mut Population,
    epoch: u32,
) -> Result<DiscoveryCost, XenError> {
    let began = Instant::now();
    let mut asker = Asker::new();
    let probed = probes(population, |_| true);
    asker.ask(hypervisor, domid, probed.iter().copied(), |pfn, there| {
        population.note(pfn, there);
    })?;
    let occupied: Vec<usize> = population.known().occupied_chunks().collect();
    ask_chunks(hypervisor, domid, population, &mut asker, &occupied)?;
    let mut tot_pages = hypervisor.domain_info(domid)?.tot_pages;
    let walked_all = population.known().len() < tot_pages;
    if walked_all {
        let known = population.known();
        let empty: Vec<usize> = (0..known.nr_chunks()).filter(|chunk| known.chunk_len(*chunk) == 0).collect();
        ask_chunks(hypervisor, domid, population, &mut asker, &empty)?;
        tot_pages = hypervisor.domain_info(domid)?.tot_pages;
    }
    for chunk in 0..population.known().nr_chunks() {
        population.set_asked(chunk, epoch);
    }
    let found = Found { tot_pages, proved: population.known().len() == tot_pages, walked_all };
    Ok(cost(population, &asker, found, began))
}

/// Asks for all pages of `chunks`.
fn ask_chunks(
    hypervisor: &dyn Hypervisor,
    domid: DomId,
    population: &mut Population,
    asker: &mut Asker,
    chunks: &[usize],
) -> Result<(), XenError> {
    let pages: Vec<Pfn> = chunks.iter().flat_map(|chunk| population.chunk_pages(*chunk)).collect();
    asker.ask(hypervisor, domid, pages.into_iter(), |pfn, there| {
        population.note(pfn, there);
    })
}

/// Finds the pages that a suspended domain has got since it was discovered, and has `came` know of each. Asks only for
/// what is not known to be there, and not for chunks that were asked for in `final_epoch`, which began when the domain was
/// suspended; whether pages known have gone is of no interest, but for the count.
pub(super) fn discover_again(
    shared: &Shared,
    population: &mut Population,
    final_epoch: Option<u32>,
    came: &mut dyn FnMut(Pfn),
) -> Result<DiscoveryCost, XenError> {
    let began = Instant::now();
    let hypervisor = shared.hypervisor.as_ref();
    let mut asker = Asker::new();
    let mut ask = |population: &mut Population, pages: Vec<Pfn>| {
        asker.ask(hypervisor, shared.domid, pages.into_iter(), |pfn, there| {
            if population.note(pfn, there) == Change::Came {
                came(pfn);
            }
        })
    };
    // Pages that were written and not there, holes between pages, and probes of what was empty.
    ask(population, population.missed())?;
    let is_open =
        |population: &Population, chunk| !final_epoch.is_some_and(|e| population.is_asked(chunk, e));
    let nr_chunks = population.known().nr_chunks();
    let open: Vec<usize> = (0..nr_chunks).filter(|chunk| is_open(population, *chunk)).collect();
    let is_empty = |population: &Population, chunk| population.known().chunk_len(chunk) == 0;
    let (empty, _): (Vec<usize>, Vec<usize>) = open.iter().partition(|chunk| is_empty(population, **chunk));
    ask(population, probes(population, |chunk| empty.binary_search(&chunk).is_ok()))?;
    let (empty, occupied): (Vec<usize>, Vec<usize>) =
        open.into_iter().partition(|chunk| is_empty(population, *chunk));
    ask(population, unknown(population, &occupied))?;
    let tot_pages = hypervisor.domain_info(shared.domid)?.tot_pages;
    let excess =
        |population: &Population| population.known().len() as i64 + shared.surplus - tot_pages as i64;
    let mut walked_all = false;
    if excess(population) != 0 {
        // Either pages have gone that were thought to be there, or some have come in a chunk that seemed empty. Only
        // asking for one or the other can tell; where it may be either, the smaller lot goes first.
        let known: Vec<Pfn> =
            occupied.iter().flat_map(|chunk| population.known().pages_of_chunk(*chunk)).collect();
        let hidden = unknown(population, &empty);
        if excess(population) > 0 && known.len() < hidden.len() {
            ask(population, known)?;
        }
        walked_all = excess(population) != 0;
        if walked_all {
            ask(population, hidden)?;
        }
    }
    let found = Found { tot_pages, proved: excess(population) == 0, walked_all };
    Ok(cost(population, &asker, found, began))
}

/// What the search ended with.
struct Found {
    tot_pages: u64,
    proved: bool,
    walked_all: bool,
}

fn cost(population: &Population, asker: &Asker, found: Found, began: Instant) -> DiscoveryCost {
    let nr_pfns = population.known().nr_pages();
    DiscoveryCost {
        nr_pfns,
        populated: population.known().len(),
        tot_pages: found.tot_pages,
        proved: found.proved,
        walked_all: found.walked_all,
        calls: asker.calls,
        frames_asked: asker.frames,
        calls_of_full_walk: nr_pfns.div_ceil(MAX_TYPES as u64),
        seconds: began.elapsed().as_secs_f64(),
    }
}

/// The pages of `chunks` that are not known to be there.
fn unknown(population: &Population, chunks: &[usize]) -> Vec<Pfn> {
    let mut pages = Vec::new();
    chunks.iter().for_each(|chunk| population.list_unknown(*chunk, &mut pages));
    pages
}
