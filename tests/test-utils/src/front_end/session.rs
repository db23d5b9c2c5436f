//! A front-end that does what a VMM does: it negotiates, shares its memory, starts and stops vrings, and connects
//! again.

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserProtocolFeatures, VhostUserVirtioFeatures, VhostUserVringAddr, VhostUserVringAddrFlags,
};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::{connection::Connection, shared::InflightRegion, wire::Wire};
use crate::{event::Eventfds, ram::Ram, vring::VringLayout};

/// How a front-end sets a device up.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Virtio features that the front-end accepts if the back-end offers them. It always accepts those that the
    /// connection needs.
    pub features: u64,
    /// Protocol features that the front-end accepts if the back-end offers them.
    pub protocol_features: VhostUserProtocolFeatures,
    /// Whether the front-end shares its memory with one `SET_MEM_TABLE` rather than with `ADD_MEM_REG` for each region.
    pub mem_table: bool,
}

/// The bit of a feature that the headers number.
pub const fn bit(number: u32) -> u64 {
    1 << number
}

impl Default for Options {
    /// Everything that the back-end offers, with memory slots.
    fn default() -> Self {
        Self { features: u64::MAX, protocol_features: VhostUserProtocolFeatures::all(), mem_table: false }
    }
}

impl Options {
    /// The same without these virtio features.
    pub fn without(mut self, features: u64) -> Self {
        self.features &= !features;
        self
    }

    /// The same without these protocol features.
    pub fn without_protocol(mut self, features: VhostUserProtocolFeatures) -> Self {
        self.protocol_features.remove(features);
        self
    }
}

/// A front-end that is connected.
#[derive(Debug)]
pub struct FrontEnd {
    connection: Connection,
    ram: Ram,
    features: u64,
    protocol_features: VhostUserProtocolFeatures,
    queues: u16,
    backend: Option<Wire>,
    has_inflight_region: AtomicBool,
}

impl FrontEnd {
    /// Connects to the back-end at `path`, negotiates, and shares the memory. Starts no vring.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message, or does not answer.
    pub fn connect(path: &Path, ram: &Ram, options: Options) -> Result<Self> {
        Self::negotiate(Connection::open(path)?, ram, options)
    }

