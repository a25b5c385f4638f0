//! The two headers in front of the first record, as the reader takes them.

use super::error::Fault;
use super::records::*;
use super::source::Source;
use std::io::Read;

/// Reads and checks the image header, which is big-endian.
pub(super) fn read_image_header<R: Read>(source: &mut Source<R>) -> Result<(), Fault> {
    let mut bytes = [0; IMAGE_HEADER_LEN];
    source.fill(&mut bytes)?;
    let marker = u64_at(&bytes, 0).swap_bytes();
    if marker != MARKER {
        return Err(Fault::Marker(marker));
    }
    let id = u32_at(&bytes, 8).swap_bytes();
    if id != ID {
        return Err(Fault::Id(id));
    }
    let version = u32_at(&bytes, 12).swap_bytes();
    if version != VERSION {
        return Err(Fault::Version(version));
    }
    // Options in the upper half, of which bit 0 is the byte order; the lower half is reserved.
    let options = u32_at(&bytes, 16).swap_bytes();
    if options == 1 << 16 {
        return Err(Fault::BigEndian);
    }
    Fault::check_reserved("options", options)?;
    Fault::check_reserved("field at the end", u32_at(&bytes, 20).swap_bytes())
}

/// Reads and checks the domain header.
pub(super) fn read_domain_header<R: Read>(source: &mut Source<R>) -> Result<DomainHeader, Fault> {
    let mut bytes = [0; DOMAIN_HEADER_LEN];
    source.fill(&mut bytes)?;
    let guest = u32_at(&bytes, 0);
    if guest == GuestType::X86Pv as u32 {
        return Err(Fault::PvGuest);
    }
    if guest != GuestType::X86Hvm as u32 {
        return Err(Fault::GuestType(guest));
    }
    let [shift_low, shift_high, reserved @ ..] = u32_at(&bytes, 4).to_le_bytes();
    let page_shift = u16::from_le_bytes([shift_low, shift_high]);
    if page_shift != PAGE_SHIFT {
        return Err(Fault::PageShift(page_shift));
    }
    Fault::check_reserved("field after the page shift", u16::from_le_bytes(reserved).into())?;
    Ok(DomainHeader { guest: GuestType::X86Hvm, xen_major: u32_at(&bytes, 8), xen_minor: u32_at(&bytes, 12) })
}
