//! The tracer: a forked child that borrows one thread, for one errand. Between the fork and its end it allocates
//! nothing, takes no lock and does not panic, since the process it was forked from may have other threads.
//!
//! The steps, and what each is careful of:
//!
//! 1. PTRACE_SEIZE without PTRACE_O_EXITKILL, PTRACE_INTERRUPT; signals that come first are passed on as they come.
//! 2. At the stop the thread is on its way out of the kernel, perhaps of a system call that is to be restarted. Its
//!    registers are kept, rax and orig_rax as they are seen. One that stands inside a restartable sequence is let
//!    go and stopped again, so that the kernel aborts the sequence.
//! 3. Its signals are blocked (they stay pending and come afterwards), then the two calls are made: rip at a
//!    `syscall` instruction, PTRACE_SYSCALL to its entry and to its exit. This is not single-stepping, whose SIGTRAP would
//!    reset a target's disposition of that signal where it ignores it. orig_rax = -1, or else the kernel would restart
//!    the interrupted call over it.
//! 4. The thread is stopped once more where signals are delivered, because only from there does the kernel look
//!    at rax and orig_rax and restart what was interrupted. Registers and mask are restored; it is let go. A
//!    SIGSTOP meanwhile was passed on and takes effect now.
//!
//! A call that is interrupted with EINTR although there was no signal (epoll_wait and some others: signal(7), "Interruption
//! of system calls by stop signals") is so here as by SIGSTOP and SIGCONT; the caller prefers threads in which that cannot
//! happen.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use libc::{c_int, c_uint, c_void, user_regs_struct};

use super::{BorrowError, Order, SYSCALL_INSTRUCTION};
use crate::sys::signals;
use crate::sys::{cpu, descriptors};

/// How often a thread may be found inside a restartable sequence.
const TRIES: usize = 100;

/// The code segment of 64-bit programs.
const USER_CS: u64 = 0x33;

/// Leaves only faults of user mode to the descriptor, which an unprivileged target may ask for too. In asynchronous
/// mode the kernel resolves all faults by itself, its own among them.
const UFFD_USER_MODE_ONLY: c_int = 1;

const PTRACE_EVENT_STOP: c_int = 128;
const SYSCALL_STOP: c_int = libc::SIGTRAP | 0x80;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: c_uint = 0x4211;
const PR_SYS_DISPATCH_ON: u64 = 1;

/// The kernel's signal set, as PTRACE_GETSIGMASK has it.
const SIGSET_BYTES: usize = 8;

/// PTRACE_GET_RSEQ_CONFIGURATION, linux/ptrace.h.
#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    rseq_abi_pointer: u64,
    rseq_abi_size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// A critical section, linux/rseq.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RseqSection {
    version: u32,
    flags: u32,
    start_ip: u64,
    post_commit_offset: u64,
    abort_ip: u64,
}

/// Where `struct rseq` points to its critical section.
const RSEQ_CS_OFFSET: u64 = 8;

/// PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, linux/ptrace.h.
#[repr(C)]
#[derive(Default)]
struct DispatchConfiguration {
    mode: u64,
    selector: u64,
    offset: u64,
    len: u64,
}

const _: () = {
    assert!(size_of::<RseqConfiguration>() == 24);
    assert!(size_of::<RseqSection>() == 32);
    assert!(size_of::<DispatchConfiguration>() == 32);
    assert!(size_of::<user_regs_struct>() == 27 * 8);
};

/// Which step went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
enum Step {
    None,
    Seize,
    Gone,
    Stuck,
    Registers,
    ThirtyTwoBit,
    Dispatched,
    Restartable,
    NoInstruction,
    Inject,
    Refused,
    TakeDescriptor,
}

const STEPS: [Step; 12] = [
    Step::None,
    Step::Seize,
    Step::Gone,
    Step::Stuck,
    Step::Registers,
    Step::ThirtyTwoBit,
    Step::Dispatched,
    Step::Restartable,
    Step::NoInstruction,
    Step::Inject,
    Step::Refused,
    Step::TakeDescriptor,
];

/// What failed, with an errno or 0.
#[derive(Clone, Copy, Debug)]
struct Fault {
    step: Step,
    errno: i32,
}

impl Fault {
    fn last(step: Step) -> Self {
        Fault { step, errno: io::Error::last_os_error().raw_os_error().unwrap_or(0) }
    }

