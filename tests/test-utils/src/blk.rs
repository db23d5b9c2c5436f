//! A virtio-blk driver (VIRTIO 1.2, 5.2) that does one request after the other.

use std::time::Duration;

use anyhow::{Result, ensure};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    descriptor::Descriptor,
    ram::Arena,
    vring::{DriverVring, Used},
};

/// Length of a request's header.
pub const HEADER_BYTES: u32 = 16;
/// Length of a sector, in which requests count.
pub const SECTOR_BYTES: u64 = 512;
/// The value of a status byte before the device writes it. No status has this value.
pub const NO_STATUS: u8 = 0xee;
/// How long one request may take: much longer than it takes on a busy machine.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A request's header (VIRTIO 1.2, 5.2.6).
pub fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES as usize] {
    let mut bytes = [0; HEADER_BYTES as usize];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A range of discard or write zeroes (`virtio_blk_discard_write_zeroes`).
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// The device's answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The status byte.
    pub status: u8,
    /// How many bytes the device says that it wrote.
    pub len_bytes: u32,
}

/// A driver with buffers for one request.
#[derive(Debug)]
pub struct BlkDriver {
    vring: DriverVring,
    header_gpa: u64,
    status_gpa: u64,
    data_gpa: u64,
    data_bytes: u32,
}

