//! The options of `ringpass serve` and `vhost-user-ringpass`.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{ArgGroup, Args, ValueEnum};
use ringpass_broker::disk::{DirectIo, DiskConfig, LogicalBlock, StartUp};
use ringpass_broker::engine::EngineShape;
use ringpass_broker::probe;
use ringpass_broker::vhost_user::{BoundSocket, Server, ServerError, SocketAccess};
use ringpass_broker::virtio_blk::Serial;

use super::access::AccessArgs;
use super::control::ControlArgs;
use super::rings::{ModeArg, RingArgs};
use super::sandbox::SandboxArgs;
use super::size::size_bytes;

/// vhost-user numbers queues with a byte. The default offers all of them: the number must not depend on the host,
/// because a guest keeps its queues when it migrates.
const QUEUES_MAX: u16 = 256;
/// The size that most front-ends ask for.
const QUEUE_SIZE_DEFAULT: u16 = 256;
/// A longer time is most likely given in the wrong unit.
const POLL_MAX_US: u64 = 1_000_000;
/// The highest CPU number that Linux supports.
const CPU_MAX: usize = 8191;

/// Help text after the options.
const HELP: &str = "\
Signals: SIGTERM and SIGINT end the server when I/O has finished. A second SIGTERM or SIGINT more than a second later, or SIGQUIT, \
ends the server at once. After SIGHUP the server reads the size of the disk again (after a resize; images up to --max-size) and tells the guest. The server \
ignores other signals. It removes its socket files at the end, except after SIGKILL or a crash; the next start replaces them.

Logs go to standard error. RUST_LOG sets the level: error, warn, info (default), debug.

QEMU 9.2 and later (earlier versions: reconnect=1 instead of reconnect-ms=1000):
    -m SIZE -object memory-backend-memfd,id=ram,size=SIZE,share=on -machine MACHINE,memory-backend=ram
    -chardev socket,id=disk,path=PATH,reconnect-ms=1000 -device vhost-user-blk-pci,chardev=disk,num-queues=N";

/// The options of both programs.
#[derive(Debug, Args)]
#[command(after_long_help = HELP, group = ArgGroup::new("what").args(["socket_path", "fd", "print_capabilities"]).required(true))]
pub(crate) struct ServeArgs {
    /// Print the capabilities of this program as JSON for management software, and exit.
    #[arg(long, exclusive = true)]
    print_capabilities: bool,

    /// Unix socket to listen on. The server replaces a socket file that an earlier server left there.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// Number of an open file descriptor: a listening Unix socket, or a Unix socket connected to the front-end.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    fd: Option<RawFd>,

    /// Disk image or block device to serve.
    #[arg(long, value_name = "FILE", required_unless_present = "print_capabilities")]
    blk_file: Option<PathBuf>,

    /// Refuse all writes. Several servers can share a read-only disk.
    #[arg(long)]
    read_only: bool,

    /// Maximum number of queues that a front-end can use. VMMs give each vCPU a queue and refuse a device with fewer
    /// queues. Unused queues cost next to nothing.
    #[arg(long, value_name = "N", default_value_t = QUEUES_MAX, value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    num_queues: u16,

    /// Maximum number of requests of a queue that the server executes at a time: a power of two. Front-ends may use
    /// longer queues; further requests then wait in the queue.
    #[arg(long, value_name = "N", default_value_t = QUEUE_SIZE_DEFAULT, value_parser = queue_size)]
    queue_size: u16,

    /// Largest size of the image while the server runs, for example 64G: up to this size you can enlarge the image and
    /// send SIGHUP. Nothing in the server can make the image larger. Sizes below 129 MiB count as 129 MiB. Block devices
    /// need no such size [default: the size at the start, so only a restart makes the image larger].
    #[arg(long, value_name = "SIZE", value_parser = size_bytes)]
    max_size: Option<u64>,

    /// Logical block size that the guest sees, in bytes: a power of two. Use the block size with which the data on the
    /// disk was written [default: 512 for a file; for a block device the device's own block size, which is also the
    /// minimum].
    #[arg(long, value_name = "BYTES", value_parser = logical_block)]
    logical_block_size: Option<u32>,

    /// Serial number that the guest sees: at most 20 characters.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    serial: Serial,

