//! Checks before the server locks the disk or creates a socket: everything that can be known by then.

use std::path::Path;

use anyhow::{Context, ensure};
use ringpass_broker::control::ControlSocket;
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::engine::check_cpus;
use ringpass_broker::privileges::without_privileges;
use ringpass_broker::vhost_user::Server;

use super::args::{ServeArgs, Socket};
use super::sandbox::directory_of;

/// Checks the options and the disk with the rights that the confined server will have.
///
/// # Errors
///
/// The confined server could not use the disk or an option.
pub(super) fn check(args: &ServeArgs, disk: &LocatedDisk) -> anyhow::Result<()> {
    if args.sandbox().is_on() {
        return without_privileges(|| {
            // The server opens the disk anew for each lease.
            disk.refresh_size().context(
                "the server drops its privileges (--sandbox) and cannot open the disk without them: run it as a user who may \
                 open the disk",
            )?;
            check_options(args)
        })?;
    }
    check_options(args)
}

/// Refuses the same path for both sockets: the server would take the first socket for a leftover of a killed server
/// when it creates the second.
///
/// # Errors
///
/// Both paths lead to the same directory entry, even if they are spelled differently.
pub(super) fn check_sockets(socket: Option<&Path>, control_socket: Option<&Path>) -> anyhow::Result<()> {
    let (Some(socket), Some(control_socket)) = (socket, control_socket) else { return Ok(()) };
    ensure!(
        !is_same_entry(socket, control_socket),
        "--socket-path {} is also the path of the control socket: give another --socket-path, --control-socket or --name",
        socket.display()
    );
    Ok(())
}

fn is_same_entry(one: &Path, other: &Path) -> bool {
    // Other checks refuse a directory that does not exist, with the reason.
    let place = |path: &Path| Some((directory_of(path).canonicalize().ok()?, path.file_name()?.to_owned()));
    place(one).is_some_and(|place_of_one| Some(place_of_one) == place(other))
}

fn check_options(args: &ServeArgs) -> anyhow::Result<()> {
    check_cpus(args.cpus()).context("--cpus")?;
    args.rings().check_entries()?;
    args.rings().check_sq_cpu()?;
    let control_socket = args.control().asked_for();
    match args.socket()? {
        Socket::Inherited(fd) => Server::check_inherited_fd(fd).context("--fd")?,
        Socket::Path(path) => {
            Server::check_path(path).context("--socket-path")?;
        }
    }
    control_socket.map_or(Ok(()), |path: &Path| ControlSocket::check_path(path).context("--control-socket"))
}
