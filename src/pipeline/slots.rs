//! The slots: a fixed number of buffers of one size, cut from one block of memory. The mapper copies pages into
//! them, the kernel sends from them.
//!
//! What always holds: there is exactly one [`Slot`] for each slot. It cannot be cloned, so whoever has it is the
//! only one who can reach the slot's bytes, and moving it (through a ring, into the ledger) moves that right. While
//! the kernel reads a slot the ledger has the handle, and so nobody can write. A handle that is dropped is lost, not
//! reused: its slot stays out of use, which is the safe side.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::ring::{Producer, PushError};
use crate::page::PAGE_SIZE;
use crate::sys::slot_memory::{Backing, SlotMemory};

/// Why a block of memory cannot be cut into slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlotPoolError {
    /// The slot size is not a multiple of the page size, or is 0.
    #[error("slots of {slot_bytes} bytes: the size must be a multiple of {PAGE_SIZE}, and not 0")]
    Size {
        /// What was asked for.
        slot_bytes: usize,
    },
    /// Not one slot fits, or more than can be numbered.
    #[error("{memory_bytes} bytes of memory hold {slots} slots: the number must be from 1 to 4294967295")]
    Count {
        /// The size of the memory.
        memory_bytes: usize,
        /// How many slots of the size asked for it would hold.
        slots: usize,
    },
}

/// The block that the slots are cut from: what a sender registers with its ring. It gives no access to the bytes.
#[derive(Debug, Clone)]
pub struct SlotPool {
    memory: Arc<SlotMemory>,
    slot_bytes: usize,
    slots: u32,
}

impl SlotPool {
    /// Cuts `memory` into slots of `slot_bytes` and returns them all, in the order of their indices. What is left
    /// over at the end is not used.
    ///
    /// # Errors
    ///
    /// `slot_bytes` is not a whole number of pages, or `memory` is too small for one slot.
    pub fn new(memory: SlotMemory, slot_bytes: usize) -> Result<(Self, Vec<Slot>), SlotPoolError> {
        if slot_bytes == 0 || !slot_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(SlotPoolError::Size { slot_bytes });
        }
        let memory_bytes = memory.len();
        let slots = memory_bytes / slot_bytes;
        let count = u32::try_from(slots).ok().filter(|&count| count > 0);
        let count = count.ok_or(SlotPoolError::Count { memory_bytes, slots })?;
        let memory = Arc::new(memory);
        let all = (0..count).map(|index| Slot::new(&memory, index, slot_bytes)).collect();
        Ok((Self { memory, slot_bytes, slots: count }, all))
    }

    /// The first byte of the block. For registering it; reading or writing through it needs the slot's handle.
    pub fn as_ptr(&self) -> *const u8 {
        self.memory.as_ptr()
    }

    /// The size of all slots together in bytes.
    pub fn total_bytes(&self) -> usize {
        self.slot_bytes * self.slots as usize
    }

    /// The size of one slot in bytes.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// What the memory is made of.
    pub fn backing(&self) -> Backing {
        self.memory.backing()
    }
}

/// One slot: the right to read and write its bytes.
pub struct Slot {
    index: u32,
    size: usize,
    /// Of the slot's first byte, inside `memory`.
    bytes: NonNull<u8>,
    /// Keeps the bytes mapped. Never touched on the hot path: a handle is moved, not cloned.
    memory: Arc<SlotMemory>,
}

// SAFETY: the handle is the only one for its bytes, and memory belongs to no thread.
unsafe impl Send for Slot {}
// SAFETY: a shared handle only reads, and nobody writes while it is shared, since writing takes `&mut`.
unsafe impl Sync for Slot {}

impl Slot {
    /// Called once for each index, with `index` and `size` such that the slot lies inside `memory`.
    fn new(memory: &Arc<SlotMemory>, index: u32, size: usize) -> Self {
        let end = (index as usize + 1) * size;
        assert!(end <= memory.len());
        // SAFETY: by the line above this is inside the block, which is one mapping and does not begin at null.
        let bytes = unsafe { NonNull::new_unchecked(memory.as_ptr().add(end - size)) };
        Self { index, size, bytes, memory: memory.clone() }
    }

    /// The slot's number, from 0.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Where the slot begins in the pool's block, in bytes.
    pub fn offset(&self) -> usize {
        self.index as usize * self.size
    }

