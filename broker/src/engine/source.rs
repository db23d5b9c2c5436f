//! Where the engine gets its disk.

use std::error::Error;

#[cfg(doc)]
use super::EngineControl;

/// Where the engine gets its disk.
///
/// The engine asks when a queue starts, and gives the disk back when all queues have stopped while a dirty log is kept,
/// which is when the guest may be about to go on elsewhere.
pub trait DiskSource: Send {
    /// The disk is wanted: sooner or later [`EngineControl::set_disk`] is to be called with it, from another thread.
    /// Returns at once. Comes again and again, also when the engine has the disk.
    fn request(&mut self);

    /// The front-end is gone. If the engine has the disk, it keeps it; if not, it does not want it before the next
    /// [`request`](Self::request): the guest may be running elsewhere, on that disk. Returns at once.
    fn stop_waiting(&mut self);

    /// The disk is not wanted any more: [`EngineControl::set_disk`] is not to be called after this, before the next
    /// [`request`](Self::request). The source holds nothing of the disk when this returns: the engine lets go of it next, and then
    /// others can have it. It may return earlier if `is_wanted`, which it asks while it waits, says no.
    fn release(&mut self, is_wanted: &dyn Fn() -> bool);

    /// Reads the size of the disk again, in bytes.
    ///
    /// # Errors
    ///
    /// It cannot be read, or is of no use.
    fn refresh_size_bytes(&mut self) -> Result<u64, Box<dyn Error + Send + Sync>>;
}
