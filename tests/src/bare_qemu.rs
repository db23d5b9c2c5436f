//! A machine in QEMU without a guest. The test itself is the driver of its vhost-user disk.
//!
//! With QEMU's test protocol (`-qtest`) a test reads and writes the machine's ports and memory. So it can write any
//! value to the registers of virtio-pci, and a real VMM sends the vhost-user messages. The machine's CPU only halts.

use std::{
    fmt::Display,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::needs::{Need, find_program};

const PROGRAM: &str = "qemu-system-x86_64";
const PATIENCE: Duration = Duration::from_secs(30);
/// The size of the firmware: a multiple of 64 KiB. The CPU begins 16 bytes before its end.
const FIRMWARE_BYTES: usize = 64 << 10;
/// CLI; HLT; and a jump back to HLT.
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
/// RAM of the machine.
pub const RAM_BYTES: u64 = 64 << 20;
/// Where the test puts the BAR with the registers: behind RAM, before the machine's own devices.
pub const BAR_ADDRESS: u64 = 0xe000_0000;
/// Device 4 on bus 0, as the ports 0xcf8 and 0xcfc have it.
const PCI_DEVICE: u32 = 0x8000_0000 | 4 << 11;

/// Registers of the configuration space (PCI), and of a capability of virtio (VIRTIO 1.2, 4.1.4).
const PCI_COMMAND: u32 = 0x04;
const PCI_COMMAND_MEMORY_AND_MASTER: u32 = 0x6;
const PCI_BAR0: u32 = 0x10;
const PCI_CAPABILITIES: u32 = 0x34;
const PCI_CAPABILITY_VENDOR: u32 = 0x09;
const CAP_COMMON: u32 = 1;
const CAP_NOTIFY: u32 = 2;

/// Fields of the common configuration (VIRTIO 1.2, 4.1.4.3).
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const DEVICE_STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
const STATUS_STEPS: [u8; 4] = [1, 3, 11, 15];

/// The values that a driver writes for its only queue.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    /// Number of descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
}

/// What this machine needs of the host.
pub fn needs() -> Vec<Need> {
    vec![Need::program(PROGRAM, "qemu-system-x86")]
}

/// A machine with one vhost-user disk. The drop kills its QEMU.
#[derive(Debug)]
pub struct BareQemu {
    child: Child,
    directory: TempDir,
    commands: BufReader<UnixStream>,
    common: u64,
    notify: u64,
}

