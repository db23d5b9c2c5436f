//! What this kernel and these limits allow, and for each missing ability the reason and what to change.
//!
//! [`Facts`] are the observations: settings, limits, and the outcome of trying each ability with throw-away rings.
//! [`Report`] is the conclusion from them. It does not look at the machine again, so tests can check every refusal with
//! made-up facts.

mod access;
mod check;
mod facts;
mod feature;
mod limits;
#[cfg(feature = "kvm")]
mod machines;
mod mode_name;
mod modes;
mod outcome;
mod report;
mod trial;

pub use check::{Check, Status};
pub use facts::{Facts, FactsError, HugePagePool, Sysctl};
pub use feature::Feature;
pub use mode_name::ModeName;
pub use modes::Mode;
pub use outcome::Outcome;
pub use report::{HoleReport, KernelReport, Report};

use crate::engine::EngineShape;
pub use crate::processes::{NoProc, require_proc};

/// The server for which a machine is judged: an ability is available if that server can use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Server {
    /// The server gives up its privileges before it makes a ring, as
    /// [`without_privileges`](crate::privileges::without_privileges) does.
    pub is_confined: bool,
    /// The workers of the server.
    pub engine: EngineShape,
    /// Whether the server may offer rings to guests. If not, abilities that only these rings need are not tried.
    pub may_offer_rings: bool,
}

impl Server {
    /// A server that gives up its privileges and may offer rings.
    pub fn new(engine: EngineShape) -> Self {
        Self { is_confined: true, engine, may_offer_rings: true }
    }

    /// Sets [`is_confined`](Self#structfield.is_confined).
    #[must_use]
    pub fn is_confined(self, is_confined: bool) -> Self {
        Self { is_confined, ..self }
    }

    /// Sets [`may_offer_rings`](Self#structfield.may_offer_rings).
    #[must_use]
    pub fn may_offer_rings(self, may_offer_rings: bool) -> Self {
        Self { may_offer_rings, ..self }
    }
}

/// Observes this machine as that server will find it, and judges the observations.
///
/// Limits count as they are: a program that raises them does so before. Makes and closes a dozen small rings, of which
/// one or two have an SQ thread; takes about a tenth of a second.
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
