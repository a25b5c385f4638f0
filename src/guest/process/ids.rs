//! Page numbers for memory that comes and goes: ids are handed out by 2 MiB chunk when the chunk is first seen.

use std::collections::HashMap;

use crate::page::{CHUNK_PAGES, Pfn};

/// log2 of the bytes in a page.
const PAGE_SHIFT: u32 = 12;

/// log2 of the bytes in a chunk.
const CHUNK_SHIFT: u32 = 21;

/// Whose memory a chunk is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Private memory of an address space, by its number among those attached to so far.
    Space(u32),
    /// A shared object, by device and inode, whoever maps it.
    Object(u64, u64),
}

/// A run of pages of one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Whose memory.
    pub place: Place,
    /// The page within the place: of private memory the address, of an object the offset, in pages.
    pub page: u64,
    /// How many.
    pub count: u64,
    /// The address of the first, in the process through which it was seen.
    pub va: u64,
}

impl Stretch {
    /// The address of a page of it, by where it is within the place.
    pub fn address(&self, page: u64) -> u64 {
        self.va + ((page - self.page) << PAGE_SHIFT)
    }
}

/// The id space is as large as it may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory has outgrown the {} MiB that there is room for", u64::from(*.0) * 2)]
pub struct Full(pub u32);

/// Ids of all chunks seen so far.
pub struct Ids {
    chunks: HashMap<(Place, u64), u32>,
    va_chunks: Vec<u64>,
    max_chunks: u32,
}

impl Ids {
    /// An empty id space for at most `max_chunks` chunks.
    pub fn new(max_chunks: u32) -> Self {
        Ids { chunks: HashMap::new(), va_chunks: Vec::new(), max_chunks }
    }

    /// Has no more than `max_chunks` chunks be numbered, those included that are.
    pub fn limit(&mut self, max_chunks: u32) -> Result<(), Full> {
        if self.va_chunks.len() > max_chunks as usize {
            return Err(Full(max_chunks));
        }
        self.max_chunks = max_chunks;
        Ok(())
    }

    /// Size of the id space so far, in pages.
    pub fn nr_pages(&self) -> u64 {
        (self.va_chunks.len() * CHUNK_PAGES) as u64
    }

    /// For each chunk the address of its first page, shifted right by 21, by which a trace names it.
    pub fn va_chunks(&self) -> &[u64] {
        &self.va_chunks
    }

    /// Calls `run(first id, count, page)` with the ids of a stretch, chunk by chunk; `page`: where within the place.
    pub fn number(&mut self, stretch: Stretch, run: &mut dyn FnMut(Pfn, u64, u64)) -> Result<(), Full> {
        let (mut page, end) = (stretch.page, stretch.page + stretch.count);
        while page < end {
            let in_chunk = page % CHUNK_PAGES as u64;
            let count = (CHUNK_PAGES as u64 - in_chunk).min(end - page);
            let known = self.va_chunks.len() as u32;
            let chunk = *self.chunks.entry((stretch.place, page / CHUNK_PAGES as u64)).or_insert(known);
            if chunk == known {
                if known >= self.max_chunks {
                    self.chunks.remove(&(stretch.place, page / CHUNK_PAGES as u64));
                    return Err(Full(self.max_chunks));
                }
                let va = stretch.address(page);
                self.va_chunks.push(va.saturating_sub(in_chunk << PAGE_SHIFT) >> CHUNK_SHIFT);
            }
            run(Pfn(u64::from(chunk) * CHUNK_PAGES as u64 + in_chunk), count, page);
            page += count;
        }
        Ok(())
    }

    /// As [`Ids::number`], but gives no new ids: what is in no chunk that has one is passed over.
    pub fn known(&self, stretch: Stretch, run: &mut dyn FnMut(Pfn, u64, u64)) {
        let (mut page, end) = (stretch.page, stretch.page + stretch.count);
        while page < end {
            let in_chunk = page % CHUNK_PAGES as u64;
            let count = (CHUNK_PAGES as u64 - in_chunk).min(end - page);
            if let Some(chunk) = self.chunks.get(&(stretch.place, page / CHUNK_PAGES as u64)) {
                run(Pfn(u64::from(*chunk) * CHUNK_PAGES as u64 + in_chunk), count, page);
            }
            page += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(ids: &mut Ids, place: Place, page: u64, count: u64, va: u64) -> Vec<(u64, u64, u64)> {
        let mut runs = Vec::new();
        let stretch = Stretch { place, page, count, va };
        ids.number(stretch, &mut |first, count, page| runs.push((first.0, count, page))).unwrap();
        runs
    }

    #[test]
    fn neighbours_within_a_chunk_are_neighbours_by_id_and_an_address_keeps_its_id() {
        let mut ids = Ids::new(10);
        let (one, other) = (Place::Space(0), Place::Space(1));
        assert_eq!(numbered(&mut ids, one, 1000, 30, 1000 << 12), [(488, 24, 1000), (512, 6, 1024)]);
        assert_eq!(numbered(&mut ids, other, 1000, 1, 1000 << 12), [(1024 + 488, 1, 1000)]);
        assert_eq!(numbered(&mut ids, one, 1023, 2, 1023 << 12), [(511, 1, 1023), (512, 1, 1024)]);
        assert_eq!(ids.va_chunks(), [1, 2, 1]);
        assert_eq!(ids.nr_pages(), 3 * 512);
    }

    #[test]
    fn a_shared_object_has_the_same_ids_through_every_mapping() {
        let mut ids = Ids::new(10);
        let object = Place::Object(1, 2053);
        assert_eq!(numbered(&mut ids, object, 3, 2, 0x7f00_0000_3000), [(3, 2, 3)]);
        assert_eq!(numbered(&mut ids, object, 4, 1, 0x6600_0040_4000), [(4, 1, 4)]);
        assert_eq!(ids.va_chunks(), [0x7f00_0000_0000 >> 21]);
    }

    #[test]
    fn what_has_no_id_yet_is_passed_over_where_only_known_ids_are_wanted() {
        let mut ids = Ids::new(10);
        let object = Place::Object(1, 2053);
        numbered(&mut ids, object, 1024 + 7, 1, 0);
        let mut runs = Vec::new();
        let all = Stretch { place: object, page: 100, count: 3000, va: 0 };
        ids.known(all, &mut |first, count, page| runs.push((first.0, count, page)));
        assert_eq!((runs, ids.nr_pages()), (vec![(0, 512, 1024)], 512));
    }

    #[test]
    fn a_full_space_says_so_and_stays_as_it_is() {
        let mut ids = Ids::new(1);
        numbered(&mut ids, Place::Space(0), 0, 1, 0);
        let more = Stretch { place: Place::Space(0), page: 512, count: 1, va: 512 << 12 };
        assert_eq!(ids.number(more, &mut |_, _, _| panic!("there is no room")), Err(Full(1)));
        assert_eq!(ids.nr_pages(), 512);
        assert_eq!(numbered(&mut ids, Place::Space(0), 7, 1, 7 << 12), [(7, 1, 7)]);
    }
}
