//! The stretches of a process's memory that are worth tracking, from /proc/PID/maps.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

/// What an area is a view of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Backing {
    /// Memory of this process alone.
    Private,
    /// Memory that others may map too: a memfd, a System V segment, a file in /dev/shm, a shared anonymous mapping.
    Shared {
        /// The device and the inode by which the kernel knows it.
        object: (u64, u64),
        /// Where in it the area begins, in bytes.
        offset: u64,
    },
}

/// Mappings that touch, seen as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// Addresses.
    pub range: Range<u64>,
    /// What it is a view of.
    pub backing: Backing,
    /// The mappings, ascending.
    pub pieces: Vec<Range<u64>>,
}

impl Area {
    /// Bytes of it.
    pub fn length(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether others may map its memory too.
    pub fn is_shared(&self) -> bool {
        self.backing != Backing::Private
    }

    /// Whether it shows the same in the same place as another, in however many mappings.
    pub fn is_view_of_same(&self, other: &Area) -> bool {
        self.range == other.range && self.backing == other.backing
    }
}

/// Which mappings count.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Areas below this many bytes do not.
    pub min_bytes: u64,
    /// Memory that can be shared does.
    pub shared: bool,
    /// The main thread's stack does.
    pub stack: bool,
    /// Private mappings that cannot be written now do: they may have been, and may be again.
    pub read_only: bool,
}

/// Reads the areas of a process. Uses `text` as its buffer.
pub fn list(pid: i32, wanted: &Wanted, text: &mut String) -> io::Result<Vec<Area>> {
    text.clear();
    File::open(format!("/proc/{pid}/maps"))?.read_to_string(text)?;
    Ok(parse(text, wanted))
}

fn parse(text: &str, wanted: &Wanted) -> Vec<Area> {
    let mut areas: Vec<Area> = Vec::new();
    for (range, backing) in text.lines().filter_map(|line| mapping(line, wanted)) {
        match areas.last_mut() {
            Some(last) if continues(last, &range, backing) => {
                last.range.end = range.end;
                last.pieces.push(range);
            }
            _ => areas.push(Area { range: range.clone(), backing, pieces: vec![range] }),
        }
    }
    areas.retain(|area| area.length() >= wanted.min_bytes);
    areas
}

/// Whether a mapping goes on where an area ends.
fn continues(area: &Area, range: &Range<u64>, backing: Backing) -> bool {
    let adjacent = area.range.end == range.start;
    adjacent
        && match (area.backing, backing) {
            (Backing::Private, Backing::Private) => true,
            (Backing::Shared { object, offset }, Backing::Shared { object: other, offset: at }) => {
                object == other && offset + area.length() == at
            }
            _ => false,
        }
}

/// A line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// Addresses.
    pub range: Range<u64>,
    /// As `rw-p`.
    pub permissions: &'a str,
    /// Where in the object it begins, in bytes.
    pub offset: u64,
    /// The device and the inode of the object.
    pub object: (u64, u64),
    /// The name's first word.
    pub name: &'a str,
}

impl<'a> Line<'a> {
    /// Takes a line apart; None if it makes no sense.
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let range = hex(start)?..hex(end)?;
        let permissions = words.next()?;
        let offset = hex(words.next()?)?;
        let (major, minor) = words.next()?.split_once(':')?;
        let object = (hex(major)? << 20 | hex(minor)?, words.next()?.parse().ok()?);
        Some(Line { range, permissions, offset, object, name: words.next().unwrap_or("") })
    }

    /// Whether what is written through it stays with the process.
    pub fn is_private(&self) -> bool {
        self.permissions.as_bytes().get(3) == Some(&b'p')
    }

    fn is_writable(&self) -> bool {
        self.permissions.as_bytes().get(1) == Some(&b'w')
    }
}

