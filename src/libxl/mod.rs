//! Being libxl's save helper: `LIBXL_SAVE_HELPER=pagecast xl migrate …`.
//!
//! * [`config`]: how to migrate, which xl cannot say.
//! * [`report_file`]: the files that tell how it went.
//! * [`stock`]: Xen's own save helper, for what pagecast does not do.

pub mod config;
pub mod report_file;
pub mod stock;
