//! A broker that offers rings, and a front-end that has started queue 0: most tests of rings begin with them.

use anyhow::Result;

use super::{QueueZero, RingDriver};
use crate::{
    broker_process::BrokerProcess,
    disks::DiskKind,
    front_end::{
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        vring::DriverVring,
    },
};

/// Entries of each virtqueue.
pub const QUEUE_SIZE: u16 = 64;

/// Starts queue 0 of a device, asks it what rings it offers, and takes its first news.
///
/// # Errors
///
/// The device offers no rings.
pub fn start_queue_zero(front_end: &FrontEnd, ram: &mut TestRam) -> Result<QueueZero> {
    let vring = start(front_end, ram, 0)?;
    let mut queue_zero = QueueZero::new(vring, &mut ram.arenas[0])?;
    queue_zero.probe()?;
    queue_zero.take_first_event()?;
    Ok(queue_zero)
}

/// Gives the back-end an in-flight region, without which it gives no rings, unless it has one.
///
/// # Errors
///
/// The back-end refuses a message.
pub fn keep_records(front_end: &FrontEnd) -> Result<()> {
    if !front_end.has_inflight_region() {
        front_end.new_inflight_region(front_end.queues(), QUEUE_SIZE)?;
    }
    Ok(())
}

/// Starts a queue that the driver will attach.
///
/// # Errors
///
/// The back-end refuses a message.
pub fn start_ring(front_end: &FrontEnd, ram: &mut TestRam, index: u16) -> Result<RingDriver> {
    let vring = start(front_end, ram, index)?;
    RingDriver::new(vring, &mut ram.arenas[0])
}

/// Starts a queue at its used index. A front-end knows no more of a queue that another front-end has left.
///
/// # Errors
///
/// The back-end refuses a message.
pub fn start_again(front_end: &FrontEnd, vring: &DriverVring, index: u16) -> Result<()> {
    front_end.start_vring(index, &vring.layout(), vring.eventfds(), vring.used_idx()?)
}

fn start(front_end: &FrontEnd, ram: &mut TestRam, index: u16) -> Result<DriverVring> {
    keep_records(front_end)?;
    let vring = ram.vring(front_end, QUEUE_SIZE)?;
    front_end.start_vring(index, &vring.layout(), vring.eventfds(), 0)?;
    Ok(vring)
}

/// A broker, a front-end, and the driver of queue 0.
#[derive(Debug)]
pub struct Bench {
    /// The disk and the place of the socket.
    pub rig: Rig,
    /// The broker.
    pub broker: BrokerProcess,
    /// The guest's RAM.
    pub ram: TestRam,
    /// The front-end.
    pub front_end: FrontEnd,
    /// The driver of queue 0.
    pub queue_zero: QueueZero,
}

impl Bench {
    /// A disk of zeroes of this size, a broker with this many queues and these further arguments, and 16 MiB of RAM.
    ///
    /// # Errors
    ///
    /// The broker does not serve, or offers no rings.
    pub fn new(kind: DiskKind, disk_bytes: u64, queues: u16, arguments: &[&str]) -> Result<Self> {
        let rig = Rig::new(kind, disk_bytes)?;
        let queues = queues.to_string();
        let arguments = [&["--mode", "direct", "--num-queues", &queues], arguments].concat();
        let broker = rig.broker(&arguments)?;
        let mut ram = TestRam::new(1, 16 << 20)?;
        let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
        let queue_zero = broker.explain(start_queue_zero(&front_end, &mut ram))?;
        Ok(Self { rig, broker, ram, front_end, queue_zero })
    }

    /// Starts a queue without attaching it, and returns its driver.
    ///
    /// # Errors
    ///
    /// The back-end refuses a message.
    pub fn started(&mut self, index: u16) -> Result<RingDriver> {
        self.broker.explain(start_ring(&self.front_end, &mut self.ram, index))
    }

    /// Starts and attaches a queue, and returns its driver. Its ring is open.
    ///
    /// # Errors
    ///
    /// The ring does not open.
    pub fn attached(&mut self, index: u16) -> Result<RingDriver> {
        let mut driver = self.started(index)?;
        self.broker.explain(driver.attach())?;
        Ok(driver)
    }
}
