//! The message sequences of VMMs that do not run here, and of those that do, replayed message by message.
//!
//! Each was read from a named version of the VMM's source. What they differ in is what back-ends get wrong: who wants
//! acknowledgements of what, the order of a vring's messages, how the configuration space is asked for, and what a stop is.

use std::process::ExitCode;

use anyhow::{Context, Result};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::rig::{Rig, TestRam},
    harness::{self, Test, test},
    needs::Need,
};
use vhost::vhost_user::message::VHOST_USER_CONFIG_OFFSET;

use vmm::Vmm;

mod cloud_hypervisor;
mod crosvm;
mod firecracker;
mod no_protocol_features;
mod qemu;
mod vmm;

const DISK_BYTES: u64 = 4 << 20;

type Sequence = fn(&mut Vmm, &mut TestRam) -> Result<()>;

fn main() -> ExitCode {
    let sequences: [(&str, Sequence); 6] = [
        ("cloud_hypervisor_53", |vmm, ram| cloud_hypervisor::sequence(vmm, ram, 0)),
        ("cloud_hypervisor_50", |vmm, ram| cloud_hypervisor::sequence(vmm, ram, VHOST_USER_CONFIG_OFFSET)),
        ("crosvm", crosvm::sequence),
        ("firecracker", firecracker::sequence),
        ("qemu_7_2", qemu::sequence),
        ("a_front_end_without_protocol_features", no_protocol_features::sequence),
    ];
    let tests: Vec<Test> = sequences
        .into_iter()
        .map(|(name, sequence)| {
            let needs = DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
            let needs: Vec<Need> = needs.collect();
            test(format!("{name}_is_served_and_comes_back"), needs, move || replay(sequence))
        })
        .collect();
    harness::run(tests)
}

fn replay(sequence: Sequence) -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    for time in ["the first", "the second"] {
        let mut ram = TestRam::new(2, 4 << 20)?;
        let result = Vmm::connect(&rig.socket()).and_then(|mut vmm| sequence(&mut vmm, &mut ram));
        broker.explain(result.with_context(|| format!("{time} time")))?;
    }
    Ok(())
}
