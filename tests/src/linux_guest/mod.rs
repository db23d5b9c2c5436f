//! A Linux guest in QEMU: an unmodified kernel with its own virtio-blk driver.
//!
//! ```no_run
//! use std::{path::Path, time::Duration};
//! use ringpass_tests::linux_guest::{LinuxGuest, LinuxGuestConfig, VhostUserDisk};
//!
//! # fn main() -> anyhow::Result<()> {
//! let disk = VhostUserDisk::new("disk", Path::new("/run/broker.sock"));
//! let mut guest = LinuxGuest::boot(&LinuxGuestConfig { disks: vec![disk], ..LinuxGuestConfig::default() })?;
//! guest.run("mkfs.ext4 -q /dev/vda && e2fsck -fn /dev/vda")?;
//! let job = guest.spawn("fio --name=job --filename=/dev/vda --rw=randread --runtime=5 --time_based")?;
//! guest.pause_and_resume()?;
//! guest.wait(job, Duration::from_secs(30))?;
//! guest.shut_down()
//! # }
//! ```
//!
//! The guest's only programs are those of its initramfs. The guest runs on KVM if Linux boots under it, otherwise QEMU
//! emulates the CPU (TCG). Every wait has a limit. An error has the end of the guest's console.

mod agent;
pub mod cached;
mod config;
pub mod fio;
mod firmware;
mod image;
pub mod interrupts;
mod machine;
pub mod memory;
mod migration;
pub mod on_rings;
pub mod programs;
mod qmp;
mod shell;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use config::{Accelerator, Start};
use machine::Machine;
use serde_json::{Value, json};

pub use agent::{Job, JobOutput};
pub use config::{LinuxGuestConfig, VhostUserDisk};
pub use firmware::FirmwareGuest;
pub use image::{BlockDriver, GuestImage, KernelSeries};
pub use migration::{IncomingGuest, Migration};

use crate::{interruption, needs::Need};

/// How long a guest may take to boot. On an idle machine it takes two or three seconds under TCG.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// The same for the first trial of KVM. If KVM works, the guest boots much faster.
const KVM_TRIAL_LIMIT: Duration = Duration::from_secs(20);
/// How long [`LinuxGuest::run`] waits for a script.
const SCRIPT_LIMIT: Duration = Duration::from_secs(60);
/// How long a device may take to appear or vanish, and QEMU to end.
const DEVICE_LIMIT: Duration = Duration::from_secs(30);

/// What a Linux guest needs of the machine.
pub fn needs() -> Vec<Need> {
    let mut needs = GuestImage::needs();
    needs.push(Need::program(machine::PROGRAM, "qemu-system-x86"));
    needs
}

/// A running guest. The drop kills its QEMU.
#[derive(Debug)]
pub struct LinuxGuest {
    machine: Machine,
}

impl LinuxGuest {
    /// Boots a guest, and waits until its agent takes scripts.
    ///
    /// # Errors
    ///
    /// The image cannot be made, QEMU does not start, or the guest does not boot.
    pub fn boot(config: &LinuxGuestConfig) -> Result<Self> {
        let image = GuestImage::of(config.kernel)?;
        let accelerator = if config.tcg_plugin.is_some() { Accelerator::Tcg } else { accelerator(&image)? };
        Self::boot_on(config, &image, accelerator, BOOT_LIMIT)
    }

    fn boot_on(
        config: &LinuxGuestConfig,
        image: &GuestImage,
        accelerator: Accelerator,
        limit: Duration,
    ) -> Result<Self> {
        let start = Instant::now();
        let machine = Machine::start(config, &Start::Kernel(image), accelerator)?;
        let mut guest = Self { machine };
        guest.wait_for_boot(1, limit)?;
        eprintln!("the guest is up after {:.1} s on {accelerator:?}", start.elapsed().as_secs_f64());
        Ok(guest)
    }

    fn wait_for_boot(&mut self, count: u32, limit: Duration) -> Result<()> {
        self.machine.wait_until("the guest to come up", limit, |agent| (agent.boots() >= count).then_some(()))
    }

    /// Runs a script (of busybox's shell) to its end, for at most a minute, and returns its output.
    ///
    /// # Errors
    ///
    /// The exit status of the script is not 0, or the script does not end. Use `set -e` for a script of several
    /// commands.
    pub fn run(&mut self, script: &str) -> Result<String> {
        let job = self.spawn(script)?;
        self.wait(job, SCRIPT_LIMIT)
    }

    /// Starts a script. Other scripts may run at the same time.
    ///
    /// # Errors
    ///
    /// QEMU has ended.
    pub fn spawn(&mut self, script: &str) -> Result<Job> {
        self.machine.agent.send(script)
    }

    /// Waits for the end of a script, and returns its output.
    ///
    /// # Errors
    ///
    /// The exit status of the script is not 0, or the script does not end in this time.
    pub fn wait(&mut self, job: Job, limit: Duration) -> Result<String> {
        let output = self.wait_output(job, limit)?;
        ensure!(output.status == 0, "a script ended with status {}:\n{}", output.status, output.text);
        Ok(output.text)
    }

    /// Waits for the end of a script that may fail.
    ///
    /// # Errors
    ///
    /// The script does not end in this time.
    pub fn wait_output(&mut self, job: Job, limit: Duration) -> Result<JobOutput> {
        self.machine.wait_until("a script to end", limit, |agent| agent.take_ended(job))
    }

