//! Tests of leases on files; those that need a device or hanging I/O are in the end-to-end tests.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};

use super::*;
use crate::disk::{DirectIo, DiskConfig};

/// Longer than any step takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(8192).unwrap();
        Self { _dir: dir, path }
    }

    fn config(&self) -> DiskConfig {
        DiskConfig { direct_io: DirectIo::Off, ..DiskConfig::new(&self.path) }
    }

    fn lease(&self) -> (DiskLease, Receiver<Arc<Disk>>) {
        let (sender, receiver) = channel();
        let located = Arc::new(Disk::locate(&self.config()).unwrap());
        (DiskLease::new(located, move |disk| sender.send(disk).unwrap()).unwrap(), receiver)
    }
}

fn is_held(lease: &DiskLease) -> bool {
    matches!(lease.state(), LeaseState::Held(_))
}

/// A lock on the file as QEMU takes it: of this process, on an open file description of its own.
fn lock(path: &Path) -> std::os::fd::OwnedFd {
    let file = File::options().read(true).write(true).open(path).unwrap().into();
    assert!(crate::disk::lock::try_lock(&file, path, false).unwrap());
    file
}

#[test]
fn a_lease_takes_nothing_before_it_is_asked() {
    let image = Image::new();
    let (lease, held) = image.lease();
    assert!(matches!(lease.state(), LeaseState::Released));
    drop(lock(&image.path));
    drop(lease);
    assert_eq!(held.recv_timeout(LIMIT).unwrap_err(), RecvTimeoutError::Disconnected);
}

#[test]
fn the_disk_is_passed_on_when_its_holder_releases_it() {
    let image = Image::new();
    let (lease, held) = image.lease();
    let other = lock(&image.path);
    lease.acquire();
    assert!(matches!(lease.state(), LeaseState::Waiting { .. }));
    assert_eq!(held.recv_timeout(Duration::from_millis(100)).unwrap_err(), RecvTimeoutError::Timeout);
    // The size is read once the lock is ours.
    rustix::fs::ftruncate(&other, 16384).unwrap();
    drop(other);
    let disk = held.recv_timeout(LIMIT).unwrap();
    assert!(is_held(&lease));
    assert_eq!((disk.size_bytes(), lease.located().size_bytes()), (16384, 8192));
}

#[test]
fn a_disk_that_the_lease_has_is_not_passed_on_again() {
    let image = Image::new();
    let (lease, held) = image.lease();
    lease.acquire();
    let _disk = held.recv_timeout(LIMIT).unwrap();
    lease.acquire();
    drop(lease);
    assert_eq!(held.recv_timeout(LIMIT).unwrap_err(), RecvTimeoutError::Disconnected);
}

#[test]
fn a_released_disk_is_free_when_its_last_reference_is_gone_and_can_be_acquired_again() {
    let image = Image::new();
    let (lease, held) = image.lease();
    lease.acquire();
    let disk = held.recv_timeout(LIMIT).unwrap();
    lease.release();
    assert!(matches!(lease.state(), LeaseState::Released));
    assert!(lease.located().try_lock().unwrap_err().is_busy(), "I/O may still be under way");
    drop(disk);
    drop(lock(&image.path));
    lease.acquire();
    held.recv_timeout(LIMIT).unwrap();
}

#[test]
fn a_release_ends_the_wait() {
    let image = Image::new();
    let (lease, held) = image.lease();
    let other = lock(&image.path);
    lease.acquire();
    lease.release();
    drop(other);
    // Nothing is sent: the release has ended this wait. The next call of acquire is served.
    assert_eq!(held.recv_timeout(Duration::from_millis(200)).unwrap_err(), RecvTimeoutError::Timeout);
    drop(lock(&image.path));
    lease.acquire();
    held.recv_timeout(LIMIT).unwrap();
}