    fn of(step: Step) -> Self {
        Fault { step, errno: 0 }
    }

    /// A failed request to a stopped thread: ESRCH is the thread's end.
    fn request(step: Step) -> Self {
        let fault = Fault::last(step);
        if fault.errno == libc::ESRCH { Fault::of(Step::Gone) } else { fault }
    }
}

/// What the tracer says when it is done; a descriptor comes with it if all went well.
pub struct Answer {
    fault: Fault,
    seccomp: bool,
    stopped_ns: u64,
}

/// Bytes of an encoded answer.
const ANSWER_BYTES: usize = 24;

impl Answer {
    fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..4].copy_from_slice(&(self.fault.step as i32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.fault.errno.to_ne_bytes());
        bytes[8] = u8::from(self.seccomp);
        bytes[16..].copy_from_slice(&self.stopped_ns.to_ne_bytes());
        bytes
    }

    /// Reads what the tracer has sent.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ANSWER_BYTES] = bytes.try_into().ok()?;
        let number = |range: std::ops::Range<usize>| Some(i32::from_ne_bytes(bytes[range].try_into().ok()?));
        let step = *STEPS.get(usize::try_from(number(0..4)?).ok()?)?;
        Some(Answer {
            fault: Fault { step, errno: number(4..8)? },
            seccomp: bytes[8] != 0,
            stopped_ns: u64::from_ne_bytes(bytes[16..].try_into().ok()?),
        })
    }

    /// How long the thread was stopped, or what went wrong.
    pub fn outcome(&self, pid: i32) -> Result<Duration, BorrowError> {
        let errno = self.fault.errno;
        let io = |what| Err(BorrowError::Io(what, io::Error::from_raw_os_error(errno)));
        match self.fault.step {
            Step::None => Ok(Duration::from_nanos(self.stopped_ns)),
            Step::Gone => Err(BorrowError::Gone),
            Step::Seize if errno == libc::ESRCH => Err(BorrowError::Gone),
            Step::Seize if errno == libc::EPERM && self.seccomp => Err(BorrowError::Seccomp(pid)),
            Step::Seize if errno == libc::EPERM => Err(BorrowError::Rights(pid)),
            Step::Seize => io("trace the process"),
            Step::Stuck => Err(BorrowError::Stuck),
            Step::Registers => io("read and write the thread's registers"),
            Step::ThirtyTwoBit => Err(BorrowError::ThirtyTwoBit(pid)),
            Step::Dispatched => Err(BorrowError::Dispatched(pid)),
            Step::Restartable => Err(BorrowError::Restartable),
            Step::NoInstruction => Err(BorrowError::NoInstruction),
            Step::Inject => io("have the thread make a system call"),
            Step::Refused => Err(BorrowError::Refused(pid, io::Error::from_raw_os_error(errno))),
            Step::TakeDescriptor => io("take the descriptor out of the process (pidfd_getfd)"),
        }
    }
}

/// Forks a tracer that runs `order` and answers on `socket`. Gives its process id.
pub fn fork(order: &Order, socket: &OwnedFd) -> io::Result<i32> {
    signals::with_all_blocked(|| {
        // SAFETY: the child runs `run`, which neither allocates nor locks nor panics, and then leaves by _exit.
        match unsafe { libc::fork() } {
            0 => {
                run(order, socket.as_fd());
                // SAFETY: ends the process without running anything of its parent's.
                unsafe { libc::_exit(0) }
            }
            child if child < 0 => Err(io::Error::last_os_error()),
            child => Ok(child),
        }
    })?
}

