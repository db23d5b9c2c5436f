//! The first conversation with a device: its offer, and the negotiation.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::config::BYTES as CONFIG_BYTES;
use super::super::memory::Memory;
use super::super::virtqueue::Vring;
use super::super::watchdog::Watchdog;
use super::super::{Error, Options};
use super::link::{Conversations, Link, QUEUES_MAX};
use super::set_up::new_inflight;
use super::{Connection, Shared};

/// The result of the negotiation at the first connection. A device that comes back must offer the same again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Negotiated {
    pub(super) features: u64,
    pub(super) protocol: VhostUserProtocolFeatures,
}

/// A device before its queues are set up.
pub(in super::super) struct Offer {
    link: Link,
    path: PathBuf,
    negotiated: Negotiated,
    conversations: Conversations,
    pub(in super::super) queue_count: u16,
    pub(in super::super) config: Vec<u8>,
}

/// The answers of a device in the first conversation.
struct Answers {
    negotiated: Negotiated,
    queue_count: u16,
    config: Vec<u8>,
}

impl Offer {
    /// Connects and negotiates.
    pub(in super::super) fn new(path: &Path, options: &Options, wanted: u64) -> Result<Self, Error> {
        let conversations = Conversations { watchdog: Watchdog::start()?, patience: options.patience };
        let mut link = Link::open(path, options.patience, |pause| {
            thread::sleep(pause);
            true
        })?;
        let answers = conversations.run(&mut link, |frontend| Answers::of(frontend, options, wanted))?;
        let Answers { negotiated, queue_count, config } = answers;
        Ok(Self { link, path: path.to_owned(), negotiated, conversations, queue_count, config })
    }

    /// The features in force.
    pub(in super::super) fn features(&self) -> u64 {
        self.negotiated.features
    }

    /// Sets up the queues and starts the thread that keeps the connection.
    pub(in super::super) fn start(self, memory: Arc<Memory>, vrings: Vec<Arc<Vring>>) -> Result<Connection, Error> {
        let Self { mut link, path, negotiated, conversations, .. } = self;
        let inflight = match negotiated.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            true => Some(conversations.run(&mut link, |frontend| new_inflight(frontend, &vrings))?),
            false => None,
        };
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("making an eventfd"))?;
        let shared = Arc::new(Shared {
            path,
            negotiated,
            memory,
            vrings,
            inflight,
            changes: Mutex::new(()),
            link: Mutex::new(None),
            reconnects: AtomicU64::new(0),
            stop,
            conversations,
        });
        shared.conversations.run(&mut link, |frontend| shared.set_up(frontend, |_| 0))?;
        *shared.link() = Some(link);
        let for_thread = shared.clone();
        let thread = thread::Builder::new()
            .name("ringpass-link".into())
            .spawn(move || for_thread.keep_connected())
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
        negotiated.accept(frontend)?;
        let count = frontend.get_queue_num().map_err(Error::protocol("asking for the number of queues"))?;
        let config = vec![0; CONFIG_BYTES];
        let flags = VhostUserConfigFlags::empty();
        let (_, config) = frontend
            .get_config(0, CONFIG_BYTES as u32, flags, &config)
            .map_err(Error::protocol("reading the configuration space"))?;
        let queue_count = u16::try_from(count.min(QUEUES_MAX)).unwrap_or(1);
        Ok(Self { negotiated, queue_count, config })
    }
}

impl Negotiated {
    /// Accepts the features, as the first messages of a connection.
    pub(super) fn accept(&self, frontend: &mut Frontend) -> Result<(), Error> {
        frontend.set_protocol_features(self.protocol).map_err(Error::protocol("accepting the protocol features"))?;
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_owner().map_err(Error::protocol("becoming the owner of the device"))?;
        frontend.set_features(self.features).map_err(Error::protocol("accepting the features"))
    }
}
