//! The devices of a virtual machine, and the command line of QEMU for them.

use std::path::{Path, PathBuf};

use super::image::{BlockDriver, GuestImage, KernelSeries};

/// The devices of a guest.
#[derive(Clone, Debug)]
pub struct LinuxGuestConfig {
    /// The kernel to boot.
    pub kernel: KernelSeries,
    /// The guest's RAM in MiB: one memfd, shared with the back-ends.
    pub memory_mib: u32,
    /// A file on tmpfs of that length, which replaces the memfd as the guest's RAM.
    pub memory_file: Option<PathBuf>,
    /// The most RAM of the guest with plugged memory, in MiB, for devices that bring memory and for memory in slots.
    pub memory_max_mib: Option<u32>,
    /// The number of virtual CPUs.
    pub cpus: u32,
    /// Disks whose back-ends are other processes, each behind a PCIe port of its own, so that it can be unplugged. They
    /// are `/dev/vda`, `/dev/vdb`, … in this order.
    pub disks: Vec<VhostUserDisk>,
    /// Objects that devices need, as values of QEMU's `-object`.
    pub objects: Vec<String>,
    /// Further devices, as values of QEMU's `-device`.
    pub devices: Vec<String>,
    /// Further words of the kernel's command line.
    pub kernel_arguments: Vec<String>,
    /// A kernel (`bzImage`) to boot instead of the one of [`kernel`](Self::kernel). The guest does not have its
    /// modules, so the needed drivers must be built in.
    pub kernel_image: Option<PathBuf>,
    /// Further statically linked programs of the guest, in `/sbin`.
    pub programs: Vec<PathBuf>,
    /// The block driver that the guest loads instead of the kernel's own, for the same kernel.
    pub block_driver: Option<BlockDriver>,
    /// Parameters of the block driver: `poll_queues=1`.
    pub block_driver_parameters: String,
    /// Files for devices of QEMU's own, as values of QEMU's `-blockdev`.
    pub block_nodes: Vec<String>,
    /// A plugin of QEMU's emulator, as the value of `-plugin`. The guest then runs without KVM.
    pub tcg_plugin: Option<String>,
}

impl Default for LinuxGuestConfig {
    fn default() -> Self {
        Self {
            kernel: KernelSeries::Linux6_12,
            memory_mib: 512,
            memory_file: None,
            memory_max_mib: None,
            cpus: 2,
            disks: Vec::new(),
            objects: Vec::new(),
            devices: Vec::new(),
            kernel_arguments: Vec::new(),
            kernel_image: None,
            programs: Vec::new(),
            block_driver: None,
            block_driver_parameters: String::new(),
            block_nodes: Vec::new(),
            tcg_plugin: None,
        }
    }
}

impl LinuxGuestConfig {
    /// Whether the guest needs another initramfs than that of its image.
    pub(super) fn has_own_initramfs(&self) -> bool {
        !self.programs.is_empty() || self.block_driver.is_some()
    }
}

/// A disk of a guest that a vhost-user-blk back-end serves.
#[derive(Clone, Debug)]
pub struct VhostUserDisk {
    /// The id of the device for QEMU's monitor. Its character device is `<id>-socket`, its PCIe port `<id>-port`.
    pub id: String,
    /// The socket on which the back-end listens.
    pub socket: PathBuf,
    /// The number of virtqueues. 0: QEMU chooses one for each CPU.
    pub queues: u16,
    /// Whether QEMU connects again, once a second, when the back-end has disconnected.
    pub reconnect: bool,
    /// Further properties of the device: `config-wce=off`.
    pub properties: Vec<String>,
}

impl VhostUserDisk {
    /// A disk with two queues that does not connect again.
    pub fn new(id: &str, socket: &Path) -> Self {
        Self { id: id.to_owned(), socket: socket.to_owned(), queues: 2, reconnect: false, properties: Vec::new() }
    }

    /// The id of the PCIe port into which the device can be plugged.
    pub fn port(&self) -> String {
        format!("{}-port", self.id)
    }

    /// The id of the character device.
    pub fn socket_id(&self) -> String {
        format!("{}-socket", self.id)
    }

    /// The value of `-chardev`.
    fn chardev(&self, qemu: Version) -> String {
        let reconnect = match (self.reconnect, qemu) {
            (false, _) => "",
            // QEMU 9.2 has an option with a finer unit, and QEMU 10.2 no longer has the old one.
            (true, qemu) if qemu < Version(9, 2) => ",reconnect=1",
            (true, _) => ",reconnect-ms=1000",
        };
        format!("socket,id={},path={}{reconnect}", self.socket_id(), value(&self.socket))
    }

    /// The value of `-device`.
    fn device(&self) -> String {
        let properties: String = self.properties.iter().map(|property| format!(",{property}")).collect();
        let queues = if self.queues == 0 { String::new() } else { format!(",num-queues={}", self.queues) };
        format!(
            "vhost-user-blk-pci,id={},chardev={},bus={}{queues}{properties}",
            self.id,
            self.socket_id(),
            self.port()
        )
    }
}

/// The executor of the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    /// QEMU itself emulates the CPU.
    Tcg,
}

/// The version of QEMU, major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32);

impl Version {
    /// From the first line of `qemu-system-x86_64 --version`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let numbers = text.split_once("version ")?.1;
        let mut parts = numbers.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self(parts.next()?.ok()?, parts.next()?.ok()?))
    }
}

/// The paths of the sockets and files of one QEMU.
#[derive(Debug)]
pub(super) struct Places<'a>(pub(super) &'a Path);