    /// Waits until a running script has written this.
    ///
    /// # Errors
    ///
    /// The script does not write it in this time.
    pub fn wait_for_text(&mut self, job: Job, text: &str, limit: Duration) -> Result<()> {
        let what = format!("a script to write {text:?}");
        self.machine.wait_until(&what, limit, |agent| agent.output_so_far(job).contains(text).then_some(()))
    }

    /// The output of a running script so far. Does not wait: the other functions take what the guest sends.
    pub fn output_so_far(&self, job: Job) -> &str {
        self.machine.agent.output_so_far(job)
    }

    /// Whether a script has ended in any way. Does not wait.
    ///
    /// # Errors
    ///
    /// QEMU or the guest's kernel ends.
    pub fn has_ended(&mut self, job: Job) -> Result<bool> {
        self.machine.take_output(Instant::now())?;
        Ok(self.machine.agent.has_ended(job))
    }

    /// Lets the guest run for this long, and takes its output.
    ///
    /// # Errors
    ///
    /// QEMU or the guest's kernel ends.
    pub fn let_run(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.machine.take_output(end)?;
        }
        Ok(())
    }

    /// Executes a command of QEMU's monitor (QMP).
    ///
    /// # Errors
    ///
    /// QEMU refuses it.
    pub fn qmp(&mut self, command: Value) -> Result<Value> {
        self.machine.qmp.execute(command)
    }

    /// Stops the virtual machine, which stops its virtqueues, and continues it.
    ///
    /// # Errors
    ///
    /// QEMU refuses, or does not answer.
    pub fn pause_and_resume(&mut self) -> Result<()> {
        self.qmp(json!({"execute": "stop"}))?;
        self.qmp(json!({"execute": "cont"}))?;
        Ok(())
    }

    /// Pushes the reset button, and waits until the guest has booted again. All scripts have ended then.
    ///
    /// # Errors
    ///
    /// The guest does not boot.
    pub fn reset(&mut self) -> Result<()> {
        let boots = self.machine.agent.boots();
        self.qmp(json!({"execute": "system_reset"}))?;
        self.wait_for_boot(boots + 1, BOOT_LIMIT)
    }

    /// Runs a script that ends this kernel (`reboot -f`, kexec), and waits until the guest has booted again. All scripts
    /// have ended then.
    ///
    /// # Errors
    ///
    /// The guest does not boot.
    pub fn boot_again_by(&mut self, script: &str) -> Result<()> {
        let boots = self.machine.agent.boots();
        self.spawn(script)?;
        self.wait_for_boot(boots + 1, BOOT_LIMIT)
    }

    /// Unplugs a device, and waits until the guest has released it.
    ///
    /// # Errors
    ///
    /// There is no such device, or the guest does not release it.
    pub fn unplug(&mut self, id: &str) -> Result<()> {
        self.qmp(json!({"execute": "device_del", "arguments": {"id": id}}))?;
        let end = Instant::now() + DEVICE_LIMIT;
        loop {
            let data = self.machine.qmp.wait_event("DEVICE_DELETED", end.saturating_duration_since(Instant::now()))?;
            if data["device"] == id {
                return Ok(());
            }
        }
    }

    /// Plugs in a disk again that was [unplugged](Self::unplug), over the same connection.
    ///
    /// # Errors
    ///
    /// QEMU refuses.
    pub fn plug(&mut self, disk: &VhostUserDisk) -> Result<()> {
        let mut arguments = json!({
            "driver": "vhost-user-blk-pci", "id": disk.id, "chardev": disk.socket_id(), "bus": disk.port(),
            "num-queues": disk.queues,
        });
        for property in &disk.properties {
            let Some((name, value)) = property.split_once('=') else { bail!("{property:?} is not NAME=VALUE") };
            arguments[name] = Value::from(value);
        }
        self.qmp(json!({"execute": "device_add", "arguments": arguments})).map(drop)
    }

    /// The output of the firmware and the kernel so far.
    pub fn console(&self) -> String {
        self.machine.console()
    }

    /// Powers the guest off from inside, and waits until QEMU has ended.
    ///
    /// # Errors
    ///
    /// QEMU does not end, or the guest's kernel has reported trouble (a warning, a stall) since it booted.
    pub fn shut_down(mut self) -> Result<()> {
        self.spawn("poweroff -f")?;
        let status = self.machine.wait_end(DEVICE_LIMIT)?;
        ensure!(status.success(), "QEMU: {status}\n{}", self.machine.describe());
        let trouble = self.machine.kernel_trouble();
        ensure!(trouble.is_empty(), "the guest's kernel complained:\n    {}", trouble.join("\n    "));
        Ok(())
    }
}

/// KVM, if a Linux guest boots under it. This is tried once in each boot of this machine.
fn accelerator(image: &GuestImage) -> Result<Accelerator> {
    image::remembered_per_boot("kvm", || {
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok("no".to_owned());
        }
        let config = LinuxGuestConfig { memory_mib: 256, ..LinuxGuestConfig::default() };
        match LinuxGuest::boot_on(&config, image, Accelerator::Kvm, KVM_TRIAL_LIMIT) {
            Ok(_) => Ok("yes".to_owned()),
            Err(error) => {
                // The user may have ended the trial.
                interruption::check()?;
                eprintln!("guests run without KVM: {error:#}");
                Ok("no".to_owned())
            }
        }
    })
    .map(|answer| if answer == "yes" { Accelerator::Kvm } else { Accelerator::Tcg })
}
