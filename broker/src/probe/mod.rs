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

/// Observes this machine and judges what was seen.
///
/// Makes and closes a dozen small rings, one or two of which have an SQ thread; takes about a tenth of a second.
///
/// # Errors
///
/// [`FactsError`] if the kernel's version or this process's limits cannot be read.
pub fn run() -> Result<Report, FactsError> {
    Ok(Report::judge(&Facts::observe()?))
}

#[cfg(test)]
mod tests;
