//! Attach requests as descriptor chains.

use anyhow::Result;
use ringpass_guest_abi::request::{ErrorCode, NO_FIELD, Outcome};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    blk::{HEADER_BYTES, NO_STATUS, header},
    descriptor::Descriptor,
    ram::Arena,
    vring::DriverVring,
};

/// Room of one request: its header and the longest payload, its answer, its status.
const PLACE_BYTES: u64 = 0x3000;
const ANSWER_OFFSET: u64 = 0x2000;
/// Room for an answer.
pub(super) const ANSWER_BYTES: usize = 0x100;
/// The answer's bytes before the device writes them.
const NO_ANSWER: u8 = 0xff;
const STATUS_OFFSET: u64 = 0x2800;

/// The device's answer to a request that has an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// `ErrorCode` as a number.
    pub code: u32,
    /// Offset of the field of the payload that is wrong.
    pub field_offset_bytes: u32,
    /// The status byte.
    pub status: u8,
}

/// An outcome that names no field.
pub fn whole(code: ErrorCode) -> Found {
    Found { code: code as u32, field_offset_bytes: NO_FIELD, status: u8::from(!code.is_ok()) }
}

/// Success.
pub fn ok() -> Found {
    whole(ErrorCode::None)
}

/// Places for the attach requests of one queue.
#[derive(Debug, Clone, Copy)]
pub struct RequestPlaces {
    gpa: u64,
}

impl RequestPlaces {
    /// Takes the RAM of so many places from an arena.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn take(arena: &mut Arena, places: u64) -> Result<Self> {
        Ok(Self { gpa: arena.take(places * PLACE_BYTES, 0x1000)? })
    }

    /// Makes a request available in a place, and kicks. Returns its head.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send(&self, vring: &mut DriverVring, place: u64, kind: u32, payload: &[u8]) -> Result<u16> {
        let at = self.at(place);
        let memory = vring.ram().memory();
        memory.write_slice(&header(kind, 0), GuestAddress(at))?;
        memory.write_slice(payload, GuestAddress(at + u64::from(HEADER_BYTES)))?;
        memory.write_slice(&[NO_ANSWER; ANSWER_BYTES], GuestAddress(at + ANSWER_OFFSET))?;
        let request = Descriptor::readable(at, HEADER_BYTES + u32::try_from(payload.len())?);
        let answer = Descriptor::writable(at + ANSWER_OFFSET, u32::try_from(ANSWER_BYTES)?);
        send_chain(vring, at, request, answer)
    }

    /// The same for a request of virtio-blk.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send_block(
        &self,
        vring: &mut DriverVring,
        place: u64,
        kind: u32,
        sector: u64,
        data: Descriptor,
    ) -> Result<u16> {
        let at = self.at(place);
        vring.ram().memory().write_slice(&header(kind, sector), GuestAddress(at))?;
        send_chain(vring, at, Descriptor::readable(at, HEADER_BYTES), data)
    }

    /// The answer in a place, and its status.
    ///
    /// # Errors
    ///
    /// The place is not in RAM.
    pub fn answer(&self, vring: &DriverVring, place: u64) -> Result<([u8; ANSWER_BYTES], u8)> {
        let at = self.at(place);
        let mut answer = [0; ANSWER_BYTES];
        vring.ram().memory().read_slice(&mut answer, GuestAddress(at + ANSWER_OFFSET))?;
        Ok((answer, vring.ram().memory().read_obj(GuestAddress(at + STATUS_OFFSET))?))
    }

    /// Whether the device has written nothing to the answer and the status of a place.
    ///
    /// # Errors
    ///
    /// The place is not in RAM.
    pub fn is_untouched(&self, vring: &DriverVring, place: u64) -> Result<bool> {
        let (answer, status) = self.answer(vring, place)?;
        Ok(answer == [NO_ANSWER; ANSWER_BYTES] && status == NO_STATUS)
    }

    /// The outcome in a place.
    ///
    /// # Errors
    ///
    /// The place is not in RAM.
    pub fn outcome(&self, vring: &DriverVring, place: u64) -> Result<Found> {
        let (answer, status) = self.answer(vring, place)?;
        let mut bytes = [0; Outcome::BYTES];
        bytes.copy_from_slice(&answer[..Outcome::BYTES]);
        let outcome = Outcome::from_bytes(&bytes);
        Ok(Found { code: outcome.error.get(), field_offset_bytes: outcome.field_offset_bytes.get(), status })
    }

    fn at(&self, place: u64) -> u64 {
        self.gpa + place * PLACE_BYTES
    }
}

/// Makes a request available whose status is in the place at `at`, and kicks. Returns its head.
fn send_chain(vring: &mut DriverVring, at: u64, request: Descriptor, data: Descriptor) -> Result<u16> {
    let status_gpa = at + STATUS_OFFSET;
    vring.ram().memory().write_obj(NO_STATUS, GuestAddress(status_gpa))?;
    let head = vring.add(&[request, data, Descriptor::writable(status_gpa, 1)])?;
    vring.publish_quietly()?;
    vring.kick()?;
    Ok(head)
}
