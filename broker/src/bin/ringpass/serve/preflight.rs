//! What is refused before the disk is locked or a socket made: all that can be known by then.

use std::path::Path;

use anyhow::{Context, ensure};
use ringpass_broker::control::ControlSocket;
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::engine::check_cpus;
use ringpass_broker::privileges::without_privileges;
use ringpass_broker::vhost_user::Server;

use super::args::{ServeArgs, Socket};
use super::sandbox::directory_of;

/// Looks at the options and the disk as the server will find them when it is confined.
///
/// # Errors
///
/// One of them cannot be had.
pub(super) fn check(args: &ServeArgs, disk: &LocatedDisk) -> anyhow::Result<()> {
    if args.sandbox().is_on() {
        return without_privileges(|| {
            // The server opens it anew for each time that it has the disk.
            disk.refresh_size().context(
                "without privileges, which the server gives up (--sandbox), it cannot open the disk any more: run it as a user \
                 who may",
            )?;
            check_options(args)
        })?;
    }
    check_options(args)
}

/// Refuses one path for both sockets: the second would take the first for one that a killed server has left behind.
///
/// # Errors
///
/// Both are the same directory entry, however they are written.
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
    // A directory that cannot be found is refused elsewhere, with the reason.
    let place = |path: &Path| Some((directory_of(path).canonicalize().ok()?, path.file_name()?.to_owned()));
    place(one).is_some_and(|place_of_one| Some(place_of_one) == place(other))
}

fn check_options(args: &ServeArgs) -> anyhow::Result<()> {
    check_cpus(args.cpus()).context("--cpus")?;
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