    /// The slot's size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The slot's bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `size` bytes from `bytes` are inside the block (`Slot::new`), which `memory` keeps mapped and
        // which was zeroed, so they are initialised. This is the one handle for them, and while it is borrowed
        // nobody can have them mutably.
        unsafe { NonNull::slice_from_raw_parts(self.bytes, self.size).as_ref() }
    }

    /// The slot's bytes, to fill.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; and this is the one handle, mutably borrowed, so nobody else is at the bytes. The
        // kernel is not either: requests are made for slots whose handles are in the ledger.
        unsafe { NonNull::slice_from_raw_parts(self.bytes, self.size).as_mut() }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backing = self.memory.backing();
        write!(f, "Slot {{ index: {}, size: {}, backing: {backing} }}", self.index, self.size)
    }
}

/// A slot with something to send in it, and what the mapper has to tell the sender about it: which pages, how many
/// of them with data, which runs are to be sent from where they lie.
#[derive(Debug)]
pub struct Filled<P> {
    slot: Slot,
    range: Range<usize>,
    payload: P,
}

impl<P> Filled<P> {
    /// Marks the bytes `range` of `slot` as ready to send.
    ///
    /// # Errors
    ///
    /// `range` is not inside the slot; slot and payload come back.
    pub fn new(slot: Slot, range: Range<usize>, payload: P) -> Result<Self, (Slot, P)> {
        match slot.bytes().get(range.clone()) {
            Some(_) => Ok(Self { slot, range, payload }),
            None => Err((slot, payload)),
        }
    }

    /// The bytes to send.
    pub fn bytes(&self) -> &[u8] {
        &self.slot.bytes()[self.range.clone()]
    }

    /// Where the bytes to send lie in the pool's block.
    pub fn range_in_pool(&self) -> Range<usize> {
        let offset = self.slot.offset();
        offset + self.range.start..offset + self.range.end
    }

    /// What goes with the slot.
    pub fn payload(&self) -> &P {
        &self.payload
    }

    /// The slot, to be kept while it is sent and filled again afterwards, and what went with it.
    pub fn into_parts(self) -> (Slot, P) {
        (self.slot, self.payload)
    }
}

/// Frees the slot of what was sent. If the mapper is gone the slot is lost, and nobody misses it.
pub fn give_back<P>(free: &mut Producer<Slot>, sent: Filled<P>) {
    let (slot, _) = sent.into_parts();
    match free.push(slot) {
        Ok(()) | Err(PushError::Closed(_)) => {}
        Err(PushError::Full(_)) => unreachable!("the ring of free slots has room for every slot there is"),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pool(memory_pages: usize, slot_pages: usize) -> Result<(SlotPool, Vec<Slot>), SlotPoolError> {
        SlotPool::new(SlotMemory::new(memory_pages * PAGE_SIZE).unwrap(), slot_pages * PAGE_SIZE)
    }

    #[test]
    fn slots_share_no_byte_and_outlive_the_pool() {
        let (pool, mut slots) = pool(11, 2).unwrap();
        assert_eq!((pool.slots(), pool.total_bytes(), slots.len()), (5, 10 * PAGE_SIZE, 5));
        let block = pool.as_ptr();
        drop(pool);
        for slot in &mut slots {
            let fill = slot.index() as u8 + 1;
            slot.bytes_mut().fill(fill);
        }
        for (at, slot) in slots.iter().enumerate() {
            assert_eq!(
                (slot.index() as usize, slot.offset(), slot.size()),
                (at, at * 2 * PAGE_SIZE, 2 * PAGE_SIZE)
            );
            assert_eq!(slot.bytes().as_ptr().addr(), block.addr() + slot.offset());
            assert!(slot.bytes().iter().all(|&byte| byte == at as u8 + 1));
        }
    }

    #[test]
    fn a_pool_needs_whole_pages_and_one_slot() {
        assert_eq!(pool(1, 2).unwrap_err(), SlotPoolError::Count { memory_bytes: PAGE_SIZE, slots: 0 });
        assert_eq!(pool(1, 0).unwrap_err(), SlotPoolError::Size { slot_bytes: 0 });
        let odd = SlotPool::new(SlotMemory::new(PAGE_SIZE).unwrap(), 512);
        assert_eq!(odd.unwrap_err(), SlotPoolError::Size { slot_bytes: 512 });
    }

    #[test]
    fn a_filled_slot_shows_its_range_and_refuses_one_outside_itself() {
        let (_pool, mut slots) = pool(2, 1).unwrap();
        let mut slot = slots.pop().unwrap();
        slot.bytes_mut()[10..13].copy_from_slice(b"abc");
        let (slot, payload) = Filled::new(slot, 10..PAGE_SIZE + 1, "pages").unwrap_err();
        let filled = Filled::new(slot, 10..13, payload).unwrap();
        assert_eq!((filled.bytes(), *filled.payload()), (&b"abc"[..], "pages"));
        assert_eq!(filled.range_in_pool(), PAGE_SIZE + 10..PAGE_SIZE + 13);
        assert_eq!(filled.into_parts().0.index(), 1);
    }
}