    /// The same on a connection on which the front-end has sent nothing.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message, or does not answer.
    pub fn negotiate(mut connection: Connection, ram: &Ram, options: Options) -> Result<Self> {
        let offered = connection.features()?;
        let needed = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | bit(VIRTIO_F_VERSION_1);
        ensure!(offered & needed == needed, "the back-end offers {offered:#x}");
        let logging = VhostUserVirtioFeatures::LOG_ALL.bits();
        let features = offered & (options.features | needed) & !logging;
        let protocol_features = connection.protocol_features()? & options.protocol_features;
        connection.set_protocol_features(protocol_features)?;
        let queues = match protocol_features.contains(VhostUserProtocolFeatures::MQ) {
            true => u16::try_from(connection.ask_u64(FrontendReq::GET_QUEUE_NUM)?)?,
            false => 1,
        };
        connection.set_owner()?;
        let mut backend = None;
        if protocol_features.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            connection.set_backend_req_fd(theirs.as_fd())?;
            backend = Some(Wire::new(ours, Duration::from_secs(20))?);
        }
        connection.set_features(features)?;
        let (ram, has_inflight_region) = (ram.clone(), AtomicBool::new(false));
        let front_end = Self { connection, ram, features, protocol_features, queues, backend, has_inflight_region };
        front_end.tell_memory(options.mem_table)?;
        Ok(front_end)
    }

    fn tell_memory(&self, mem_table: bool) -> Result<()> {
        let regions = self.ram.regions();
        let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if mem_table || !self.protocol_features.contains(slots) {
            let table: Vec<_> = regions.iter().map(|region| (region.message(), region.file())).collect();
            return self.connection.set_mem_table(&table);
        }
        let most = self.connection.ask_u64(FrontendReq::GET_MAX_MEM_SLOTS)?;
        ensure!(regions.len() as u64 <= most, "{} regions, and the back-end takes {most}", regions.len());
        regions.iter().try_for_each(|region| self.connection.add_mem_reg(&region.message(), region.file()))
    }

    /// The messages.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The messages of the back-end, if BACKEND_REQ is negotiated.
    pub fn backend(&self) -> Option<&Wire> {
        self.backend.as_ref()
    }

    /// The RAM that the back-end has.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The virtio features in force.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features in force.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol_features
    }

    /// How many queues the back-end has.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// Whether driver and device suppress kicks and calls by index.
    pub fn has_event_idx(&self) -> bool {
        self.features & bit(VIRTIO_RING_F_EVENT_IDX) != 0
    }

    /// Whether the driver may use tables of descriptors.
    pub fn has_indirect(&self) -> bool {
        self.features & bit(VIRTIO_RING_F_INDIRECT_DESC) != 0
    }

    /// Gets a region for requests in flight and returns it at once, as QEMU does.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message.
    pub fn new_inflight_region(&self, queues: u16, queue_size: u16) -> Result<InflightRegion> {
        let (description, fd) = self.connection.inflight_fd(queues, queue_size)?;
        let region = InflightRegion::new(description, fd);
        self.set_inflight_region(&region)?;
        Ok(region)
    }

    /// Gives the back-end the region of an earlier connection.
    ///
    /// # Errors
    ///
    /// The back-end refuses the message.
    pub fn set_inflight_region(&self, region: &InflightRegion) -> Result<()> {
        self.connection.set_inflight_fd(region.description(), region.fd())?;
        self.has_inflight_region.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether the back-end has a region for requests in flight.
    pub fn has_inflight_region(&self) -> bool {
        self.has_inflight_region.load(Ordering::Relaxed)
    }

    /// The addresses of a vring as a message. `log`: the back-end logs its writes to the used ring.
    ///
    /// # Errors
    ///
    /// The vring is not in RAM.
    pub fn vring_addr(&self, index: u16, layout: &VringLayout, log: bool) -> Result<VhostUserVringAddr> {
        let flags = if log { VhostUserVringAddrFlags::VHOST_VRING_F_LOG } else { VhostUserVringAddrFlags::empty() };
        let [desc, used, avail] =
            [layout.desc_gpa, layout.used_gpa, layout.avail_gpa].map(|gpa| self.ram.user_addr(gpa));
        Ok(VhostUserVringAddr::new(index.into(), flags, desc?, used?, avail?, layout.used_gpa))
    }

    /// Starts a vring at the available index `base`, and enables it.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message.
    pub fn start_vring(&self, index: u16, layout: &VringLayout, eventfds: &Eventfds, base: u16) -> Result<()> {
        let connection = &self.connection;
        connection.set_vring(FrontendReq::SET_VRING_NUM, index, layout.size.into())?;
        connection.set_vring(FrontendReq::SET_VRING_BASE, index, base.into())?;
        connection.set_vring_addr(&self.vring_addr(index, layout, false)?)?;
        connection.set_vring_fd(FrontendReq::SET_VRING_CALL, index, Some(eventfds.call().as_fd()))?;
        connection.set_vring_fd(FrontendReq::SET_VRING_KICK, index, Some(eventfds.kick().as_fd()))?;
        connection.set_vring(FrontendReq::SET_VRING_ENABLE, index, 1).with_context(|| format!("vring {index}"))
    }

    /// Stops a vring, and returns the next available index.
    ///
    /// # Errors
    ///
    /// The back-end does not answer.
    pub fn stop_vring(&self, index: u16) -> Result<u16> {
        self.connection.vring_base(index)
    }

    /// Turns logging of all writes on or off.
    ///
    /// # Errors
    ///
    /// The back-end refuses the message.
    pub fn set_logging(&self, on: bool) -> Result<()> {
        let logging = VhostUserVirtioFeatures::LOG_ALL.bits();
        self.connection.set_features(if on { self.features | logging } else { self.features })
    }
}
