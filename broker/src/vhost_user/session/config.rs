//! The configuration space: reads by the front-end, and writes by the driver.

use vhost::vhost_user::message::{VHOST_USER_CONFIG_OFFSET, VHOST_USER_CONFIG_SIZE, VhostUserProtocolFeatures};

use super::super::device::ConfigWriteError;
use super::{Answer, RequestError, Session};

/// SET_CONFIG flags: 0 is a write of the driver. In the specification 1 is a live migration; in rust-vmm's front-ends
/// (Cloud Hypervisor) 1 is a write of the driver and 2 is the migration.
const CONFIG_FLAGS_KNOWN: u32 = 3;

impl Session<'_> {
    /// The device's configuration space, with zeroes behind it: front-ends ask for as much as their own version of the
    /// structure has.
    ///
    /// Cloud Hypervisor up to v50.0 counts offsets from the start of a virtio-mmio device's space (`Blk::new` in its
    /// `vhost_user/blk.rs`). No virtio-blk device has fields of its own at such high offsets.
    pub(super) fn get_config(&self, offset_bytes: u32, size_bytes: u32, flags: u32) -> Result<Vec<u8>, RequestError> {
        self.negotiation.require(VhostUserProtocolFeatures::CONFIG, "CONFIG")?;
        check_config_range(offset_bytes, size_bytes)?;
        let space = self.device.config_space();
        let first = offset_bytes.checked_sub(VHOST_USER_CONFIG_OFFSET).unwrap_or(offset_bytes);
        let bytes = (first..).take(size_bytes as usize).map(|at| byte_at(&space, at));
        Ok([offset_bytes, size_bytes, flags].into_iter().flat_map(u32::to_ne_bytes).chain(bytes).collect())
    }

    /// Writes bytes of the driver, or of the front-end of a migration, to the configuration space.
    pub(super) fn set_config(&mut self, offset_bytes: u32, flags: u32, bytes: &[u8]) -> Result<Answer, RequestError> {
        self.negotiation.require(VhostUserProtocolFeatures::CONFIG, "CONFIG")?;
        if flags & !CONFIG_FLAGS_KNOWN != 0 {
            return Err(RequestError::ConfigFlags { flags });
        }
        Ok(match self.write_changed_config(offset_bytes, flags, bytes) {
            Ok(()) => Answer::Done,
            Err(error) => Answer::RefusedToDriver(error),
        })
    }

    /// A driver may only write writable fields. A migration carries the whole space, and bytes that already have the
    /// right value need no write.
    ///
    /// crosvm passes on any offset that the driver writes to.
    fn write_changed_config(&mut self, offset_bytes: u32, flags: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        if check_config_range(offset_bytes, bytes.len() as u32).is_err() {
            let end_bytes = u64::from(offset_bytes) + bytes.len() as u64;
            return Err(ConfigWriteError::NotWritable { offset_bytes, end_bytes });
        }
        if flags == 0 {
            return self.write_config(offset_bytes, bytes);
        }
        let space = self.device.config_space();
        let places = (offset_bytes..).zip(bytes).enumerate();
        let mut others = places.filter(|(_, (at, byte))| byte_at(&space, *at) != **byte).map(|(place, _)| place);
        let Some(first) = others.next() else { return Ok(()) };
        let last = others.last().unwrap_or(first);
        self.write_config(offset_bytes + first as u32, &bytes[first..=last])
    }

    /// The driver relies on what it wrote as soon as it has the answer, even if this process is killed then.
    fn write_config(&mut self, offset_bytes: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        self.device.write_config(offset_bytes, bytes)?;
        self.keep_driver_settings();
        Ok(())
    }
}

fn byte_at(space: &[u8], at: u32) -> u8 {
    space.get(at as usize).copied().unwrap_or(0)
}

/// Checks that the range lies in the 4096 bytes that a configuration space can have.
fn check_config_range(offset_bytes: u32, size_bytes: u32) -> Result<(), RequestError> {
    match offset_bytes.checked_add(size_bytes) {
        Some(end_bytes) if size_bytes > 0 && end_bytes <= VHOST_USER_CONFIG_SIZE => Ok(()),
        _ => Err(RequestError::ConfigRange { offset_bytes, size_bytes }),
    }
}
