//! Operations on files that are not in the ring's table: descriptors, paths, attributes, pipes.

use super::*;

impl Lab {
    pub(super) fn descriptors(&mut self, operation: Operation) -> Result<Reach> {
        let (_, path) = self.path("new")?;
        let path = path.as_ptr().addr() as u64;
        let create = (nix::libc::O_CREAT | nix::libc::O_RDWR) as u32;
        match operation {
            Operation::OPENAT => {
                let open = Sqe { fd: AT_FDCWD, len: 0o600, rw_flags: create, ..self.sqe() };
                let reads = self.reads(path, |_, addr| Sqe { addr, ..open })?;
                let opened = self.succeed(Sqe { addr: path, ..open })?;
                ensure!(own(opened)?.is_some(), "no new descriptor");
                Ok(Reach::OTHER_FILES | reads)
            }
            Operation::OPENAT2 => {
                let how = [u64::from(create), 0o600, 0];
                let how = how.as_ptr().addr() as u64;
                let reads = self.reads(how, |sqe, off| Sqe { fd: AT_FDCWD, addr: path, len: 24, off, ..sqe })?;
                let opened = self.succeed(Sqe { fd: AT_FDCWD, addr: path, len: 24, off: how, ..self.sqe() })?;
                ensure!(own(opened)?.is_some(), "no new descriptor");
                Ok(Reach::OTHER_FILES | reads)
            }
            Operation::CLOSE => {
                let victim = self.secret.try_clone()?;
                let fd = std::os::fd::IntoRawFd::into_raw_fd(victim);
                self.succeed(Sqe { fd, ..self.sqe() })?;
                ensure!(!is_open(fd), "the descriptor is still there");
                Ok(Reach::OTHER_FILES)
            }
            Operation::FILES_UPDATE => {
                let other = tempfile::tempfile()?;
                let fds = [other.as_raw_fd()];
                let fds = fds.as_ptr().addr() as u64;
                let reads = self.reads(fds, |sqe, addr| Sqe { addr, len: 1, off: 1, ..sqe })?;
                ensure!(self.succeed(Sqe { addr: fds, len: 1, off: 1, ..self.sqe() })? == 1);
                Ok(Reach::OTHER_FILES | reads)
            }
            Operation::FIXED_FD_INSTALL => {
                let installed = self.succeed(Sqe { flags: 1, fd: SLOT_SECRET, ..self.sqe() })?;
                ensure!(own(installed)?.is_some(), "no new descriptor");
                Ok(Reach::OTHER_FILES)
            }
            _ => {
                let mut fds = [-1i32; 2];
                self.succeed(Sqe { addr: fds.as_mut_ptr().addr() as u64, ..self.sqe() })?;
                let [reader, writer] = std::hint::black_box(fds);
                ensure!(own(reader)?.is_some() && own(writer)?.is_some(), "no new descriptors: {reader} {writer}");
                Ok(Reach::OTHER_FILES | Reach::WRITES_MEMORY)
            }
        }
    }

    pub(super) fn paths(&mut self, operation: Operation) -> Result<Reach> {
        let (from, from_text) = self.path("secret")?;
        let (to, to_text) = self.path("new")?;
        let (from_at, to_at) = (from_text.as_ptr().addr() as u64, to_text.as_ptr().addr() as u64);
        let at = Sqe { fd: AT_FDCWD, ..self.sqe() };
        let shown = match operation {
            Operation::STATX => {
                let mut buffer = [0u8; 256];
                let statx = Sqe { off: buffer.as_mut_ptr().addr() as u64, len: 0x7ff, ..at };
                let reads = self.reads(from_at, |_, addr| Sqe { addr, ..statx })?;
                ensure!(std::hint::black_box(buffer).iter().any(|&byte| byte != 0), "nothing was written");
                return Ok(Reach::OTHER_FILES | Reach::WRITES_MEMORY | reads);
            }
            Operation::RENAMEAT | Operation::LINKAT => {
                self.reads(from_at, |_, addr| Sqe { addr, off: to_at, len: AT_FDCWD_WORD, ..at })?
            }
            Operation::UNLINKAT => {
                let reads = self.reads(from_at, |_, addr| Sqe { addr, ..at })?;
                ensure!(!from.exists(), "the file is still there");
                return Ok(Reach::OTHER_FILES | reads);
            }
            Operation::MKDIRAT => self.reads(to_at, |_, addr| Sqe { addr, len: 0o700, ..at })?,
            _ => self.reads(from_at, |_, addr| Sqe { addr, off: to_at, ..at })?,
        };
        ensure!(fs::symlink_metadata(&to).is_ok(), "the operation made no file");
        Ok(Reach::OTHER_FILES | shown)
    }

    pub(super) fn attributes(&mut self, operation: Operation) -> Result<Reach> {
        let (_, path) = self.path("secret")?;
        let by_path = matches!(operation, Operation::SETXATTR | Operation::GETXATTR);
        let sets = matches!(operation, Operation::SETXATTR | Operation::FSETXATTR);
        let name = c"user.ringpass".as_ptr().addr() as u64;
        let mut value = [7u8; 16];
        let target = if by_path {
            Sqe { addr3: path.as_ptr().addr() as u64, ..self.sqe() }
        } else {
            Sqe { fd: self.secret.as_raw_fd(), ..self.sqe() }
        };
        if !sets {
            rustix::fs::fsetxattr(&self.secret, "user.ringpass", &[9; 16], rustix::fs::XattrFlags::empty())
                .context("the temporary directory's file system has no attributes")?;
        }
        let request = Sqe { off: value.as_mut_ptr().addr() as u64, len: 16, ..target };
        let mut shown = self.reads(name, |_, addr| Sqe { addr, ..request })?;
        let mut read = [0; 16];
        if sets {
            rustix::fs::fgetxattr(&self.secret, "user.ringpass", &mut read)?;
            ensure!(read == [7; 16], "the attribute is {read:?}");
        } else {
            ensure!(std::hint::black_box(value) == [9; 16], "the memory is {value:?}");
            shown |= Reach::WRITES_MEMORY;
        }
        Ok(shown | if by_path { Reach::OTHER_FILES } else { Reach::empty() })
    }

    /// Shows that splice moves data of a descriptor that is in no table, although the SQE has `IOSQE_FIXED_FILE`.
    pub(super) fn splice(&mut self, operation: Operation) -> Result<Reach> {
        let (mut out_reader, out_writer) = pipe()?;
        let (in_reader, mut in_writer) = pipe()?;
        in_writer.write_all(SECRET)?;
        let from = in_reader.as_raw_fd();
        // `fd` is a descriptor here, because the ring's table was filled before. The other descriptor matters.
        let nowhere = if operation == Operation::SPLICE { u64::MAX } else { 0 };
        let request = Sqe {
            fd: out_writer.as_raw_fd(),
            file_index: from as u32,
            off: nowhere,
            addr: nowhere,
            len: 16,
            ..self.sqe()
        };
        ensure!(self.succeed(request)? == 16);
        let mut moved = [0; 16];
        out_reader.read_exact(&mut moved)?;
        ensure!(&moved == SECRET);
        // With the flag, `fd` is a slot, but the source is still a descriptor: an open one and a closed one give
        // different results.
        let fixed = Sqe { flags: 1, fd: SLOT_SECRET, ..request };
        let closed = self.run(Sqe { file_index: 100_000, ..fixed })?;
        in_writer.write_all(SECRET)?;
        let open = self.run(fixed)?;
        ensure!(closed == -9 && open != -9, "{closed} and {open}");
        Ok(Reach::OTHER_FILES)
    }
}
