//! The reader's input: whole fills out of short reads, with a count of the bytes that were taken.

use super::error::Fault;
use std::io::{ErrorKind, IoSliceMut, Read, Result as IoResult};

/// Bytes by which a buffer grows that is filled with what a record header has announced. The announcement is not
/// to be trusted: memory is taken as the bytes arrive.
const STEP: usize = 64 << 10;

/// An input and the count of bytes taken from it.
pub(super) struct Source<R> {
    input: R,
    offset: u64,
}

impl<R: Read> Source<R> {
    pub(super) fn new(input: R) -> Self {
        Source { input, offset: 0 }
    }

    /// Bytes taken so far.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn into_inner(self) -> R {
        self.input
    }

    /// Fills all of `buffer`.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Fault> {
        let mut filled = 0;
        while filled < buffer.len() {
            filled += self.read_some(buffer.len() - filled, |input| input.read(&mut buffer[filled..]))?;
        }
        Ok(())
    }

    /// Fills the first `due` bytes of `slices`; returns how many of the bytes behind them came along with the
    /// last read. Never waits for those.
    pub(super) fn fill_vectored(
        &mut self,
        mut slices: &mut [IoSliceMut<'_>],
        due: usize,
    ) -> Result<usize, Fault> {
        let mut filled = 0;
        while filled < due {
            let got = self.read_some(due - filled, |input| input.read_vectored(slices))?;
            IoSliceMut::advance_slices(&mut slices, got);
            filled += got;
        }
        Ok(filled - due)
    }

    /// Appends the next `len` bytes to `buffer`, which grows as they arrive.
    pub(super) fn append(&mut self, buffer: &mut Vec<u8>, len: usize) -> Result<(), Fault> {
        let mut missing = len;
        while missing > 0 {
            let from = buffer.len();
            let step = missing.min(STEP);
            buffer.resize(from + step, 0);
            self.fill(&mut buffer[from..])?;
            missing -= step;
        }
        Ok(())
    }

    /// Takes the next `len` bytes and drops them.
    pub(super) fn skip(&mut self, len: u64) -> Result<(), Fault> {
        let mut scrap = [0; 8192];
        let mut missing = len;
        while missing > 0 {
            let step = missing.min(scrap.len() as u64);
            self.fill(&mut scrap[..step as usize])?;
            missing -= step;
        }
        Ok(())
    }

    /// One read, repeated while signals interrupt it. `missing` is for the error, should the input have ended.
    fn read_some(
        &mut self,
        missing: usize,
        mut read: impl FnMut(&mut R) -> IoResult<usize>,
    ) -> Result<usize, Fault> {
        loop {
            match read(&mut self.input) {
                Ok(0) => return Err(Fault::Truncated { at: self.offset, missing: missing as u64 }),
                Ok(got) => {
                    self.offset += got as u64;
                    return Ok(got);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Fault::Io(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_for_what_arrives_and_not_for_what_is_announced() {
        for arrives in [0, 1, STEP - 1, STEP, STEP + 1, 5 * STEP + 7] {
            let mut buffer = Vec::new();
            let mut source = Source::new(std::io::repeat(1).take(arrives as u64));
            let fault = source.append(&mut buffer, 128 << 20).unwrap_err();
            assert!(matches!(fault, Fault::Truncated { at, .. } if at == arrives as u64), "{fault}");
            assert!(buffer.capacity() <= 2 * (arrives + STEP), "{arrives}: {}", buffer.capacity());
        }
    }

    #[test]
    fn a_failing_input_is_reported_as_it_failed() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> IoResult<usize> {
                Err(ErrorKind::ConnectionReset.into())
            }
        }
        let fault = Source::new(Failing).skip(1).unwrap_err();
        assert!(matches!(fault, Fault::Io(error) if error.kind() == ErrorKind::ConnectionReset));
    }
}
