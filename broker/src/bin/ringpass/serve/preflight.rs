//! What is refused before the disk is locked or a socket made: all that can be known by then.

use std::path::Path;

use anyhow::{Context, ensure};
use ringpass_broker::control::ControlSocket;
use ringpass_broker::disk::LocatedDisk;
use ringpass_broker::engine::check_cpus;
use ringpass_broker::privileges::without_privileges;
use ringpass_broker::vhost_user::Server;

use super::args::{ServeArgs, Socket};

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

fn check_options(args: &ServeArgs) -> anyhow::Result<()> {
    check_cpus(args.cpus()).context("--cpus")?;
    args.rings().check_sq_cpu()?;
    let control_socket = args.control().asked_for();
    match args.socket()? {
        Socket::Inherited(fd) => Server::check_inherited_fd(fd).context("--fd")?,
        Socket::Path(path) => {
            ensure!(
                control_socket != Some(path.as_path()),
                "--control-socket {0} is also the --socket-path: give another path for one of them",
                path.display()
            );
            Server::check_path(path).context("--socket-path")?;
        }
    }
    control_socket.map_or(Ok(()), |path: &Path| ControlSocket::check_path(path).context("--control-socket"))
}
