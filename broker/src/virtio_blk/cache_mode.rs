//! The cache mode of the device: write-back or write-through.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::config::WRITEBACK_OFFSET_BYTES;
use crate::vhost_user::ConfigWriteError;

/// Bit of [`CacheMode::settings`]: the driver wrote 0 to `writeback`.
const SETTING_WRITE_THROUGH: u8 = 1;

/// Whether completed writes may still be volatile (VIRTIO 1.2, 5.2.5 and 5.2.6.2).
///
/// The device has a write-back cache: the host's, or the disk's own. It must behave as write-through for a driver that
/// cannot flush, and for a driver that chooses write-through in `writeback`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheMode {
    /// `None` until the driver has accepted features.
    driver_features: Option<u64>,
    /// The value that the driver wrote to `writeback`.
    chosen: Option<bool>,
}

impl CacheMode {
    /// The mode after a reset of the device: write-back, until the driver accepts features.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the features that the driver accepted. What the driver wrote to `writeback` stays: front-ends repeat this
    /// message while the driver runs (QEMU: at `cont`, and when a migration begins).
    pub fn set_driver_features(&mut self, features: u64) {
        self.driver_features = Some(features);
    }

    /// The features that the driver accepted; 0 until it has accepted some.
    pub fn driver_features(&self) -> u64 {
        self.driver_features.unwrap_or(0)
    }

    /// The driver's choice, for a successor process: bits for [`restore`](Self::restore). 0: the next process would
    /// behave the same without them.
    pub fn settings(&self) -> u8 {
        if self.chosen == Some(false) { SETTING_WRITE_THROUGH } else { 0 }
    }

    /// Restores the choice from an earlier process. Ignores unknown bits and never turns write-through off: only the
    /// driver may do that.
    pub fn restore(&mut self, settings: u8) {
        if settings & SETTING_WRITE_THROUGH != 0 {
            self.chosen = Some(false);
        }
    }

    /// The value of `writeback` in the configuration space. True: writes are volatile until a flush. False: each write
    /// must be stable when it completes.
    ///
    /// Always 0 for a driver without VIRTIO_BLK_F_FLUSH. VIRTIO 1.2 (5.2.5.2) makes such a driver start with 0, and a
    /// front-end does not tell where one driver ends and the next begins: what the last driver wrote must not count for
    /// a driver that cannot flush. Such a driver may write 1 and still gets stable writes, the only ones that it can
    /// use.
    pub fn writeback(&self) -> bool {
        let Some(features) = self.driver_features else { return true };
        let has_chosen_write_through = has(features, VIRTIO_BLK_F_CONFIG_WCE) && self.chosen == Some(false);
        has(features, VIRTIO_BLK_F_FLUSH) && !has_chosen_write_through
    }

    /// A write of the driver to the configuration space. The only writable field is `writeback`, with 0 or 1.
    ///
    /// The mode keeps a write that comes before the features: front-ends forward the write at once, and the features
    /// only when the driver is done.
    ///
    /// # Errors
    ///
    /// The bytes are not exactly that field, the driver did not accept VIRTIO_BLK_F_CONFIG_WCE, or the value is neither
    /// 0 nor 1. The mode then stays unchanged.
    pub fn write_config(&mut self, offset_bytes: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        let may_choose = self.driver_features.is_none_or(|features| has(features, VIRTIO_BLK_F_CONFIG_WCE));
        let &[value] = bytes else { return Err(not_writable(offset_bytes, bytes)) };
        if offset_bytes as usize != WRITEBACK_OFFSET_BYTES || !may_choose {
            return Err(not_writable(offset_bytes, bytes));
        }
        self.chosen = match value {
            0 => Some(false),
            1 => Some(true),
            _ => return Err(ConfigWriteError::BadValue { field: "writeback", value: value.into() }),
        };
        Ok(())
    }
}

