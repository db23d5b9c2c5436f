//! The needs of a test: things that the machine must have, and the checks for them.

use std::{
    env, fmt, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use ringpass_broker::kvm::ExitCounters;

/// One thing that the machine must have for a test to run.
///
/// The check runs whenever the tests are *listed*, so it is cheap (milliseconds) and changes nothing. Its error tells a
/// person what is missing and how to get it.
pub struct Need {
    what: String,
    check: Box<dyn Fn() -> Result<()>>,
}

impl Need {
    /// A need called `what` ("a loop device") that is met when `check` succeeds.
    pub fn new(what: impl Into<String>, check: impl Fn() -> Result<()> + 'static) -> Self {
        Self { what: what.into(), check: Box::new(check) }
    }

    /// The need's name.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Checks whether the need is met.
    ///
    /// # Errors
    ///
    /// The need is not met: `needs <what>: <reason>`.
    pub fn check(&self) -> Result<()> {
        (self.check)().map_err(|error| anyhow::anyhow!("needs {}: {error:#}", self.what))
    }

    /// The effective user is root: for loop devices, mounts and other users' limits.
    pub fn root() -> Self {
        Self::new("root", || {
            let user = rustix::process::geteuid();
            ensure!(user.is_root(), "the user id is {}; run the tests as root for this one", user.as_raw());
            Ok(())
        })
    }

    /// This process may create an io_uring.
    pub fn io_uring() -> Self {
        Self::new("io_uring", || match io_uring::IoUring::new(2) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                bail!("{error}; see `sysctl kernel.io_uring_disabled`, or the seccomp filter of the container")
            }
            Err(error) => bail!("io_uring_setup: {error}"),
        })
    }

    /// The process may run on at least `count` CPUs at once. A ring with SQPOLL that a thread polls needs two.
    pub fn cpus(count: usize) -> Self {
        Self::new(format!("{count} CPUs"), move || {
            let usable = thread::available_parallelism().context("cannot count the usable CPUs")?.get();
            ensure!(usable >= count, "this process may use {usable}");
            Ok(())
        })
    }

    /// At least `bytes` of memory are available now (`MemAvailable` of `/proc/meminfo`).
    pub fn available_memory_bytes(bytes: u64) -> Self {
        Self::new(format!("{} MiB of available memory", bytes.div_ceil(1 << 20)), move || {
            let available = meminfo_bytes("MemAvailable")?;
            ensure!(available >= bytes, "{} MiB are available", available >> 20);
            Ok(())
        })
    }

    /// This process may make virtual machines, with an interrupt controller in the kernel and vCPUs that count their
    /// exits.
    pub fn kvm() -> Self {
        Self::new("KVM", || {
            let kvm = kvm_ioctls::Kvm::new().context("cannot open /dev/kvm")?;
            let vm = ringpass_vmm::create_vm(&kvm).context("cannot make a virtual machine")?;
            vm.create_irq_chip().context("cannot make an interrupt controller")?;
            let vcpu = vm.create_vcpu(0).context("cannot make a vCPU")?;
            ExitCounters::of(&vcpu).context("cannot count exits")?;
            Ok(())
        })
    }

    /// A program in `PATH` or one of the system's directories; `package` is the Debian package that has it.
    pub fn program(name: &'static str, package: &'static str) -> Self {
        Self::new(format!("the program `{name}`"), move || match find_program(name) {
            Some(_) => Ok(()),
            None => bail!("not found; on Debian: apt-get install {package}"),
        })
    }

    /// A device or other file that exists: `/dev/kvm`, `/dev/loop-control`.
    pub fn file(path: &'static str) -> Self {
        Self::new(path, move || {
            fs::metadata(path).with_context(|| format!("cannot look at {path}"))?;
            Ok(())
        })
    }
}

impl fmt::Debug for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Need").field(&self.what).finish()
    }
}

/// The path of the program `name`. Looks in `PATH` first, then in the directories that an ordinary user's `PATH` often
/// lacks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| Path::is_file(candidate))
}

/// A field of `/proc/meminfo` that the kernel gives in KiB.
fn meminfo_bytes(field: &str) -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kibibytes: u64 = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.trim().parse().ok())
        .with_context(|| format!("/proc/meminfo has no line `{field}`"))?;
    Ok(kibibytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(need: &Need) -> String {
        need.check().expect_err("an unmet need").to_string()
    }

    #[test]
    fn an_unmet_need_says_what_is_missing_and_what_to_do() {
        let program = Need::program("ringpass-no-such-program", "some-package");
        assert_eq!(
            refusal(&program),
            "needs the program `ringpass-no-such-program`: not found; on Debian: apt-get install some-package"
        );
        let cpus = refusal(&Need::cpus(1_000_000));
        assert!(cpus.starts_with("needs 1000000 CPUs: this process may use "), "{cpus}");
        let memory = refusal(&Need::available_memory_bytes(1 << 60));
        assert!(memory.starts_with("needs 1099511627776 MiB of available memory: "), "{memory}");
        let file = refusal(&Need::file("/dev/ringpass-no-such-device"));
        assert!(file.contains("No such file or directory"), "{file}");
    }

    #[test]
    fn a_need_that_the_machine_has_is_met() {
        Need::cpus(1).check().expect("one CPU");
        Need::available_memory_bytes(1).check().expect("one byte");
        Need::program("sh", "dash").check().expect("a shell");
        Need::file("/proc/self").check().expect("procfs");
    }
}
