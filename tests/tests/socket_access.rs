//! The users that may connect to the sockets of `ringpass serve`.

use std::{
    fs::{self, File},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    harness::{self, test},
    needs::Need,
};

/// A group without a name and without members.
const GROUP: u32 = 1_234_567;
/// A user that this machine does not use otherwise.
const USER: u32 = 1_234_568;
/// Another one, who serves a device.
const OWNER: u32 = 1_234_569;

fn main() -> ExitCode {
    let needs = || broker_process::needs().into_iter().chain([Need::root()]);
    harness::run(vec![
        test("members_of_the_socket_s_group_may_connect_and_others_may_not", needs(), members_may_connect),
        test("the_server_sets_the_mode_of_its_sockets_whatever_the_umask_is", needs(), modes_are_exact),
        test("a_user_who_may_show_a_device_may_not_change_its_mode", needs(), only_owners_change),
        test("root_changes_the_mode_of_a_device_that_another_user_serves_and_a_third_does_not", needs(), root_changes),
        test("the_server_refuses_an_impossible_group_or_mode_before_it_makes_a_socket", needs(), bad_ones_are_refused),
    ])
}

/// A directory that every user can enter, with a disk.
fn place() -> Result<tempfile::TempDir> {
    let directory = tempfile::tempdir()?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755))?;
    File::create(directory.path().join("disk.img"))?.set_len(1 << 20)?;
    Ok(directory)
}

/// Whether a process of that user and group may connect, which needs the permission to write to the socket.
fn may_connect(socket: &Path, user: u32, group: u32) -> Result<bool> {
    let test = Command::new("test").arg("-w").arg(socket).uid(user).gid(group).status()?;
    Ok(test.success())
}

fn rights(socket: &Path) -> Result<(u32, u32)> {
    let found = fs::metadata(socket).with_context(|| format!("cannot look at {}", socket.display()))?;
    Ok((found.mode() & 0o7777, found.gid()))
}

fn members_may_connect() -> Result<()> {
    let place = place()?;
    let (socket, disk, control) =
        (place.path().join("vm.sock"), place.path().join("disk.img"), place.path().join("vm.control"));
    let group = GROUP.to_string();
    let options = ["--socket-group", &group, "--control-socket-group", &group];
    let mut server = BrokerProcess::start(&socket, &disk, &options)?;
    server.wait_for_log("waiting for a front-end")?;
    for socket in [&socket, &control] {
        ensure!(rights(socket)? == (0o660, GROUP), "{}: {:?}", socket.display(), rights(socket)?);
        ensure!(may_connect(socket, USER, GROUP)?, "a member of the group may not connect");
        ensure!(!may_connect(socket, USER, USER)?, "another user may connect");
    }
    server.terminate()?;
    ensure!(!socket.exists() && !control.exists(), "the server has not removed its sockets");
    Ok(())
}

fn modes_are_exact() -> Result<()> {
    let place = place()?;
    let (socket, disk, control) =
        (place.path().join("vm.sock"), place.path().join("disk.img"), place.path().join("vm.control"));
    let own = rustix::process::getegid().as_raw();
    for (options, mode, control_mode) in [
        (&["--socket-mode", "0666", "--control-socket-mode", "0640"][..], 0o666, 0o640),
        (&["--socket-mode", "600"], 0o600, 0o600),
        // The server below has a umask of 027, which gives these modes.
        (&[], 0o750, 0o600),
    ] {
        let mut command = Command::new("sh");
        command.args(["-c", "umask 027 && exec \"$@\"", "sh"]).arg(broker_process::program()?);
        command.arg("serve").arg("--socket-path").arg(&socket).arg("--blk-file").arg(&disk).args(options);
        let mut server = BrokerProcess::spawn(command, &socket)?;
        server.wait_for_log("waiting for a front-end")?;
        ensure!(rights(&socket)? == (mode, own), "{options:?}: {:?}", rights(&socket)?);
        ensure!(rights(&control)? == (control_mode, own), "{options:?}: {:?}", rights(&control)?);
        server.terminate()?;
    }
    Ok(())
}

