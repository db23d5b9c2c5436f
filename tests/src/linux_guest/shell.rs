//! A shell in the guest for a person at a terminal.

use std::{
    env,
    io::{ErrorKind, IsTerminal, Read, Write, stdin, stdout},
    os::fd::AsFd,
    os::unix::net::UnixStream,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use super::{DEVICE_LIMIT, LinuxGuest};

/// What leaves a guest that no longer answers, as in QEMU's own terminal: this byte (Ctrl-A), and then `x`.
const ESCAPE: u8 = 1;

impl LinuxGuest {
    /// Gives the terminal of this process to a shell in the guest. It returns when the shell has ended, and the guest with
    /// it, or when the user types Ctrl-A X.
    ///
    /// # Errors
    ///
    /// Standard input is no terminal, or QEMU does not end.
    pub fn shell(mut self) -> Result<()> {
        ensure!(stdin().is_terminal(), "standard input is no terminal");
        let size = stty(&["size"])?;
        let terminal = env::var("TERM").ok().filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
        let port = self.machine.agent.start_shell(&size, &terminal.unwrap_or_else(|| "vt100".into()))?;
        let mode = RawMode::enter()?;
        let ended = relay(port)?;
        drop(mode);
        if ended == End::ByGuest {
            self.machine.wait_end(DEVICE_LIMIT)?;
        }
        Ok(())
    }
}

/// What has ended a shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    ByGuest,
    ByEscape,
}

/// Passes bytes between the terminal and the guest.
fn relay(mut port: UnixStream) -> Result<End> {
    let mut escape = Escape::default();
    let mut bytes = [0; 4096];
    loop {
        let mut ready = [
            PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN),
            PollFd::from_borrowed_fd(port.as_fd(), PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot wait for input"),
        }
        let [typed, written] = ready.map(|fd| !fd.revents().is_empty());
        if written {
            match port.read(&mut bytes) {
                Ok(0) => return Ok(End::ByGuest),
                Ok(count) => {
                    let mut out = stdout().lock();
                    out.write_all(&bytes[..count])
                        .and_then(|()| out.flush())
                        .context("cannot write to the terminal")?;
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(End::ByGuest),
                Err(error) => return Err(error).context("cannot read from the guest"),
            }
        }
        if typed {
            let count =
                rustix::io::read(rustix::stdio::stdin(), &mut bytes).context("cannot read from the terminal")?;
            // The terminal has hung up, or the user leaves.
            let Some(typed) = escape.filter(&bytes[..count]).filter(|_| count > 0) else { return Ok(End::ByEscape) };
            if port.write_all(&typed).is_err() {
                return Ok(End::ByGuest);
            }
        }
    }
}

/// Looks for the keys that leave the guest.
#[derive(Debug, Default)]
struct Escape {
    is_half: bool,
}

impl Escape {
    /// The bytes for the guest. `None`: the user leaves.
    fn filter(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut passed = Vec::new();
        for byte in typed {
            match (self.is_half, *byte) {
                (true, b'x' | b'X') => return None,
                (false, ESCAPE) => {
                    self.is_half = true;
                    continue;
                }
                // Twice is once for the guest.
                (true, ESCAPE) => passed.push(ESCAPE),
                (true, other) => passed.extend([ESCAPE, other]),
                (false, other) => passed.push(other),
            }
            self.is_half = false;
        }
        Some(passed)
    }
}

/// A terminal that passes every key on. The drop gives it its old settings.
struct RawMode {
    settings: String,
}

impl RawMode {
    fn enter() -> Result<Self> {
        let settings = stty(&["-g"])?;
        stty(&["raw", "-echo"])?;
        Ok(Self { settings })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(error) = stty(&[&self.settings]) {
            eprintln!("the terminal keeps the settings of the guest (`reset` helps): {error:#}");
        }
    }
}

/// Runs stty(1) on the terminal of this process.
fn stty(arguments: &[&str]) -> Result<String> {
    let output = Command::new("stty")
        .args(arguments)
        .stdin(Stdio::inherit())
        .output()
        .context("cannot start stty, of the package coreutils")?;
    ensure!(output.status.success(), "stty: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_also_in_two_pieces_and_all_other_keys_reach_the_guest() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ls x\r"), Some(b"ls x\r".to_vec()));
        assert_eq!(escape.filter(b"\x01b\x01\x01"), Some(b"\x01b\x01".to_vec()));
        assert_eq!(escape.filter(b"x\x01"), Some(b"x".to_vec()));
        assert_eq!(escape.filter(b"x"), None);
        assert_eq!(Escape::default().filter(b"a\x01Xb"), None);
    }
}
