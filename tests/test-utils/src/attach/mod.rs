//! The driver of queues that become rings (`docs/abi.md`), one step at a time. It keeps the rules as long as the test
//! does nothing beside it.

mod attachment;
mod driver;
mod first_queue;
mod places;
mod ring_io;
mod words;

pub use self::{
    attachment::{Attachment, Buffers, CQ_ENTRIES, SQ_ENTRIES},
    driver::RingDriver,
    first_queue::FirstQueue,
    places::{Found, RequestPlaces, ok, whole},
    words::Words,
};