/// Waits until the tracer has ended.
pub fn reap(tracer: i32) {
    loop {
        // SAFETY: waits for one child by its number and stores nothing.
        let waited = unsafe { libc::waitpid(tracer, std::ptr::null_mut(), 0) };
        if waited >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// Waits until a stop is announced by SIGCHLD, which is blocked here as all signals are, or the time is over. No
/// spinning: that would keep the core from the very thread that is waited for.
fn await_child_signal(left: Duration) {
    let time = libc::timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    // SAFETY: the set is initialised; all structures outlive the call, and nobody wants the signal's details.
    unsafe {
        let mut child: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut child, libc::SIGCHLD);
        libc::sigtimedwait(&child, std::ptr::null_mut(), &time);
    }
}

/// The tracer's whole life.
fn run(order: &Order, socket: BorrowedFd<'_>) {
    let own = socket.as_raw_fd() as c_uint;
    // SAFETY: none takes a pointer of ours but a string literal. A session of its own keeps signals that are meant
    // for the recorder's group or terminal away. What is closed are copies, of which this process uses none: other
    // targets' userfaultfds must not outlive the recorder here. Failing would change nothing else.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"pagecast-tracer".as_ptr());
        libc::close_range(3, own.saturating_sub(1), 0);
        libc::close_range(own + 1, c_uint::MAX, 0);
    }
    // So that the borrowed thread does not have to wait for others to have had their turn before this process gives it
    // back. Without the right to it, it takes longer on a busy host: 16 ms instead of 1 were seen.
    let _ = cpu::run_in_real_time();
    let mut thread = Thread { order, since: None, blocked: None };
    let result = thread.errand();
    let stopped = thread.since.map_or(Duration::ZERO, |since| since.elapsed());
    let fault = result.as_ref().err().copied().unwrap_or(Fault::of(Step::None));
    let answer = Answer { fault, seccomp: order.has_seccomp, stopped_ns: stopped.as_nanos() as u64 }.encode();
    // Nobody may be listening any more; the errand was done all the same.
    let _ = match &result {
        Ok(descriptor) => descriptors::send(socket, &answer, &[descriptor.as_fd()]),
        Err(_) => descriptors::send(socket, &answer, &[]),
    };
}

/// The borrowed thread.
struct Thread<'a> {
    order: &'a Order,
    /// When it was stopped.
    since: Option<Instant>,
    /// The signals that it had blocked itself, once all are blocked.
    blocked: Option<u64>,
}

