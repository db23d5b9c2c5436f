//! The driver of queue 0, with its attach requests.

use anyhow::{Context, Result, ensure};
use ringpass_guest_abi::{
    probe::{Device, ProbeAnswer},
    request::{EVENT_QUEUES, EventAnswer, T_EVENT, T_PROBE},
};

use super::{Found, RequestPlaces};
use crate::{
    PATIENCE,
    ram::Arena,
    vring::{DriverVring, Used},
};

const EVENT_PLACE: u64 = 0;
const OTHER_PLACE: u64 = 1;

/// The driver of queue 0.
#[derive(Debug)]
pub struct QueueZero {
    vring: DriverVring,
    places: RequestPlaces,
    event: Option<u16>,
    has_event: bool,
}

impl QueueZero {
    /// The driver of an empty queue 0.
    ///
    /// # Errors
    ///
    /// The arena does not have enough memory left.
    pub fn new(vring: DriverVring, arena: &mut Arena) -> Result<Self> {
        Ok(Self { vring, places: RequestPlaces::take(arena, 2)?, event: None, has_event: false })
    }

    /// The queue.
    pub fn vring(&mut self) -> &mut DriverVring {
        &mut self.vring
    }

    /// Begins anew on an empty queue.
    ///
    /// # Errors
    ///
    /// The queue is not in RAM.
    pub fn restart(&mut self) -> Result<()> {
        (self.event, self.has_event) = (None, false);
        self.vring.reset()
    }

    /// Sends PROBE. Returns what the device offers.
    ///
    /// # Errors
    ///
    /// The device offers no rings.
    pub fn probe(&mut self) -> Result<Device> {
        let (answer, status) = self.probe_answer()?;
        ensure!(status == 0, "PROBE has status {status}");
        answer.check().map_err(|error| anyhow::anyhow!("{error:?}"))
    }

    /// Sends PROBE. Returns the answer and the status.
    ///
    /// # Errors
    ///
    /// PROBE does not end.
    pub fn probe_answer(&mut self) -> Result<(ProbeAnswer, u8)> {
        self.request(T_PROBE, &[])?;
        let (answer, status) = self.places.answer(&self.vring, OTHER_PLACE)?;
        Ok((ProbeAnswer::from_prefix(&answer), status))
    }

    /// Sends a request. Returns its head.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn send(&mut self, kind: u32, payload: &[u8]) -> Result<u16> {
        self.places.send(&mut self.vring, OTHER_PLACE, kind, payload)
    }

    /// Sends a request and waits for its end.
    ///
    /// # Errors
    ///
    /// It does not end.
    pub fn request(&mut self, kind: u32, payload: &[u8]) -> Result<()> {
        let head = self.send(kind, payload)?;
        while self.next_used()?.head != head {}
        Ok(())
    }

    /// Sends a request that has an outcome, and waits for the outcome.
    ///
    /// # Errors
    ///
    /// It does not end.
    pub fn outcome_of(&mut self, kind: u32, payload: &[u8]) -> Result<Found> {
        self.request(kind, payload)?;
        self.places.outcome(&self.vring, OTHER_PLACE)
    }

    /// Takes the news that every device has when queue 0 starts.
    ///
    /// # Errors
    ///
    /// The device does not tell them.
    pub fn take_first_event(&mut self) -> Result<()> {
        self.post_event()?;
        let events = self.wait_event()?;
        ensure!(events == EVENT_QUEUES, "the first EVENT says {events:#x}");
        Ok(())
    }

    /// Sends EVENT, which ends when the device has news.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn post_event(&mut self) -> Result<()> {
        self.event = Some(self.places.send(&mut self.vring, EVENT_PLACE, T_EVENT, &[])?);
        Ok(())
    }

    /// The head of the EVENT that the driver sent last and has not taken back.
    pub fn pending_event(&self) -> Option<u16> {
        self.event
    }

    /// Whether EVENT has ended. Sends PROBE to find out: the device takes the requests of a queue in their order.
    ///
    /// # Errors
    ///
    /// PROBE does not end.
    pub fn has_event_ended(&mut self) -> Result<bool> {
        self.request(T_PROBE, &[])?;
        Ok(self.has_event)
    }

    /// Waits until EVENT ends. Returns its bits.
    ///
    /// # Errors
    ///
    /// It does not end.
    pub fn wait_event(&mut self) -> Result<u32> {
        ensure!(self.event.is_some() || self.has_event, "no EVENT was posted");
        while !self.has_event {
            self.next_used()?;
        }
        self.has_event = false;
        let (answer, status) = self.places.answer(&self.vring, EVENT_PLACE)?;
        ensure!(status == 0, "EVENT has status {status}");
        let mut bytes = [0; EventAnswer::BYTES];
        bytes.copy_from_slice(&answer[..EventAnswer::BYTES]);
        Ok(EventAnswer::from_bytes(&bytes).events.get())
    }

    /// Waits for the next request that ends.
    ///
    /// # Errors
    ///
    /// None ends.
    pub fn next_used(&mut self) -> Result<Used> {
        let used = self.vring.next_used_by_spinning(PATIENCE).context("on queue 0")?;
        if self.event == Some(used.head) {
            (self.event, self.has_event) = (None, true);
        }
        Ok(used)
    }
}