impl BlkDriver {
    /// A driver whose requests have up to `data_bytes` of data. It takes its buffers from `arena`.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn new(vring: DriverVring, arena: &mut Arena, data_bytes: u32) -> Result<Self> {
        Ok(Self {
            vring,
            header_gpa: arena.take(HEADER_BYTES.into(), 16)?,
            status_gpa: arena.take(1, 1)?,
            data_gpa: arena.take(data_bytes.into(), 4096)?,
            data_bytes,
        })
    }

    /// The vring.
    pub fn vring(&mut self) -> &mut DriverVring {
        &mut self.vring
    }

    /// Where the data of a request is.
    pub fn data_gpa(&self) -> u64 {
        self.data_gpa
    }

    /// Where the header of a request is.
    pub fn header_gpa(&self) -> u64 {
        self.header_gpa
    }

    /// Where the status of a request is.
    pub fn status_gpa(&self) -> u64 {
        self.status_gpa
    }

    /// Writes a header into RAM, and returns its descriptor.
    ///
    /// # Errors
    ///
    /// The driver's buffers are not in RAM.
    pub fn put_header(&self, kind: u32, sector: u64) -> Result<Descriptor> {
        self.vring.ram().memory().write_slice(&header(kind, sector), GuestAddress(self.header_gpa))?;
        Ok(Descriptor::readable(self.header_gpa, HEADER_BYTES))
    }

    /// Resets the status byte, and returns its descriptor.
    ///
    /// # Errors
    ///
    /// The driver's buffers are not in RAM.
    pub fn put_status(&self) -> Result<Descriptor> {
        self.vring.ram().memory().write_obj(NO_STATUS, GuestAddress(self.status_gpa))?;
        Ok(Descriptor::writable(self.status_gpa, 1))
    }

    /// The status byte as it is in RAM.
    ///
    /// # Errors
    ///
    /// The driver's buffers are not in RAM.
    pub fn status(&self) -> Result<u8> {
        Ok(self.vring.ram().memory().read_obj(GuestAddress(self.status_gpa))?)
    }

    /// Sends any chain unchanged, and waits until the device has used it.
    ///
    /// # Errors
    ///
    /// The device does not use it in time.
    pub fn send(&mut self, chain: &[Descriptor]) -> Result<Used> {
        self.vring.add(chain)?;
        self.vring.publish()?;
        self.vring.next_used_by_call(REQUEST_TIMEOUT)
    }

    /// Sends a request with these data descriptors between its header and its status, and waits for the answer.
    ///
    /// # Errors
    ///
    /// The device does not answer in time.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Descriptor]) -> Result<Answer> {
        let mut chain = vec![self.put_header(kind, sector)?];
        chain.extend_from_slice(data);
        chain.push(self.put_status()?);
        let used = self.send(&chain)?;
        Ok(Answer { status: self.status()?, len_bytes: used.len_bytes })
    }

    /// Reads `len_bytes` from `sector` on. Any answer is a result.
    ///
    /// # Errors
    ///
    /// The device does not answer in time.
    pub fn try_read(&mut self, sector: u64, len_bytes: u32) -> Result<Answer> {
        ensure!(len_bytes <= self.data_bytes, "the driver's buffer has {} bytes", self.data_bytes);
        self.request(VIRTIO_BLK_T_IN, sector, &[Descriptor::writable(self.data_gpa, len_bytes)])
    }

    /// Reads `len_bytes` from `sector` on.
    ///
    /// # Errors
    ///
    /// The device does not answer with success and that many bytes.
    pub fn read(&mut self, sector: u64, len_bytes: u32) -> Result<Vec<u8>> {
        let answer = self.try_read(sector, len_bytes)?;
        ensure!(answer == Answer { status: 0, len_bytes: len_bytes + 1 }, "reading at {sector}: {answer:?}");
        self.data(len_bytes)
    }

    /// The content of the buffer.
    ///
    /// # Errors
    ///
    /// The driver's buffers are not in RAM.
    pub fn data(&self, len_bytes: u32) -> Result<Vec<u8>> {
        let mut data = vec![0; len_bytes as usize];
        self.vring.ram().memory().read_slice(&mut data, GuestAddress(self.data_gpa))?;
        Ok(data)
    }

    /// Writes data from `sector` on. Any answer is a result.
    ///
    /// # Errors
    ///
    /// The device does not answer in time.
    pub fn try_write(&mut self, sector: u64, data: &[u8]) -> Result<Answer> {
        let descriptor = self.put_data(data)?;
        self.request(VIRTIO_BLK_T_OUT, sector, &[descriptor])
    }

    /// Writes data from `sector` on.
    ///
    /// # Errors
    ///
    /// The device does not answer with success.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        let answer = self.try_write(sector, data)?;
        ensure!(answer == Answer { status: 0, len_bytes: 1 }, "writing at {sector}: {answer:?}");
        Ok(())
    }

    /// Writes the content of the buffer from `sector` on.
    ///
    /// # Errors
    ///
    /// The device does not answer with success.
    pub fn write_buffer(&mut self, sector: u64, len_bytes: u32) -> Result<()> {
        let buffer = Descriptor::readable(self.data_gpa, len_bytes);
        succeeded("write", self.request(VIRTIO_BLK_T_OUT, sector, &[buffer])?)
    }

    /// Puts data into the buffer, and returns its descriptor.
    ///
    /// # Errors
    ///
    /// The data is longer than the buffer.
    pub fn put_data(&self, data: &[u8]) -> Result<Descriptor> {
        let len_bytes = u32::try_from(data.len())?;
        ensure!(len_bytes <= self.data_bytes, "the driver's buffer has {} bytes", self.data_bytes);
        self.vring.ram().memory().write_slice(data, GuestAddress(self.data_gpa))?;
        Ok(Descriptor::readable(self.data_gpa, len_bytes))
    }

    /// Flushes the device's write cache.
    ///
    /// # Errors
    ///
    /// The device does not answer with success.
    pub fn flush(&mut self) -> Result<()> {
        succeeded("flush", self.request(VIRTIO_BLK_T_FLUSH, 0, &[])?)
    }

    /// The device's serial number, without the zeroes behind it.
    ///
    /// # Errors
    ///
    /// The device does not answer with success.
    pub fn id(&mut self) -> Result<Vec<u8>> {
        let buffer = Descriptor::writable(self.data_gpa, VIRTIO_BLK_ID_BYTES);
        let answer = self.request(VIRTIO_BLK_T_GET_ID, 0, &[buffer])?;
        ensure!(u32::from(answer.status) == VIRTIO_BLK_S_OK, "get id: {answer:?}");
        let mut id = self.data(VIRTIO_BLK_ID_BYTES)?;
        let end = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
        id.truncate(end);
        Ok(id)
    }

    /// Discards sectors.
    ///
    /// # Errors
    ///
    /// The device does not answer with success.
    pub fn discard(&mut self, sector: u64, sectors: u32) -> Result<()> {
        let data = self.put_data(&range(sector, sectors, 0))?;
        succeeded("discard", self.request(VIRTIO_BLK_T_DISCARD, 0, &[data])?)
    }

    /// Writes zeroes.
    ///
    /// # Errors
    ///
    /// The device does not answer with success.
    pub fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> Result<()> {
        let flags = if unmap { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        let data = self.put_data(&range(sector, sectors, flags))?;
        succeeded("write zeroes", self.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[data])?)
    }
}

fn succeeded(what: &str, answer: Answer) -> Result<()> {
    ensure!(answer == Answer { status: 0, len_bytes: 1 }, "{what}: {answer:?}");
    Ok(())
}