fn only_owners_change() -> Result<()> {
    let place = place()?;
    let (socket, disk) = (place.path().join("vm.sock"), place.path().join("disk.img"));
    let program = place.path().join("ringpass");
    fs::copy(broker_process::program()?, &program)?;
    let server = BrokerProcess::start(&socket, &disk, &["--mode", "direct", "--control-socket-mode", "0666"])?;
    let dev = |user: u32, arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("dev").args(arguments).env("RUNTIME_DIRECTORY", place.path()).uid(user).gid(user);
        command.output()
    };
    server.explain((|| {
        ensure!(dev(USER, &["show", "vm"])?.status.success(), "another user may not show the device");
        let output = dev(USER, &["set", "vm", "mode", "virtqueue"])?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && text.contains("only root and the user that serves the device"), "{text}");
        let output = dev(0, &["set", "vm", "mode", "virtqueue"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    })())
}

/// A server of an ordinary user may be in a user namespace, where it cannot tell root from other users. Its control
/// socket is in a directory of its own below the runtime directory, as with the systemd unit.
fn root_changes() -> Result<()> {
    let place = place()?;
    let own = place.path().join("vm");
    let (socket, disk) = (own.join("vm.sock"), own.join("disk.img"));
    fs::create_dir(&own)?;
    File::create(&disk)?.set_len(1 << 20)?;
    for path in [&own, &disk] {
        chown(path, Some(OWNER), Some(OWNER))?;
    }
    let program = place.path().join("ringpass");
    fs::copy(broker_process::program()?, &program)?;
    let mut command = Command::new(&program);
    command.args(["serve", "--control-socket-mode", "0666", "--socket-path"]).arg(&socket).arg("--blk-file").arg(&disk);
    command.uid(OWNER).gid(OWNER).current_dir("/");
    let server = BrokerProcess::spawn(command, &socket)?;
    server.wait_for_log("waiting for a front-end")?;
    let dev = |user: u32, arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("dev").args(arguments).env("RUNTIME_DIRECTORY", place.path()).uid(user).gid(user);
        command.output()
    };
    server.explain((|| {
        let listed = dev(0, &["list"])?;
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        ensure!(text.contains("vm ") && text.contains("disk.img"), "{text}");
        for (user, may) in [(USER, false), (OWNER, true), (0, true)] {
            let output = dev(user, &["set", "vm", "mode", "virtqueue"])?;
            ensure!(output.status.success() == may, "user {user}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    })())
}

fn bad_ones_are_refused() -> Result<()> {
    let place = place()?;
    let (socket, disk) = (place.path().join("vm.sock"), place.path().join("disk.img"));
    for (option, value, expected) in [
        ("--socket-mode", "9", "octal number from 0 to 777"),
        ("--socket-mode", "1777", "octal number from 0 to 777"),
        ("--socket-group", "no-such-group", "getent group"),
        ("--control-socket-mode", "rw", "octal number from 0 to 777"),
        ("--control-socket-group", "no-such-group", "getent group"),
    ] {
        let output = Command::new(broker_process::program()?)
            .arg("serve")
            .arg("--socket-path")
            .arg(&socket)
            .arg("--blk-file")
            .arg(&disk)
            .args([option, value])
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && text.contains(option) && text.contains(expected), "{text}");
    }
    ensure!(!socket.exists());

    // The server runs as a user who is no member of the group.
    fs::set_permissions(&place, fs::Permissions::from_mode(0o777))?;
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666))?;
    let program = place.path().join("ringpass");
    fs::copy(broker_process::program()?, &program)?;
    let output = Command::new(program)
        .arg("serve")
        .arg("--socket-path")
        .arg(&socket)
        .arg("--blk-file")
        .arg(&disk)
        .args(["--socket-group", &GROUP.to_string()])
        .env("RUNTIME_DIRECTORY", place.path())
        .uid(USER)
        .gid(USER)
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && text.contains("only root and members of a group can"), "{text}");
    ensure!(!socket.exists(), "the socket still exists");
    Ok(())
}
