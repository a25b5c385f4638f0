//! Being libxl's save helper: `LIBXL_SAVE_HELPER=pagecast xl migrate …`.
//!
//! Libxl runs a save helper for each domain that it saves or restores, and speaks to it through two pipes. The program asks
//! [`recognise`] first of all whether it was run as one, and if so ends with [`run`].
//!
//! * [`arguments`]: what libxl wants, and whether that is pagecast's to do.
//! * `messages`, `channel`, [`handle`]: the conversation: bytes, pipes, and what a saver sees of it.
//! * [`abort`]: SIGTERM and its like.
//! * [`config`]: how to migrate, which xl cannot say.
//! * [`save`]: what whoever saves domains is given and gives back; [`dom0`]: whether any can be; `xen_save`: who does.
//! * [`report_file`]: the files that tell how it went.
//! * [`stock`]: Xen's own save helper, for everything else.
//!
//! What always holds, also after an error, a panic or a signal: either the stock helper takes this process over with
//! everything as it was received, or qemu's dirty logging is off and libxl is told the end exactly once, unless it
//! is gone. Until then it is told nothing that it could misunderstand.

pub mod abort;
pub mod arguments;
mod channel;
pub mod config;
pub mod dom0;
pub mod handle;
mod messages;
pub mod report_file;
pub mod save;
pub mod stock;
mod xen_save;

use std::any::Any;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::fd::IntoRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

pub use abort::Abort;
pub use arguments::{Invocation, recognise};
pub use handle::Libxl;
pub use messages::{Level, MAX_TEXT};
pub use save::{SaveDomain, SaveError, SaveReport, SaveRequest};
pub use xen_save::save_domain;

use arguments::{Flags, SaveArguments};
use channel::Channel;
use config::Options;
use report_file::PathTemplate;

use crate::cli::Exit;
use crate::report::json;
use crate::sys::{console, descriptors};

/// The most lines of a summary that go to libxl's log.
const MAX_SUMMARY_LINES: usize = 64;

