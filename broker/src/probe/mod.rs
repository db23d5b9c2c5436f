//! What this kernel and these limits allow, and for everything that is missing, why and what to change.
//!
//! [`Facts`] are what was observed: settings, limits, and the outcome of trying each thing with throw-away rings.
//! [`Report`] is what follows from them, without looking at the machine again; so every refusal can be tested from
//! made-up facts.

mod access;
mod facts;
mod feature;
mod limits;
#[cfg(feature = "kvm")]
mod machines;
mod modes;
mod report;
mod trial;

pub use facts::{Facts, FactsError, HugePagePool, Outcome, Sysctl};
pub use feature::Feature;
pub use report::{Check, HoleReport, KernelReport, Mode, ModeName, Report, Status};

use crate::engine::EngineShape;
pub use crate::processes::{NoProc, require_proc};

/// The server for which a machine is judged: what is available is what that server can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Server {
    /// It gives up its privileges before it makes a ring, as [`without_privileges`](crate::privileges::without_privileges) does.
    pub is_confined: bool,
    /// Its workers.
    pub engine: EngineShape,
    /// Whether it may offer rings to guests. If not, what only these need is not tried.
    pub may_offer_rings: bool,
}

/// Observes this machine as that server will find it, and judges what was seen.
///
/// Limits count as they are: a program that raises them does so before. Makes and closes a dozen small rings, one or two of
/// which have an SQ thread; takes about a tenth of a second.
///
/// # Errors
///
/// [`FactsError`] if the kernel's version or this process's limits cannot be read.
pub fn run(server: &Server) -> Result<Report, FactsError> {
    Ok(Report::judge(&Facts::observe(server)?))
}

#[cfg(test)]
impl Server {
    pub(crate) fn for_tests() -> Self {
        let engine = EngineShape { queues: 1, queue_size: 64, workers: Some(1) };
        Self { is_confined: true, engine, may_offer_rings: true }
    }
}

#[cfg(test)]
mod tests;
