//! The front-end's side of vhost-user: sets the device up, and sets it up again when it comes back.
//!
//! Everything that a device needs to go on is in memory that outlives it: the rings, the requests in them, the pending
//! ATTACH, and an in-flight region if there is one. So a device that is gone is waited for, without end, told the same
//! things again, and goes on where the used index says.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::memory::{Memory, Region};
use super::virtqueue::Setup;
use super::watchdog::Watchdog;
use super::{Error, Options};
use crate::raw;

/// vhost-user numbers queues with a byte.
const QUEUES_MAX: u64 = 256;
/// How long to wait at first before it is tried again to connect.
const RETRY_MIN: Duration = Duration::from_millis(5);
/// And at most.
const RETRY_MAX: Duration = Duration::from_millis(40);

/// What was negotiated at the first connection. A device that comes back must offer it again.
#[derive(Clone, Copy, Debug)]
struct Negotiated {
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

/// A connection to a device, kept up by a thread.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Nothing is left to be told to the device.
    has_ended: bool,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    negotiated: Negotiated,
    memory: Arc<Memory>,
    queues: Vec<Arc<Setup>>,
    inflight: Option<Inflight>,
    /// The connection, if there is one now.
    link: Mutex<Option<Link>>,
    reconnects: AtomicU64,
    stop: EventFd,
    waits: Waits,
}

/// How long the device is waited for.
#[derive(Debug)]
struct Waits {
    watchdog: Watchdog,
    patience: Duration,
}

impl Waits {
    /// Says something to the device, which has `patience` to answer all of it.
    fn talk<T>(&self, link: &mut Link, work: impl FnOnce(&mut Frontend) -> Result<T, Error>) -> Result<T, Error> {
        let watch = self.watchdog.watch(&link.stream, self.patience)?;
        work(&mut link.frontend).map_err(|error| match error {
            Error::Protocol { what, .. } if watch.is_cut() => Error::Silent { what, patience: self.patience },
            other => other,
        })
    }
}

/// The region in which a device notes what it has taken.
struct Inflight {
    description: VhostUserInflight,
    file: File,
}

impl std::fmt::Debug for Inflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Inflight").field(&self.file).finish()
    }
}

struct Link {
    frontend: Frontend,
    /// The same socket, to be waited for.
    stream: UnixStream,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Link").field(&self.stream).finish()
    }
}

/// A device before its queues are set up.
pub(super) struct Offer {
    link: Link,
    path: PathBuf,
    negotiated: Negotiated,
    waits: Waits,
    pub(super) queue_count: u16,
    pub(super) config: Vec<u8>,
}

/// What a device says of itself when it is asked first.
struct Answers {
    negotiated: Negotiated,
    queue_count: u16,
    config: Vec<u8>,
}

impl Offer {
    /// Connects and negotiates.
    pub(super) fn new(path: &Path, options: &Options, wanted: u64) -> Result<Self, Error> {
        let waits = Waits { watchdog: Watchdog::start()?, patience: options.patience };
        let mut link = Link::open(path, options.patience, |pause| {
            thread::sleep(pause);
            true
        })?;
        let answers = waits.talk(&mut link, |frontend| Answers::of(frontend, options, wanted))?;
        let Answers { negotiated, queue_count, config } = answers;
        Ok(Self { link, path: path.to_owned(), negotiated, waits, queue_count, config })
    }

    /// The features in force.
    pub(super) fn features(&self) -> u64 {
        self.negotiated.features
    }

