//! Messages with wrong sizes, flags, descriptors, orders and values, on thousands of connections. The broker answers or
//! closes that connection, serves the next one, and keeps nothing.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        blk::{HEADER_BYTES, NO_STATUS, SECTOR_BYTES, header},
        descriptor::{DESCRIPTOR_BYTES, Descriptor, F_NEXT},
        event::Event,
        ram::RamRegion,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        wire::{FLAG_NEED_REPLY, FLAG_VERSION, Wire, encode},
    },
    harness::{self, test},
    seed::Seed,
};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    pipe::{PipeFlags, pipe_with},
};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserLog, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVringAddr, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN};
use vm_memory::ByteValued;

const DISK_BYTES: u64 = 4 << 20;
/// The length of guest RAM, which is the middle part of its file. The broker must not touch the parts before and behind
/// it.
const RAM_BYTES: u64 = 4 << 20;
const RAM_GPA: u64 = 1 << 20;
const CANARY: u8 = 0xc5;
/// The offsets of the vrings in each part of the file: descriptor table, used ring, available ring.
const RING_OFFSETS: [u64; 3] = [0, 0x1000, 0x2000];
/// The offset of the request's header. A wrong message can only make the device write behind [`PREPARED_BYTES`]: an
/// overwritten header could become a request that writes the disk.
const HEADER_OFFSET: u64 = 0x3000;
const STATUS_OFFSET: u64 = 0x3800;
const PREPARED_BYTES: u64 = 0x4000;
/// The most by which the broker's own memory may grow in all rounds. Only its allocator may keep something.
const GROWTH_BYTES: u64 = 2 << 20;

fn main() -> ExitCode {
    let needs = DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
    harness::run(vec![test("the_broker_keeps_nothing_of_connections_with_malformed_messages", needs, malformed)])
}

fn malformed() -> Result<()> {
    let seed = Seed::from_env_or_random();
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "2"])?;
    broker.explain(rounds(&rig, &broker, seed))
}

fn rounds(rig: &Rig, broker: &BrokerProcess, seed: Seed) -> Result<()> {
    let rounds: u64 = harness::budget(10_000, 500_000);
    let mut hostile = Hostile::new()?;
    serve_honestly(&rig.socket())?;
    let fds = broker.usage()?.fds;
    let mut settled_bytes = 0;
    let mut executed = 0;
    for round in 0..rounds {
        let mut rng = seed.derive(round).rng();
        hostile.round(&rig.socket(), &mut rng).with_context(|| format!("round {round}"))?;
        if round % 500 == 499 {
            serve_honestly(&rig.socket()).with_context(|| format!("after round {round}"))?;
            broker.wait_for_fds(fds).with_context(|| format!("after round {round}"))?;
            executed += u32::from(hostile.restore_ram()?);
        }
        if round == rounds / 4 {
            settled_bytes = broker.usage()?.anonymous_bytes;
        }
    }
    let bytes = broker.usage()?.anonymous_bytes;
    ensure!(bytes <= settled_bytes + GROWTH_BYTES, "{bytes} bytes of memory, {settled_bytes} after a quarter");
    ensure!(executed > 0, "no request was executed in all rounds");
    let disk = rig.disk_file()?;
    ensure!(disk.metadata()?.len() == DISK_BYTES, "the disk has another size");
    let mut content = vec![0; (DISK_BYTES - 4096) as usize];
    disk.read_exact_at(&mut content, 0)?;
    ensure!(content.iter().all(|&byte| byte == 0), "the disk was written");
    Ok(())
}

/// Checks that the broker serves a correct front-end, which writes and reads the last block.
fn serve_honestly(socket: &Path) -> Result<()> {
    let mut ram = TestRam::new(1, 1 << 20)?;
    let front_end = FrontEnd::connect(socket, &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 1, 4096)?;
    let last = (DISK_BYTES - 4096) / SECTOR_BYTES;
    driver.write(last, &[0x77; 4096])?;
    ensure!(driver.read(last, 4096)? == [0x77; 4096]);
    front_end.stop_vring(1).map(drop)
}

/// A front-end that knows the protocol and breaks it.
struct Hostile {
    /// A file of three parts, of which the middle one is guest RAM. A message tells which part of a file the broker may
    /// access, so this file goes only with messages that name the middle part.
    ram_file: Arc<File>,
    ram: RamRegion,
    /// Descriptors of all kinds, which go where the broker expects others. The broker may write all of these files.
    files: Vec<OwnedFd>,
}

/// The index in [`Hostile::files`] of the eventfd, which plausible messages have.
const EVENT: usize = 0;
const LOG: usize = 2;
/// The index of another file like that of guest RAM.
const OTHER_RAM: usize = 5;