    /// Whether to bypass the host's page cache.
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = DirectIoArg::Auto)]
    direct_io: DirectIoArg,

    /// How long I/O threads poll for requests after the last request before they sleep, in microseconds. 0: no polling.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(..=POLL_MAX_US))]
    poll_us: u64,

    /// CPUs for the I/O threads, for example 2,4-6: one thread for each CPU. Without this option the number of threads
    /// is the number of CPUs or the number of queues, whichever is smaller.
    #[arg(long, value_name = "LIST", value_parser = cpu_list)]
    cpus: Option<CpuList>,

    /// For the destination of a live migration: start even if another process has locked the disk, and lock the disk
    /// when the guest runs here and the other process has released it.
    #[arg(long, conflicts_with = "lock_wait_s")]
    incoming: bool,

    /// How long to wait for another process that has locked the disk before the start fails, in seconds. For the
    /// remaining I/O of a killed server there is no limit: the server answers the front-end meanwhile and executes no
    /// requests.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=86_400))]
    lock_wait_s: u64,

    #[command(flatten)]
    access: AccessArgs,

    #[command(flatten)]
    rings: RingArgs,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    sandbox: SandboxArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DirectIoArg {
    /// Bypass the page cache. The start fails if the file system does not support that.
    On,
    /// Use the page cache.
    Off,
    /// Bypass the page cache if the file system supports that.
    Auto,
}

/// The CPUs of a list such as `2,4-6`, in the order of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CpuList(Vec<usize>);

/// The socket on which front-ends connect.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Socket<'a> {
    Path(&'a PathBuf),
    Inherited(RawFd),
}

/// A [`Socket`] that is created or checked. The server does not answer yet, and a new socket accepts no connections
/// yet.
pub(super) enum PreparedSocket {
    Bound(BoundSocket),
    Inherited(Server),
}

impl Socket<'_> {
    pub(super) fn prepare(&self, access: SocketAccess) -> Result<PreparedSocket, ServerError> {
        Ok(match self {
            Self::Path(path) => PreparedSocket::Bound(BoundSocket::bind(path, access)?),
            Self::Inherited(fd) => PreparedSocket::Inherited(Server::from_inherited_fd(*fd)?),
        })
    }
}

impl PreparedSocket {
    pub(super) fn serve(self) -> Result<Server, ServerError> {
        match self {
            Self::Bound(socket) => Server::listen(socket),
            Self::Inherited(server) => Ok(server),
        }
    }
}

impl ServeArgs {
    pub(super) fn print_capabilities(&self) -> bool {
        self.print_capabilities
    }

    pub(super) fn socket(&self) -> anyhow::Result<Socket<'_>> {
        let path = self.socket_path.as_ref().map(Socket::Path);
        path.or(self.fd.map(Socket::Inherited)).context("neither --socket-path nor --fd is given")
    }

    pub(super) fn disk_config(&self) -> anyhow::Result<DiskConfig> {
        let path = self.blk_file.as_ref().context("--blk-file is not given")?;
        let direct_io = match self.direct_io {
            DirectIoArg::On => DirectIo::On,
            DirectIoArg::Off => DirectIo::Off,
            DirectIoArg::Auto => DirectIo::Auto,
        };
        let logical_block = self.logical_block_size.map_or(LogicalBlock::Own, LogicalBlock::Bytes);
        Ok(DiskConfig::new(path).read_only(self.read_only).direct_io(direct_io).logical_block(logical_block))
    }

    pub(super) fn max_size_bytes(&self) -> Option<u64> {
        self.max_size
    }

    pub(super) fn start_up(&self) -> StartUp {
        if self.incoming { StartUp::Incoming } else { StartUp::Grace(Duration::from_secs(self.lock_wait_s)) }
    }

    pub(super) fn control(&self) -> &ControlArgs {
        &self.control
    }

    pub(super) fn socket_path(&self) -> Option<&Path> {
        self.socket_path.as_deref()
    }

    pub(super) fn access(&self) -> &AccessArgs {
        &self.access
    }

    pub(super) fn sandbox(&self) -> &SandboxArgs {
        &self.sandbox
    }

    pub(super) fn rings(&self) -> &RingArgs {
        &self.rings
    }

    pub(super) fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// This server as the probe judges it.
    pub(crate) fn probed(&self) -> probe::Server {
        let engine = EngineShape::new(self.num_queues(), self.queue_size, self.workers());
        let may_offer_rings = self.rings.mode() != ModeArg::Virtqueue && !self.read_only;
        probe::Server::new(engine).is_confined(self.sandbox.is_on()).may_offer_rings(may_offer_rings)
    }

    pub(super) fn queue_size(&self) -> u16 {
        self.queue_size
    }

    pub(super) fn serial(&self) -> Serial {
        self.serial
    }

    pub(super) fn poll_time(&self) -> Duration {
        Duration::from_micros(self.poll_us)
    }

    pub(super) fn cpus(&self) -> &[usize] {
        self.cpus.as_ref().map_or(&[], |list| &list.0)
    }

    pub(super) fn workers(&self) -> Option<usize> {
        self.cpus.as_ref().map(|list| list.0.len())
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(entries) if entries.is_power_of_two() && (4..=32768).contains(&entries) => Ok(entries),
        _ => Err("must be a power of two from 4 to 32768; VMMs use 128 to 1024".into()),
    }
}

fn logical_block(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(bytes) if bytes.is_power_of_two() && (512..=65536).contains(&bytes) => Ok(bytes),
        _ => Err("must be a power of two from 512 to 65536; guests support 512 and 4096".into()),
    }
}