/// A line of /proc/PID/maps, if it is wanted.
fn mapping(line: &str, wanted: &Wanted) -> Option<(Range<u64>, Backing)> {
    let line = Line::parse(line)?;
    let (_, inode) = line.object;
    if line.is_private() {
        let is_special = matches!(line.name, "[vvar]" | "[vvar_vclock]" | "[vdso]" | "[vsyscall]");
        let counts = inode == 0
            && !is_special
            && (line.is_writable() || wanted.read_only)
            && (wanted.stack || line.name != "[stack]");
        return counts.then_some((line.range, Backing::Private));
    }
    let of_memory =
        ["/memfd:", "/dev/zero", "/dev/shm/", "/SYSV"].iter().any(|start| line.name.starts_with(start));
    let counts = wanted.shared && line.is_writable() && inode != 0 && of_memory;
    let backing = Backing::Shared { object: line.object, offset: line.offset };
    counts.then_some((line.range, backing))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55c9dc0a5000-55c9dc166000 r-xp 0002f000 fe:00 247003                     /usr/bin/bash
55c9dc166000-55c9dc170000 rw-p 000ee000 fe:00 247003                     /usr/bin/bash
55c9dc170000-55c9dc180000 rw-p 00000000 00:00 0 
55c9dd000000-55c9dd021000 rw-p 00000000 00:00 0                          [heap]
55c9dd021000-55c9dd042000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000100000 rw-p 00000000 00:00 0                          [anon: GC heap]
7f0000100000-7f0000200000 ---p 00000000 00:00 0 
7f0000200000-7f0000300000 rwxp 00000000 00:00 0 
7f1000000000-7f1000200000 rw-s 00000000 00:01 2053                       /dev/zero (deleted)
7f1000200000-7f1000400000 rw-s 00200000 00:01 2053                       /dev/zero (deleted)
7f1000400000-7f1000600000 rw-s 00000000 00:01 3000                       /memfd:ram (deleted)
7f1000600000-7f1000800000 r--s 00000000 00:01 3001                       /memfd:seen-only (deleted)
7f1000800000-7f1000900000 rw-s 00000000 fe:00 777                        /var/lib/data.mmap
7ffd50000000-7ffd50100000 rw-p 00000000 00:00 0                          [stack]
7ffd501f0000-7ffd501f4000 r--p 00000000 00:00 0                          [vvar]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    fn starts(wanted: &Wanted) -> Vec<(u64, u64, usize)> {
        let of = |area: &Area| (area.range.start, area.range.end - area.range.start, area.pieces.len());
        parse(MAPS, wanted).iter().map(of).collect()
    }

    #[test]
    fn private_writable_memory_of_some_size_is_listed_and_joined_where_it_touches() {
        let wanted = Wanted { min_bytes: 0x42000, shared: false, stack: false, read_only: false };
        assert_eq!(
            starts(&wanted),
            [
                (0x55c9_dd00_0000, 0x42000, 2),
                (0x7f00_0000_0000, 0x100000, 1),
                (0x7f00_0020_0000, 0x100000, 1)
            ]
        );
        let all = Wanted { min_bytes: 0, stack: true, read_only: true, ..wanted };
        assert_eq!(
            starts(&all),
            [
                (0x55c9_dc17_0000, 0x10000, 1),
                (0x55c9_dd00_0000, 0x42000, 2),
                (0x7f00_0000_0000, 0x300000, 3),
                (0x7ffd_5000_0000, 0x100000, 1)
            ]
        );
    }

    #[test]
    fn shared_memory_is_listed_by_object_and_files_on_a_disk_are_not() {
        let wanted = Wanted { min_bytes: 1 << 21, shared: true, stack: false, read_only: false };
        let backings: Vec<Backing> = parse(MAPS, &wanted).iter().map(|area| area.backing).collect();
        let object = |inode| Backing::Shared { object: (1, inode), offset: 0 };
        assert_eq!(backings, [object(2053), object(3000)]);
        assert_eq!(starts(&wanted)[0], (0x7f10_0000_0000, 0x400000, 2));
    }

    #[test]
    fn a_line_that_makes_no_sense_is_left_out() {
        let wanted = Wanted { min_bytes: 0, shared: true, stack: true, read_only: true };
        assert_eq!(parse("what\n12-zz rw-p 0 0:0 0\n\n1-2\n", &wanted), []);
    }
}