impl BareQemu {
    /// Starts QEMU with a disk whose back-end listens at `socket`, and finds the registers of the disk.
    ///
    /// # Errors
    ///
    /// QEMU does not start, or its machine has other devices than this code expects.
    pub fn start(socket: &Path) -> Result<Self> {
        let directory = TempDir::with_prefix("ringpass-qtest-")?;
        let control = directory.path().join("qtest");
        let mut firmware = vec![0xf4; FIRMWARE_BYTES];
        firmware[FIRMWARE_BYTES - 16..][..HALT.len()].copy_from_slice(&HALT);
        let firmware_path = directory.path().join("firmware");
        std::fs::write(&firmware_path, firmware)?;
        let ram = format!("memory-backend-memfd,id=ram,size={RAM_BYTES},share=on");
        let errors = std::fs::File::create(directory.path().join("stderr"))?;
        let child = Command::new(find_program(PROGRAM).with_context(|| format!("there is no {PROGRAM}"))?)
            .args(["-M", "pc,memory-backend=ram", "-m", &format!("{}M", RAM_BYTES >> 20), "-object", &ram])
            .arg("-bios")
            .arg(firmware_path)
            .args(["-accel", "tcg", "-qtest-log", "/dev/null", "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-qtest", &format!("unix:{},server=on,wait=off", control.display())])
            .args(["-chardev", &format!("socket,id=disk,path={}", socket.display())])
            .args(["-device", "vhost-user-blk-pci,chardev=disk,num-queues=1,disable-legacy=on,addr=4"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .context("cannot start QEMU")?;
        let mut child = Killed(Some(child));
        let commands = connect(&mut child, &control).with_context(|| {
            format!("QEMU said: {}", std::fs::read_to_string(directory.path().join("stderr")).unwrap_or_default())
        })?;
        commands.set_read_timeout(Some(PATIENCE))?;
        let child = child.0.take().context("QEMU is there")?;
        let mut qemu = Self { child, directory, commands: BufReader::new(commands), common: 0, notify: 0 };
        qemu.find_registers()?;
        Ok(qemu)
    }

    /// The messages of QEMU so far.
    pub fn complaints(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
    }

    /// Resets the device and sets it up with this queue, up to DRIVER_OK.
    ///
    /// # Errors
    ///
    /// QEMU does not answer, or the device does not accept the features.
    pub fn set_up(&mut self, queue: Queue) -> Result<()> {
        self.reset()?;
        let common = self.common;
        for status in &STATUS_STEPS[..2] {
            self.write("writeb", common + DEVICE_STATUS, status)?;
        }
        // The only feature is VIRTIO_F_VERSION_1.
        for (half, features) in [(0, 0), (1, 1)] {
            self.write("writel", common + DRIVER_FEATURE_SELECT, half)?;
            self.write("writel", common + DRIVER_FEATURE, features)?;
        }
        self.write("writeb", common + DEVICE_STATUS, STATUS_STEPS[2])?;
        ensure!(self.read("readb", common + DEVICE_STATUS)? == 11, "the device does not take the features");
        self.write("writew", common + QUEUE_SELECT, 0)?;
        self.write("writew", common + QUEUE_SIZE, queue.size)?;
        for (field, address) in [(QUEUE_DESC, queue.desc), (QUEUE_DRIVER, queue.avail), (QUEUE_DEVICE, queue.used)] {
            self.write("writel", common + field, address & 0xffff_ffff)?;
            self.write("writel", common + field + 4, address >> 32)?;
        }
        self.write("writew", common + QUEUE_ENABLE, 1)?;
        self.write("writeb", common + DEVICE_STATUS, STATUS_STEPS[3])
    }

    /// Resets the device.
    ///
    /// # Errors
    ///
    /// The device does not reset.
    pub fn reset(&mut self) -> Result<()> {
        let status = self.common + DEVICE_STATUS;
        self.write("writeb", status, 0)?;
        ensure!(self.read("readb", status)? == 0, "the device is not reset");
        Ok(())
    }

    /// Rings the doorbell of the queue.
    ///
    /// # Errors
    ///
    /// QEMU does not answer.
    pub fn notify(&mut self) -> Result<()> {
        let notify = self.notify;
        self.write("writew", notify, 0)
    }

    /// Writes RAM.
    ///
    /// # Errors
    ///
    /// QEMU does not answer.
    pub fn write_ram(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.command(&format!("write {address:#x} {:#x} 0x{hex}", bytes.len())).map(drop)
    }

    /// Reads RAM.
    ///
    /// # Errors
    ///
    /// QEMU does not answer.
    pub fn read_ram(&mut self, address: u64, len_bytes: usize) -> Result<Vec<u8>> {
        let answer = self.command(&format!("read {address:#x} {len_bytes:#x}"))?;
        let hex = answer.strip_prefix("0x").with_context(|| format!("an answer {answer:?}"))?;
        let bytes = (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16));
        Ok(bytes.collect::<Result<_, _>>()?)
    }

    fn find_registers(&mut self) -> Result<()> {
        // BAR 4 has 64 bits and holds everything.
        self.write_pci(PCI_BAR0 + 4 * 4, BAR_ADDRESS as u32)?;
        self.write_pci(PCI_BAR0 + 5 * 4, (BAR_ADDRESS >> 32) as u32)?;
        self.write_pci(PCI_COMMAND, PCI_COMMAND_MEMORY_AND_MASTER)?;
        let mut at = self.read_pci(PCI_CAPABILITIES)? & 0xff;
        let (mut common, mut notify) = (None, None);
        while at != 0 {
            let header = self.read_pci(at)?;
            if header & 0xff == PCI_CAPABILITY_VENDOR {
                let (kind, offset) = (header >> 24, u64::from(self.read_pci(at + 8)?));
                match kind {
                    CAP_COMMON => common = Some(BAR_ADDRESS + offset),
                    CAP_NOTIFY => notify = Some((BAR_ADDRESS + offset, u64::from(self.read_pci(at + 16)?))),
                    _ => {}
                }
            }
            at = header >> 8 & 0xff;
        }
        self.common = common.context("the device has no common configuration")?;
        self.write("writew", self.common + QUEUE_SELECT, 0)?;
        let offset = self.read("readw", self.common + QUEUE_NOTIFY_OFF)?;
        let (notify, multiplier) = notify.context("the device has no doorbells")?;
        self.notify = notify + offset * multiplier;
        Ok(())
    }

    fn read_pci(&mut self, register: u32) -> Result<u32> {
        self.write("outl", 0xcf8, PCI_DEVICE | register)?;
        Ok(u32::try_from(self.read("inl", 0xcfc)?)?)
    }

    fn write_pci(&mut self, register: u32, value: u32) -> Result<()> {
        self.write("outl", 0xcf8, PCI_DEVICE | register)?;
        self.write("outl", 0xcfc, value)
    }

    fn write(&mut self, command: &str, address: u64, value: impl Display) -> Result<()> {
        self.command(&format!("{command} {address:#x} {value}")).map(drop)
    }

    fn read(&mut self, command: &str, address: u64) -> Result<u64> {
        let answer = self.command(&format!("{command} {address:#x}"))?;
        let hex = answer.strip_prefix("0x").with_context(|| format!("an answer {answer:?}"))?;
        Ok(u64::from_str_radix(hex, 16)?)
    }

    /// Sends a command, and returns the answer behind OK.
    fn command(&mut self, command: &str) -> Result<String> {
        self.commands.get_mut().write_all(format!("{command}\n").as_bytes())?;
        loop {
            let mut line = String::new();
            let length = self.commands.read_line(&mut line).with_context(|| command.to_owned())?;
            ensure!(length > 0, "{command}: QEMU has ended: {}", self.complaints());
            match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
                ("OK", answer) => return Ok(answer.to_owned()),
                // An interrupt.
                ("IRQ", _) => {}
                _ => bail!("{command}: {line:?}"),
            }
        }
    }
}

impl Drop for BareQemu {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A child process. The drop kills it unless it was taken out.
struct Killed(Option<Child>);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
        eprintln!("QEMU cannot be ended: {error}");
    }
}

fn connect(child: &mut Killed, path: &PathBuf) -> Result<UnixStream> {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return Ok(stream);
        }
        if let Some(status) = child.0.as_mut().and_then(|child| child.try_wait().transpose()).transpose()? {
            bail!("QEMU ended at once: {status}");
        }
        ensure!(Instant::now() < end, "QEMU makes no socket in {PATIENCE:?}");
        thread::sleep(Duration::from_millis(5));
    }
}
