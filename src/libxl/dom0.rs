//! Whether this is a host of Xen's guests at all.

use std::path::Path;

use super::save::SaveError;

/// The device by which a dom0 speaks to Xen, by its name and by its old one.
const PRIVCMD: [&str; 2] = ["/dev/xen/privcmd", "/proc/xen/privcmd"];

/// Fails where no domain can be saved because there is none.
pub fn check() -> Result<(), SaveError> {
    if PRIVCMD.iter().any(|path| Path::new(path).exists()) {
        return Ok(());
    }
    let message = "there is no /dev/xen/privcmd: this is no Xen dom0, or the module xen-privcmd is not loaded; \
                   run `pagecast probe`";
    Err(SaveError::failed(libc::ENODEV, message))
}