    /// Sets the queues up and starts the thread that keeps the connection.
    pub(super) fn start(self, memory: Arc<Memory>, queues: Vec<Arc<Setup>>) -> Result<Connection, Error> {
        let Self { mut link, path, negotiated, waits, .. } = self;
        let inflight = match negotiated.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            true => Some(waits.talk(&mut link, |frontend| new_inflight(frontend, &queues))?),
            false => None,
        };
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("making an eventfd"))?;
        let shared = Arc::new(Shared {
            path,
            negotiated,
            memory,
            queues,
            inflight,
            link: Mutex::new(None),
            reconnects: AtomicU64::new(0),
            stop,
            waits,
        });
        shared.waits.talk(&mut link, |frontend| shared.set_up(frontend, |_| 0))?;
        *shared.link() = Some(link);
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("ringpass-link".into())
            .spawn(move || theirs.keep())
            .map_err(Error::system("starting the thread that keeps the connection"))?;
        Ok(Connection { shared, thread: Some(thread), has_ended: false })
    }
}

impl Answers {
    fn of(frontend: &mut Frontend, options: &Options, wanted: u64) -> Result<Self, Error> {
        let offered = frontend.get_features().map_err(Error::protocol("asking for the features"))?;
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let needed = protocol_bit | 1 << VIRTIO_F_VERSION_1;
        if offered & needed != needed {
            return Err(Error::Lacks { what: "VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES" });
        }
        let features = offered & (wanted | needed);
        let offered = frontend.get_protocol_features().map_err(Error::protocol("asking for the protocol features"))?;
        let mut protocol = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if !offered.contains(protocol) {
            return Err(Error::Lacks { what: "the protocol features MQ, CONFIG, REPLY_ACK and CONFIGURE_MEM_SLOTS" });
        }
        if options.inflight && offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            protocol |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        let negotiated = Negotiated { features, protocol };
        negotiated.tell(frontend)?;
        let count = frontend.get_queue_num().map_err(Error::protocol("asking for the number of queues"))?;
        let config = vec![0; super::config::BYTES];
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = frontend
            .get_config(0, super::config::BYTES as u32, flags, &config)
            .map_err(Error::protocol("reading the configuration space"))?;
        let queue_count = u16::try_from(count.min(QUEUES_MAX)).unwrap_or(1);
        Ok(Self { negotiated, queue_count, config })
    }
}

impl Connection {
    /// How often the device was lost and found again.
    pub(super) fn reconnects(&self) -> u64 {
        self.shared.reconnects.load(Ordering::Relaxed)
    }

    /// Tells the device of a region. One that comes back later is told of all.
    pub(super) fn add_region(&self, region: &Region) -> Result<(), Error> {
        self.shared.tell(|frontend| add_region(frontend, region))
    }

    /// Tells the device that a region is gone. When this returns it reaches it no more.
    pub(super) fn remove_region(&self, region: &Region) -> Result<(), Error> {
        let region = describe(region);
        let failed = Error::protocol("removing a memory region");
        self.shared.tell(|frontend| frontend.remove_mem_region(&region).map_err(failed))
    }

    /// Gives a queue another eventfd for interrupts, which the device signals once.
    pub(super) fn renew_call(&self, index: usize) -> Result<(), Error> {
        let call = self.shared.queues[index].renew_call()?;
        let failed = Error::protocol("changing the call eventfd");
        self.shared.tell(|frontend| frontend.set_vring_call(index, &call).map_err(failed))
    }

    /// Gives this connection up for a new one. A device that was killed and cannot end, because I/O of it hangs, does not close
    /// its socket; another may serve already.
    pub(super) fn renew(&self) {
        if let Some(link) = self.shared.link().as_ref() {
            let _ = link.stream.shutdown(Shutdown::Both);
        }
    }

    /// Stops all queues and starts them again where they stopped, as a machine does that is paused.
    pub(super) fn stop_and_go_on(&self) -> Result<(), Error> {
        self.shared.tell(|frontend| {
            let mut bases = Vec::new();
            for index in 0..self.shared.queues.len() {
                let base = frontend.get_vring_base(index).map_err(Error::protocol("stopping a queue"))?;
                bases.push(u16::try_from(base).unwrap_or_default());
            }
            self.shared.start_queues(frontend, |index| bases[index])
        })
    }
}

