//! Memory of a specimen that it maps itself, private or shared, and children that share it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::page::PAGE_SIZE;

/// A mapping and its children's pipes.
#[derive(Default)]
pub struct Regions {
    mapped: Vec<Region>,
    children: Vec<Child>,
}

#[derive(Clone, Copy)]
struct Region {
    start: *mut u8,
    pages: usize,
    kind: libc::c_int,
}

struct Child {
    pid: i32,
    go: OwnedFd,
    done: OwnedFd,
}

impl Regions {
    /// Does what a command says; None if it is not of regions. The answer is numbers.
    ///
    /// * `share PAGES`, `own PAGES`: maps shared or private memory, gives its address.
    /// * `touch REGION FIRST STEP COUNT`: adds 1 to the first byte of each page.
    /// * `look REGION FIRST STEP COUNT`: gives the sum of the first bytes.
    /// * `drop`, `punch`, `renew`, `release REGION FIRST COUNT`: MADV_DONTNEED, MADV_REMOVE, maps anew in the same place, unmaps.
    /// * `child REGION FIRST COUNT KEEP MANNER`: forks a child that unmaps the pages of the region from KEEP on, touches those
    ///   from FIRST and waits; MANNER 1: nobody else can trace it; 2: it has a child of its own touch them and end. Gives its
    ///   pid.
    /// * `again CHILD`: the child touches once more. `end CHILD`: kills it and takes note of its end.
    pub fn obey(&mut self, command: &str, numbers: &[usize]) -> Option<Vec<u64>> {
        let number = |index: usize| numbers[index];
        match command {
            "share" => return Some(vec![self.map(number(0), libc::MAP_SHARED)]),
            "own" => return Some(vec![self.map(number(0), libc::MAP_PRIVATE)]),
            "touch" => self.each(numbers, |page| write(page, read(page).wrapping_add(1))),
            "look" => {
                let mut sum = 0;
                self.each(numbers, |page| sum += u64::from(read(page)));
                return Some(vec![sum]);
            }
            "drop" => self.advise(numbers, libc::MADV_DONTNEED),
            "punch" => self.advise(numbers, libc::MADV_REMOVE),
            "renew" => {
                let kind = self.mapped[number(0)].kind;
                map_at(self.page(number(0), number(1)), number(2), kind | libc::MAP_FIXED);
            }
            "release" => unmap(self.page(number(0), number(1)), number(2)),
            "child" => return Some(vec![self.fork(numbers) as u64]),
            "again" => self.child(number(0)).wait_for_another_touch(),
            "end" => {
                let pid = number(0) as i32;
                self.children.retain(|child| child.pid != pid);
                // SAFETY: both calls take integers and a null pointer.
                unsafe {
                    libc::kill(pid, libc::SIGKILL);
                    libc::waitpid(pid, std::ptr::null_mut(), 0);
                }
            }
            _ => return None,
        }
        Some(Vec::new())
    }

    fn map(&mut self, pages: usize, kind: libc::c_int) -> u64 {
        let start = map_at(std::ptr::null_mut(), pages, kind);
        self.mapped.push(Region { start, pages, kind });
        start as u64
    }

    fn page(&self, region: usize, page: usize) -> *mut u8 {
        assert!(page <= self.mapped[region].pages, "page {page} of region {region}");
        self.mapped[region].start.wrapping_add(page * PAGE_SIZE)
    }

    /// Region, first page, step, how many.
    fn each(&self, numbers: &[usize], mut act: impl FnMut(*mut u8)) {
        for index in 0..numbers[3] {
            act(self.page(numbers[0], numbers[1] + index * numbers[2]));
        }
    }

    fn advise(&self, numbers: &[usize], advice: libc::c_int) {
        let start = self.page(numbers[0], numbers[1]);
        // SAFETY: the range is of a region of ours, to which nothing but raw pointers leads.
        let result = unsafe { libc::madvise(start.cast(), numbers[2] * PAGE_SIZE, advice) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    fn child(&self, pid: usize) -> &Child {
        self.children.iter().find(|child| child.pid == pid as i32).expect("a child of that number")
    }

    fn fork(&mut self, numbers: &[usize]) -> i32 {
        let [region, first, count, keep, manner] = numbers else { panic!("five numbers") };
        let (rest, beyond) = (self.page(*region, *keep), self.mapped[*region].pages - keep);
        let (told, go) = rustix::pipe::pipe().expect("a pipe");
        let (done, tell) = rustix::pipe::pipe().expect("a pipe");
        // SAFETY: the child calls nothing but system calls and writes to memory that it has, and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            drop(go);
            if *manner == 1 {
                // SAFETY: takes integers only.
                unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            }
            if beyond > 0 {
                unmap(rest, beyond);
            }
            let touch =
                || self.each(&[*region, *first, 1, *count], |page| write(page, read(page).wrapping_add(1)));
            loop {
                if *manner == 2 {
                    by_a_child(touch)
                } else {
                    touch()
                }
                let heard = rustix::io::write(&tell, &[1]).and_then(|_| rustix::io::read(&told, &mut [0]));
                if heard != Ok(1) {
                    // SAFETY: ends the process without running anything of its parent's.
                    unsafe { libc::_exit(0) };
                }
            }
        }
        assert!(pid > 0, "{}", io::Error::last_os_error());
        drop(tell);
        assert_eq!(rustix::io::read(done.as_fd(), &mut [0]), Ok(1), "the child has touched its pages");
        self.children.push(Child { pid, go, done });
        pid
    }
}

impl Child {
    fn wait_for_another_touch(&self) {
        assert_eq!(rustix::io::write(&self.go, &[1]), Ok(1), "the child listens");
        assert_eq!(rustix::io::read(&self.done, &mut [0]), Ok(1), "the child has touched its pages");
    }
}

/// Has a child of this process do something and end.
fn by_a_child(act: impl Fn()) {
    // SAFETY: the child writes to memory that it has and leaves by _exit; waitpid stores nothing.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            act();
            libc::_exit(0);
        }
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
}

fn map_at(start: *mut u8, pages: usize, kind: libc::c_int) -> *mut u8 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = kind | libc::MAP_ANONYMOUS;
    // SAFETY: new memory, or, with MAP_FIXED, in the place of memory to which nothing but raw pointers leads.
    let mapped = unsafe { libc::mmap(start.cast(), pages * PAGE_SIZE, protection, flags, -1, 0) };
    assert_ne!(mapped, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    mapped.cast()
}

fn unmap(start: *mut u8, pages: usize) {
    // SAFETY: a part of a region of ours, to which nothing but raw pointers leads.
    unsafe { libc::munmap(start.cast(), pages * PAGE_SIZE) };
}

fn read(page: *const u8) -> u8 {
    // SAFETY: the test that gives the commands asks only for pages that it has had mapped.
    unsafe { page.read_volatile() }
}

fn write(page: *mut u8, value: u8) {
    // SAFETY: as for `read`.
    unsafe { page.write_volatile(value) }
}
