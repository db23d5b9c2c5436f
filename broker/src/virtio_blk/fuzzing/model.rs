//! A reference model of a chain's meaning. Unlike the parser, it flattens everything to single bytes first.

use std::collections::HashSet;

use ringpass_guest_abi::request::RequestType;
use vm_memory::GuestAddress;

use super::scene::{Scene, TABLE_ENTRIES};
use crate::virtio_blk::{AttachRequest, ByteRange, Operation, Request, RequestLimits, Status};

/// Longer than any buffer in the scene's memory.
const LONGEST_IN_MEMORY_BYTES: u64 = 0x1_0000;

/// The result that the parser must give. Data is the guest-physical and the host address of each byte.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Request { request: Request, data: Vec<(u64, *mut u8)> },
    Answer { status: Status, status_gpa: GuestAddress, used_bytes: u32 },
    AttachRequest { request: AttachRequest, data: Vec<(u64, *mut u8)> },
    Malformed,
}

struct Buffer {
    gpa: u64,
    len_bytes: u64,
    is_writable: bool,
}

pub(super) fn parse(scene: &Scene, head: u16, limits: &RequestLimits, driver_features: u64, room: usize) -> Expected {
    let Some(buffers) = buffers(scene, head) else { return Expected::Malformed };
    let Some(last) = buffers.iter().rfind(|buffer| buffer.is_writable) else { return Expected::Malformed };
    let status_gpa = last.gpa.wrapping_add(last.len_bytes - 1);
    if scene.host_byte(status_gpa).is_none() {
        return Expected::Malformed;
    }
    let total_writable: u64 = buffers.iter().filter(|buffer| buffer.is_writable).map(|buffer| buffer.len_bytes).sum();
    let status_gpa = GuestAddress(status_gpa);
    let writable_bytes = (total_writable - 1).min(u32::MAX.into()) as u32;
    // The device writes nothing but the status, which counts only if it is the first byte.
    let used_bytes = u32::from(total_writable == 1);
    let mut attach_request = None;
    let meaning = parts(scene, &buffers, room).and_then(|parts| match attach_request_type(parts.request_type()) {
        None => meaning(scene, parts, limits, driver_features),
        Some(request_type) => {
            let (payload_bytes, answer_bytes) = (parts.readable.len() as u32, parts.writable.len() as u32);
            let request = AttachRequest { request_type, payload_bytes, answer_bytes, status_gpa };
            attach_request = Some((request, [parts.readable, parts.writable].concat()));
            Ok((None, Vec::new()))
        }
    });
    if let Some((request, data)) = attach_request {
        return Expected::AttachRequest { request, data };
    }
    match meaning {
        Ok((Some(operation), data)) => {
            let data_bytes = data.len() as u32;
            Expected::Request { request: Request { operation, data_bytes, status_gpa, writable_bytes }, data }
        }
        Ok((None, _)) => Expected::Answer { status: Status::Ok, status_gpa, used_bytes },
        Err(status) => Expected::Answer { status, status_gpa, used_bytes },
    }
}

/// The buffers with at least one byte. `None` if the chain breaks the rules of VIRTIO 1.2, 2.7.5.
fn buffers(scene: &Scene, head: u16) -> Option<Vec<Buffer>> {
    let number = |gpa: u64, bytes: u64| -> Option<u64> {
        (0..bytes).rev().try_fold(0, |value, n| Some(value << 8 | u64::from(scene.byte(gpa.checked_add(n)?)?)))
    };
    let (mut table, mut entries, mut index) = (scene.table_gpa().0, u64::from(TABLE_ENTRIES), u64::from(head));
    let mut seen = HashSet::new();
    let mut buffers = Vec::new();
    let mut total_bytes = 0;
    loop {
        if index >= entries || !seen.insert((table, entries, index)) {
            return None;
        }
        let at = table.checked_add(16 * index)?;
        let [gpa, len_bytes, flags, next] =
            [number(at, 8)?, number(at + 8, 4)?, number(at + 12, 2)?, number(at + 14, 2)?];
        if flags & 4 != 0 {
            let in_main_table = (table, entries) == (scene.table_gpa().0, TABLE_ENTRIES.into());
            if !in_main_table || flags & 1 != 0 || len_bytes == 0 || len_bytes % 16 != 0 || len_bytes > 16 * 1024 {
                return None;
            }
            (table, entries, index) = (gpa, len_bytes / 16, 0);
            seen.clear();
            continue;
        }
        total_bytes += len_bytes;
        if total_bytes > 1 << 32 {
            return None;
        }
        if len_bytes > 0 {
            buffers.push(Buffer { gpa, len_bytes, is_writable: flags & 2 != 0 });
        }
        if flags & 1 == 0 {
            return Some(buffers);
        }
        index = next;
    }
}

type Meaning = (Option<Operation>, Vec<(u64, *mut u8)>);

/// The parts of a request: guest-physical and host address of each byte behind the header and before the status.
struct Parts {
    header: [u8; 16],
    readable: Vec<(u64, *mut u8)>,
    writable: Vec<(u64, *mut u8)>,
}

impl Parts {
    fn request_type(&self) -> u32 {
        u32::from_le_bytes(self.header[..4].try_into().expect("4 bytes"))
    }
}

