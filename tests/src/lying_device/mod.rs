//! A vhost-user disk of the test's own that speaks the guest ABI (docs/abi.md) and lies to the driver of a Linux guest.
//!
//! It has no rings: nothing that the driver puts into one is ever executed. What comes over virtqueues is.

mod queue;
mod ram;
mod service;
mod session;

use std::{
    os::unix::net::UnixListener,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use ringpass_guest_abi::{control::RingRecord, request::ErrorCode};
use vhost::vhost_user::BackendReqHandler;

use ram::Ram;
use session::Session;

/// The queues of the device, queue 0 included.
pub const QUEUES: u16 = 3;
const DISK_BYTES: usize = 16 << 20;

/// What the device does with an ATTACH.
#[derive(Clone, Debug)]
pub enum Conduct {
    /// It refuses each at once, with these errors in turn.
    Refuse(Vec<ErrorCode>),
    /// It opens a ring, and takes it away a moment later.
    OpenAndTake,
    /// It opens a ring, ends it, opens the next, and so on.
    EndlessEpochs,
    /// It opens a ring with this record.
    Open(RingRecord),
    /// It opens a ring, and lies when the SQ has as many SQEs as this.
    Tell(RingLie, u32),
}

/// What no device and no kernel may write.
#[derive(Clone, Copy, Debug)]
pub enum RingLie {
    /// This word in the control page.
    Announce(u32),
    /// A CQ that has more CQEs than there are SQEs.
    TooManyCompletions,
    /// Two CQEs for the same SQE.
    SecondCompletion,
    /// A CQE with an index that the driver does not use.
    UnknownIndex,
    /// A CQE of an earlier use of the index.
    EarlierUse,
    /// A result of more bytes than the SQE has.
    TooManyBytes,
}

/// All its lies.
#[derive(Clone, Debug)]
pub struct Lies {
    /// About rings.
    pub conduct: Conduct,
    /// It completes each EVENT at once.
    pub floods_events: bool,
    /// It does not give queues back.
    pub keeps_queues: bool,
}

impl Lies {
    /// A device that lies about rings only.
    pub fn of(conduct: Conduct) -> Self {
        Self { conduct, floods_events: false, keeps_queues: false }
    }
}

/// What the driver has sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number of PROBEs.
    pub probes: usize,
    /// Number of EVENTs.
    pub events: usize,
    /// Number of ATTACHs, on all queues.
    pub attaches: usize,
    /// Number of reads and writes over virtqueues.
    pub transfers: usize,
}

/// The record of a ring that a driver accepts.
pub fn honest_record() -> RingRecord {
    RingRecord {
        sq_head_offset_bytes: 0.into(),
        sq_tail_offset_bytes: SQ_TAIL_BYTES.into(),
        sq_flags_offset_bytes: 8.into(),
        cq_head_offset_bytes: 64.into(),
        cq_tail_offset_bytes: CQ_TAIL_BYTES.into(),
        cq_flags_offset_bytes: 72.into(),
        cqes_offset_bytes: CQES_BYTES.into(),
        doorbell: 2.into(),
        mode: 1.into(),
        slot_shift: 24.into(),
        iova_base: (1 << 40).into(),
        address_align_bytes: 1.into(),
        length_align_bytes: 512.into(),
        segment_bytes_max: (1 << 20).into(),
        reserved: 0.into(),
    }
}

/// Offsets in an [`honest_record`].
const SQ_TAIL_BYTES: u32 = 4;
const CQ_TAIL_BYTES: u32 = 68;
const CQES_BYTES: u32 = 1024;

/// A device that listens at a socket, for one front-end after another.
#[derive(Debug)]
pub struct LyingDevice {
    shared: Arc<Shared>,
}

impl LyingDevice {
    /// Listens. The guest's RAM must be the file `ram`, without a hole below the end of the first piece.
    ///
    /// # Errors
    ///
    /// The socket cannot be made, or there is no such file.
    pub fn start(socket: &Path, ram: &Path, lies: Lies) -> Result<Self> {
        let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
        let shared = Arc::new(Shared {
            ram: Ram::open(ram)?,
            lies: Mutex::new(lies),
            disk: Mutex::new(vec![0; DISK_BYTES]),
            probes: AtomicUsize::new(0),
            events: AtomicUsize::new(0),
            attaches: AtomicUsize::new(0),
            transfers: AtomicUsize::new(0),
        });
        let of_sessions = shared.clone();
        // It ends with the test program.
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let session = Arc::new(Mutex::new(Session::new(of_sessions.clone())));
                let mut handler = BackendReqHandler::from_stream(stream, session);
                while handler.handle_request().is_ok() {}
            }
        });
        Ok(Self { shared })
    }

    /// What the device does from now on. Queues that are attached keep what they have.
    pub fn change(&self, lies: Lies) {
        *locked(&self.shared.lies) = lies;
    }

    /// What the driver has sent so far.
    pub fn counts(&self) -> Counts {
        let shared = &self.shared;
        Counts {
            probes: shared.probes.load(Ordering::Relaxed),
            events: shared.events.load(Ordering::Relaxed),
            attaches: shared.attaches.load(Ordering::Relaxed),
            transfers: shared.transfers.load(Ordering::Relaxed),
        }
    }
}

/// What all threads of the device share.
#[derive(Debug)]
struct Shared {
    ram: Ram,
    lies: Mutex<Lies>,
    disk: Mutex<Vec<u8>>,
    probes: AtomicUsize,
    events: AtomicUsize,
    attaches: AtomicUsize,
    transfers: AtomicUsize,
}

impl Shared {
    fn lies(&self) -> Lies {
        locked(&self.lies).clone()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