impl Hostile {
    fn new() -> Result<Self> {
        let memfd = |len_bytes| -> Result<File> {
            let file = File::from(memfd_create("ringpass-test", MemfdFlags::CLOEXEC)?);
            file.set_len(len_bytes)?;
            Ok(file)
        };
        let ram_file = Arc::new(memfd(3 * RAM_BYTES)?);
        for (part, fill) in [(0, CANARY), (1, 0), (2, CANARY)] {
            ram_file.write_all_at(&part_of_ram(fill), part * RAM_BYTES)?;
        }
        let other_ram = memfd(3 * RAM_BYTES)?;
        other_ram.write_all_at(&part_of_ram(0), RAM_BYTES)?;
        let ram = RamRegion::of_file(ram_file.clone(), RAM_BYTES, RAM_GPA, RAM_BYTES)?;
        let (pipe_end, other_pipe_end) = pipe_with(PipeFlags::CLOEXEC)?;
        let (socket, _) = UnixStream::pair()?;
        let mut short = memfd(100)?;
        short.write_all(&[CANARY; 100])?;
        let files = vec![
            Event::new()?.as_fd().try_clone_to_owned()?,
            memfd(4096)?.into(),
            memfd(64 << 20)?.into(),
            memfd(0)?.into(),
            short.into(),
            other_ram.into(),
            File::open("/dev/null")?.into(),
            File::open("/")?.into(),
            File::open("/proc/self/status")?.into(),
            pipe_end,
            other_pipe_end,
            socket.into(),
        ];
        Ok(Self { ram_file, ram, files })
    }

    /// Checks that nothing was written beside guest RAM, and makes guest RAM what it was: a request that was executed
    /// with wrong addresses may have overwritten the rings. Returns whether a request was executed at the right address.
    fn restore_ram(&self) -> Result<bool> {
        let part = |index| -> Result<Vec<u8>> {
            let mut part = vec![0; RAM_BYTES as usize];
            self.ram_file.read_exact_at(&mut part, index * RAM_BYTES)?;
            Ok(part)
        };
        for index in [0, 2] {
            ensure!(part(index)? == part_of_ram(CANARY), "bytes beside guest RAM were written");
        }
        let is_executed = part(1)?[STATUS_OFFSET as usize] == VIRTIO_BLK_S_OK as u8;
        self.ram_file.write_all_at(&part_of_ram(0), RAM_BYTES)?;
        Ok(is_executed)
    }

    /// Runs one connection: some right messages, then some wrong ones. Then the broker closes it, unless it has
    /// already.
    fn round(&mut self, socket: &Path, rng: &mut fastrand::Rng) -> Result<()> {
        let wire = Wire::connect(socket, Duration::from_secs(20))?;
        // The broker may have closed the connection already, so these errors do not matter.
        let _ = self.right_messages(&wire, rng.usize(0..=5));
        for _ in 0..rng.usize(1..=6) {
            if self.wrong_message(&wire, rng).is_err() {
                break;
            }
        }
        let _ = wire.finish_sending();
        wire.drain_until_closed().context("the broker neither answers nor closes")
    }

