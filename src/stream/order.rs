//! Which record may come when, in a plain stream of an HVM or PVH guest.

use super::error::Fault;
use super::records::RecordType;

/// How far the stream has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Before STATIC_DATA_END.
    Static,
    /// After it: pages.
    Pages,
    /// The guest is stopped at the source and its final state is being sent.
    Tail,
}

/// Admits records one by one.
pub(super) struct Order {
    phase: Phase,
    /// Types that may come once and have come, a bit each; all of them are below 32.
    seen: u32,
}

impl Order {
    /// The order at the first record.
    pub(super) fn new() -> Self {
        Order { phase: Phase::Static, seen: 0 }
    }

    /// Admits a record of the type `kind`, or says why it must not come here. Of the types that are not known,
    /// only optional ones are admitted.
    pub(super) fn admit(&mut self, kind: RecordType) -> Result<(), Fault> {
        match kind {
            RecordType::X86_CPUID_POLICY | RecordType::X86_MSR_POLICY => {
                if self.phase != Phase::Static {
                    return Err(Fault::AfterStaticDataEnd);
                }
                self.once(kind)
            }
            RecordType::STATIC_DATA_END => {
                if self.phase != Phase::Static {
                    return Err(Fault::AfterStaticDataEnd);
                }
                self.phase = Phase::Pages;
                Ok(())
            }
            RecordType::PAGE_DATA => match self.phase {
                Phase::Static => Err(Fault::BeforeStaticDataEnd),
                Phase::Pages => Ok(()),
                // A receiver clears the guest's ioreq, store and console pages when it applies HVM_PARAMS: a
                // page that came later would bring old requests back.
                Phase::Tail => Err(Fault::AfterTail),
            },
            RecordType::X86_TSC_INFO | RecordType::HVM_CONTEXT | RecordType::HVM_PARAMS => {
                self.after_static()?;
                self.phase = Phase::Tail;
                self.once(kind)
            }
            RecordType::END => self.after_static(),
            _ => refuse(kind),
        }
    }

    fn after_static(&self) -> Result<(), Fault> {
        if self.phase == Phase::Static { Err(Fault::BeforeStaticDataEnd) } else { Ok(()) }
    }

    fn once(&mut self, kind: RecordType) -> Result<(), Fault> {
        let bit = 1 << kind.0;
        if self.seen & bit != 0 {
            return Err(Fault::Repeated);
        }
        self.seen |= bit;
        Ok(())
    }
}

/// Refuses what the profile leaves out, except for optional records.
fn refuse(kind: RecordType) -> Result<(), Fault> {
    match kind {
        RecordType::X86_PV_INFO
        | RecordType::X86_PV_P2M_FRAMES
        | RecordType::X86_PV_VCPU_BASIC
        | RecordType::X86_PV_VCPU_EXTENDED
        | RecordType::X86_PV_VCPU_XSAVE
        | RecordType::X86_PV_VCPU_MSRS
        | RecordType::SHARED_INFO => Err(Fault::Refused("the record belongs to PV guests")),
        RecordType::CHECKPOINT | RecordType::CHECKPOINT_DIRTY_PFN_LIST => {
            Err(Fault::Refused("the record belongs to checkpointed streams (Remus, COLO)"))
        }
        RecordType::VERIFY => Err(Fault::Refused("the record belongs to a saver's debugging mode")),
        RecordType::TOOLSTACK => Err(Fault::Refused("the record has been withdrawn from the format")),
        _ if kind.is_optional() => Ok(()),
        _ => Err(Fault::Unknown),
    }
}
