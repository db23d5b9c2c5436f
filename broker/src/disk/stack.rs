//! What lies under a disk: the file behind a loop device, the disk of a partition, the devices under a device mapper.
//!
//! The walk ends at regular files. The block device of their file system is not part of it: a mount claims that device.

use super::block_device::{BlockDevice, Sysfs};
use super::byte_range::ByteRange;
use super::loop_device::{Backing, StorageId};

/// More layers than any machine has; the kernel allows no circles.
const LAYERS_MAX: usize = 64;

/// The disk itself, or a storage on which it lies.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) id: StorageId,
    /// The part of the storage in which the disk lies.
    pub(super) range: ByteRange,
    /// Whether other devices may have other pieces of that part: below a device mapper or RAID, whose tables the walk
    /// does not read.
    pub(super) is_shared: bool,
    /// The loop device that has this storage as its file, if one has.
    pub(super) loop_device: Option<BlockDevice>,
}

/// The disk, followed by all storage under it.
pub(super) fn walk(
    disk: StorageId,
    sysfs: &Sysfs,
    mut backing: impl FnMut(&BlockDevice) -> Option<Backing>,
) -> Vec<Layer> {
    let mut layers = vec![Layer { id: disk, range: ByteRange::ALL, is_shared: false, loop_device: None }];
    let mut next = 0;
    while let Some(layer) = layers.get(next).filter(|_| layers.len() < LAYERS_MAX) {
        let below = below(layer, sysfs, &mut backing);
        layers.extend(below);
        next += 1;
    }
    layers
}

fn below(layer: &Layer, sysfs: &Sysfs, backing: &mut impl FnMut(&BlockDevice) -> Option<Backing>) -> Vec<Layer> {
    let StorageId::Device(number) = layer.id else { return Vec::new() };
    let Some(device) = sysfs.device(number) else { return Vec::new() };
    if let (Some(disk), Some(window)) = (device.whole_disk(), device.partition_window()) {
        let range = layer.range.in_storage(window);
        return vec![Layer {
            id: StorageId::Device(disk.number),
            range,
            is_shared: layer.is_shared,
            loop_device: None,
        }];
    }
    if device.is_loop() {
        let backing = backing(&device).map(|backing| Layer {
            id: backing.id,
            range: layer.range.in_storage(backing.window),
            is_shared: layer.is_shared,
            loop_device: Some(device),
        });
        return backing.into_iter().collect();
    }
    let slave = |slave: BlockDevice| Layer {
        id: StorageId::Device(slave.number),
        range: ByteRange::ALL,
        is_shared: true,
        loop_device: None,
    };
    device.slaves().into_iter().map(slave).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;
    use crate::disk::block_device::DeviceNumber;

    /// A tree as sysfs has it.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["dev/block", "block"] {
                fs::create_dir_all(dir.path().join(name)).unwrap();
            }
            Self(dir)
        }

        /// Adds a device below `devices`, with these attributes.
        fn add(&self, path: &str, minor: u32, attributes: &[(&str, &str)]) {
            let dir = self.0.path().join("devices").join(path);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("dev"), format!("7:{minor}\n")).unwrap();
            symlink(&dir, self.0.path().join(format!("dev/block/7:{minor}"))).unwrap();
            symlink(&dir, self.0.path().join("block").join(Path::new(path).file_name().unwrap())).unwrap();
            for (name, text) in attributes {
                let file = dir.join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, format!("{text}\n")).unwrap();
            }
        }

        fn add_slave(&self, path: &str, slave: &str) {
            let devices = self.0.path().join("devices");
            fs::create_dir_all(devices.join(path).join("slaves")).unwrap();
            symlink(devices.join(slave), devices.join(path).join("slaves").join(slave)).unwrap();
        }

        fn sysfs(&self) -> Sysfs {
            Sysfs::at(self.0.path())
        }
    }

    const fn device(minor: u32) -> StorageId {
        StorageId::Device(DeviceNumber { major: 7, minor })
    }

    const FILE: StorageId = StorageId::File { file_system: DeviceNumber { major: 254, minor: 0 }, inode: 77 };
    const LOOP: &[(&str, &str)] = &[("loop/backing_file", "/a.img")];

    fn found(layers: &[Layer]) -> Vec<(StorageId, ByteRange, bool)> {
        layers.iter().map(|layer| (layer.id, layer.range, layer.is_shared)).collect()
    }

    #[test]
    fn a_file_lies_on_nothing() {
        let layers = walk(FILE, &Tree::new().sysfs(), |_| panic!("no device"));
        assert_eq!(found(&layers), [(FILE, ByteRange::ALL, false)]);
    }

    #[test]
    fn a_partition_of_a_loop_device_over_a_loop_device_lies_in_a_part_of_the_file() {
        let tree = Tree::new();
        tree.add("loop0", 0, LOOP);
        tree.add("loop1", 1, LOOP);
        tree.add("loop1/loop1p2", 2, &[("partition", "2"), ("start", "8"), ("size", "4")]);
        let layers = walk(device(2), &tree.sysfs(), |asked| {
            let (id, start) = if asked.name == "loop1" { (device(0), 1000) } else { (FILE, 100) };
            Some(Backing { id, window: ByteRange::new(start, None) })
        });
        let start = 8 * 512;
        let expected = [
            (device(2), ByteRange::ALL, false),
            (device(1), ByteRange::new(start, Some(2048)), false),
            (device(0), ByteRange::new(start + 1000, Some(2048)), false),
            (FILE, ByteRange::new(start + 1100, Some(2048)), false),
        ];
        assert_eq!(found(&layers), expected);
        let loops = layers.iter().map(|layer| layer.loop_device.as_ref().map(|device| device.name.as_str()));
        assert_eq!(loops.collect::<Vec<_>>(), [None, None, Some("loop1"), Some("loop0")]);
    }

    #[test]
    fn storage_under_a_device_mapper_is_shared() {
        let tree = Tree::new();
        tree.add("loop0", 0, LOOP);
        tree.add("sda", 1, &[]);
        tree.add("dm-0", 2, &[]);
        tree.add_slave("dm-0", "loop0");
        tree.add_slave("dm-0", "sda");
        let backing = Backing { id: FILE, window: ByteRange::new(512, None) };
        let layers = walk(device(2), &tree.sysfs(), |_| Some(backing));
        let mut found = found(&layers);
        found.sort_by_key(|found| format!("{found:?}"));
        let mut expected = [
            (device(2), ByteRange::ALL, false),
            (device(0), ByteRange::ALL, true),
            (device(1), ByteRange::ALL, true),
            (FILE, ByteRange::new(512, None), true),
        ];
        expected.sort_by_key(|found| format!("{found:?}"));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_loop_device_that_is_not_set_up_or_does_not_answer_ends_the_walk() {
        let tree = Tree::new();
        tree.add("loop0", 0, &[]);
        tree.add("loop1", 1, LOOP);
        assert_eq!(walk(device(0), &tree.sysfs(), |_| panic!("not set up")).len(), 1);
        assert_eq!(walk(device(1), &tree.sysfs(), |_| None).len(), 1);
    }
}
