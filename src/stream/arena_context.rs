//! What the embedded guest has in place of a Xen guest's HVM context: the size of its memory and, on request, a
//! digest of each page, so that the destination can tell that what it has is what the source had.
//!
//! The body, all little-endian: magic `PCARENA1`; flags `u32` (bit 0: digests present); reserved `u32`, 0; number
//! of pages `u64`; with bit 0 a digest `u64` of each page; last a digest `u64` of the domain header and of all of
//! the body before it. The digests (XXH3) find accidents. They are no protection against an attacker, who can
//! compute them too.

use super::records::{DomainHeader, REC_LENGTH_MAX, u32_at, u64_at};
use crate::page::Pfn;
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

const MAGIC: &[u8; 8] = b"PCARENA1";

/// Flag: a digest of each page is present.
const HAS_DIGESTS: u32 = 1;

/// Bytes in front of the page digests: magic, flags, reserved field, number of pages.
const HEAD_LEN: usize = 24;

/// Bytes of a digest.
const DIGEST_LEN: usize = 8;

/// The most pages whose digests fit into one record: close to 64 GiB of guest memory. Larger guests go without.
pub const MAX_DIGESTS: usize = (REC_LENGTH_MAX as usize - HEAD_LEN - DIGEST_LEN) / DIGEST_LEN;

/// The digest of the page `pfn`. The page number is part of it, so that a page in the wrong place is noticed.
pub fn page_digest(pfn: Pfn, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, pfn.0)
}

/// The final state of the embedded guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaContext {
    /// Pages of guest memory.
    pub nr_pages: u64,
    /// [`page_digest`] of each page, in order, if the source took them.
    pub digests: Option<Vec<u64>>,
}

/// How an image differs from the digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatches {
    /// Pages that differ.
    pub count: u64,
    /// The first of them.
    pub first: Option<Pfn>,
}

/// Why a record's body is not the context of an embedded guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArenaContextError {
    /// Too short for the fixed fields.
    #[error("arena context: {0} bytes are too short")]
    Short(usize),
    /// Somebody else's context.
    #[error("arena context: the magic is wrong; this is not the context of an embedded guest")]
    Magic,
    /// Damaged, or in a stream with another domain header.
    #[error("arena context: its digest is {stated:#018x}, but its content comes to {computed:#018x}")]
    Digest {
        /// In the body.
        stated: u64,
        /// Of the body and the domain header.
        computed: u64,
    },
    /// A flag that is not known.
    #[error("arena context: flags {0:#x} are not all known")]
    Flags(u32),
    /// The reserved field is in use.
    #[error("arena context: the reserved field must be zero but is {0:#x}")]
    Reserved(u32),
    /// More pages than the receiver has.
    #[error("arena context: {nr_pages:#x} pages, but at most {limit:#x} are accepted")]
    TooManyPages {
        /// Pages that the context states.
        nr_pages: u64,
        /// The receiver's limit.
        limit: u64,
    },
    /// Not a digest for each page.
    #[error("arena context: {len} bytes do not match {nr_pages:#x} pages")]
    Length {
        /// Length of the body.
        len: usize,
        /// Pages that the context states.
        nr_pages: u64,
    },
}

impl ArenaContext {
    /// The context of a guest of `nr_pages` pages, with the digests of all of them. `digest` returns a page's
    /// [`page_digest`].
    pub fn with_digests(nr_pages: u64, digest: impl FnMut(Pfn) -> u64) -> Self {
        let digests = (0..nr_pages).map(Pfn).map(digest).collect();
        ArenaContext { nr_pages, digests: Some(digests) }
    }

