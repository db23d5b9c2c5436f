//! libblkio, a client that this project did not write, uses a whole disk: it writes, flushes, reads, discards, writes
//! zeroes and verifies.

use std::{
    fs::File,
    mem::MaybeUninit,
    os::unix::fs::FileExt,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use ringpass_tests::{
    broker_process,
    disks::DiskKind,
    front_end::{load::Model, rig::Rig},
    harness::{self, Test, test},
    pairs::{Row, Space},
    seed::Seed,
};

const DISK_BYTES: u64 = 4 << 20;
const BLOCK_BYTES: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(30);

const DEPTHS: [usize; 5] = [1, 2, 16, 64, 128];
const QUEUES: [i32; 3] = [1, 2, 4];
const REQUEST_BLOCKS: [usize; 3] = [1, 4, 32];
/// Whether the client polls the used ring rather than waiting for interrupts.
const POLL_QUEUES: [bool; 2] = [false, true];

fn main() -> ExitCode {
    let tests: Vec<Test> = DiskKind::ALL
        .map(|kind| {
            let needs = kind.needs().into_iter().chain(broker_process::needs());
            test(format!("libblkio_reads_back_what_it_wrote_to_a_whole_disk_on_{kind}"), needs, move || matrix(kind))
        })
        .into();
    harness::run(tests)
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    depth: usize,
    queues: i32,
    request_blocks: usize,
    poll: bool,
}

fn matrix(kind: DiskKind) -> Result<()> {
    let mut space = Space::new();
    let depth = space.factor("depth", &DEPTHS);
    let queues = space.factor("queues", &QUEUES);
    let request_blocks = space.factor("blocks of a request", &REQUEST_BLOCKS);
    let poll = space.factor("poll queues", &POLL_QUEUES);
    let seed = Seed::from_env_or_random();
    let rows = if harness::is_soak() { space.full_product()? } else { space.all_pairs(seed)? };

    let rig = Rig::new(kind, DISK_BYTES)?;
    let broker = rig.broker(&["--num-queues", "4"])?;
    // The disk keeps what the row before left. The test expects only what this row writes.
    for row in &rows {
        let shape = Shape {
            depth: *depth.of(row),
            queues: *queues.of(row),
            request_blocks: *request_blocks.of(row),
            poll: *poll.of(row),
        };
        let result = use_whole_disk(&rig.socket(), shape, row_seed(seed, row));
        broker.explain(result.with_context(|| format!("{row}")))?;
    }
    Ok(())
}

fn row_seed(seed: Seed, row: &Row) -> Seed {
    seed.derive(row.to_string())
}

fn use_whole_disk(socket: &Path, shape: Shape, seed: Seed) -> Result<()> {
    let mut client = Client::connect(socket, shape)?;
    let mut model = Model::zeroes(0, DISK_BYTES / BLOCK_BYTES, seed);
    let version = model.new_version();
    let whole: Vec<Request> = all_of(shape.request_blocks, model.blocks());
    client.run(&model, Operation::Write { version }, &whole)?;
    model.give_back(0, model.blocks(), Some(version));
    client.run(&model, Operation::Flush, &[Request { first: 0, count: 1 }])?;
    client.run(&model, Operation::Read, &whole)?;

    // Every fourth request of the disk, so that the blocks beside it show whether the device changes too much.
    let some = |which: usize| whole.iter().copied().skip(which).step_by(4).collect::<Vec<_>>();
    for (which, operation) in [(0, Operation::WriteZeroes), (1, Operation::WriteZeroesNoUnmap)] {
        client.run(&model, operation, &some(which))?;
        for request in some(which) {
            model.give_back(request.first, request.count, Some(0));
        }
    }
    // The device chooses the content of a discarded block. Everything else must be unchanged.
    client.run(&model, Operation::Discard, &some(2))?;
    let kept: Vec<Request> = (0..4).filter(|&which| which != 2).flat_map(some).collect();
    client.run(&model, Operation::Read, &kept)
}

/// The whole disk in requests of so many blocks. The last one is shorter.
fn all_of(request_blocks: usize, blocks: usize) -> Vec<Request> {
    let request = |first| Request { first, count: request_blocks.min(blocks - first) };
    (0..blocks).step_by(request_blocks).map(request).collect()
}

#[derive(Debug, Clone, Copy)]
struct Request {
    first: usize,
    count: usize,
}

#[derive(Debug, Clone, Copy)]
enum Operation {
    Read,
    Write { version: u32 },
    WriteZeroes,
    WriteZeroesNoUnmap,
    Discard,
    Flush,
}

/// libblkio, connected.
struct Client {
    // This drops before the library's handle, so that requests end before their memory is freed.
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    /// The memory of the region, which the library keeps in a file.
    memory: File,
    shape: Shape,
    _blkio: Blkio,
}

impl Client {
    fn connect(socket: &Path, shape: Shape) -> Result<Self> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(in_words)?;
        blkio.set_str("path", socket.to_str().context("a socket path in UTF-8")?).map_err(in_words)?;
        blkio.connect().map_err(in_words)?;
        let (interrupts, polling) = if shape.poll { (0, shape.queues) } else { (shape.queues, 0) };
        blkio.set_i32("num-queues", interrupts).map_err(in_words)?;
        blkio.set_i32("num-poll-queues", polling).map_err(in_words)?;
        ensure!(blkio.get_u64("capacity").map_err(in_words)? == DISK_BYTES, "another capacity");
        let outcome = blkio.start().map_err(in_words)?;
        let queues: Vec<Blkioq> = outcome.queues.into_iter().chain(outcome.poll_queues).collect();
        ensure!(queues.len() == usize::try_from(shape.queues)?, "{} queues", queues.len());
        let buffers = queues.len() * shape.depth;
        let region = blkio.alloc_mem_region(buffers * buffer_bytes(shape)).map_err(in_words)?;
        blkio.map_mem_region(&region).map_err(in_words)?;
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", region.fd))
            .context("cannot open the client's memory once more")?;
        Ok(Self { queues, region, memory, shape, _blkio: blkio })
    }

    /// Does the requests on all queues in turn, and waits for all of them.
    fn run(&mut self, model: &Model, operation: Operation, requests: &[Request]) -> Result<()> {
        let mut todo = requests.iter().copied();
        let mut buffers: Vec<Vec<Option<Request>>> = vec![vec![None; self.shape.depth]; self.queues.len()];
        loop {
            for (queue, buffers) in buffers.iter_mut().enumerate() {
                for (buffer, slot) in buffers.iter_mut().enumerate().filter(|(_, slot)| slot.is_none()) {
                    let Some(request) = todo.next() else { break };
                    self.submit(model, operation, queue, buffer, request)?;
                    *slot = Some(request);
                }
            }
            let mut waited = false;
            for (queue, buffers) in buffers.iter_mut().enumerate() {
                if buffers.iter().any(Option::is_some) {
                    waited = true;
                    for buffer in self.complete(queue)? {
                        let request = buffers[buffer].take().context("a completion of nothing")?;
                        if let Operation::Read = operation {
                            let found = self.content(queue, buffer, request.count)?;
                            model.check(request.first, &found)?;
                        }
                    }
                }
            }
            if !waited {
                return Ok(());
            }
        }
    }

    fn submit(
        &mut self,
        model: &Model,
        operation: Operation,
        queue: usize,
        buffer: usize,
        request: Request,
    ) -> Result<()> {
        let start = model.offset_bytes(request.first);
        let len_bytes = request.count as u64 * BLOCK_BYTES;
        let at = self.buffer_at(queue, buffer);
        let address = (self.region.addr + at) as *mut u8;
        let flags = ReqFlags::empty();
        match operation {
            Operation::Read => {
                let unread = vec![0xdd; len_bytes as usize];
                self.memory.write_all_at(&unread, at as u64)?;
                self.queues[queue].read(start, address, unread.len(), buffer, flags);
            }
            Operation::Write { version } => {
                let mut content = vec![0; len_bytes as usize];
                model.content(request.first, version, &mut content);
                self.memory.write_all_at(&content, at as u64)?;
                self.queues[queue].write(start, address, content.len(), buffer, flags);
            }
            Operation::WriteZeroes => self.queues[queue].write_zeroes(start, len_bytes, buffer, flags),
            Operation::WriteZeroesNoUnmap => {
                self.queues[queue].write_zeroes(start, len_bytes, buffer, ReqFlags::NO_UNMAP);
            }
            Operation::Discard => self.queues[queue].discard(start, len_bytes, buffer, flags),
            Operation::Flush => self.queues[queue].flush(buffer, flags),
        }
        Ok(())
    }

    /// Waits for at least one completion of a queue, and returns the buffers of the completed requests.
    fn complete(&mut self, queue: usize) -> Result<Vec<usize>> {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; 64];
        let mut left = PATIENCE;
        let begun = Instant::now();
        let count = self.queues[queue]
            .do_io(&mut completions, 1, Some(&mut left), None)
            .map_err(in_words)
            .with_context(|| format!("do_io failed after {:?}", begun.elapsed()))?;
        let mut buffers = Vec::with_capacity(count);
        for completion in &completions[..count] {
            // SAFETY: `do_io` returned the number of completions that it has written, from the first on.
            let completion = unsafe { completion.assume_init_ref() };
            ensure!(completion.ret == 0, "a request ended with {}", completion.ret);
            buffers.push(completion.user_data);
        }
        Ok(buffers)
    }

    fn content(&self, queue: usize, buffer: usize, blocks: usize) -> Result<Vec<u8>> {
        let mut content = vec![0; blocks * BLOCK_BYTES as usize];
        self.memory.read_exact_at(&mut content, self.buffer_at(queue, buffer) as u64)?;
        Ok(content)
    }

    fn buffer_at(&self, queue: usize, buffer: usize) -> usize {
        (queue * self.shape.depth + buffer) * buffer_bytes(self.shape)
    }
}

fn buffer_bytes(shape: Shape) -> usize {
    shape.request_blocks * BLOCK_BYTES as usize
}

fn in_words(error: blkio::Error) -> anyhow::Error {
    anyhow!("libblkio: {error}")
}