/// Does what libxl wants; `argv` is this program's own, its name included, as `recognise` was given it. To be called
/// before this process starts any thread or opens anything.
pub fn run(argv: &[OsString], invocation: Invocation, domain: &mut dyn SaveDomain) -> ExitCode {
    if std::io::stdin().is_terminal() || std::io::stdout().is_terminal() {
        console::complain(format_args!(
            "pagecast: only libxl says --save-domain and --restore-domain; run xl with LIBXL_SAVE_HELPER set to pagecast"
        ));
        return ExitCode::from(Exit::Usage as u8);
    }
    let (channel, abort) = match Channel::take().and_then(|channel| Ok((channel, Abort::new()?))) {
        Ok(both) => both,
        Err(error) => {
            console::complain(format_args!("pagecast: cannot take over the pipes to libxl: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let helper = Helper { argv, libxl: Libxl::new(channel, &abort), abort };
    match invocation {
        Invocation::Save(arguments) => helper.save(arguments, domain),
        Invocation::Delegate { why } => {
            let configured = Options::load().map(|options| options.stock_helper).unwrap_or_else(|error| {
                // Nothing but the place of the stock helper concerns what it does.
                helper.libxl.log(Level::Warn, &error.to_string());
                std::env::var_os("PAGECAST_STOCK_HELPER").map(PathBuf::from)
            });
            helper.delegate(configured, &why)
        }
    }
}

/// This process as a save helper.
struct Helper<'a> {
    argv: &'a [OsString],
    libxl: Libxl,
    abort: Abort,
}

impl Helper<'_> {
    /// Puts the stock helper in this process's place.
    fn delegate(&self, configured: Option<PathBuf>, why: &str) -> ExitCode {
        let error = match stock::find(configured.as_deref()) {
            Ok(program) => {
                let line = format!("leaving this to {}, because {why}", program.display());
                self.libxl.log(Level::Info, &line);
                match self.libxl.give_back() {
                    Ok(()) => stock::exec(&program, self.argv),
                    Err(source) => stock::StockError::Exec { path: program.display().to_string(), source },
                }
            }
            Err(error) => error,
        };
        self.fail(error.errno(), &format!("{error} (pagecast leaves this to it, because {why})"))
    }

    fn save(&self, arguments: SaveArguments, domain: &mut dyn SaveDomain) -> ExitCode {
        let watch = match self.abort.on_signals() {
            Ok(watch) => watch,
            Err(error) => return self.fail(libc::EIO, &format!("cannot watch for SIGTERM: {error}")),
        };
        let options = match Options::load() {
            Ok(options) => options,
            Err(error) => return self.fail(libc::EINVAL, &error.to_string()),
        };
        let stream = match descriptors::inherited(arguments.stream_fd) {
            Ok(stream) => stream,
            Err(error) => {
                let number = arguments.stream_fd;
                return self.fail(libc::EBADF, &format!("the stream's descriptor {number}: {error}"));
            }
        };
        let live = arguments.flags.contains(Flags::LIVE);
        let request = SaveRequest { domid: arguments.domid, live, stream, options };
        match self.attempt(&request, domain) {
            Err(SaveError::NotOurs(_)) if self.abort.is_raised() => {
                self.finish(&request, Err(SaveError::failed(libc::EINTR, self.abort.reason())))
            }
            Err(SaveError::NotOurs(why)) if self.libxl.is_engaged() => {
                let message = format!("this is a bug in pagecast: it found too late that {why}");
                self.finish(&request, Err(SaveError::failed(libc::EIO, message)))
            }
            Err(SaveError::NotOurs(why)) => {
                // Everything as it was received, the signals and the stream's close-on-exec flag included.
                let passed_on = rustix::io::fcntl_setfd(&request.stream, rustix::io::FdFlags::empty());
                if let Err(error) = watch.end().and(passed_on.map_err(Into::into)) {
                    return self.fail(libc::EIO, &format!("cannot pass signals and stream on: {error}"));
                }
                let _ = request.stream.into_raw_fd();
                self.delegate(request.options.stock_helper, &why)
            }
            result => self.finish(&request, result),
        }
    }

    /// Saves, and makes an error of a panic.
    fn attempt(&self, request: &SaveRequest, domain: &mut dyn SaveDomain) -> Result<SaveReport, SaveError> {
        let attempt = || domain.save(request, &self.libxl, &self.abort);
        catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|panic| {
            let message = format!("this is a bug in pagecast: {}", panic_text(&*panic));
            Err(SaveError::failed(libc::EIO, message))
        })
    }

    /// Undoes what libxl did for the save, tells how it went wherever that is to be told, and ends.
    fn finish(&self, request: &SaveRequest, result: Result<SaveReport, SaveError>) -> ExitCode {
        if let Err(error) = self.libxl.end_logdirty() {
            self.libxl.log(Level::Warn, &error.to_string());
        }
        let domid = request.domid;
        let (report, summary, (retval, errno)) = match result {
            Ok(report) => {
                for line in report.summary.lines().take(MAX_SUMMARY_LINES) {
                    self.libxl.log(Level::Info, line);
                }
                (report.report, report.summary, (0, 0))
            }
            Err(error) => {
                let message = error.to_string();
                let line = format!("domain {domid} is not saved: {message}");
                self.libxl.log(Level::Error, &line);
                let (errno, convergence) = match &error {
                    SaveError::Failed { errno, convergence, .. } => (*errno, convergence.as_deref()),
                    SaveError::NotOurs(_) => (libc::EOPNOTSUPP, None),
                };
                (json::failed(&message, convergence), line, (-1, errno))
            }
        };
        self.write_files(request, report, &summary);
        self.complete(retval, errno)
    }

    fn write_files(&self, request: &SaveRequest, mut report: serde_json::Value, summary: &str) {
        if let Some(report) = report.as_object_mut() {
            report.insert("domid".to_owned(), request.domid.into());
            report.insert("live".to_owned(), request.live.into());
        }
        let now = SystemTime::now();
        let write = |template: &Option<PathTemplate>, text: String| {
            let Some(template) = template else { return };
            let path = template.fill(request.domid, now);
            if let Err(error) = report_file::write(&path, &text) {
                let line = format!("cannot write {}: {error}", path.display());
                self.libxl.log(Level::Warn, &line);
            }
        };
        write(&request.options.report, format!("{report}\n"));
        write(&request.options.summary, format!("{}\n", summary.trim_end()));
    }

    /// Ends before anything was begun.
    fn fail(&self, errno: i32, message: &str) -> ExitCode {
        self.libxl.log(Level::Error, message);
        self.complete(-1, errno)
    }

    /// The last word.
    fn complete(&self, retval: i32, errno: i32) -> ExitCode {
        match self.libxl.complete(retval, errno) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                console::complain(format_args!("pagecast: {error}"));
                ExitCode::FAILURE
            }
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it does not say which")
}
