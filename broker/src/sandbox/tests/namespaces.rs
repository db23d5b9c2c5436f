//! What a process sees in its namespaces.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::fs::{AtFlags, openat, statat};

use super::*;
use crate::ring::token_directory;
use crate::skipped::skipped;

/// An ordinary user, who need not be known.
const USER: u32 = 12345;

/// A directory that every user may enter, with a disk, a directory of sockets and one beside that.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
        let place = Self { directory };
        for name in ["sockets", "other"] {
            fs::create_dir(place.path(name)).unwrap();
            fs::set_permissions(place.path(name), fs::Permissions::from_mode(0o777)).unwrap();
        }
        fs::write(place.path("disk"), "d").unwrap();
        fs::set_permissions(place.path("disk"), fs::Permissions::from_mode(0o666)).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().canonicalize().unwrap().join(name)
    }
}

/// In the namespaces: everything but the disk's descriptor, the sockets' directory, `/proc` and `/sys` is gone.
fn assert_hidden(place: &Place, disk: &File) {
    use std::os::fd::AsRawFd;
    for path in [PathBuf::from("/etc/passwd"), "/usr/bin".into(), "/var/tmp".into(), place.path("other")] {
        assert_eq!(fs::metadata(&path).unwrap_err().kind(), io::ErrorKind::NotFound, "{path:?}");
    }
    // Ways out through open directories and links.
    let token = token_directory().unwrap();
    let sockets = openat(CWD, place.path("sockets"), OFlags::RDONLY, Mode::empty()).unwrap();
    let up = "../".repeat(20) + "etc/passwd";
    for path in [&up, &format!("/proc/self/cwd/{up}"), &format!("/proc/self/fd/{}/{up}", disk.as_raw_fd())] {
        for directory in [token, std::os::fd::AsFd::as_fd(&sockets)] {
            assert!(statat(directory, path, AtFlags::empty()).is_err(), "{path}");
        }
    }
    assert!(fs::metadata("/proc/self/status").is_ok() && fs::metadata("/sys/kernel").is_ok());
    // The disk opens again, and a socket file goes.
    let again = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", disk.as_raw_fd()));
    again.unwrap();
    fs::remove_file(place.path("sockets/own")).unwrap();
    let devices = fs::read_to_string("/proc/self/net/dev").unwrap();
    let names: Vec<&str> = devices.lines().skip(2).filter_map(|line| line.split(':').next()).collect();
    assert!(names.iter().all(|name| name.trim() == "lo"), "{names:?}");
}

/// Isolates a process of its own, because other tests of this one may have made the directory of the tokens. False: the
/// kernel refuses.
fn isolated(test: &str, user: Option<u32>) -> bool {
    if let Some(output) = child(test) {
        let text = assert_success(&output);
        eprint!("{text}");
        return !text.contains("not isolated");
    }
    let place = Place::new();
    let disk = File::open(place.path("disk")).unwrap();
    in_fork(|| {
        if let Some(user) = user {
            nix::unistd::setgid(user.into()).unwrap();
            nix::unistd::setuid(user.into()).unwrap();
            // As after an exec: otherwise the files of this process in /proc belong to root.
            rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable).unwrap();
        }
        let _own = UnixListener::bind(place.path("sockets/own")).unwrap();
        let isolation = isolate(&[place.path("sockets")]).unwrap();
        if let Some(why) = isolation.why_not() {
            eprintln!("not isolated: {why}");
            assert!(fs::metadata("/etc/passwd").is_ok(), "something has changed");
            return;
        }
        assert_hidden(&place, &disk);
        let _unprivileged = drop_privileges().unwrap();
        let left = capabilities(None).unwrap();
        assert_eq!(left.effective, left.effective & CapabilitySet::IPC_LOCK);
        assert!(user.is_none() || left.effective.is_empty());
        assert_hidden_for_good();
    });
    true
}

/// Without capabilities there is no way into other namespaces.
fn assert_hidden_for_good() {
    assert!(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err());
    assert!(nix::mount::umount("/proc").is_err());
}

#[test]
fn root_sees_only_the_directories_that_stay() {
    if !capabilities(None).unwrap().effective.contains(CapabilitySet::SYS_ADMIN) {
        return skipped("sandbox::tests::namespaces::root_sees_only_the_directories_that_stay", "needs root");
    }
    assert!(isolated("namespaces::root_sees_only_the_directories_that_stay", None));
}

#[test]
fn an_ordinary_user_sees_only_the_directories_that_stay() {
    const NAME: &str = "namespaces::an_ordinary_user_sees_only_the_directories_that_stay";
    let user = rustix::process::geteuid().is_root().then_some(USER);
    if !isolated(NAME, user) {
        skipped(&format!("sandbox::tests::{NAME}"), "this kernel gives ordinary users no namespaces");
    }
}

#[test]
fn a_user_with_the_number_of_all_others_gets_no_user_namespace() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        return skipped(
            "sandbox::tests::namespaces::a_user_with_the_number_of_all_others_gets_no_user_namespace",
            "needs root",
        );
    }
    in_fork(|| {
        nix::unistd::setuid(NOBODY.into()).unwrap();
        let isolation = isolate(&[std::env::temp_dir()]).unwrap();
        assert!(isolation.why_not().unwrap().contains("choose another user"));
    });
}

#[test]
fn a_socket_in_the_root_directory_leaves_everything_in_sight() {
    in_fork(|| {
        let isolation = isolate(&[PathBuf::from("/")]).unwrap();
        assert!(isolation.why_not().unwrap().contains("root directory"));
        assert!(fs::metadata("/etc/passwd").is_ok());
    });
}
