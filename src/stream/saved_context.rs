//! What Xen saves of an HVM or PVH domain's processors and platform, as far as two of them are compared.
//!
//! The body of HVM_CONTEXT is a list of entries: type and instance, 16 bits each, a 32-bit length, and that many bytes
//! (xen/include/public/hvm/save.h).

/// The type of a processor's state, `struct hvm_hw_cpu`.
const CPU: u16 = 2;

/// Where in it the guest's TSC is, 8 bytes (xen/include/public/arch-x86/hvm/save.h).
const TSC_AT: usize = 1008;

/// Whether two contexts differ in nothing but the processors' TSCs. Those are of the moment when Xen was asked, and go on while
/// the guest is suspended.
pub fn differ_in_tsc_only(one: &[u8], other: &[u8]) -> bool {
    one != other && without_tsc(one) == without_tsc(other)
}

fn without_tsc(context: &[u8]) -> Vec<u8> {
    let mut context = context.to_vec();
    let mut at = 0;
    while let Some(head) = context.get(at..at + 8) {
        let kind = u16::from_le_bytes([head[0], head[1]]);
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let body = at + 8;
        if kind == CPU
            && length >= TSC_AT + 8
            && let Some(tsc) = context.get_mut(body + TSC_AT..body + TSC_AT + 8)
        {
            tsc.fill(0);
        }
        at = body.saturating_add(length);
    }
    context
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u16, body: &[u8]) -> Vec<u8> {
        let words = [kind.to_le_bytes(), 0u16.to_le_bytes()].concat();
        [&words[..], &(body.len() as u32).to_le_bytes(), body].concat()
    }

    #[test]
    fn the_tsc_of_a_processor_is_all_that_may_differ() {
        let context = |rip: u8, tsc: u8, other: u8| {
            let mut cpu = vec![0; 1032];
            cpu[640] = rip;
            cpu[TSC_AT + 3] = tsc;
            [entry(1, &[7; 24]), entry(CPU, &cpu), entry(5, &[other; 2000]), entry(0, &[])].concat()
        };
        let one = context(1, 2, 3);
        assert!(differ_in_tsc_only(&one, &context(1, 9, 3)));
        assert!(!differ_in_tsc_only(&one, &one), "they do not differ at all");
        assert!(!differ_in_tsc_only(&one, &context(4, 9, 3)));
        assert!(!differ_in_tsc_only(&one, &context(1, 2, 4)), "the same place in another entry counts");
        assert!(!differ_in_tsc_only(&one, &one[..one.len() - 9]));
    }
}