impl Connection {
    /// Stops all queues: none touches memory when its last request has ended, for which the device has the patience of all waits.
    ///
    /// # Errors
    ///
    /// The device does not say that. It is left at that: it may still use the memory.
    pub(super) fn end(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.has_ended, true) {
            return Ok(());
        }
        let _ = self.shared.stop.write(1);
        // Nobody else talks to the device now but the thread, if it is just connecting anew.
        self.shared.waits.watchdog.cut_all();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, nothing is left to be done.
            let _ = thread.join();
        }
        self.shared.waits.watchdog.allow();
        let mut link = self.shared.link().take().ok_or(Error::NotStopped { why: "its connection is lost".into() })?;
        let stopped = self.shared.waits.talk(&mut link, |frontend| {
            (0..self.shared.queues.len()).try_for_each(|index| {
                frontend.get_vring_base(index).map(drop).map_err(Error::protocol("stopping a queue"))
            })
        });
        stopped.map_err(|error| Error::NotStopped { why: error.to_string() })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!("{error}");
        }
    }
}

impl Shared {
    fn link(&self) -> MutexGuard<'_, Option<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the device something, if it is there: one that comes back is told everything anew.
    fn tell(&self, message: impl FnOnce(&mut Frontend) -> Result<(), Error>) -> Result<(), Error> {
        let mut link = self.link();
        let Some(link) = link.as_mut() else { return Ok(()) };
        self.waits.talk(link, message).or_else(|error| match error {
            // It is there, and has not done it. The connection is cut, because a late answer would be taken for the next one.
            Error::Silent { .. } => Err(error),
            _ if link.is_gone() => Ok(()),
            _ => Err(error),
        })
    }

    /// Everything after the negotiation.
    fn set_up(&self, frontend: &mut Frontend, base: impl Fn(usize) -> u16) -> Result<(), Error> {
        for region in self.memory.regions() {
            add_region(frontend, &region)?;
        }
        if let Some(Inflight { description, file }) = &self.inflight {
            frontend
                .set_inflight_fd(description, file.as_raw_fd())
                .map_err(Error::protocol("giving the in-flight region"))?;
        }
        self.start_queues(frontend, base)
    }

    fn start_queues(&self, frontend: &mut Frontend, base: impl Fn(usize) -> u16) -> Result<(), Error> {
        for (index, setup) in self.queues.iter().enumerate() {
            let user = |gpa: u64| {
                let regions = self.memory.regions();
                let region = regions.iter().find(|region| (region.gpa..region.gpa + region.len_bytes).contains(&gpa));
                region.map_or(0, |region| region.user_address() + (gpa - region.gpa))
            };
            let addresses = VringConfigData {
                queue_max_size: setup.size,
                queue_size: setup.size,
                flags: 0,
                desc_table_addr: user(setup.desc_gpa),
                used_ring_addr: user(setup.used_gpa),
                avail_ring_addr: user(setup.avail_gpa),
                log_addr: None,
            };
            let failed = || Error::protocol("setting a queue up");
            frontend.set_vring_num(index, setup.size).map_err(failed())?;
            frontend.set_vring_base(index, base(index)).map_err(failed())?;
            frontend.set_vring_addr(index, &addresses).map_err(failed())?;
            frontend.set_vring_call(index, &setup.call()).map_err(failed())?;
            frontend.set_vring_kick(index, &setup.kick).map_err(failed())?;
        }
        for index in 0..self.queues.len() {
            frontend.set_vring_enable(index, true).map_err(Error::protocol("enabling a queue"))?;
        }
        Ok(())
    }

