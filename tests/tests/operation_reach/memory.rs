//! Reads and writes: at addresses of the owner, in registered buffers, and in provided buffers.

use super::*;

impl Lab {
    pub(super) fn plain(&mut self, operation: Operation) -> Result<Reach> {
        let is_read = matches!(operation, Operation::READ | Operation::READV);
        let mut memory = if is_read { *b"its own memory.." } else { *b"the owner's own!" };
        let iovec = [memory.as_mut_ptr().addr() as u64, memory.len() as u64];
        let is_vectored = matches!(operation, Operation::READV | Operation::WRITEV);
        let (addr, len) = if is_vectored { (iovec.as_ptr().addr() as u64, 1) } else { (iovec[0], 16) };
        let transfer = Sqe { fd: self.secret.as_raw_fd(), addr, len, ..self.sqe() };
        let mut shown = if is_read { Reach::WRITES_MEMORY } else { Reach::READS_MEMORY };
        if is_vectored {
            shown |= self.reads(addr, |_, addr| Sqe { addr, ..transfer })?;
        }
        self.succeed(transfer)?;
        let mut on_disk = [0; 16];
        self.secret.read_exact_at(&mut on_disk, 0)?;
        let same = std::hint::black_box(memory) == on_disk;
        ensure!(same, "nothing was transferred");
        Ok(shown)
    }

    fn register_buffer(&self, memory: &mut memmap2::MmapMut) -> Result<u64> {
        let address = memory.as_mut_ptr();
        let buffer = nix::libc::iovec { iov_base: address.cast(), iov_len: memory.len() };
        // SAFETY: the mapping outlives the ring's requests: every demonstration waits for its CQEs.
        unsafe { self.ring.submitter().register_buffers(&[buffer]) }?;
        Ok(address.addr() as u64)
    }

    /// Shows that fixed reads and writes work inside their buffer, and fail with -EFAULT one byte beyond it.
    pub(super) fn fixed(&mut self) -> Result<Reach> {
        let mut memory = memmap2::MmapMut::map_anon(8192)?;
        let address = self.register_buffer(&mut memory)?;
        let transfer = Sqe { flags: 1, fd: SLOT_SECRET, addr: address, len: 16, ..self.sqe() };
        ensure!(self.succeed(transfer)? == 16);
        for beyond in [
            address - 1,
            address + 8192 - 15,
            UNMAPPED,
            self.directory.path().as_os_str().as_bytes().as_ptr().addr() as u64,
        ] {
            let result = self.run(Sqe { addr: beyond, ..transfer })?;
            ensure!(result == -EFAULT, "{beyond:#x} gave {result}");
        }
        Ok(Reach::empty())
    }

    pub(super) fn fixed_vectors(&mut self, _: Operation) -> Result<Reach> {
        let mut memory = memmap2::MmapMut::map_anon(8192)?;
        let address = self.register_buffer(&mut memory)?;
        let iovec = [address, 16];
        let transfer = Sqe { flags: 1, fd: SLOT_SECRET, len: 1, ..self.sqe() };
        self.reads(iovec.as_ptr().addr() as u64, |_, addr| Sqe { addr, ..transfer })
    }

    pub(super) fn provided(&mut self, operation: Operation) -> Result<Reach> {
        let mut memory = [0u8; 16];
        let provide = Sqe {
            opcode: Operation::PROVIDE_BUFFERS.code(),
            fd: 1,
            addr: memory.as_mut_ptr().addr() as u64,
            len: 16,
            buf_index: 1,
            ..Sqe::default()
        };
        self.succeed(provide)?;
        let (reader, mut writer) = pipe()?;
        writer.write_all(SECRET)?;
        let flags = SqeFlags::BUFFER_SELECT.bits();
        let read = match operation {
            Operation::PROVIDE_BUFFERS => Sqe {
                opcode: Operation::READ.code(),
                flags,
                fd: reader.as_raw_fd(),
                len: 16,
                buf_index: 1,
                ..Sqe::default()
            },
            _ => Sqe { flags, fd: reader.as_raw_fd(), buf_index: 1, off: u64::MAX, ..self.sqe() },
        };
        ensure!(self.succeed(read)? == 16);
        ensure!(&std::hint::black_box(memory) == SECRET, "the memory is {memory:?}");
        if operation == Operation::READ_MULTISHOT {
            let (empty, _writer) = pipe()?;
            self.succeed(provide)?;
            return Ok(Reach::WRITES_MEMORY | self.waits(Sqe { fd: empty.as_raw_fd(), ..read })?);
        }
        // The kernel allocates a structure for each buffer. One SQE makes 32 000 of them, and there are as many groups
        // as numbers.
        for group in 2..18 {
            self.succeed(Sqe { fd: 32_000, len: 1, buf_index: group, addr: 1 << 20, ..provide })?;
        }
        Ok(Reach::WRITES_MEMORY | Reach::UNBOUNDED_MEMORY)
    }
}