    /// Sends the messages with which a session begins, up to `stage`.
    fn right_messages(&self, wire: &Wire, stage: usize) -> Result<()> {
        let number = |value: u64| value.to_ne_bytes().to_vec();
        let event = [self.files[0].as_fd()];
        let send = |request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]| {
            wire.send(request as u32, FLAG_VERSION, body, fds)
        };
        if stage >= 1 {
            // The bits of the specification that back-ends may offer: PROTOCOL_FEATURES, and all of ours.
            send(FrontendReq::SET_PROTOCOL_FEATURES, &number(0x1_b22b), &[])?;
            send(FrontendReq::SET_FEATURES, &number(1 << 32 | 1 << 30), &[])?;
        }
        if stage >= 2 {
            send(FrontendReq::ADD_MEM_REG, &single(&self.ram.message()), &[self.ram_file.as_fd()])?;
        }
        if stage >= 3 {
            for index in 0..2 {
                send(FrontendReq::SET_VRING_NUM, VhostUserVringState::new(index, 64).as_slice(), &[])?;
                send(FrontendReq::SET_VRING_ADDR, self.vring_addr(index, RING_OFFSETS).as_slice(), &[])?;
            }
        }
        if stage >= 4 {
            for index in 0..2 {
                send(FrontendReq::SET_VRING_CALL, &number(index), &event)?;
                send(FrontendReq::SET_VRING_KICK, &number(index), &event)?;
            }
        }
        if stage >= 5 {
            for index in 0..2 {
                send(FrontendReq::SET_VRING_ENABLE, VhostUserVringState::new(index, 1).as_slice(), &[])?;
            }
        }
        Ok(())
    }

    fn vring_addr(&self, index: u32, offsets: [u64; 3]) -> VhostUserVringAddr {
        let user = self.ram.message().user_addr;
        let [desc, used, avail] = offsets.map(|offset| user.wrapping_add(offset));
        VhostUserVringAddr::new(index, VhostUserVringAddrFlags::empty(), desc, used, avail, 0)
    }

    /// Sends a message that is almost right, and wrong in some places.
    fn wrong_message(&self, wire: &Wire, rng: &mut fastrand::Rng) -> Result<()> {
        let (plausible_request, plausible_body, fds) = self.plausible(rng);
        let mut body = plausible_body.clone();
        for _ in 0..rng.usize(0..=2) {
            corrupt_word(&mut body, rng);
        }
        match rng.u8(0..20) {
            0 => body.truncate(rng.usize(0..=body.len())),
            1 => body.extend(std::iter::repeat_n(rng.u8(..), rng.usize(1..64))),
            2 => body.resize(rng.usize(0..9000), 0),
            _ => {}
        }
        let request = if rng.u8(0..20) == 0 { rng.u32(..) >> rng.u32(0..32) } else { plausible_request };
        let flags = match rng.u8(0..10) {
            0 => rng.u32(..),
            1 => rng.u32(0..16),
            2..=5 => FLAG_VERSION | FLAG_NEED_REPLY,
            _ => FLAG_VERSION,
        };
        let mut bytes = encode(request, flags, &body);
        if rng.u8(0..20) == 0 {
            // The size is not that of the body, so more or fewer bytes follow.
            let size_bytes = [0, 1, 4096, 65_536, u32::MAX, rng.u32(..)][rng.usize(0..6)];
            bytes[8..12].copy_from_slice(&size_bytes.to_ne_bytes());
        }
        if rng.u8(0..20) == 0 {
            bytes.truncate(rng.usize(1..=bytes.len()));
        }
        let names_ram = [FrontendReq::SET_MEM_TABLE, FrontendReq::ADD_MEM_REG].map(|request| request as u32);
        let is_as_planned = bytes == encode(plausible_request, flags, &plausible_body);
        let file = |file: usize| match file {
            OTHER_RAM if names_ram.contains(&request) && is_as_planned => self.ram_file.as_fd(),
            file => self.files[file].as_fd(),
        };
        let mut sent: Vec<BorrowedFd<'_>> = fds.into_iter().map(file).collect();
        match rng.u8(0..12) {
            0 => sent.clear(),
            1 => sent.extend((0..rng.usize(1..8)).map(|_| self.files[rng.usize(..self.files.len())].as_fd())),
            2 => sent.extend((0..60).map(|_| self.files[rng.usize(..self.files.len())].as_fd())),
            3 => sent.iter_mut().for_each(|fd| *fd = self.files[rng.usize(..self.files.len())].as_fd()),
            _ => {}
        }
        // The message goes in two pieces sometimes, and the descriptors with either.
        let cut = if rng.u8(0..10) == 0 { rng.usize(1..=bytes.len()) } else { bytes.len() };
        let (first, second) = bytes.split_at(cut);
        let late = rng.bool() && !second.is_empty();
        wire.send_bytes(first, if late { &[] } else { &sent })?;
        if !second.is_empty() {
            wire.send_bytes(second, if late { &sent } else { &[] })?;
        }
        Ok(())
    }

    /// A message that would be right at some time, and the indexes of its descriptors.
    fn plausible(&self, rng: &mut fastrand::Rng) -> (u32, Vec<u8>, Vec<usize>) {
        let index = rng.u32(0..3);
        let number = |value: u64| value.to_ne_bytes().to_vec();
        let state = |number| VhostUserVringState::new(index, number).as_slice().to_vec();
        let request = FrontendReq::try_from(rng.u32(1..=44)).unwrap_or(FrontendReq::GET_FEATURES);
        let ram = self.ram.message();
        let (body, fds) = match request {
            FrontendReq::SET_FEATURES | FrontendReq::SET_PROTOCOL_FEATURES => {
                (number(rng.u64(..) & rng.u64(..)), vec![])
            }
            FrontendReq::SET_STATUS => (number(rng.u64(0..256)), vec![]),
            FrontendReq::SET_MEM_TABLE => {
                let count = rng.usize(1..10);
                let mut body = VhostUserMemory::new(count as u32).as_slice().to_vec();
                let part_bytes = RAM_BYTES / 16;
                for part in 0..count as u64 {
                    let (at, offset) = (part * part_bytes, ram.mmap_offset + part * part_bytes);
                    let region =
                        VhostUserMemoryRegion::new(ram.guest_phys_addr + at, part_bytes, ram.user_addr + at, offset);
                    body.extend_from_slice(region.as_slice());
                }
                (body, vec![OTHER_RAM; count])
            }
            FrontendReq::ADD_MEM_REG | FrontendReq::REM_MEM_REG => (single(&ram), vec![OTHER_RAM]),
            FrontendReq::SET_LOG_BASE => (VhostUserLog::new(1 << 16, 0).as_slice().to_vec(), vec![LOG]),
            FrontendReq::SET_LOG_FD | FrontendReq::SET_BACKEND_REQ_FD => (vec![], vec![self.files.len() - 1]),
            FrontendReq::SET_VRING_NUM => (state(1 << rng.u32(0..16)), vec![]),
            FrontendReq::SET_VRING_BASE => (state(rng.u32(0..0x1_0000)), vec![]),
            FrontendReq::SET_VRING_ENABLE => (state(rng.u32(0..2)), vec![]),
            FrontendReq::GET_VRING_BASE => (state(0), vec![]),
            FrontendReq::SET_VRING_ADDR => {
                let offsets = RING_OFFSETS
                    .map(|right| [right, rng.u64(PREPARED_BYTES..RAM_BYTES + 8192) & !0xf][rng.usize(0..2)]);
                (self.vring_addr(index, offsets).as_slice().to_vec(), vec![])
            }
            FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
                let has_fd = rng.u8(0..4) > 0;
                let flag = if has_fd { 0 } else { 1 << 8 };
                (number(u64::from(index) | flag), if has_fd { vec![EVENT] } else { vec![] })
            }
            FrontendReq::GET_CONFIG | FrontendReq::SET_CONFIG => {
                let size_bytes = rng.u32(1..70);
                let header = VhostUserConfig::new(rng.u32(0..64), size_bytes, VhostUserConfigFlags::WRITABLE);
                ([header.as_slice(), &vec![0; size_bytes as usize]].concat(), vec![])
            }
            FrontendReq::GET_INFLIGHT_FD => (VhostUserInflight::new(0, 0, 2, 128).as_slice().to_vec(), vec![]),
            FrontendReq::SET_INFLIGHT_FD => {
                let size_bytes = [4096, 8192, rng.u64(0..1 << 20)][rng.usize(0..3)];
                (VhostUserInflight::new(size_bytes, 0, 2, 128).as_slice().to_vec(), vec![LOG])
            }
            _ => (vec![], vec![]),
        };
        (request as u32, body, fds)
    }
}

