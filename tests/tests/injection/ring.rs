//! An io_uring that injected code makes, in pages of the process.

use anyhow::{Context, Result, ensure};
use nix::libc;
use rustix::io::Errno;

use crate::tracee::{Answer, Tracee};

/// `IORING_SETUP_NO_MMAP`, `IORING_SETUP_NO_SQARRAY`, `IORING_ENTER_GETEVENTS` (`<linux/io_uring.h>`).
const NO_MMAP: u32 = 1 << 14;
const NO_SQARRAY: u32 = 1 << 16;
const GETEVENTS: u64 = 1;
const PAGE_BYTES: u64 = 4096;
/// Places in `struct io_uring_params`.
const PARAMS_BYTES: usize = 120;
const FLAGS: usize = 8;
const SQ_OFF: usize = 40;
const CQ_OFF: usize = 80;
const USER_ADDR: usize = 32;

/// What an SQE says (`struct io_uring_sqe`); the rest is zero.
#[derive(Clone, Copy, Default)]
pub(crate) struct Entry {
    pub(crate) opcode: u8,
    pub(crate) fd: i32,
    pub(crate) off: u64,
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) op_flags: u32,
    pub(crate) addr3: u64,
}

pub(crate) struct Ring<'t> {
    tracee: &'t Tracee,
    fd: u64,
    sqes: u64,
    rings: u64,
    params: [u8; PARAMS_BYTES],
}

impl<'t> Ring<'t> {
    /// One entry, without restrictions.
    pub(crate) fn new(tracee: &'t Tracee) -> Result<Self> {
        let pages = tracee.map(3)?;
        let (sqes, rings, at) = (pages, pages + PAGE_BYTES, pages + 2 * PAGE_BYTES);
        let mut params = [0; PARAMS_BYTES];
        params[FLAGS..FLAGS + 4].copy_from_slice(&(NO_MMAP | NO_SQARRAY).to_le_bytes());
        params[SQ_OFF + USER_ADDR..SQ_OFF + USER_ADDR + 8].copy_from_slice(&sqes.to_le_bytes());
        params[CQ_OFF + USER_ADDR..CQ_OFF + USER_ADDR + 8].copy_from_slice(&rings.to_le_bytes());
        tracee.write(at, &params)?;
        let fd = tracee.call(libc::SYS_io_uring_setup, &[1, at])?.context("io_uring_setup")?;
        Ok(Self { tracee, fd, sqes, rings, params: tracee.read(at)? })
    }

    /// The address of the word whose offset is in this place of the parameters.
    fn word(&self, place: usize) -> u64 {
        let bytes = &self.params[place..place + 4];
        self.rings + u64::from(u32::from_le_bytes(bytes.try_into().unwrap_or_default()))
    }

    /// Has the kernel execute an entry.
    pub(crate) fn execute(&self, entry: Entry) -> Result<Answer> {
        let mut sqe = [0; 64];
        sqe[0] = entry.opcode;
        sqe[4..8].copy_from_slice(&entry.fd.to_le_bytes());
        sqe[8..16].copy_from_slice(&entry.off.to_le_bytes());
        sqe[16..24].copy_from_slice(&entry.addr.to_le_bytes());
        sqe[24..28].copy_from_slice(&entry.len.to_le_bytes());
        sqe[28..32].copy_from_slice(&entry.op_flags.to_le_bytes());
        sqe[48..56].copy_from_slice(&entry.addr3.to_le_bytes());
        self.tracee.write(self.sqes, &sqe)?;
        let (sq_tail, cq_head, cq_tail) = (self.word(SQ_OFF + 4), self.word(CQ_OFF), self.word(CQ_OFF + 4));
        let tail = self.tracee.read_u32(sq_tail)?;
        self.tracee.write(sq_tail, &(tail + 1).to_le_bytes())?;
        let head = self.tracee.read_u32(cq_head)?;
        let mut to_submit = 1;
        while self.tracee.read_u32(cq_tail)? == head {
            match self.tracee.call(libc::SYS_io_uring_enter, &[self.fd, to_submit, 1, GETEVENTS, 0, 0])? {
                Ok(submitted) => to_submit -= submitted,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).context("io_uring_enter"),
            }
        }
        // The CQ has two entries of 16 bytes.
        let cqe: [u8; 16] = self.tracee.read(self.word(CQ_OFF + 20) + 16 * u64::from(head % 2))?;
        self.tracee.write(cq_head, &(head + 1).to_le_bytes())?;
        let result = i32::from_le_bytes([cqe[8], cqe[9], cqe[10], cqe[11]]);
        ensure!(result > -4096, "a result of {result}");
        Ok(u64::try_from(result).map_err(|_| Errno::from_raw_os_error(-result)))
    }
}