#[test]
fn a_release_waits_for_the_call_that_passes_the_disk_on() {
    let image = Image::new();
    let (entered, has_entered) = channel();
    let (go_on, may_go_on): (Sender<()>, _) = channel();
    let (passed, has_passed) = channel();
    let lease = DiskLease::new(Arc::new(Disk::locate(&image.config()).unwrap()), move |disk| {
        entered.send(()).unwrap();
        may_go_on.recv().unwrap();
        passed.send(disk).unwrap();
    })
    .unwrap();
    lease.acquire();
    has_entered.recv_timeout(LIMIT).unwrap();
    thread::scope(|scope| {
        let releasing = scope.spawn(|| lease.release());
        thread::sleep(Duration::from_millis(50));
        assert!(!releasing.is_finished());
        go_on.send(()).unwrap();
        releasing.join().unwrap();
    });
    has_passed.try_recv().expect("the disk was passed on before the release returned");
}

#[test]
fn a_start_with_a_free_disk_acquires_it() {
    let image = Image::new();
    let (lease, held) = image.lease();
    lease.start_up(StartUp::Grace(Duration::ZERO)).unwrap();
    held.recv_timeout(LIMIT).unwrap();
    assert!(is_held(&lease));
}

#[test]
fn a_start_gives_up_if_a_living_process_keeps_the_disk() {
    let image = Image::new();
    let (lease, _held) = image.lease();
    let _other = lock(&image.path);
    let grace = Duration::from_millis(120);
    let started = Instant::now();
    let error = lease.start_up(StartUp::Grace(grace)).unwrap_err();
    assert!(started.elapsed() >= grace);
    let message = error.to_string();
    assert!(message.contains(&format!("[{}]", std::process::id())), "{message}");
    assert!(matches!(lease.state(), LeaseState::Released));
}

#[test]
fn a_start_within_the_grace_gets_the_disk() {
    let image = Image::new();
    let (lease, held) = image.lease();
    let other = lock(&image.path);
    thread::scope(|scope| {
        let starting = scope.spawn(|| lease.start_up(StartUp::Grace(LIMIT)));
        thread::sleep(Duration::from_millis(50));
        assert!(!starting.is_finished());
        drop(other);
        starting.join().unwrap().unwrap();
    });
    // If the lock went just before the search for its holder, the start returns before the lease has the disk.
    held.recv_timeout(LIMIT).unwrap();
}

#[test]
fn the_destination_of_a_migration_leaves_the_disk_alone_until_acquire() {
    let image = Image::new();
    let (lease, held) = image.lease();
    let source = lock(&image.path);
    lease.start_up(StartUp::Incoming).unwrap();
    assert!(matches!(lease.state(), LeaseState::Released));
    lease.acquire();
    assert!(!is_held(&lease));
    drop(source);
    held.recv_timeout(LIMIT).unwrap();
}

#[test]
fn stop_waiting_keeps_a_disk_that_the_lease_has_and_waits_for_no_other() {
    let image = Image::new();
    let (lease, held) = image.lease();
    let other = lock(&image.path);
    lease.acquire();
    lease.stop_waiting();
    assert!(matches!(lease.state(), LeaseState::Released));
    drop(other);
    lease.acquire();
    held.recv_timeout(LIMIT).unwrap();
    lease.stop_waiting();
    assert!(is_held(&lease));
}

#[test]
fn a_disk_that_became_unusable_fails_the_start_and_is_tried_again_later() {
    let image = Image::new();
    let (lease, held) = image.lease();
    let set_size = |bytes| File::options().write(true).open(&image.path).unwrap().set_len(bytes).unwrap();
    set_size(0);
    let error = lease.start_up(StartUp::Grace(LIMIT)).unwrap_err();
    assert!(error.to_string().contains("a size of zero bytes"), "{error}");
    lease.acquire();
    set_size(4096);
    assert_eq!(held.recv_timeout(LIMIT).unwrap().size_bytes(), 4096);
}
