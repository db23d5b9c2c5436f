//! A device that lies to the repository's Linux driver, and is honest again when the driver takes it anew: the test writes to the
//! guest's RAM what only the device may write. (`linux_driver_liars` has more lies, of a device of its own.)

use std::{fs::File, os::unix::fs::FileExt, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use ringpass_tests::harness::{self, test};
use ringpass_tests::linux_guest::{
    LinuxGuest, LinuxGuestConfig, fio,
    on_rings::{AWAIT_RINGS, ServedDisk, needs},
};

const RAM_MIB: u32 = 512;
const PAGE_BYTES: usize = 4096;
const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    harness::run(vec![test("a_device_that_lies_ends_with_io_errors_and_the_guest_goes_on", needs(), lies)])
}

/// The RAM of a guest, in a file.
struct Ram(File);

impl Ram {
    fn word(&self, at: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.0.read_exact_at(&mut bytes, at).context("cannot read the guest's RAM")?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn set_word(&self, at: u64, value: u32) -> Result<()> {
        self.0.write_all_at(&value.to_le_bytes(), at).context("cannot write the guest's RAM")
    }

    /// The pages of which `is_it` says so.
    fn pages(&self, is_it: impl Fn(&[u32]) -> bool) -> Result<Vec<u64>> {
        let mut found = Vec::new();
        let mut bytes = vec![0; 1 << 20];
        for start in (0..u64::from(RAM_MIB) << 20).step_by(bytes.len()) {
            self.0.read_exact_at(&mut bytes, start).context("cannot read the guest's RAM")?;
            for (page, at) in bytes.chunks(PAGE_BYTES).zip((start..).step_by(PAGE_BYTES)) {
                let words = page.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
                if is_it(&words.collect::<Vec<_>>()) {
                    found.push(at);
                }
            }
        }
        Ok(found)
    }

    /// The control pages: an open epoch and a record that makes sense (docs/abi.md, section 5).
    fn control_pages(&self) -> Result<Vec<u64>> {
        self.pages(|words| {
            words[0] & 3 == 1
                && words[1] == 0
                && [1, 2].contains(&words[9])
                && words[10] == 1
                && (22..=30).contains(&words[11])
                && words[12].trailing_zeros() >= 30
                && (words[12], words[13]) != (0, 0)
                && words[14].is_power_of_two()
                && words[15].is_power_of_two()
                && words[512 / 4..].iter().all(|word| *word == 0)
        })
    }
}

/// What the device writes, into each of the control pages.
type Lie = fn(&Ram) -> Result<usize>;

const LIES: [(&str, Lie); 2] = [
    ("a ring that follows without the end of the one before", |ram| {
        let pages = ram.control_pages()?;
        for page in &pages {
            ram.set_word(*page, ram.word(*page)? + 4)?;
        }
        Ok(pages.len())
    }),
    ("no epoch any more", |ram| {
        let pages = ram.control_pages()?;
        pages.iter().try_for_each(|page| ram.set_word(*page, 0))?;
        Ok(pages.len())
    }),
];

fn lies() -> Result<()> {
    let served = ServedDisk::new()?;
    let file = tempfile::NamedTempFile::new_in("/dev/shm").context("cannot make the guest's RAM")?;
    file.as_file().set_len(u64::from(RAM_MIB) << 20)?;
    let mut guest = served.boot(LinuxGuestConfig {
        memory_mib: RAM_MIB,
        memory_file: Some(file.path().to_owned()),
        // Memory that was freed looks like nothing that the test knows.
        kernel_arguments: vec!["init_on_free=1".to_owned()],
        ..LinuxGuestConfig::default()
    })?;
    for (name, lie) in LIES {
        served.broker.explain(tell(&mut guest, file.path(), lie)).with_context(|| name.to_owned())?;
        eprintln!("  {name}: the guest goes on");
    }
    guest.shut_down()?;
    served.end()
}

fn tell(guest: &mut LinuxGuest, ram: &Path, lie: Lie) -> Result<()> {
    let ram = Ram(File::options().read(true).write(true).open(ram)?);
    guest.run("dmesg -c >/dev/null")?;
    let options = "--rw=randwrite --bs=4k --size=8m --iodepth=16";
    let job = guest.spawn(&fio::verify_until_stopped("io_uring", "/dev/vda", options))?;
    guest.let_run(Duration::from_millis(500))?;
    let told = lie(&ram)?;
    ensure!(told == 2, "the guest has two queues with rings, and the test has found {told}");
    let ended = guest.wait_output(job, LIMIT)?;
    ensure!(ended.status != 0, "fio has noticed nothing: {ended:?}");
    let log = guest.run("dmesg | grep ringpass_blk")?;
    ensure!(log.contains("breaks the protocol") && log.contains("every request fails"), "{log}");
    ensure!(guest.run("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>&1; true")?.contains("error"));
    // The device is honest again, and the driver takes it anew.
    guest.run("rmmod ringpass_blk && load-module ringpass_blk")?;
    guest.run(AWAIT_RINGS)?;
    guest.run(&fio::verify("io_uring", "/dev/vda", options)).map(drop)
}