    /// The body of the HVM_CONTEXT record in a stream with this domain header. Panics if there are digests but
    /// not one for each page, or more than [`MAX_DIGESTS`].
    pub fn encode(&self, domain: &DomainHeader) -> Vec<u8> {
        let digests = self.digests.as_deref().unwrap_or_default();
        assert!(self.digests.is_none() || digests.len() as u64 == self.nr_pages, "one digest for each page");
        assert!(digests.len() <= MAX_DIGESTS, "{} digests do not fit into a record", digests.len());
        let flags = if self.digests.is_some() { HAS_DIGESTS } else { 0 };
        let mut body = Vec::with_capacity(HEAD_LEN + (digests.len() + 1) * DIGEST_LEN);
        body.extend_from_slice(MAGIC);
        body.extend_from_slice(&flags.to_le_bytes());
        body.extend_from_slice(&0u32.to_le_bytes());
        body.extend_from_slice(&self.nr_pages.to_le_bytes());
        for digest in digests {
            body.extend_from_slice(&digest.to_le_bytes());
        }
        let digest = body_digest(domain, &body);
        body.extend_from_slice(&digest.to_le_bytes());
        body
    }

    /// Takes a body apart that came in a stream with this domain header; `limit` is the most pages that the
    /// receiver accepts.
    pub fn decode(body: &[u8], domain: &DomainHeader, limit: u64) -> Result<Self, ArenaContextError> {
        if body.len() < HEAD_LEN + DIGEST_LEN {
            return Err(ArenaContextError::Short(body.len()));
        }
        let (content, stated) = body.split_at(body.len() - DIGEST_LEN);
        if !content.starts_with(MAGIC) {
            return Err(ArenaContextError::Magic);
        }
        let (stated, computed) = (u64_at(stated, 0), body_digest(domain, content));
        if stated != computed {
            return Err(ArenaContextError::Digest { stated, computed });
        }
        let flags = u32_at(content, 8);
        if flags & !HAS_DIGESTS != 0 {
            return Err(ArenaContextError::Flags(flags));
        }
        let reserved = u32_at(content, 12);
        if reserved != 0 {
            return Err(ArenaContextError::Reserved(reserved));
        }
        let nr_pages = u64_at(content, 16);
        if nr_pages > limit {
            return Err(ArenaContextError::TooManyPages { nr_pages, limit });
        }
        let (words, rest) = content[HEAD_LEN..].as_chunks();
        let has_digests = flags & HAS_DIGESTS != 0;
        let expected = if has_digests { nr_pages } else { 0 };
        if words.len() as u64 != expected || !rest.is_empty() {
            return Err(ArenaContextError::Length { len: body.len(), nr_pages });
        }
        let digests = has_digests.then(|| words.iter().map(|word| u64::from_le_bytes(*word)).collect());
        Ok(ArenaContext { nr_pages, digests })
    }

    /// Compares each page of an image with its digest; `None` if the source took no digests. `digest` returns a
    /// page's [`page_digest`].
    pub fn mismatches(&self, mut digest: impl FnMut(Pfn) -> u64) -> Option<Mismatches> {
        let mut found = Mismatches { count: 0, first: None };
        for (pfn, stated) in (0..).map(Pfn).zip(self.digests.as_ref()?) {
            if digest(pfn) != *stated {
                found.count += 1;
                found.first.get_or_insert(pfn);
            }
        }
        Some(found)
    }
}

