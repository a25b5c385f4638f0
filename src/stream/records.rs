//! The words of the stream that the writer and the reader share. Sources: Xen's
//! `docs/specs/libxc-migration-stream.pandoc` and `tools/libs/guest/xg_sr_stream_format.h`.

use crate::page::Pfn;
use std::fmt;

/// First field of the image header.
pub const MARKER: u64 = u64::MAX;

/// Second field of the image header: "XENF".
pub const ID: u32 = 0x5845_4e46;

/// The only version of the format that is written and read.
pub const VERSION: u32 = 3;

/// log2 of the page size, as the domain header states it.
pub const PAGE_SHIFT: u16 = 12;

/// Bytes in the image header.
pub const IMAGE_HEADER_LEN: usize = 24;

/// Bytes in the domain header.
pub const DOMAIN_HEADER_LEN: usize = 16;

/// Bytes in front of each record's body: its type and its length.
pub const RECORD_HEADER_LEN: usize = 8;

/// The largest body of a record; every receiver refuses a longer one.
pub const REC_LENGTH_MAX: u32 = 128 << 20;

/// Bytes in the body of a PAGE_DATA record in front of its PFN array: the count and a reserved field.
pub const PAGE_DATA_HEAD_LEN: usize = 8;

/// Bits of an entry of PAGE_DATA that hold its PFN.
const PFN_MASK: u64 = (1 << 52) - 1;

/// Where an entry of PAGE_DATA holds its page type.
const KIND_SHIFT: u32 = 60;

/// What a record is. Types from 0x8000_0000 on are optional: who does not know one skips it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RecordType(pub u32);

macro_rules! record_types {
    ($($name:ident = $value:literal, $doc:literal;)*) => {
        impl RecordType {
            $(#[doc = $doc] pub const $name: Self = RecordType($value);)*

            /// The name that Xen's specification gives the type, if it is one of the known.
            pub fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

record_types! {
    END = 0x00, "Last record; empty.";
    PAGE_DATA = 0x01, "A batch of page types and page contents.";
    X86_PV_INFO = 0x02, "PV: width and paging levels.";
    X86_PV_P2M_FRAMES = 0x03, "PV: frames that hold the p2m.";
    X86_PV_VCPU_BASIC = 0x04, "PV: vCPU registers.";
    X86_PV_VCPU_EXTENDED = 0x05, "PV: extended vCPU context.";
    X86_PV_VCPU_XSAVE = 0x06, "PV: XSAVE area.";
    SHARED_INFO = 0x07, "PV: the shared info page.";
    X86_TSC_INFO = 0x08, "How the guest's time stamp counter runs on.";
    HVM_CONTEXT = 0x09, "HVM: state of vCPUs and platform, opaque here.";
    HVM_PARAMS = 0x0a, "HVM: index and value pairs.";
    TOOLSTACK = 0x0b, "Deprecated; not sent by any saver of version 3.";
    X86_PV_VCPU_MSRS = 0x0c, "PV: MSRs of a vCPU.";
    VERIFY = 0x0d, "Debugging: the pages that follow are compared and not loaded.";
    CHECKPOINT = 0x0e, "Remus and COLO: end of a checkpoint.";
    CHECKPOINT_DIRTY_PFN_LIST = 0x0f, "COLO: travels on the back channel.";
    STATIC_DATA_END = 0x10, "End of the records that are known before the guest has run; exactly once.";
    X86_CPUID_POLICY = 0x11, "CPUID leaves that the guest sees.";
    X86_MSR_POLICY = 0x12, "MSRs that the guest sees.";
}

impl RecordType {
    /// Whether a reader that does not know the type may skip the record.
    pub fn is_optional(self) -> bool {
        self.0 >= 0x8000_0000
    }
}

impl fmt::Display for RecordType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "record type {:#x}", self.0),
        }
    }
}

impl fmt::Debug for RecordType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The kind of guest in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum GuestType {
    /// Paravirtualised: the guest knows its machine frames.
    X86Pv = 1,
    /// Hardware-virtualised, which includes PVH.
    X86Hvm = 2,
}

/// Whose image the stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainHeader {
    /// Kind of guest.
    pub guest: GuestType,
    /// Major version of the Xen that the guest was saved on; 0 for a converted legacy stream.
    pub xen_major: u32,
    /// Minor version of that Xen.
    pub xen_minor: u32,
}

impl DomainHeader {
    /// The header as it is on the wire.
    pub fn to_bytes(&self) -> [u8; DOMAIN_HEADER_LEN] {
        let mut bytes = [0; DOMAIN_HEADER_LEN];
        bytes[0..4].copy_from_slice(&(self.guest as u32).to_le_bytes());
        bytes[4..6].copy_from_slice(&PAGE_SHIFT.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.xen_major.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.xen_minor.to_le_bytes());
        bytes
    }
}

