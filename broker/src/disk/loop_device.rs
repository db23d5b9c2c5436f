//! What a loop device shows, as its driver tells it (`loop(4)`, `LOOP_GET_STATUS64`). Unlike the path in sysfs this holds
//! for a file that has moved or has no name left, and in every mount namespace.

use std::os::fd::AsFd;

use rustix::fs::Stat;
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, ioctl};

use super::block_device::DeviceNumber;
use super::byte_range::ByteRange;

/// `LOOP_GET_STATUS64` of `<linux/loop.h>`.
const LOOP_GET_STATUS64: Opcode = 0x4c05;

/// `struct loop_info64` of `<linux/loop.h>`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// What identifies storage, whichever path leads to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StorageId {
    /// A regular file.
    File {
        /// The device number of its file system.
        file_system: DeviceNumber,
        inode: u64,
    },
    /// A block device, whichever its node.
    Device(DeviceNumber),
}

impl StorageId {
    /// Anything but a block device counts as a file.
    pub(super) fn of(found: &Stat) -> Self {
        use rustix::fs::FileType;
        if FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice {
            Self::Device(DeviceNumber::from_raw(found.st_rdev))
        } else {
            Self::File { file_system: DeviceNumber::from_raw(found.st_dev), inode: found.st_ino }
        }
    }
}

/// The storage behind a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) id: StorageId,
    /// The part of the storage that the device shows.
    pub(super) window: ByteRange,
}

impl Backing {
    /// The storage behind an open loop device.
    pub(super) fn of(device: impl AsFd) -> Result<Self, Errno> {
        // SAFETY: LOOP_GET_STATUS64 stores one `loop_info64` (drivers/block/loop.c) and has no other effect.
        let getter = unsafe { Getter::<LOOP_GET_STATUS64, LoopInfo64>::new() };
        // SAFETY: the getter above passes a pointer to a live `LoopInfo64`.
        let info = unsafe { ioctl(device, getter) }?;
        Ok(Self::from_info(&info))
    }

    fn from_info(info: &LoopInfo64) -> Self {
        let id = if info.rdevice == 0 {
            StorageId::File { file_system: DeviceNumber::from_raw(info.device), inode: info.inode }
        } else {
            StorageId::Device(DeviceNumber::from_raw(info.rdevice))
        };
        let limit = Some(info.sizelimit).filter(|&limit| limit != 0);
        Self { id, window: ByteRange::new(info.offset, limit) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(rdevice: u64, offset: u64, sizelimit: u64) -> LoopInfo64 {
        LoopInfo64 {
            device: 0xfe00,
            inode: 77,
            rdevice,
            offset,
            sizelimit,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }

    #[test]
    fn the_structure_has_the_size_of_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
    }

    #[test]
    fn a_backing_is_a_file_or_a_device_and_a_part_of_it() {
        let file = Backing::from_info(&info(0, 0, 0));
        let file_system = DeviceNumber { major: 254, minor: 0 };
        assert_eq!(file.id, StorageId::File { file_system, inode: 77 });
        assert_eq!(file.window, ByteRange::ALL);
        let device = Backing::from_info(&info(0x701, 512, 1024));
        assert_eq!(device.id, StorageId::Device(DeviceNumber { major: 7, minor: 1 }));
        assert_eq!(device.window, ByteRange { start: 512, end: 1536 });
    }
}
