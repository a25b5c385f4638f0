//! Reading the memory of another process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::page::PAGE_SIZE;

/// Pages read by one call at most: the kernel takes 1024 ranges.
pub const MAX_PAGES: usize = 512;

/// Reads the pages at `addresses` of a process, in this order, into `into`, which holds as many. Gives how many pages
/// were read before one that could not be.
pub fn read_pages(pid: i32, addresses: &[u64], into: &mut [u8]) -> io::Result<usize> {
    let count = addresses.len().min(MAX_PAGES).min(into.len() / PAGE_SIZE);
    let mut remote: [libc::iovec; MAX_PAGES] =
        [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PAGES];
    let mut ranges: usize = 0;
    let mut end = None;
    for address in &addresses[..count] {
        if end == Some(*address) {
            remote[ranges - 1].iov_len += PAGE_SIZE;
        } else {
            remote[ranges] = libc::iovec { iov_base: *address as *mut libc::c_void, iov_len: PAGE_SIZE };
            ranges += 1;
        }
        end = address.checked_add(PAGE_SIZE as u64);
    }
    let local =
        libc::iovec { iov_base: into.as_mut_ptr().cast::<libc::c_void>(), iov_len: count * PAGE_SIZE };
    // SAFETY: the kernel writes at most count * PAGE_SIZE bytes into `into`, which is that long, and checks the other
    // process's addresses itself.
    let read = unsafe { libc::process_vm_readv(pid, &local, 1, remote.as_ptr(), ranges as u64, 0) };
    if read < 0 { Err(io::Error::last_os_error()) } else { Ok(read as usize / PAGE_SIZE) }
}

/// Reads one page as a debugger does, also where the process itself may not read.
pub fn read_page_by_force(pid: i32, address: u64, into: &mut [u8]) -> io::Result<()> {
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(into, address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_in_the_order_asked_for_up_to_one_that_is_not_there() {
        let memory: Vec<u8> = (0..9 * PAGE_SIZE).map(|at| (at / PAGE_SIZE) as u8).collect();
        let first = memory.as_ptr().align_offset(PAGE_SIZE);
        let address = |page: usize| memory[first + page * PAGE_SIZE..].as_ptr() as u64;
        let mut into = vec![0; 5 * PAGE_SIZE];
        let own = std::process::id() as i32;
        let wanted = [address(3), address(4), address(0), 4096, address(1)];
        let read = read_pages(own, &wanted, &mut into).unwrap();
        assert_eq!(read, 3);
        for (place, page) in [3, 4, 0].into_iter().enumerate() {
            let from = first + page * PAGE_SIZE;
            assert_eq!(into[place * PAGE_SIZE..][..PAGE_SIZE], memory[from..][..PAGE_SIZE]);
        }
        let mut page = vec![0; PAGE_SIZE];
        read_page_by_force(own, address(5), &mut page).unwrap();
        assert_eq!(page, memory[first + 5 * PAGE_SIZE..][..PAGE_SIZE]);
        assert!(read_page_by_force(own, 4096, &mut page).is_err());
    }
}
