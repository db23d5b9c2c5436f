//! Access rights to the sockets of a server.

use clap::Args;
use nix::unistd::Group;
use ringpass_broker::vhost_user::SocketAccess;
use rustix::fs::Mode;

/// The mode of a socket that has a group but no explicit mode.
const MODE_WITH_GROUP: u32 = 0o660;
/// All permission bits that apply to a socket.
const MODE_MAX: u32 = 0o777;

/// Options for the access rights to sockets.
#[derive(Debug, Args)]
pub(super) struct AccessArgs {
    /// Mode of the socket, in octal. A process needs write permission for the socket, and access to its directory, to
    /// connect [default: 0777 without the bits of the umask, which usually leaves write permission to the owner only;
    /// 0660 with --socket-group].
    #[arg(long, value_name = "MODE", value_parser = mode, requires = "socket_path")]
    socket_mode: Option<u32>,

    /// Group of the socket, by name or number, for example the group of libvirt's QEMU.
    #[arg(long, value_name = "GROUP", value_parser = group, requires = "socket_path")]
    socket_group: Option<u32>,

    /// Mode of the control socket, in octal [default: 0600; 0660 with --control-socket-group].
    #[arg(long, value_name = "MODE", value_parser = mode)]
    control_socket_mode: Option<u32>,

    /// Group of the control socket, by name or number.
    #[arg(long, value_name = "GROUP", value_parser = group)]
    control_socket_group: Option<u32>,
}

/// The access rights to the two sockets.
pub(super) struct Access {
    /// Rights to the front-end's socket.
    pub(super) front_end: SocketAccess,
    /// Rights to the control socket.
    pub(super) control: SocketAccess,
}

impl AccessArgs {
    /// Derives the rights from the options. Clears the umask of the process, so that later files get their full mode.
    pub(super) fn decide(&self) -> Access {
        let left_by_umask = MODE_MAX & !rustix::process::umask(Mode::empty()).bits();
        let mode = |mode: Option<u32>, group: Option<u32>, default| {
            Some(mode.unwrap_or(if group.is_some() { MODE_WITH_GROUP } else { default }))
        };
        Access {
            front_end: SocketAccess::default()
                .mode(mode(self.socket_mode, self.socket_group, left_by_umask))
                .group(self.socket_group),
            control: SocketAccess::default()
                .mode(mode(self.control_socket_mode, self.control_socket_group, 0o600))
                .group(self.control_socket_group),
        }
    }
}

fn mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = u32::from_str_radix(digits, 8).ok().filter(|&mode| mode <= MODE_MAX && !digits.starts_with('+'));
    mode.ok_or_else(|| "must be an octal number from 0 to 777, such as 0660".into())
}

/// Parses a group. A name takes precedence over a number, as in `chgrp(1)`.
fn group(text: &str) -> Result<u32, String> {
    match Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        // The largest number says "no group" to chown(2).
        _ => text.parse().ok().filter(|&number| number != u32::MAX).ok_or_else(|| {
            "this machine has no group of that name: give one that `getent group` lists, or a number".into()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_and_contain_only_permission_bits() {
        assert_eq!([mode("660"), mode("0660"), mode("0o660"), mode("0")], [Ok(0o660), Ok(0o660), Ok(0o660), Ok(0)]);
        for bad in ["", "8", "0x1f", "1777", "+660", "-1", "u+rw"] {
            assert!(mode(bad).unwrap_err().contains("octal"), "{bad}");
        }
    }

    #[test]
    fn groups_have_names_and_numbers() {
        assert_eq!([group("root"), group("0"), group("12345")], [Ok(0), Ok(0), Ok(12345)]);
        for bad in ["", "no such group", "-1", "4294967295"] {
            assert!(group(bad).unwrap_err().contains("getent group"), "{bad}");
        }
    }
}
