//! `pagecast inspect`: what is in a migration stream.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::{Exit, Failure};
use crate::report::json::joined;
use crate::report::table;
use crate::stream::image::PageState;
use crate::stream::{Image, Limits, unwrap_xl};
use crate::sys::console;

/// Page numbers of a guest of 4 TiB: the most that is believed of a stream.
const MAX_PFNS: u64 = 1 << 30;

#[derive(Args)]
pub struct InspectArguments {
    /// A file that `xl save` has written, or a bare migration stream
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Compare with the guest in this stream, page by page and record by record; exit code 1 if they differ
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &InspectArguments) -> Result<Exit, Failure> {
    let image = read(&arguments.file)?;
    let other = arguments.compare.as_deref().map(read).transpose()?;
    let difference = other.map(|other| image.difference(&other));
    if arguments.json {
        let line = json!({
            "pages_populated": image.pages.len(),
            "pages_without_data": allocated_only(&image),
            "xen": format!("{}.{}", image.domain.xen_major, image.domain.xen_minor),
            "cpuid_bytes": image.cpuid.len(),
            "msr_bytes": image.msrs.len(),
            "context_bytes": image.context.len(),
            "params": image.params,
            "difference": difference,
        });
        console::say(format_args!("{}", joined(line, json!(image.tally))));
    } else {
        console::say(format_args!("{}", table::rows(&rows(&image))));
        if let Some(difference) = &difference {
            console::say(format_args!("{difference}"));
        }
    }
    let equal = difference.is_none_or(|difference| difference.is_none());
    Ok(if equal { Exit::Done } else { Exit::Failed })
}

fn read(path: &Path) -> Result<Image, Failure> {
    let named = |error: &dyn std::fmt::Display| Failure::failed(format!("{}: {error}", path.display()));
    let file = File::open(path).map_err(|error| named(&error))?;
    let stream = unwrap_xl(BufReader::with_capacity(1 << 20, file)).map_err(|error| named(&error))?;
    Image::read(stream, Limits::new(MAX_PFNS)).map_err(|error| named(&error))
}

fn allocated_only(image: &Image) -> usize {
    image.pages.values().filter(|state| **state == PageState::Allocated).count()
}

fn rows(image: &Image) -> Vec<(&'static str, String)> {
    let tally = &image.tally;
    let params: Vec<String> =
        image.params.iter().map(|(index, value)| format!("{index}={value:#x}")).collect();
    vec![
        ("saved on", format!("Xen {}.{}", image.domain.xen_major, image.domain.xen_minor)),
        ("pages populated", image.pages.len().to_string()),
        ("  without data", allocated_only(image).to_string()),
        ("page records", tally.page_records.to_string()),
        ("pages with data", tally.data_entries.to_string()),
        ("  of zeroes", tally.zero_entries.to_string()),
        ("pages allocated (XALLOC)", tally.alloc_entries.to_string()),
        ("holes named (XTAB, BROKEN)", tally.hole_entries.to_string()),
        ("2 MiB chunks whole at first", tally.whole_chunks.to_string()),
        ("bytes", tally.bytes.to_string()),
        ("CPUID and MSR policy", format!("{} and {} bytes", image.cpuid.len(), image.msrs.len())),
        ("time stamp counter", image.tsc.as_ref().map_or("none".to_owned(), |tsc| format!("{tsc:?}"))),
        ("HVM context", format!("{} bytes", image.context.len())),
        ("HVM parameters", params.join(" ")),
    ]
}