impl Thread<'_> {
    fn errand(&mut self) -> Result<OwnedFd, Fault> {
        let mut options = libc::PTRACE_O_TRACESYSGOOD;
        if self.order.has_seccomp {
            options |= libc::PTRACE_O_SUSPEND_SECCOMP;
        }
        if !self.request(libc::PTRACE_SEIZE, 0, options as usize) {
            return Err(Fault::last(Step::Seize));
        }
        let saved = self.stop_where_it_may_be_borrowed()?;
        let taken = self.borrow(&saved);
        let let_go = self.give_back(&saved);
        // A descriptor in hand is worth more than an error after it: the thread's end is seen by whoever comes next.
        taken.and_then(|descriptor| match let_go {
            Err(Fault { step: Step::Gone, .. }) | Ok(()) => Ok(descriptor),
            Err(fault) => Err(fault),
        })
    }

    fn stop_where_it_may_be_borrowed(&mut self) -> Result<user_regs_struct, Fault> {
        for _ in 0..TRIES {
            if !self.request(libc::PTRACE_INTERRUPT, 0, 0) {
                return Err(Fault::request(Step::Stuck));
            }
            self.await_interrupt()?;
            self.since.get_or_insert_with(Instant::now);
            let registers = self.registers()?;
            if registers.cs != USER_CS {
                return Err(Fault::of(Step::ThirtyTwoBit));
            }
            if self.dispatches_system_calls() {
                return Err(Fault::of(Step::Dispatched));
            }
            if self.peek(self.order.syscall_at) != Some(SYSCALL_INSTRUCTION) {
                return Err(Fault::of(Step::NoInstruction));
            }
            if !self.is_inside_restartable_sequence(registers.rip) {
                return Ok(registers);
            }
            // On its way out the kernel sees the sequence and aborts it.
            self.proceed(libc::PTRACE_CONT, 0)?;
        }
        Err(Fault::of(Step::Restartable))
    }

    /// The two calls, and the copy of the descriptor in between.
    fn borrow(&mut self, saved: &user_regs_struct) -> Result<OwnedFd, Fault> {
        self.block_signals()?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        let number = self.inject(saved, libc::SYS_userfaultfd, flags as u64)?;
        if number < 0 {
            return Err(Fault { step: Step::Refused, errno: -number as i32 });
        }
        let taken = self.take(number as i32);
        self.inject(saved, libc::SYS_close, number as u64)?;
        taken
    }

    fn take(&self, number: i32) -> Result<OwnedFd, Fault> {
        // SAFETY: both calls take integers only and return a new descriptor or -1.
        unsafe {
            let process = libc::syscall(libc::SYS_pidfd_open, self.order.pid, 0);
            if process < 0 {
                return Err(Fault::last(Step::TakeDescriptor));
            }
            let process = OwnedFd::from_raw_fd(process as i32);
            let taken = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0);
            if taken < 0 {
                return Err(Fault::last(Step::TakeDescriptor));
            }
            Ok(OwnedFd::from_raw_fd(taken as i32))
        }
    }

    /// Makes the thread execute one system call and gives what it returned.
    fn inject(&self, saved: &user_regs_struct, number: i64, argument: u64) -> Result<i64, Fault> {
        let mut registers = *saved;
        registers.rip = self.order.syscall_at;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX;
        registers.rdi = argument;
        self.set_registers(&registers)?;
        for _entry_then_exit in 0..2 {
            self.proceed(libc::PTRACE_SYSCALL, 0)?;
            self.await_syscall_stop()?;
        }
        Ok(self.registers()?.rax as i64)
    }

    /// Stops the thread where signals are delivered, gives it its registers and its mask, and lets go. What was not
    /// changed is restored all the same: there is one way out.
    fn give_back(&mut self, saved: &user_regs_struct) -> Result<(), Fault> {
        if self.request(libc::PTRACE_INTERRUPT, 0, 0) {
            self.proceed(libc::PTRACE_CONT, 0)?;
            self.await_interrupt()?;
        }
        self.set_registers(saved)?;
        if let Some(mask) = self.blocked.take() {
            self.set_mask(mask)?;
        }
        if self.request(libc::PTRACE_DETACH, 0, 0) { Ok(()) } else { Err(Fault::request(Step::Registers)) }
    }

    /// Whether a ptrace request with an address and a datum was granted.
    fn request(&self, request: c_uint, address: usize, data: usize) -> bool {
        // SAFETY: `address` and `data` are numbers for the requests that are made here; those with buffers go
        // through `request_with`.
        unsafe { libc::ptrace(request, self.order.thread, address as *mut c_void, data as *mut c_void) >= 0 }
    }

    /// The same with a buffer as the datum.
    fn request_with<T>(&self, request: c_uint, address: usize, data: &mut T) -> bool {
        let data: *mut T = data;
        // SAFETY: each caller passes the structure that the request reads or writes, by its size in `address` where the
        // request wants that; it outlives the call.
        unsafe {
            libc::ptrace(request, self.order.thread, address as *mut c_void, data.cast::<c_void>()) >= 0
        }
    }

    fn proceed(&self, how: c_uint, signal: c_int) -> Result<(), Fault> {
        if self.request(how, 0, signal as usize) { Ok(()) } else { Err(Fault::request(Step::Inject)) }
    }

    /// Waits for the stop that PTRACE_INTERRUPT asks for and passes on signals that come before it.
    fn await_interrupt(&self) -> Result<(), Fault> {
        let since = Instant::now();
        loop {
            match self.wait(since)? {
                (_, PTRACE_EVENT_STOP) => return Ok(()),
                (SYSCALL_STOP, _) => self.proceed(libc::PTRACE_CONT, 0)?,
                // While its own registers are not in place no signal with a handler gets here: they are blocked.
                (signal, _) => self.proceed(libc::PTRACE_CONT, signal)?,
            }
        }
    }

    /// Waits for the entry or the exit of a system call. SIGSTOP, which cannot be blocked, is passed on: the group stops,
    /// this thread as soon as it is let go.
    fn await_syscall_stop(&self) -> Result<(), Fault> {
        let since = Instant::now();
        loop {
            match self.wait(since)? {
                (SYSCALL_STOP, _) => return Ok(()),
                (_, PTRACE_EVENT_STOP) => self.proceed(libc::PTRACE_SYSCALL, 0)?,
                (libc::SIGSTOP, _) => self.proceed(libc::PTRACE_SYSCALL, libc::SIGSTOP)?,
                // The instruction faulted: it does not do what it should.
                (signal, _) => return Err(Fault { step: Step::Inject, errno: signal }),
            }
        }
    }

    /// The next stop: its signal and its event.
    fn wait(&self, since: Instant) -> Result<(c_int, c_int), Fault> {
        loop {
            let mut status = 0;
            // SAFETY: waits for one traced thread and stores its status.
            let waited =
                unsafe { libc::waitpid(self.order.thread, &mut status, libc::__WALL | libc::WNOHANG) };
            if waited < 0 {
                return Err(Fault::of(Step::Gone));
            }
            if waited > 0 {
                if !libc::WIFSTOPPED(status) {
                    return Err(Fault::of(Step::Gone));
                }
                return Ok((libc::WSTOPSIG(status), status >> 16));
            }
            let left = self.order.patience.saturating_sub(since.elapsed());
            if left.is_zero() {
                return Err(Fault::of(Step::Stuck));
            }
            await_child_signal(left);
        }
    }

    fn registers(&self) -> Result<user_regs_struct, Fault> {
        // SAFETY: user_regs_struct is plain integers.
        let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
        let base: *mut user_regs_struct = &mut registers;
        let mut vector =
            libc::iovec { iov_base: base.cast::<c_void>(), iov_len: size_of::<user_regs_struct>() };
        if !self.request_with(libc::PTRACE_GETREGSET, libc::NT_PRSTATUS as usize, &mut vector) {
            return Err(Fault::request(Step::Registers));
        }
        if vector.iov_len != size_of::<user_regs_struct>() {
            return Err(Fault::of(Step::ThirtyTwoBit));
        }
        Ok(registers)
    }

    fn set_registers(&self, registers: &user_regs_struct) -> Result<(), Fault> {
        let mut registers = *registers;
        let base: *mut user_regs_struct = &mut registers;
        let mut vector =
            libc::iovec { iov_base: base.cast::<c_void>(), iov_len: size_of::<user_regs_struct>() };
        if self.request_with(libc::PTRACE_SETREGSET, libc::NT_PRSTATUS as usize, &mut vector) {
            Ok(())
        } else {
            Err(Fault::request(Step::Registers))
        }
    }

    fn block_signals(&mut self) -> Result<(), Fault> {
        let mut mask: u64 = 0;
        if !self.request_with(libc::PTRACE_GETSIGMASK, SIGSET_BYTES, &mut mask) {
            return Err(Fault::request(Step::Registers));
        }
        self.set_mask(u64::MAX)?;
        self.blocked = Some(mask);
        Ok(())
    }

    fn set_mask(&self, mut mask: u64) -> Result<(), Fault> {
        if self.request_with(libc::PTRACE_SETSIGMASK, SIGSET_BYTES, &mut mask) {
            Ok(())
        } else {
            Err(Fault::request(Step::Registers))
        }
    }

    /// A kernel that cannot say (before 6.4) is taken to answer no.
    fn dispatches_system_calls(&self) -> bool {
        let mut configuration = DispatchConfiguration::default();
        let size = size_of::<DispatchConfiguration>();
        self.request_with(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, size, &mut configuration)
            && configuration.mode == PR_SYS_DISPATCH_ON
    }

    /// A kernel that cannot say (before 5.13) is taken to answer no.
    fn is_inside_restartable_sequence(&self, rip: u64) -> bool {
        let mut configuration = RseqConfiguration::default();
        let size = size_of::<RseqConfiguration>();
        if !self.request_with(libc::PTRACE_GET_RSEQ_CONFIGURATION, size, &mut configuration)
            || configuration.rseq_abi_pointer == 0
        {
            return false;
        }
        let Some(section) = self
            .peek::<u64>(configuration.rseq_abi_pointer.wrapping_add(RSEQ_CS_OFFSET))
            .filter(|at| *at != 0)
            .and_then(|at| self.peek::<RseqSection>(at))
        else {
            return false;
        };
        rip.wrapping_sub(section.start_ip) < section.post_commit_offset
    }

    /// Reads plain data out of the target.
    fn peek<T: Plain>(&self, address: u64) -> Option<T> {
        let mut value = T::default();
        let base: *mut T = &mut value;
        let local = libc::iovec { iov_base: base.cast::<c_void>(), iov_len: size_of::<T>() };
        let remote = libc::iovec { iov_base: address as *mut c_void, iov_len: size_of::<T>() };
        // SAFETY: the kernel writes at most size_of::<T>() bytes into `value`, which holds any of them, and checks the
        // other address itself.
        let read = unsafe { libc::process_vm_readv(self.order.pid, &local, 1, &remote, 1, 0) };
        (read == size_of::<T>() as isize).then_some(value)
    }
}

/// Types that hold any bytes.
trait Plain: Default + Copy {}

impl Plain for u64 {}
impl Plain for [u8; 2] {}
impl Plain for RseqSection {}
