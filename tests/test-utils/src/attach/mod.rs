//! The driver of queues that become rings (`docs/abi.md`), one step at a time. It keeps the rules as long as the test
//! does nothing beside it.

mod attachment;
mod driver;
mod places;
mod queue_zero;
mod ring_io;
mod words;

pub use self::{
    attachment::{Attachment, Buffers, CQ_ENTRIES, SQ_ENTRIES},
    driver::RingDriver,
    places::{Found, RequestPlaces, ok, whole},
    queue_zero::QueueZero,
    words::Words,
};