impl Places<'_> {
    pub(super) fn qmp(&self) -> PathBuf {
        self.0.join("qmp")
    }

    pub(super) fn agent(&self) -> PathBuf {
        self.0.join("agent")
    }

    /// The output of the firmware and the kernel.
    pub(super) fn console(&self) -> PathBuf {
        self.0.join("console")
    }

    /// The image's initramfs with the further programs, if there are any.
    pub(super) fn initramfs(&self) -> PathBuf {
        self.0.join("initramfs")
    }

    pub(super) fn stderr(&self) -> PathBuf {
        self.0.join("stderr")
    }
}

/// What QEMU boots.
#[derive(Debug)]
pub(super) enum Start<'a> {
    Kernel(&'a GuestImage),
    /// The same machine, waiting for a guest that migrates to it.
    Incoming(&'a GuestImage),
    /// The firmware boots the first disk.
    Firmware,
}

/// The arguments of QEMU.
pub(super) fn arguments(
    config: &LinuxGuestConfig,
    start: &Start<'_>,
    accelerator: Accelerator,
    qemu: Version,
    places: &Places<'_>,
) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-M", "q35,memory-backend=ram", "-nodefaults", "-no-user-config", "-display", "none"]);
    match accelerator {
        Accelerator::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
        // This CPU has everything that Debian's programs need, and little that costs time to emulate. It lacks
        // CMPXCHG16B: QEMU before 8.0 computes wrong flags for it if an interrupt has returned shortly before
        // (`helper_cmpxchg16b_unlocked` reads a `cc_op` that was not written back). TF may then be set, and the kernel
        // dies in its allocator. One thread emulates all CPUs: with one thread for each, kernels have died of an INT3
        // that another CPU had put into code for a moment while it patched that code.
        Accelerator::Tcg => add(&["-accel", "tcg,thread=single", "-cpu", "Nehalem,-cx16"]),
    }
    let memory_mib = config.memory_mib;
    let most = config.memory_max_mib.map(|mib| format!(",slots=4,maxmem={mib}M")).unwrap_or_default();
    add(&["-smp", &config.cpus.to_string(), "-m", &format!("{memory_mib}M{most}")]);
    let backend = match &config.memory_file {
        None => "memory-backend-memfd".to_owned(),
        Some(file) => format!("memory-backend-file,mem-path={}", value(file)),
    };
    add(&["-object", &format!("{backend},id=ram,size={memory_mib}M,share=on")]);
    add(&["-qmp", &format!("unix:{},server=on,wait=off", value(&places.qmp()))]);
    add(&["-serial", &format!("file:{}", value(&places.console()))]);
    add(&["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", value(&places.agent()))]);
    add(&["-serial", "chardev:agent"]);
    match start {
        Start::Kernel(image) | Start::Incoming(image) => {
            let mut command_line = String::from(
                "console=ttyS0 loglevel=5 oops=panic panic=0 mitigations=off nokaslr tsc=reliable no_timer_check",
            );
            for argument in &config.kernel_arguments {
                command_line.push(' ');
                command_line.push_str(argument);
            }
            // The kernel passes words that it does not know to the first program, as environment variables.
            if let Some(driver) = &config.block_driver {
                command_line.push_str(&format!(" block_driver={}", driver.name()));
            }
            if !config.block_driver_parameters.is_empty() {
                command_line.push_str(&format!(" block_driver_parameters={}", config.block_driver_parameters));
            }
            let kernel = config.kernel_image.as_deref().unwrap_or(image.kernel());
            let with_programs = places.initramfs();
            let initramfs = if config.has_own_initramfs() { &with_programs } else { image.initramfs() };
            add(&["-kernel", &kernel.to_string_lossy(), "-initrd", &initramfs.to_string_lossy()]);
            add(&["-append", &command_line]);
        }
        Start::Firmware => {}
    }
    if let Start::Incoming(_) = start {
        add(&["-incoming", "defer"]);
    }
    for (disk, slot) in config.disks.iter().zip(1..) {
        let chassis: u32 = slot;
        add(&["-device", &format!("pcie-root-port,id={},chassis={chassis},slot={slot}", disk.port())]);
        add(&["-chardev", &disk.chardev(qemu), "-device", &disk.device()]);
    }
    for object in &config.objects {
        add(&["-object", object]);
    }
    if let Some(plugin) = &config.tcg_plugin {
        add(&["-plugin", plugin]);
    }
    for node in &config.block_nodes {
        add(&["-blockdev", node]);
    }
    for device in &config.devices {
        add(&["-device", device]);
    }
    arguments
}

/// A path as the value of an option. It doubles commas, which separate values.
fn value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_parses_the_output_of_qemu() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022\n";
        assert_eq!(Version::parse(text), Some(Version(7, 2)));
        assert_eq!(Version::parse("QEMU emulator version 10.0.2"), Some(Version(10, 0)));
        assert_eq!(Version::parse("something else"), None);
    }

    #[test]
    fn a_disk_has_the_reconnect_option_of_its_qemu() {
        let disk = VhostUserDisk { reconnect: true, ..VhostUserDisk::new("disk", Path::new("/tmp/a,b")) };
        assert_eq!(disk.chardev(Version(7, 2)), "socket,id=disk-socket,path=/tmp/a,,b,reconnect=1");
        assert_eq!(disk.chardev(Version(9, 2)), "socket,id=disk-socket,path=/tmp/a,,b,reconnect-ms=1000");
    }
}