    /// Waits for the device to go, and for it to come back, until told to stop.
    fn keep(&self) {
        loop {
            let stream = self.link().as_ref().map(|link| link.stream.try_clone());
            let is_going = match stream {
                Some(Ok(stream)) => self.wait(Some(stream.as_fd()), None),
                Some(Err(_)) | None => self.wait(None, Some(RETRY_MIN)),
            };
            if !is_going {
                return;
            }
            *self.link() = None;
            let mut pause = RETRY_MIN;
            while let Err(error) = self.reconnect() {
                tracing::debug!(%error, "the device is not back yet");
                if !self.wait(None, Some(pause)) {
                    return;
                }
                pause = (pause * 2).min(RETRY_MAX);
            }
            self.reconnects.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until the other side has closed `socket`, or for `timeout`. False: this side is to stop.
    fn wait(&self, socket: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        let timeout = timeout.and_then(|timeout| rustix::event::Timespec::try_from(timeout).ok());
        let mut fds = vec![PollFd::from_borrowed_fd(raw::borrow(&self.stop), PollFlags::IN)];
        // Nothing comes unasked; what is readable besides replies that somebody waits for is the end.
        fds.extend(socket.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)));
        while poll(&mut fds, timeout.as_ref()) == Err(rustix::io::Errno::INTR) {}
        !fds[0].revents().contains(PollFlags::IN)
    }

    fn reconnect(&self) -> Result<(), Error> {
        let mut link = Link::open(&self.path, self.waits.patience, |pause| self.wait(None, Some(pause)))?;
        self.waits.talk(&mut link, |frontend| {
            let offered = frontend.get_features().map_err(Error::protocol("asking for the features"))?;
            if self.negotiated.features & !offered != 0 {
                return Err(Error::Lacks { what: "the features that it had before" });
            }
            frontend.get_protocol_features().map_err(Error::protocol("asking for the protocol features"))?;
            self.negotiated.tell(frontend)?;
            self.set_up(frontend, |index| self.queues[index].used_idx())
        })?;
        *self.link() = Some(link);
        Ok(())
    }
}

impl Negotiated {
    fn tell(&self, frontend: &mut Frontend) -> Result<(), Error> {
        frontend.set_protocol_features(self.protocol).map_err(Error::protocol("accepting the protocol features"))?;
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_owner().map_err(Error::protocol("becoming the owner of the device"))?;
        frontend.set_features(self.features).map_err(Error::protocol("accepting the features"))
    }
}

impl Link {
    /// Connects. While the queue of the socket is full (its server is stopped, and others wait as well) it is tried again, as long
    /// as `pause` says to go on.
    fn open(path: &Path, patience: Duration, pause: impl Fn(Duration) -> bool) -> Result<Self, Error> {
        let failed = |source| Error::Connect { path: path.to_owned(), source };
        let end = Instant::now() + patience;
        let stream = loop {
            match connect(path) {
                Err(Errno::AGAIN | Errno::INTR) => {
                    if Instant::now() >= end || !pause(RETRY_MAX) {
                        return Err(Error::Silent { what: "connecting", patience });
                    }
                }
                other => break other.map_err(|errno| failed(errno.into()))?,
            }
        };
        stream.set_nonblocking(false).map_err(failed)?;
        let ours = stream.try_clone().map_err(failed)?;
        Ok(Self { frontend: Frontend::from_stream(stream, QUEUES_MAX), stream: ours })
    }

    /// Whether the other side has closed the socket.
    fn is_gone(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::RDHUP)];
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

/// A connection, without waiting for room in the queue of the socket.
fn connect(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

fn new_inflight(frontend: &mut Frontend, queues: &[Arc<Setup>]) -> Result<Inflight, Error> {
    let size = queues.iter().map(|setup| setup.size).max().unwrap_or(1);
    let wanted =
        VhostUserInflight { num_queues: queues.len() as u16, queue_size: size, ..VhostUserInflight::default() };
    let (description, file) =
        frontend.get_inflight_fd(&wanted).map_err(Error::protocol("asking for an in-flight region"))?;
    Ok(Inflight { description, file })
}

fn describe(region: &Region) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.gpa,
        memory_size: region.len_bytes,
        userspace_addr: region.user_address(),
        mmap_offset: 0,
        mmap_handle: region.file.as_raw_fd(),
    }
}

fn add_region(frontend: &mut Frontend, region: &Region) -> Result<(), Error> {
    frontend.add_mem_region(&describe(region)).map(drop).map_err(Error::protocol("adding a memory region"))
}
