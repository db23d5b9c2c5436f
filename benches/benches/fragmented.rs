//! A read whose buffer is in several pieces of guest memory: on a ring it takes an SQE for each piece, on a virtqueue one
//! request with a descriptor for each. From how many pieces on is the virtqueue quicker?
//!
//! A driver in this process does both on one server, in alternating rounds, with one read outstanding. It spins, and the
//! server's worker polls, so a virtqueue has no notification to pay for; in a virtual machine it pays for at least some.
//!
//! `cargo bench -p ringpass-benches --bench fragmented -- --help` shows the options. Needs two idle cores.

use std::hint;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use ringpass_benches::build_program;
use ringpass_tests::disks::DiskKind;
use ringpass_tests::front_end::attach::{RingDriver, bench::Bench};
use ringpass_tests::front_end::descriptor::Descriptor;
use ringpass_tests::front_end::vring::DriverVring;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vm_memory::{Bytes, GuestAddress};

const DISK_BYTES: u64 = 64 << 20;
const PIECE_BYTES: u32 = 4096;
/// The pieces of the largest read: what the SQ of the driver holds.
const PIECES_MAX: u64 = 32;
const PATIENCE: Duration = Duration::from_secs(30);
const HEADER_BYTES: u32 = 16;

/// Compare reads of several pieces on rings and virtqueues.
#[derive(Debug, Parser)]
struct Args {
    /// Number of alternating measurements.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Duration of each measurement.
    #[arg(long, default_value_t = 100)]
    millis: u64,
    /// Passed by cargo; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.millis > 0, "rounds and millis must not be zero");
    build_program()?;
    for kind in [DiskKind::Ext4PageCache, DiskKind::Ext4Direct] {
        compare(kind, &args)?;
    }
    Ok(())
}

fn compare(kind: DiskKind, args: &Args) -> Result<()> {
    let mut bench = Bench::new(kind, DISK_BYTES, 3, &[])?;
    let mut ring = bench.attached(1)?;
    let mut virtqueue = Virtqueue::new(&mut bench)?;
    println!("\n{kind:?}: time of a read, medians of {} rounds", args.rounds);
    println!("{:>8} {:>12} {:>12} {:>8}", "pieces", "ring", "virtqueue", "ratio");
    for pieces in [1, 2, 4, 8, 16, 24, 32] {
        let (mut on_ring, mut on_virtqueue) = (Vec::new(), Vec::new());
        for _ in 0..args.rounds {
            on_ring.push(time(args, |number| read_on_ring(&mut ring, pieces, number))?);
            on_virtqueue.push(time(args, |number| virtqueue.read(pieces, number))?);
        }
        let (ring_us, virtqueue_us) = (median(&mut on_ring), median(&mut on_virtqueue));
        println!("{pieces:>8} {ring_us:>9.2} us {virtqueue_us:>9.2} us {:>8.2}", ring_us / virtqueue_us);
    }
    Ok(())
}

/// The time of a read in microseconds.
fn time(args: &Args, mut read: impl FnMut(u64) -> Result<()>) -> Result<f64> {
    let (begin, mut reads) = (Instant::now(), 0_u64);
    while begin.elapsed() < Duration::from_millis(args.millis) {
        read(reads)?;
        reads += 1;
    }
    Ok(begin.elapsed().as_secs_f64() * 1e6 / reads as f64)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Where the read with this number begins on the disk.
fn offset_bytes(pieces: u64, number: u64) -> u64 {
    let len_bytes = pieces * u64::from(PIECE_BYTES);
    number.wrapping_mul(0x9e37_79b9) % (DISK_BYTES / len_bytes) * len_bytes
}

fn read_on_ring(driver: &mut RingDriver, pieces: u64, number: u64) -> Result<()> {
    let offset_bytes = offset_bytes(pieces, number);
    let mut sqes = Vec::with_capacity(pieces as usize);
    for piece in 0..pieces {
        let position = offset_bytes + piece * u64::from(PIECE_BYTES);
        // Every second buffer: no two pieces are neighbours.
        sqes.push(driver.sqe(false, 2 * piece, PIECE_BYTES, position, piece)?);
    }
    driver.submit_together(&sqes)?;
    let begin = Instant::now();
    let mut done = 0;
    while done < pieces {
        driver.reap();
        while let Some(completion) = driver.pop_completion() {
            ensure!(completion.res == PIECE_BYTES as i32, "a piece: {}", completion.res);
            done += 1;
        }
        ensure!(begin.elapsed() < PATIENCE, "{done} of {pieces} pieces are done");
        hint::spin_loop();
    }
    Ok(())
}

/// A queue that is not attached.
struct Virtqueue {
    vring: DriverVring,
    header_gpa: u64,
    status_gpa: u64,
    buffers_gpa: u64,
}

impl Virtqueue {
    fn new(bench: &mut Bench) -> Result<Self> {
        let vring = bench.started(2)?.into_vring();
        let arena = &mut bench.ram.arenas[0];
        let header_gpa = arena.take(u64::from(HEADER_BYTES) + 1, 16)?;
        let buffers_gpa = arena.take(2 * PIECES_MAX * u64::from(PIECE_BYTES), PIECE_BYTES.into())?;
        Ok(Self { vring, header_gpa, status_gpa: header_gpa + u64::from(HEADER_BYTES), buffers_gpa })
    }

    fn read(&mut self, pieces: u64, number: u64) -> Result<()> {
        let memory = self.vring.ram().memory();
        let sector = offset_bytes(pieces, number) / 512;
        let mut header = [0; HEADER_BYTES as usize];
        header[..4].copy_from_slice(&VIRTIO_BLK_T_IN.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write_slice(&header, GuestAddress(self.header_gpa))?;
        memory.write_obj(0xff_u8, GuestAddress(self.status_gpa))?;
        let mut chain = vec![Descriptor::readable(self.header_gpa, HEADER_BYTES)];
        let piece = |piece| self.buffers_gpa + 2 * piece * u64::from(PIECE_BYTES);
        chain.extend((0..pieces).map(|number| Descriptor::writable(piece(number), PIECE_BYTES)));
        chain.push(Descriptor::writable(self.status_gpa, 1));
        self.vring.add(&chain)?;
        self.vring.publish()?;
        self.vring.next_used_by_spinning(PATIENCE).context("the read does not end")?;
        let status: u8 = self.vring.ram().memory().read_obj(GuestAddress(self.status_gpa))?;
        ensure!(status == 0, "the read has the status {status}");
        Ok(())
    }
}
