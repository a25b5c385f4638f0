//! Why a page of an image differs: what is known here of the pages that were last sent otherwise than they are at the
//! comparison. It is put together while the processes stand still, so that what it says of their mappings and what it reads
//! again is what was compared.

use std::fs;

use super::areas::Line;
use super::history::{Past, ZEROES};
use super::image::{Image, ImagePages};
use crate::page::{PAGE_SIZE, Pfn, is_zero};
use crate::stream::arena_context::page_digest;

/// The most pages that are explained.
const MAX_EXPLAINED: usize = 8;

/// The most mappings of a page that are named.
const MAX_NAMED: usize = 4;

/// Pages that were last sent otherwise than they were found at the comparison.
#[derive(Default)]
pub struct Suspects {
    count: u64,
    /// The first of them, each with its digest as it was compared; None: it could not be read.
    first: Vec<(Pfn, Option<u64>)>,
}

impl Suspects {
    /// Looks at a page as it is compared, at its digest as [`Past::sent`] has it; None if it could not be read.
    pub fn look(&mut self, image: &Image, pfn: Pfn, now: Option<u64>) {
        if now == Some(image.history().past(pfn).sent) {
            return;
        }
        self.count += 1;
        if self.first.len() < MAX_EXPLAINED {
            self.first.push((pfn, now));
        }
    }

    /// A line for each page, up to eight, and one that counts the others.
    pub fn explain(&self, image: &Image, pages: &mut ImagePages) -> Vec<String> {
        let explain = |(pfn, compared): &(Pfn, Option<u64>)| {
            let past = image.history().past(*pfn);
            let again = pages.read_again(*pfn).map(|page| digest(*pfn, page));
            format!(
                "page {pfn} differs: {}; {}; {}",
                mappings_of(image, *pfn),
                story(&past, image.history().surveys()),
                verdict(*compared, again, past.sent)
            )
        };
        let mut lines: Vec<String> = self.first.iter().map(explain).collect();
        let more = self.count - self.first.len() as u64;
        if more > 0 {
            lines.push(format!("{more} more pages differ"));
        }
        lines
    }
}

/// The digest of a page as [`Past::sent`] has it.
pub fn digest(pfn: Pfn, page: &[u8]) -> u64 {
    if is_zero(page) { ZEROES } else { page_digest(pfn, page) }
}

fn story(past: &Past, surveys: u32) -> String {
    let populated = match past.populated {
        0 => "never found populated".to_owned(),
        number => format!("first populated in survey {number}"),
    };
    let dirty = match past.dirty {
        0 => "dirty in none".to_owned(),
        count => format!("dirty in {count}, the last {}", past.dirty_last),
    };
    let last = if past.sent_after == surveys { "in the final set" } else { "not in the final set" };
    format!(
        "{populated} of {surveys}, {dirty}; last read to be sent after survey {}, {last}",
        past.sent_after
    )
}

fn verdict(compared: Option<u64>, again: Option<u64>, sent: u64) -> &'static str {
    match (compared, again) {
        (None, None) => "it cannot be read",
        (None, Some(_)) => "it could not be read and can be now",
        (Some(_), None) => "it cannot be read any more",
        (Some(compared), Some(again)) if again == compared => {
            "read again it is as it was compared: what it was sent as is outdated"
        }
        (Some(_), Some(again)) if again == sent => {
            "read again it is as it was sent: the comparison read something else"
        }
        (Some(_), Some(_)) => "read again it is neither as compared nor as sent: it is being written",
    }
}

/// Who maps a page, and what it is to them.
fn mappings_of(image: &Image, pfn: Pfn) -> String {
    let Some((pid, va)) = image.place(pfn) else { return "nobody maps it".to_owned() };
    let of_home = maps(pid);
    let Some(line) = of_home.lines().filter_map(Line::parse).find(|line| line.range.contains(&va)) else {
        return format!("process {pid}, which is to have it at {va:#x}, maps nothing there");
    };
    let name = if line.name.is_empty() { "anonymous" } else { line.name };
    if line.is_private() {
        return format!("private memory ({name}) of process {pid} at {va:#x}");
    }
    let at = line.offset + (va - line.range.start);
    let mut places = Vec::new();
    for pid in image.processes() {
        for other in maps(pid).lines().filter_map(Line::parse).filter(|other| other.object == line.object) {
            let from_start = at.wrapping_sub(other.offset);
            if from_start < other.range.end - other.range.start {
                places.push(format!("{pid} at {:#x}", other.range.start + from_start));
            }
        }
    }
    let others = places.len().saturating_sub(MAX_NAMED);
    places.truncate(MAX_NAMED);
    let others = if others > 0 { format!(" and {others} more") } else { String::new() };
    format!(
        "shared memory ({name}, page {:#x} of it), mapped by {}{others}, read through {pid}",
        at / PAGE_SIZE as u64,
        places.join(", ")
    )
}

fn maps(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_tells_an_outdated_page_from_one_that_is_being_written() {
        assert!(verdict(Some(1), Some(1), 2).contains("outdated"));
        assert!(verdict(Some(1), Some(2), 2).contains("as it was sent"));
        assert!(verdict(Some(1), Some(3), 2).contains("being written"));
        assert!(verdict(None, None, 2).contains("cannot be read"));
    }

    #[test]
    fn the_story_of_a_page_says_when_it_was_dirty_and_when_it_was_sent() {
        let past = Past { sent: 1, sent_after: 3, populated: 2, dirty: 4, dirty_last: 9 };
        assert_eq!(
            story(&past, 12),
            "first populated in survey 2 of 12, dirty in 4, the last 9; last read to be sent after survey 3, not in the final set"
        );
        assert!(story(&Past { sent_after: 12, ..past }, 12).ends_with("survey 12, in the final set"));
        assert!(story(&Past::default(), 3).starts_with("never found populated of 3, dirty in none"));
    }
}