fn not_writable(offset_bytes: u32, bytes: &[u8]) -> ConfigWriteError {
    ConfigWriteError::NotWritable { offset_bytes, end_bytes: u64::from(offset_bytes) + bytes.len() as u64 }
}

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
    const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

    fn negotiated(features: u64) -> CacheMode {
        let mut mode = CacheMode::new();
        mode.set_driver_features(features);
        mode
    }

    #[test]
    fn the_cache_is_write_back_until_features_are_accepted() {
        assert!(CacheMode::new().writeback());
    }

    #[test]
    fn a_driver_that_cannot_flush_gets_write_through() {
        assert!(negotiated(FLUSH).writeback());
        assert!(!negotiated(0).writeback());
        assert!(!negotiated(CONFIG_WCE).writeback(), "VIRTIO 1.2, 5.2.5.2: writeback starts as 0");
        assert!(negotiated(FLUSH | CONFIG_WCE).writeback());
    }

    /// VIRTIO 1.2, 5.2.5.1, 5.2.5.2 and 5.2.6.2: each pair of features, with each value that this driver or an earlier
    /// one has written.
    #[test]
    fn writeback_follows_the_features_and_the_drivers_choice() {
        for (features, written, writeback) in [
            (0, None, false),
            (0, Some(0), false),
            (0, Some(1), false),
            (CONFIG_WCE, None, false),
            (CONFIG_WCE, Some(0), false),
            (CONFIG_WCE, Some(1), false),
            (FLUSH, None, true),
            (FLUSH, Some(0), true),
            (FLUSH, Some(1), true),
            (FLUSH | CONFIG_WCE, None, true),
            (FLUSH | CONFIG_WCE, Some(0), false),
            (FLUSH | CONFIG_WCE, Some(1), true),
        ] {
            // Written by an earlier driver, and before the features of this one come.
            for first in [Some(FLUSH | CONFIG_WCE), None] {
                let mut mode = CacheMode::new();
                first.into_iter().for_each(|features| mode.set_driver_features(features));
                written.into_iter().for_each(|value| mode.write_config(32, &[value]).unwrap());
                mode.set_driver_features(features);
                assert_eq!(mode.writeback(), writeback, "{features:#x}, {written:?} written after {first:?}");
            }
        }
    }

    #[test]
    fn the_driver_switches_the_mode_by_writing_writeback() {
        let mut mode = negotiated(FLUSH | CONFIG_WCE);
        mode.write_config(32, &[0]).unwrap();
        assert!(!mode.writeback());
        mode.write_config(32, &[1]).unwrap();
        assert!(mode.writeback());
    }

    #[test]
    fn features_accepted_again_keep_what_the_driver_wrote() {
        let mut mode = negotiated(FLUSH | CONFIG_WCE);
        mode.write_config(32, &[0]).unwrap();
        mode.set_driver_features(FLUSH | CONFIG_WCE);
        assert!(!mode.writeback());
    }

    #[test]
    fn a_write_before_the_features_counts_if_they_allow_it() {
        let mut mode = CacheMode::new();
        mode.write_config(32, &[0]).unwrap();
        mode.set_driver_features(FLUSH | CONFIG_WCE);
        assert!(!mode.writeback());
        mode.set_driver_features(FLUSH);
        assert!(mode.writeback());
    }

    #[test]
    fn the_next_process_restores_write_through() {
        let mut mode = negotiated(FLUSH | CONFIG_WCE);
        assert_eq!(mode.settings(), 0);
        mode.write_config(32, &[0]).unwrap();
        let mut next = CacheMode::new();
        next.restore(mode.settings());
        assert_eq!(next.settings(), mode.settings(), "the process after the next also restores it");
        next.set_driver_features(FLUSH | CONFIG_WCE);
        assert!(!next.writeback());

        mode.write_config(32, &[1]).unwrap();
        assert_eq!(mode.settings(), 0);
        // Settings of 0 change nothing: write-through is never wrong.
        next.restore(0);
        assert!(!next.writeback());
    }

    #[test]
    fn writes_outside_the_writeback_field_are_refused() {
        let mut mode = negotiated(FLUSH | CONFIG_WCE);
        for (offset_bytes, bytes) in [(0, &[0_u8][..]), (31, &[0, 0]), (32, &[]), (32, &[0, 0]), (u32::MAX, &[0])] {
            let refused = mode.write_config(offset_bytes, bytes).unwrap_err();
            assert!(matches!(refused, ConfigWriteError::NotWritable { .. }), "{offset_bytes}: {refused}");
        }
        assert!(mode.writeback());
    }

    #[test]
    fn a_driver_without_config_wce_cannot_write_writeback() {
        let mut mode = negotiated(FLUSH);
        assert!(matches!(mode.write_config(32, &[0]), Err(ConfigWriteError::NotWritable { .. })));
        assert!(mode.writeback());
    }

    #[test]
    fn values_other_than_zero_and_one_are_refused() {
        let mut mode = negotiated(FLUSH | CONFIG_WCE);
        let refused = mode.write_config(32, &[2]).unwrap_err();
        assert_eq!(refused, ConfigWriteError::BadValue { field: "writeback", value: 2 });
    }
}
