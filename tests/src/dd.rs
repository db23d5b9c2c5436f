//! The example `ringpass-dd` as a user runs it, on a served disk.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::rig::Rig,
    needs::Need,
};

/// Size of the disk.
pub const DISK_BYTES: u64 = 48 << 20;

/// What its tests need of the machine.
pub fn needs() -> Vec<Need> {
    let kind = DiskKind::Ext4PageCache.needs().into_iter();
    let program = Need::new("the example `ringpass-dd`", || program().map(drop));
    kind.chain(broker_process::needs()).chain([Need::cpus(2), program]).collect()
}

/// The path of the example. Cargo builds the examples of a workspace with its tests.
///
/// # Errors
///
/// The example has not been built.
pub fn program() -> Result<PathBuf> {
    let test_program = std::env::current_exe()?;
    let profile =
        test_program.parent().and_then(Path::parent).context("the test program is not in a target directory")?;
    let program = profile.join("examples/ringpass-dd");
    ensure!(program.exists(), "there is no {}: `cargo build -p ringpass-guest --examples`", program.display());
    Ok(program)
}

/// The example with these arguments on a socket.
///
/// # Errors
///
/// The example has not been built.
pub fn command(socket: &Path, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.arg("--socket").arg(socket).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

/// A served disk, and room for files.
#[derive(Debug)]
pub struct Place {
    /// The disk.
    pub rig: Rig,
    /// Its server.
    pub broker: BrokerProcess,
}

impl Place {
    /// Makes a disk of zeroes, and starts a server with these arguments.
    ///
    /// # Errors
    ///
    /// The disk, the server, the example or a file fails.
    pub fn new(arguments: &[&str]) -> Result<Self> {
        let rig = Rig::new(DiskKind::Ext4PageCache, DISK_BYTES)?;
        let broker = rig.broker(arguments)?;
        Ok(Self { rig, broker })
    }

    /// A path in a directory of this place.
    pub fn path(&self, name: &str) -> PathBuf {
        self.rig.directory().join(name)
    }

    /// Makes a file, and returns its path.
    ///
    /// # Errors
    ///
    /// The disk, the server, the example or a file fails.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<String> {
        fs::write(self.path(name), bytes)?;
        Ok(self.path(name).display().to_string())
    }

    /// The program with these arguments on the socket of this place.
    ///
    /// # Errors
    ///
    /// The disk, the server, the example or a file fails.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        command(&self.rig.socket(), arguments)
    }

    /// Runs the example to its end.
    ///
    /// # Errors
    ///
    /// The disk, the server, the example or a file fails.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments)?.output()?)
    }

    /// Runs the example, and expects success.
    ///
    /// # Errors
    ///
    /// The disk, the server, the example or a file fails.
    pub fn succeed(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.run(arguments)?;
        self.broker.explain(status_is(&output, 0).with_context(|| format!("{arguments:?}")))?;
        Ok(output)
    }

    /// The content of the disk.
    ///
    /// # Errors
    ///
    /// The disk, the server, the example or a file fails.
    pub fn disk(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.rig.disk_file()?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// The text on standard error.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// # Errors
///
/// The program ended with another status.
pub fn status_is(output: &Output, code: i32) -> Result<()> {
    ensure!(output.status.code() == Some(code), "{}: {}", output.status, text(output));
    Ok(())
}