/// What a page of the guest is. The values are those of `XEN_DOMCTL_PFINFO_*`, shifted down to four bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageKind {
    /// An ordinary page; the only kind with data that an HVM guest has.
    NoTab = 0x0,
    /// PV: level 1 page table.
    L1 = 0x1,
    /// PV: level 2 page table.
    L2 = 0x2,
    /// PV: level 3 page table.
    L3 = 0x3,
    /// PV: level 4 page table.
    L4 = 0x4,
    /// PV: level 1 page table, pinned.
    L1Pinned = 0x9,
    /// PV: level 2 page table, pinned.
    L2Pinned = 0xa,
    /// PV: level 3 page table, pinned.
    L3Pinned = 0xb,
    /// PV: level 4 page table, pinned.
    L4Pinned = 0xc,
    /// A page whose memory has failed; no data.
    Broken = 0xd,
    /// XALLOC: to be populated now, contents to come or undefined; no data.
    Alloc = 0xe,
    /// XTAB: no page here; no data.
    Xtab = 0xf,
}

impl PageKind {
    /// The kind with these four bits; `None` for the values 5 to 8, which do not exist.
    pub fn from_bits(bits: u64) -> Option<Self> {
        Some(match bits {
            0x0 => Self::NoTab,
            0x1 => Self::L1,
            0x2 => Self::L2,
            0x3 => Self::L3,
            0x4 => Self::L4,
            0x9 => Self::L1Pinned,
            0xa => Self::L2Pinned,
            0xb => Self::L3Pinned,
            0xc => Self::L4Pinned,
            0xd => Self::Broken,
            0xe => Self::Alloc,
            0xf => Self::Xtab,
            _ => return None,
        })
    }

    /// The four bits of the kind.
    pub fn to_bits(self) -> u64 {
        self as u64
    }

    /// Whether the page's 4096 bytes are in the stream.
    pub fn carries_data(self) -> bool {
        !matches!(self, Self::Broken | Self::Alloc | Self::Xtab)
    }
}

/// One entry of a PAGE_DATA record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// Which page.
    pub pfn: Pfn,
    /// What it is.
    pub kind: PageKind,
}

impl PageEntry {
    /// The entry as it is in the PFN array. Panics if the PFN has more than 52 bits.
    pub fn to_word(self) -> u64 {
        assert!(self.pfn.0 <= PFN_MASK, "page {} does not fit into 52 bits", self.pfn);
        self.kind.to_bits() << KIND_SHIFT | self.pfn.0
    }

    /// The entry of this word of the PFN array; `None` if the word has a reserved bit set or no known kind.
    pub fn from_word(word: u64) -> Option<Self> {
        let kind = PageKind::from_bits(word >> KIND_SHIFT)?;
        let entry = PageEntry { pfn: Pfn(word & PFN_MASK), kind };
        (entry.to_word() == word).then_some(entry)
    }
}

/// The body of an X86_TSC_INFO record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscInfo {
    /// `XEN_CPUID_TSC_MODE` of the guest.
    pub mode: u32,
    /// Frequency that the guest sees, in kHz.
    pub khz: u32,
    /// Time elapsed for the guest, in nanoseconds.
    pub nsec: u64,
    /// How often the guest has been migrated or restored.
    pub incarnation: u32,
}

/// Bytes in the body of an X86_TSC_INFO record.
pub const TSC_INFO_LEN: usize = 24;

/// Bytes in one leaf of an X86_CPUID_POLICY record.
pub const CPUID_LEAF_LEN: usize = 24;

/// Bytes in one entry of an X86_MSR_POLICY record.
pub const MSR_ENTRY_LEN: usize = 16;

/// Bytes in the body of an HVM_PARAMS record in front of its pairs: the count and a reserved field.
pub const HVM_PARAMS_HEAD_LEN: usize = 8;

/// Bytes in one pair of an HVM_PARAMS record.
pub const HVM_PARAM_LEN: usize = 16;

/// The little-endian `u32` at `at`, which the caller knows to be in range.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// The little-endian `u64` at `at`, which the caller knows to be in range.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_four_bits_of_a_kind_are_its_own_and_5_to_8_are_no_kind() {
        for bits in 0..=16 {
            match PageKind::from_bits(bits) {
                Some(kind) => {
                    assert_eq!(kind.to_bits(), bits);
                    // The rule that Xen's own verifier uses: the low three bits are at most 4.
                    assert_eq!(kind.carries_data(), bits & 7 <= 4, "{kind:?}");
                }
                None => assert!((5..=8).contains(&bits) || bits == 16, "{bits:#x}"),
            }
        }
    }

    #[test]
    fn a_record_type_is_named_where_it_is_known() {
        assert_eq!(RecordType::PAGE_DATA.to_string(), "PAGE_DATA");
        assert_eq!(RecordType(0x13).to_string(), "record type 0x13");
        assert!((0..0x13).all(|value| RecordType(value).name().is_some()));
        assert!(!RecordType(0x7fff_ffff).is_optional() && RecordType(0x8000_0000).is_optional());
    }

    proptest! {
        #[test]
        fn a_word_is_an_entry_only_if_the_entry_is_that_word(word: u64) {
            let reserved = word << 4 >> 56 != 0;
            match PageEntry::from_word(word) {
                Some(entry) => prop_assert_eq!(entry.to_word(), word),
                None => prop_assert!(reserved || (5..=8).contains(&(word >> 60))),
            }
            let clean = word & !(0xff << 52);
            let known = !(5..=8).contains(&(word >> 60));
            prop_assert_eq!(PageEntry::from_word(clean).map(PageEntry::to_word), known.then_some(clean));
        }
    }
}
