//! Counts of what is asked of Xen and of dom0's kernel: each call when it is made, none estimated.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! calls {
    ($($variant:ident $field:ident $doc:literal,)*) => {
        /// A kind of call.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Call {
            $(#[doc = $doc] $variant,)*
        }

        /// Calls so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct CallCounts {
            $(#[doc = $doc] pub $field: u64,)*
        }

        /// Counts calls, whichever thread makes them.
        #[derive(Debug, Default)]
        pub struct Tally {
            $($field: AtomicU64,)*
        }

        impl Tally {
            /// Counts `count` of one kind.
            pub fn add(&self, call: Call, count: u64) {
                match call {
                    $(Call::$variant => self.$field.fetch_add(count, Ordering::Relaxed),)*
                };
            }

            /// All counts.
            pub fn counts(&self) -> CallCounts {
                CallCounts { $($field: self.$field.load(Ordering::Relaxed),)* }
            }
        }
    };
}

calls! {
    XenVersion xen_version "xen_version",
    DomainInfo domain_info "domctl getdomaininfo",
    MaximumGpfn maximum_gpfn "memory_op XENMEM_maximum_gpfn",
    PageTypes page_types "domctl getpageframeinfo3",
    FramesAsked frames_asked "Frames asked for by getpageframeinfo3; no call of its own",
    LogDirtyEnable log_dirty_enable "domctl shadow_op ENABLE_LOGDIRTY",
    LogDirtyClean log_dirty_clean "domctl shadow_op CLEAN",
    LogDirtyPeek log_dirty_peek "domctl shadow_op PEEK",
    LogDirtyOff log_dirty_off "domctl shadow_op OFF",
    CpuPolicy cpu_policy "domctl get_cpu_policy",
    TscInfo tsc_info "domctl gettscinfo",
    HvmContext hvm_context "domctl gethvmcontext",
    HvmParam hvm_param "hvm_op HVMOP_get_param",
    Mmap mmap "mmap of frames",
    Munmap munmap "munmap of frames",
    MapBatch map_batch "IOCTL_PRIVCMD_MMAPBATCH_V2",
    FramesMapped frames_mapped "Frames that were mapped; no call of its own",
    FramesRefused frames_refused "Frames that there was no mapping for; no call of its own",
}

impl Tally {
    /// Counts one call.
    pub fn note(&self, call: Call) {
        self.add(call, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_apart() {
        let tally = Tally::default();
        tally.note(Call::LogDirtyClean);
        tally.add(Call::FramesAsked, 1024);
        tally.note(Call::LogDirtyClean);
        let expected = CallCounts { log_dirty_clean: 2, frames_asked: 1024, ..CallCounts::default() };
        assert_eq!(tally.counts(), expected);
    }
}
