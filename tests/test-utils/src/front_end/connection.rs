//! The front-end's side of the vhost-user protocol, one method for each message.
//!
//! Source: QEMU's `docs/interop/vhost-user.rst`. Nothing here keeps the messages in an order: the tests do.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserLog, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserSingleMemoryRegion, VhostUserVringAddr,
    VhostUserVringState,
};
use vm_memory::ByteValued;

use super::wire::{Cut, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, Message, Wire};

/// How long the front-end waits for an answer: much longer than it takes on a busy machine.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Bit of `SET_VRING_KICK`, `SET_VRING_CALL` and `SET_VRING_ERR`: the message has no descriptor.
pub const NO_FD: u64 = 1 << 8;

/// A connection to a back-end.
#[derive(Debug)]
pub struct Connection {
    wire: Wire,
    /// Whether `VHOST_USER_PROTOCOL_F_REPLY_ACK` is negotiated: then the back-end acknowledges every message.
    reply_ack: bool,
}

impl Connection {
    /// Connects, and sends nothing yet.
    ///
    /// # Errors
    ///
    /// No process listens at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_until(path, None)
    }

    /// The same, and cuts the connection there.
    ///
    /// # Errors
    ///
    /// No process listens at `path`.
    pub fn open_until(path: &Path, cut: Option<Cut>) -> Result<Self> {
        Ok(Self { wire: Wire::connect(path, ANSWER_TIMEOUT)?.cut_at(cut), reply_ack: false })
    }

    /// The messages as bytes.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Whether the back-end acknowledges messages that have no answer of their own, as [`set_protocol_features`]
    /// negotiated.
    ///
    /// [`set_protocol_features`]: Self::set_protocol_features
    pub fn has_reply_ack(&self) -> bool {
        self.reply_ack
    }

    /// Sends a message that has an answer of its own, and returns the answer.
    ///
    /// # Errors
    ///
    /// The back-end does not answer, or answers another request.
    pub fn ask(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        self.exchange(request, FLAG_VERSION, body, fds).with_context(|| format!("{request:?}"))
    }

    /// Sends a message that has no answer of its own. With REPLY_ACK it waits for the acknowledgement.
    ///
    /// # Errors
    ///
    /// The back-end refuses the message, or does not answer.
    pub fn tell(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        match self.try_tell(request, body, fds)? {
            0 => Ok(()),
            code => bail!("{request:?} was refused with {code}"),
        }
    }

    /// As [`tell`](Self::tell), but returns the code of a refusal. 0 is success.
    ///
    /// # Errors
    ///
    /// The back-end does not answer.
    pub fn try_tell(&self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<u64> {
        if !self.reply_ack {
            self.wire.send(request as u32, FLAG_VERSION, body, fds).with_context(|| format!("{request:?}"))?;
            return Ok(0);
        }
        let answer = self
            .exchange(request, FLAG_VERSION | FLAG_NEED_REPLY, body, fds)
            .with_context(|| format!("{request:?}"))?;
        u64_of(&answer).with_context(|| format!("the acknowledgement of {request:?}"))
    }

    fn exchange(&self, request: FrontendReq, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        self.wire.send(request as u32, flags, body, fds)?;
        let answer = self.wire.receive()?.context("the back-end closed the connection")?;
        ensure!(answer.request == request as u32, "the answer is to request {}", answer.request);
        ensure!(answer.flags == FLAG_VERSION | FLAG_REPLY, "the answer has flags {:#x}", answer.flags);
        Ok(answer)
    }

    /// Asks for a number.
    ///
    /// # Errors
    ///
    /// The back-end does not answer with 8 bytes.
    pub fn ask_u64(&self, request: FrontendReq) -> Result<u64> {
        u64_of(&self.ask(request, &[], &[])?).with_context(|| format!("the answer to {request:?}"))
    }

    /// Sends a number.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn tell_u64(&self, request: FrontendReq, value: u64) -> Result<()> {
        self.tell(request, &value.to_ne_bytes(), &[])
    }

    /// `GET_FEATURES`: the virtio features, with `VHOST_USER_F_PROTOCOL_FEATURES` and `VHOST_F_LOG_ALL`.
    ///
    /// # Errors
    ///
    /// As [`ask_u64`](Self::ask_u64).
    pub fn features(&self) -> Result<u64> {
        self.ask_u64(FrontendReq::GET_FEATURES)
    }

    /// `SET_FEATURES`.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_features(&self, features: u64) -> Result<()> {
        self.tell_u64(FrontendReq::SET_FEATURES, features)
    }

    /// `GET_PROTOCOL_FEATURES`.
    ///
    /// # Errors
    ///
    /// As [`ask_u64`](Self::ask_u64), or a feature that no specification has.
    pub fn protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        let bits = self.ask_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
        VhostUserProtocolFeatures::from_bits(bits).with_context(|| format!("unknown protocol features in {bits:#x}"))
    }

    /// `SET_PROTOCOL_FEATURES`. The back-end acknowledges messages from now on if REPLY_ACK is among the features.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_protocol_features(&mut self, features: VhostUserProtocolFeatures) -> Result<()> {
        self.tell_u64(FrontendReq::SET_PROTOCOL_FEATURES, features.bits())?;
        self.reply_ack = features.contains(VhostUserProtocolFeatures::REPLY_ACK);
        Ok(())
    }

    /// `SET_OWNER`.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_owner(&self) -> Result<()> {
        self.tell(FrontendReq::SET_OWNER, &[], &[])
    }

    /// `GET_CONFIG`: `size_bytes` of the configuration space from its beginning.
    ///
    /// # Errors
    ///
    /// The back-end does not answer, or answers with another size: an empty answer is a refusal.
    pub fn config(&self, size_bytes: u32) -> Result<Vec<u8>> {
        let header = VhostUserConfig::new(0, size_bytes, VhostUserConfigFlags::empty());
        let body = [header.as_slice(), &vec![0; size_bytes as usize]].concat();
        let answer = self.ask(FrontendReq::GET_CONFIG, &body, &[])?;
        ensure!(answer.body.len() == body.len(), "GET_CONFIG is answered with {} bytes", answer.body.len());
        Ok(answer.body[size_of::<VhostUserConfig>()..].to_vec())
    }

    /// `SET_CONFIG`: a write of the driver.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_config(&self, offset_bytes: u32, bytes: &[u8]) -> Result<()> {
        let size_bytes = u32::try_from(bytes.len())?;
        let header = VhostUserConfig::new(offset_bytes, size_bytes, VhostUserConfigFlags::WRITABLE);
        self.tell(FrontendReq::SET_CONFIG, &[header.as_slice(), bytes].concat(), &[])
    }

    /// `SET_MEM_TABLE`: all regions at once.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_mem_table(&self, regions: &[(VhostUserMemoryRegion, &File)]) -> Result<()> {
        let mut body = VhostUserMemory::new(u32::try_from(regions.len())?).as_slice().to_vec();
        for (region, _file) in regions {
            body.extend_from_slice(region.as_slice());
        }
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|(_region, file)| file.as_fd()).collect();
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    /// `ADD_MEM_REG`: adds one region.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn add_mem_reg(&self, region: &VhostUserMemoryRegion, file: &File) -> Result<()> {
        self.tell(FrontendReq::ADD_MEM_REG, single(region).as_slice(), &[file.as_fd()])
    }

    /// `REM_MEM_REG`: removes one region. QEMU sends a descriptor with it, which the back-end closes without using it.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn rem_mem_reg(&self, region: &VhostUserMemoryRegion, file: Option<&File>) -> Result<()> {
        let fds: Vec<BorrowedFd<'_>> = file.iter().map(|file| file.as_fd()).collect();
        self.tell(FrontendReq::REM_MEM_REG, single(region).as_slice(), &fds)
    }

    /// A message about a vring with one number: `SET_VRING_NUM`, `SET_VRING_BASE`, `SET_VRING_ENABLE`.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_vring(&self, request: FrontendReq, index: u16, number: u32) -> Result<()> {
        self.tell(request, VhostUserVringState::new(index.into(), number).as_slice(), &[])
    }

    /// `SET_VRING_ADDR`.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_vring_addr(&self, addresses: &VhostUserVringAddr) -> Result<()> {
        self.tell(FrontendReq::SET_VRING_ADDR, addresses.as_slice(), &[])
    }

    /// `GET_VRING_BASE`: stops the vring, and returns the index of the next available entry.
    ///
    /// # Errors
    ///
    /// The back-end does not answer, or answers for another vring.
    pub fn vring_base(&self, index: u16) -> Result<u16> {
        let body = VhostUserVringState::new(index.into(), 0);
        let answer = self.ask(FrontendReq::GET_VRING_BASE, body.as_slice(), &[])?;
        let state: VhostUserVringState = object(&answer).context("the answer to GET_VRING_BASE")?;
        let (answered, base) = (state.index, state.num);
        ensure!(answered == u32::from(index), "GET_VRING_BASE of {index} is answered for {answered}");
        Ok(u16::try_from(base)?)
    }

    /// A message that gives a vring a file descriptor, or takes it away: `SET_VRING_KICK`, `SET_VRING_CALL`,
    /// `SET_VRING_ERR`.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_vring_fd(&self, request: FrontendReq, index: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let flag = if fd.is_none() { NO_FD } else { 0 };
        let body = (u64::from(index) | flag).to_ne_bytes();
        self.tell(request, &body, fd.as_slice())
    }

    /// `GET_INFLIGHT_FD`: a new region for requests in flight, and its file.
    ///
    /// # Errors
    ///
    /// The back-end does not answer with one descriptor.
    pub fn inflight_fd(&self, queues: u16, queue_size: u16) -> Result<(VhostUserInflight, OwnedFd)> {
        let body = VhostUserInflight::new(0, 0, queues, queue_size);
        let mut answer = self.ask(FrontendReq::GET_INFLIGHT_FD, body.as_slice(), &[])?;
        let region = object(&answer).context("the answer to GET_INFLIGHT_FD")?;
        let fd = answer.fds.pop().context("GET_INFLIGHT_FD is answered without a descriptor")?;
        ensure!(answer.fds.is_empty(), "GET_INFLIGHT_FD is answered with several descriptors");
        Ok((region, fd))
    }

    /// `SET_INFLIGHT_FD`: returns the region.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_inflight_fd(&self, region: &VhostUserInflight, fd: BorrowedFd<'_>) -> Result<()> {
        self.tell(FrontendReq::SET_INFLIGHT_FD, region.as_slice(), &[fd])
    }

    /// `SET_LOG_BASE`: where the back-end marks pages that it writes. Has an answer of its own, with `LOG_SHMFD`.
    ///
    /// # Errors
    ///
    /// The back-end does not answer.
    pub fn set_log_base(&self, log: &VhostUserLog, file: &File) -> Result<()> {
        self.ask(FrontendReq::SET_LOG_BASE, log.as_slice(), &[file.as_fd()]).map(drop)
    }

    /// `SET_BACKEND_REQ_FD`: the socket on which the back-end sends requests.
    ///
    /// # Errors
    ///
    /// As [`tell`](Self::tell).
    pub fn set_backend_req_fd(&self, socket: BorrowedFd<'_>) -> Result<()> {
        self.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[socket])
    }
}

fn single(region: &VhostUserMemoryRegion) -> VhostUserSingleMemoryRegion {
    VhostUserSingleMemoryRegion::new(region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset)
}

/// The number that is the whole body of a message.
///
/// # Errors
///
/// The body is not 8 bytes.
pub fn u64_of(message: &Message) -> Result<u64> {
    object(message)
}

fn object<T: ByteValued>(message: &Message) -> Result<T> {
    let mut object = T::zeroed();
    ensure!(message.body.len() == size_of::<T>(), "a body of {} bytes", message.body.len());
    object.as_mut_slice().copy_from_slice(&message.body);
    Ok(object)
}
