//! State by 2 MiB chunk, for the chunks that have any: a Xen guest's page-number space is mostly holes, and
//! most of what is there is never written during a migration.

use crate::sys::huge_pages;

/// No state yet.
const NONE: u32 = u32::MAX;

/// One `T` for each chunk that was asked to have one. Room for all chunks is reserved at the start (address
/// space, which the kernel backs as it is touched, with huge pages where it has any), so that nothing is moved or
/// allocated later.
pub(super) struct Chunks<T> {
    slot_of: Vec<u32>,
    slots: Vec<T>,
}

impl<T: Clone> Chunks<T> {
    /// No chunk has state; at most `nr_chunks` ever will.
    pub(super) fn new(nr_chunks: usize) -> Self {
        assert!(nr_chunks < NONE as usize, "{nr_chunks} chunks are beyond 32-bit slot numbers");
        let slots = Vec::with_capacity(nr_chunks);
        huge_pages::ask_for(&slots);
        Chunks { slot_of: vec![NONE; nr_chunks], slots }
    }

    /// The state of `chunk`, if it has any.
    #[inline]
    pub(super) fn get(&self, chunk: usize) -> Option<&T> {
        let slot = self.slot_of[chunk];
        (slot != NONE).then(|| &self.slots[slot as usize])
    }

    /// The state of `chunk`, made from `empty` if it has none.
    #[inline]
    pub(super) fn get_or_insert(&mut self, chunk: usize, empty: &T) -> &mut T {
        self.get_or_insert_with(chunk, || empty.clone())
    }

    /// The state of `chunk`, made by `empty` if it has none.
    #[inline]
    pub(super) fn get_or_insert_with(&mut self, chunk: usize, empty: impl FnOnce() -> T) -> &mut T {
        if self.slot_of[chunk] == NONE {
            self.slot_of[chunk] = self.slots.len() as u32;
            self.slots.push(empty());
        }
        &mut self.slots[self.slot_of[chunk] as usize]
    }

    /// Every state, in no particular order.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut()
    }

    /// Bytes in huge pages, as the kernel reports it.
    pub(super) fn huge_bytes(&self) -> usize {
        huge_pages::huge_bytes(&self.slots)
    }

    /// Bytes in use.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.slot_of) + size_of_val(&*self.slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_has_state_only_once_it_was_asked_to() {
        let mut chunks = Chunks::new(10);
        assert_eq!(chunks.get(7), None);
        *chunks.get_or_insert(7, &1u64) += 4;
        *chunks.get_or_insert(7, &1) += 4;
        *chunks.get_or_insert(2, &1) += 1;
        assert_eq!((chunks.get(7), chunks.get(2), chunks.get(3)), (Some(&9), Some(&2), None));
        assert_eq!(chunks.bytes(), 10 * 4 + 2 * 8);
        assert_eq!(chunks.iter_mut().count(), 2);
    }
}