/// The digest over the domain header, which nothing else in the stream protects, and over the body.
fn body_digest(domain: &DomainHeader, content: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&domain.to_bytes());
    hash.update(content);
    hash.digest()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE;
    use crate::stream::GuestType;
    use proptest::prelude::*;

    const DOMAIN: DomainHeader = DomainHeader { guest: GuestType::X86Hvm, xen_major: 4, xen_minor: 17 };

    fn context(digests: Option<Vec<u64>>) -> ArenaContext {
        ArenaContext { nr_pages: digests.as_ref().map_or(77, |digests| digests.len() as u64), digests }
    }

    /// A body with `content` under a digest that is right.
    fn sealed(content: &[u8]) -> Vec<u8> {
        [content, &body_digest(&DOMAIN, content).to_le_bytes()].concat()
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(digests: Option<Vec<u64>>) {
            let context = context(digests);
            let body = context.encode(&DOMAIN);
            prop_assert_eq!(ArenaContext::decode(&body, &DOMAIN, context.nr_pages), Ok(context));
        }

        #[test]
        fn garbage_under_a_right_digest_is_an_error_or_encodes_to_itself(
            flags in 0u32..4, reserved in 0u32..2, nr_pages in 0u64..6, rest: [u8; 40], len in 0usize..=40,
        ) {
            let head = [&flags.to_le_bytes()[..], &reserved.to_le_bytes(), &nr_pages.to_le_bytes()].concat();
            let body = sealed(&[MAGIC, &head[..], &rest[..len]].concat());
            if let Ok(context) = ArenaContext::decode(&body, &DOMAIN, 4) {
                prop_assert!(context.nr_pages <= 4);
                prop_assert_eq!(context.encode(&DOMAIN), body);
            }
        }
    }

    #[test]
    fn a_flipped_bit_in_the_body_or_another_domain_header_is_an_error() {
        let body = context(Some(vec![1, 2, 3])).encode(&DOMAIN);
        for bit in 0..body.len() * 8 {
            let mut flipped = body.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(ArenaContext::decode(&flipped, &DOMAIN, 3).is_err(), "bit {bit}");
        }
        for (xen_major, xen_minor) in [(4, 18), (5, 17)] {
            let other = DomainHeader { xen_major, xen_minor, ..DOMAIN };
            assert!(ArenaContext::decode(&body, &other, 3).is_err());
        }
    }

    #[test]
    fn every_defect_of_a_body_is_named() {
        let body = context(Some(vec![1, 2, 3])).encode(&DOMAIN);
        let content = &body[..body.len() - DIGEST_LEN];
        let with = |at: usize, value: u8| {
            let mut content = content.to_vec();
            content[at] = value;
            ArenaContext::decode(&sealed(&content), &DOMAIN, 3).unwrap_err()
        };
        assert_eq!(with(0, b'p'), ArenaContextError::Magic);
        assert_eq!(with(8, 3), ArenaContextError::Flags(3));
        assert_eq!(with(12, 1), ArenaContextError::Reserved(1));
        assert_eq!(with(16, 4), ArenaContextError::TooManyPages { nr_pages: 4, limit: 3 });
        assert_eq!(with(16, 2), ArenaContextError::Length { len: 56, nr_pages: 2 });
        assert_eq!(with(8, 0), ArenaContextError::Length { len: 56, nr_pages: 3 });
        for len in 0..32 {
            assert_eq!(ArenaContext::decode(&body[..len], &DOMAIN, 3), Err(ArenaContextError::Short(len)));
        }
    }

    #[test]
    fn the_digest_is_xxh3_seeded_with_the_page_number() {
        assert_eq!(page_digest(Pfn(0), &[]), 0x2d06_8005_38d3_94c2, "the published digest of nothing");
        assert_ne!(page_digest(Pfn(1), &[0; PAGE_SIZE]), page_digest(Pfn(2), &[0; PAGE_SIZE]));
    }

    #[test]
    fn changed_and_swapped_pages_are_counted_and_the_first_is_named() {
        let mut image = vec![[0u8; PAGE_SIZE]; 5];
        image[3][0] = 3;
        let context = ArenaContext::with_digests(5, |pfn| page_digest(pfn, &image[pfn.index()]));
        assert_eq!(
            context.mismatches(|pfn| page_digest(pfn, &image[pfn.index()])),
            Some(Mismatches { count: 0, first: None })
        );
        image.swap(2, 3);
        image[4][4095] = 1;
        assert_eq!(
            context.mismatches(|pfn| page_digest(pfn, &image[pfn.index()])),
            Some(Mismatches { count: 3, first: Some(Pfn(2)) })
        );
        assert_eq!(ArenaContext { digests: None, ..context }.mismatches(|_| 0), None);
    }
}