/// The content of each part of a file of guest RAM: a vring with a read request, and `fill` elsewhere. The parts beside
/// guest RAM have it too, so that a broker that takes them for guest RAM writes there.
fn part_of_ram(fill: u8) -> Vec<u8> {
    let mut part = vec![fill; RAM_BYTES as usize];
    let mut put = |offset: u64, bytes: &[u8]| part[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    let [desc, _, avail] = RING_OFFSETS;
    put(0, &[0; PREPARED_BYTES as usize]);
    let gpa = |offset| RAM_GPA + offset;
    let chain = [
        Descriptor::readable(gpa(HEADER_OFFSET), HEADER_BYTES),
        // The read goes up to the last byte of guest RAM.
        Descriptor::writable(gpa(RAM_BYTES - 4096), 4096),
        Descriptor::writable(gpa(STATUS_OFFSET), 1),
    ];
    for (index, mut descriptor) in chain.into_iter().enumerate() {
        if index + 1 < chain.len() {
            descriptor.flags |= F_NEXT;
            descriptor.next = index as u16 + 1;
        }
        put(desc + index as u64 * DESCRIPTOR_BYTES, &descriptor.to_bytes());
    }
    put(HEADER_OFFSET, &header(VIRTIO_BLK_T_IN, 0));
    put(STATUS_OFFSET, &[NO_STATUS]);
    // Flags 0, one entry, which is descriptor 0.
    put(avail, &[0, 0, 1, 0, 0, 0]);
    part
}

/// Puts a value that is often wrong at the beginning of some field.
fn corrupt_word(body: &mut [u8], rng: &mut fastrand::Rng) {
    let interesting =
        [0, 1, 2, 0xff, 0x100, 0xfff, 0x1000, 0x7fff_ffff, 0xffff_ffff, 1 << 32, i64::MAX as u64, u64::MAX];
    let value = match rng.u8(0..3) {
        0 => rng.u64(..),
        _ => interesting[rng.usize(..interesting.len())],
    };
    let width = if rng.bool() { 4 } else { 8 };
    if body.len() >= width {
        let at = rng.usize(0..=(body.len() - width) / 4) * 4;
        body[at..at + width].copy_from_slice(&value.to_ne_bytes()[..width]);
    }
}

fn single(region: &VhostUserMemoryRegion) -> Vec<u8> {
    let &VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } = region;
    VhostUserSingleMemoryRegion::new(guest_phys_addr, memory_size, user_addr, mmap_offset).as_slice().to_vec()
}