fn cpu_list(text: &str) -> Result<CpuList, String> {
    let bad = || format!("must be numbers of CPUs up to {CPU_MAX}, each once, such as 2,4-6");
    let number = |text: &str| text.parse::<usize>().ok().filter(|&cpu| cpu <= CPU_MAX).ok_or_else(bad);
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = number(first)?..=number(last)?;
        if range.is_empty() || range.clone().any(|cpu| cpus.contains(&cpu)) {
            return Err(bad());
        }
        cpus.extend(range);
    }
    Ok(CpuList(cpus))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn parse(further: &[&str]) -> Result<ServeArgs, String> {
        let arguments = ["program"].iter().chain(further);
        Program::try_parse_from(arguments).map(|program| program.serve).map_err(|error| error.to_string())
    }

    fn with(further: &[&str]) -> Result<ServeArgs, String> {
        parse(&[&["--socket-path", "s", "--blk-file", "f"], further].concat())
    }

    #[test]
    fn socket_and_disk_are_the_only_required_options() {
        let args = with(&[]).unwrap();
        assert_eq!(args.socket().unwrap(), Socket::Path(&"s".into()));
        assert_eq!(args.disk_config().unwrap(), DiskConfig::new("f"));
        assert_eq!(args.start_up(), StartUp::Grace(Duration::from_secs(10)));
        assert_eq!(args.num_queues(), QUEUES_MAX, "the same on every host of a migration");
        assert_eq!(args.queue_size(), 256);
        assert_eq!((args.cpus(), args.workers()), (&[][..], None));
        assert_eq!(args.serial().as_bytes(), &[0; 20]);
    }

    #[test]
    fn every_option_sets_its_value() {
        let args = parse(&[
            "--fd=7",
            "--blk-file=f",
            "--read-only",
            "--num-queues=2",
            "--queue-size=1024",
            "--logical-block-size=4096",
            "--serial=abc",
            "--direct-io=on",
            "--poll-us=0",
            "--cpus=3,0-1",
            "--incoming",
        ])
        .unwrap();
        assert_eq!(args.socket().unwrap(), Socket::Inherited(7));
        let logical_block = LogicalBlock::Bytes(4096);
        let disk = DiskConfig::new("f").read_only(true).direct_io(DirectIo::On).logical_block(logical_block);
        assert_eq!(args.disk_config().unwrap(), disk);
        assert_eq!((args.num_queues(), args.queue_size()), (2, 1024));
        assert!(args.serial().as_bytes().starts_with(b"abc\0"));
        assert_eq!(args.poll_time(), Duration::ZERO);
        assert_eq!((args.cpus(), args.workers()), (&[3, 0, 1][..], Some(3)));
        assert_eq!(args.start_up(), StartUp::Incoming);
    }

    #[test]
    fn print_capabilities_needs_and_allows_no_other_option() {
        assert!(parse(&["--print-capabilities"]).unwrap().print_capabilities());
        assert!(parse(&["--print-capabilities", "--read-only"]).is_err());
    }

    #[test]
    fn the_error_names_a_missing_or_conflicting_option() {
        for (arguments, named) in [
            (&["--blk-file=f"][..], "--socket-path"),
            (&["--blk-file=f"], "--fd"),
            (&["--socket-path=s"], "--blk-file"),
            (&["--socket-path=s", "--fd=3", "--blk-file=f"], "--fd"),
            (&["--socket-path=s", "--blk-file=f", "--incoming", "--lock-wait-s=1"], "--lock-wait-s"),
        ] {
            let message = parse(arguments).unwrap_err();
            assert!(message.contains(named), "{arguments:?}: {message}");
        }
    }

    #[test]
    fn the_error_for_a_value_out_of_range_states_the_range() {
        for (argument, expected) in [
            ("--num-queues=0", "1..=256"),
            ("--num-queues=257", "1..=256"),
            ("--queue-size=2", "from 4 to 32768"),
            ("--queue-size=300", "a power of two"),
            ("--queue-size=65536", "from 4 to 32768"),
            ("--logical-block-size=256", "from 512 to 65536"),
            ("--logical-block-size=1000", "a power of two"),
            ("--serial=123456789012345678901", "room for 20"),
            ("--direct-io=maybe", "possible values: on, off, auto"),
            ("--poll-us=2000000", "0..=1000000"),
            ("--fd=-1", "--fd"),
            ("--io-workers=99999999", "from 1 to 4096"),
            ("--io-workers=0", "from 1 to 4096"),
            ("--cpus=", "numbers of CPUs"),
            ("--cpus=3-1", "numbers of CPUs"),
            ("--cpus=1,1", "each once"),
            ("--cpus=0-99999999999", "up to 8191"),
        ] {
            let message = with(&[argument]).unwrap_err();
            assert!(message.contains(expected), "{argument}: {message}");
        }
    }
}
