//! Replays the message sequences of VMMs message by message, also of those that do not run here.
//!
//! Each sequence comes from a named version of the VMM's source. The VMMs differ in points that back-ends get wrong:
//! which messages they want acknowledged, the order of a vring's messages, how they read the configuration space, and
//! how they stop a vring.

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
            test(format!("the_broker_serves_{name}_twice"), needs, move || replay(sequence))
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