/// The numbers in `docs/abi.md`.
fn attach_request_type(number: u32) -> Option<RequestType> {
    match number {
        0x7270_0000 => Some(RequestType::Probe),
        0x7270_0002 => Some(RequestType::Arm),
        0x7270_0005 => Some(RequestType::Attach),
        0x7270_0006 => Some(RequestType::Event),
        _ => None,
    }
}

fn parts(scene: &Scene, buffers: &[Buffer], room: usize) -> Result<Parts, Status> {
    let is_in_order = buffers.is_sorted_by_key(|buffer| buffer.is_writable);
    let mut readable = Vec::new();
    let mut writable = Vec::new();
    for buffer in buffers {
        if buffer.len_bytes > LONGEST_IN_MEMORY_BYTES {
            return Err(Status::IoError);
        }
        let bytes = if buffer.is_writable { &mut writable } else { &mut readable };
        for n in 0..buffer.len_bytes {
            let gpa = buffer.gpa.checked_add(n).ok_or(Status::IoError)?;
            bytes.push((gpa, scene.host_byte(gpa).ok_or(Status::IoError)?));
        }
    }
    writable.pop();
    if !is_in_order || readable.len() < 16 {
        return Err(Status::IoError);
    }
    let data = readable.split_off(16);
    let header: Vec<u8> = readable.iter().filter_map(|&(gpa, _)| scene.byte(gpa)).collect();
    if runs(data.iter().chain(&writable)) > room {
        return Err(Status::IoError);
    }
    Ok(Parts { header: header.try_into().expect("16 bytes were split off"), readable: data, writable })
}

fn meaning(scene: &Scene, parts: Parts, limits: &RequestLimits, driver_features: u64) -> Result<Meaning, Status> {
    let request_type = parts.request_type();
    let Parts { header, readable: data, mut writable } = parts;
    let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes are left"));
    let length = |data: &Vec<_>| if data.len() % 512 == 0 { Ok(data.len() as u64 / 512) } else { Err(Status::IoError) };
    match request_type {
        0 if data.is_empty() => {
            let extent = extent(limits, sector, length(&writable)?)?;
            Ok((extent.map(|extent| Operation::Read { offset_bytes: extent.offset_bytes }), writable))
        }
        1 if writable.is_empty() && !limits.read_only => {
            let extent = extent(limits, sector, length(&data)?)?;
            Ok((extent.map(|extent| Operation::Write { offset_bytes: extent.offset_bytes }), data))
        }
        4 => Ok((Some(Operation::Flush), Vec::new())),
        8 if data.is_empty() && writable.len() >= 20 => {
            writable.truncate(20);
            Ok((Some(Operation::GetId), writable))
        }
        // The features of these types are bits 13 and 14.
        11 if driver_features >> 13 & 1 == 0 => Err(Status::Unsupported),
        13 if driver_features >> 14 & 1 == 0 => Err(Status::Unsupported),
        request_type @ (11 | 13) => {
            let range: Vec<u8> = data.iter().filter_map(|&(gpa, _)| scene.byte(gpa)).collect();
            Ok((range_operation(request_type, &range, writable.is_empty(), limits)?, Vec::new()))
        }
        0 | 1 | 8 => Err(Status::IoError),
        _ => Err(Status::Unsupported),
    }
}

fn range_operation(
    request_type: u32,
    range: &[u8],
    is_direction_right: bool,
    limits: &RequestLimits,
) -> Result<Option<Operation>, Status> {
    let is_discard = request_type == 11;
    let max_sectors = if is_discard {
        limits.discard.map(|limits| limits.max_sectors)
    } else {
        limits.write_zeroes.map(|limits| limits.max_sectors)
    };
    let max_sectors = u64::from(max_sectors.ok_or(Status::Unsupported)?);
    if range.is_empty() || range.len() % 16 != 0 {
        return Err(Status::IoError);
    }
    let Ok::<[u8; 16], _>(range) = range.try_into() else { return Err(Status::Unsupported) };
    let [sector, sectors, flags] = [&range[..8], &range[8..12], &range[12..]]
        .map(|field| field.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)));
    if flags > u64::from(!is_discard) {
        return Err(Status::Unsupported);
    }
    if !is_direction_right || sectors > max_sectors {
        return Err(Status::IoError);
    }
    let unmap = flags == 1 && limits.write_zeroes.is_some_and(|limits| limits.may_unmap);
    Ok(extent(limits, sector, sectors)?
        .map(|range| if is_discard { Operation::Discard(range) } else { Operation::WriteZeroes { range, unmap } }))
}

fn extent(limits: &RequestLimits, sector: u64, sectors: u64) -> Result<Option<ByteRange>, Status> {
    let block_bytes = 512 * u128::from(limits.logical_block_sectors);
    let [start, end] = [u128::from(sector), u128::from(sector) + u128::from(sectors)].map(|sector| sector * 512);
    if start % block_bytes != 0 || end % block_bytes != 0 || end > u128::from(limits.capacity_sectors) * 512 {
        return Err(Status::IoError);
    }
    Ok((end > start).then_some(ByteRange { offset_bytes: start as u64, len_bytes: (end - start) as u64 }))
}

/// Number of stretches that are contiguous for guest and host.
fn runs<'a>(bytes: impl Iterator<Item = &'a (u64, *mut u8)>) -> usize {
    let mut runs = 0;
    let mut expected = None;
    for &(gpa, hva) in bytes {
        if expected != Some((gpa, hva)) {
            runs += 1;
        }
        expected = Some((gpa.wrapping_add(1), hva.wrapping_add(1)));
    }
    runs
}
