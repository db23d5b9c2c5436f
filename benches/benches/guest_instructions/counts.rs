//! Which part of the guest's kernel executed how many instructions.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use ringpass_tests::linux_guest::LinuxGuest;
use serde::Serialize;

use super::{plugin::Counts, workload::Workload};

/// The modules of the two drivers.
const DRIVERS: [&str; 2] = ["virtio_blk", "ringpass_blk"];
/// Addresses from here on are the kernel's.
const KERNEL_START: u64 = 1 << 63;

/// The functions of the drivers and of the virtio core, by address.
#[derive(Debug)]
pub(crate) struct Symbols(BTreeMap<u64, Symbol>);

#[derive(Debug)]
struct Symbol {
    name: String,
    part: Option<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Driver,
    VirtioCore,
}

/// The instructions of all reads.
#[derive(Debug, Default)]
pub(crate) struct Attributed {
    driver: u64,
    virtio_core: u64,
    kernel: u64,
    functions: HashMap<String, u64>,
}

/// The figures of a workload: instructions of the guest for each read.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    driver_name: &'static str,
    workload: String,
    /// In the driver's module.
    driver: f64,
    /// In the virtio core: virtqueues, and the transport.
    virtio_core: f64,
    /// In the kernel, with the two above.
    kernel: f64,
    interrupts: f64,
    functions: BTreeMap<String, f64>,
}

impl Symbols {
    /// Reads the addresses from the guest's kernel.
    pub(crate) fn read(guest: &mut LinuxGuest) -> Result<Self> {
        // All symbols would take a minute on the serial port. The next symbol says where a function ends.
        let lines = guest.run(
            "echo 0 >/proc/sys/kernel/kptr_restrict
            sort /proc/kallsyms | grep -iE -A1 ' t (virtqueue_|vring_|vp_|virtio|detach_buf_|more_used)|\\[(virtio|ringpass).*\\]$'",
        )?;
        let mut symbols = BTreeMap::new();
        for line in lines.lines().filter(|line| !line.starts_with("--")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (Some(address), Some(name)) = (words.first(), words.get(2)) else { continue };
            let address = u64::from_str_radix(address, 16).with_context(|| format!("a symbol: {line:?}"))?;
            let module = words.get(3).map(|module| module.trim_matches(['[', ']']));
            symbols.insert(address, Symbol { name: (*name).to_owned(), part: part(name, module) });
        }
        ensure!(
            symbols.values().any(|symbol| symbol.part == Some(Part::Driver)),
            "the guest has no driver as a module"
        );
        Ok(Self(symbols))
    }

    /// What was executed between two looks.
    pub(crate) fn attribute(&self, before: &Counts, after: &Counts) -> Attributed {
        let mut attributed = Attributed::default();
        for (&address, &executed) in after {
            let executed = executed - before.get(&address).copied().unwrap_or(0);
            if address < KERNEL_START || executed == 0 {
                continue;
            }
            attributed.kernel += executed;
            let Some((_, symbol)) = self.0.range(..=address).next_back() else { continue };
            match symbol.part {
                Some(Part::Driver) => attributed.driver += executed,
                Some(Part::VirtioCore) => attributed.virtio_core += executed,
                None => continue,
            }
            *attributed.functions.entry(symbol.name.clone()).or_default() += executed;
        }
        attributed
    }
}

fn part(name: &str, module: Option<&str>) -> Option<Part> {
    match module {
        Some(module) if DRIVERS.contains(&module) => Some(Part::Driver),
        Some(module) if module.starts_with("virtio") => Some(Part::VirtioCore),
        Some(_) => None,
        None => ["virtqueue_", "vring_", "vp_", "virtio", "detach_buf_", "more_used"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
            .then_some(Part::VirtioCore),
    }
}

impl Row {
    pub(crate) fn new(workload: &Workload, is_ours: bool, reads: u32, interrupts: u64, counted: Attributed) -> Self {
        let each = |count: u64| count as f64 / f64::from(reads);
        Self {
            driver_name: DRIVERS[usize::from(is_ours)],
            workload: workload.to_string(),
            driver: each(counted.driver),
            virtio_core: each(counted.virtio_core),
            kernel: each(counted.kernel),
            interrupts: each(interrupts),
            functions: counted.functions.into_iter().map(|(name, count)| (name, each(count))).collect(),
        }
    }
}

/// Prints a table, and what each function takes.
pub(crate) fn print(rows: &[Row], with_functions: bool) {
    println!("Instructions of the guest for each read:\n");
    println!(
        "{:<30} {:<13} {:>8} {:>12} {:>8} {:>8} {:>11}",
        "", "", "driver", "virtio core", "both", "kernel", "interrupts"
    );
    let mut rows: Vec<&Row> = rows.iter().collect();
    // The two drivers of a workload one below the other.
    let order: Vec<String> = rows.iter().map(|row| row.workload.clone()).collect();
    rows.sort_by_key(|row| order.iter().position(|workload| *workload == row.workload));
    for row in rows {
        let both = row.driver + row.virtio_core;
        println!(
            "{:<30} {:<13} {:>8.0} {:>12.0} {both:>8.0} {:>8.0} {:>11.2}",
            row.workload, row.driver_name, row.driver, row.virtio_core, row.kernel, row.interrupts
        );
        if with_functions {
            let mut functions: Vec<_> = row.functions.iter().collect();
            functions.sort_by(|one, other| other.1.total_cmp(one.1));
            for (name, count) in functions.iter().filter(|(_, count)| **count >= 1.0) {
                println!("    {name:<40} {count:>8.0}");
            }
        }
    }
}
