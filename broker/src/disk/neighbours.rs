//! Other devices that have storage of a disk, and whether they are in exclusive use.
//!
//! Locks of living brokers keep each other out. They end with a broker, however, while I/O of a killed broker can still
//! be under way, and a mount has none. What both have is the claim (`O_EXCL`) on the device that they use.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, fstat, open, stat};
use rustix::io::Errno;

use super::block_device::{BlockDevice, DeviceNumber, Sysfs};
use super::byte_range::ByteRange;
use super::loop_device::{Backing, StorageId};
use super::stack::Layer;

/// The first device that has storage of the disk and is in exclusive use. `layers` are the disk and all storage under it.
/// A device that this process may not open counts as free.
///
/// A look at a claim is a claim for some microseconds. So this looks only at devices that would conflict.
pub(super) fn claimed(layers: &[Layer]) -> Option<BlockDevice> {
    let sysfs = Sysfs::default();
    let loop_devices = LoopDevices::all(&sysfs, layers);
    layers.iter().find_map(|layer| {
        // What is not the storage of a loop device is claimed by the device above it, or by this process.
        let below = layer.loop_device.as_ref().and_then(|_| claimed_in(&sysfs.device(layer.number()?)?, layer.range));
        below.or_else(|| loop_devices.claimed_over(layer.id, layer.range))
    })
}

impl Layer {
    fn number(&self) -> Option<DeviceNumber> {
        match self.id {
            StorageId::Device(number) => Some(number),
            StorageId::File { .. } => None,
        }
    }
}

/// The loop devices of the machine, except those through which the disk has its storage.
struct LoopDevices<'a> {
    sysfs: &'a Sysfs,
    found: Vec<(BlockDevice, Backing)>,
}

impl<'a> LoopDevices<'a> {
    fn all(sysfs: &'a Sysfs, layers: &[Layer]) -> Self {
        let is_own = |device: &BlockDevice| layers.iter().any(|layer| layer.number() == Some(device.number));
        let others = sysfs.loop_devices().filter(|device| !is_own(device) && may_concern(device, layers));
        let found = others.filter_map(|device| Some((backing(&device)?, device)));
        Self { sysfs, found: found.map(|(backing, device)| (device, backing)).collect() }
    }

    /// The first claimed device among those that have a part of this range.
    fn claimed_over(&self, storage: StorageId, range: ByteRange) -> Option<BlockDevice> {
        let over = self.found.iter().filter(|(_, backing)| backing.id == storage);
        over.filter_map(|(device, backing)| Some((device, range.seen_through(backing.window)?)))
            .find_map(|(device, range)| {
                claimed_in(device, range).or_else(|| self.claimed_over(StorageId::Device(device.number), range))
            })
            .or_else(|| self.claimed_over_partitions(storage, range))
    }

    fn claimed_over_partitions(&self, storage: StorageId, range: ByteRange) -> Option<BlockDevice> {
        let StorageId::Device(number) = storage else { return None };
        partitions_in(&self.sysfs.device(number)?, range)
            .into_iter()
            .find_map(|(partition, range)| self.claimed_over(StorageId::Device(partition.number), range))
    }
}

/// Whether a loop device can have storage of these layers, as far as its path tells. A device over another file is left
/// alone: an open holds up its removal, and can hang if its storage does.
fn may_concern(device: &BlockDevice, layers: &[Layer]) -> bool {
    let Some(found) = device.backing_path().and_then(|path| stat(path).ok()) else { return true };
    match StorageId::of(&found) {
        // A loop device over a loop device over the disk, for example.
        StorageId::Device(_) => true,
        file => layers.iter().any(|layer| layer.id == file),
    }
}

fn backing(device: &BlockDevice) -> Option<Backing> {
    Backing::of(open_node(device, OFlags::empty()).ok()?).ok()
}

/// The device, or the partition of it, that is claimed and has a part of the range.
fn claimed_in(device: &BlockDevice, range: ByteRange) -> Option<BlockDevice> {
    let partitions = partitions_in(device, range);
    if partitions.is_empty() {
        return is_claimed(device).then(|| device.clone());
    }
    // A claim on a partition bars a claim on the whole device. So the partitions themselves tell which is claimed.
    let (claimed, _) = partitions.into_iter().find(|(partition, _)| is_claimed(partition))?;
    Some(claimed)
}

/// The partitions that have a part of the range.
fn partitions_in(device: &BlockDevice, range: ByteRange) -> Vec<(BlockDevice, ByteRange)> {
    let seen = |partition: BlockDevice| Some((range.seen_through(partition.partition_window()?)?, partition));
    device.partitions().filter_map(seen).map(|(range, partition)| (partition, range)).collect()
}

fn is_claimed(device: &BlockDevice) -> bool {
    matches!(open_node(device, OFlags::EXCL), Err(Errno::BUSY))
}

/// Opens a device for reading: udev ignores the close of such a descriptor.
pub(super) fn open_node(device: &BlockDevice, flags: OFlags) -> Result<OwnedFd, Errno> {
    let node = device.node();
    // Another file may have the name of the device here: the broker opens it only if it is that device.
    if DeviceNumber::of_path(&node) != Some(device.number) {
        return Err(Errno::NOENT);
    }
    let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open(node, flags, Mode::empty())?;
    let is_device = StorageId::of(&fstat(&file)?) == StorageId::Device(device.number);
    is_device.then_some(file).ok_or(Errno::NOENT)
}
