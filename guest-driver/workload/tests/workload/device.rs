//! A block device in memory, with the faults that the workload must notice.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use ringpass_workload::{BlockQueue, Completion, Environment, Job, PushRefusal, Request, Verify, Wait, Wakeup};

pub(crate) const BUFFERS_GPA: u64 = 0x10_0000;
const RAM_BYTES: usize = 1 << 20;

/// A fault at request number `at` (counted from 0, in the order of execution).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// One bit of the data of a read is wrong.
    FlippedBit { byte: usize },
    /// A read returns the block after the right one.
    WrongBlock,
    /// A read reports success, but its last sector does not arrive.
    MissingSector,
    /// A write reports success, but the disk keeps its old content.
    LostWrite,
    /// The result is half of the requested length.
    Short,
    /// The result is this negative number.
    Error { res: i32 },
    /// There is no completion.
    Lost,
    /// The completion comes after this time.
    Late { after_ns: u64 },
    /// The completion comes twice.
    Doubled,
    /// There is a completion for a request that does not exist.
    MadeUp { user_data: u64 },
    /// The completion comes without its interrupt.
    NoInterrupt,
}

struct Machine {
    ram: Vec<u8>,
    disk: Vec<u8>,
    pushed: Vec<Request>,
    published: VecDeque<Request>,
    completions: VecDeque<Completion>,
    late: Vec<(u64, Completion)>,
    queue_entries: usize,
    /// The queue has room again only some pushes after a completion.
    late_room: bool,
    pushes_to_refuse: u32,
    /// The device sometimes executes the newest request first.
    reorder: bool,
    executed: u64,
    fault: Option<(u64, Fault)>,
    muted: bool,
    signals: u64,
    doorbell_needed: bool,
    asleep: bool,
    /// Requests in flight by their first byte on the disk.
    touched: Vec<u64>,
    overlaps: u64,
    depth_seen: usize,
    durable_writes: u64,
}

/// A device. The queue and the environment are two handles to it.
pub(crate) struct Device {
    machine: Rc<RefCell<Machine>>,
    clock_ns: Rc<Cell<u64>>,
}

pub(crate) struct MockQueue(Rc<RefCell<Machine>>);

pub(crate) struct MockEnvironment {
    machine: Rc<RefCell<Machine>>,
    clock_ns: Rc<Cell<u64>>,
    pub(crate) latencies_ns: Vec<u64>,
}

impl Device {
    pub(crate) fn new(disk_bytes: usize) -> Self {
        let machine = Machine {
            ram: vec![0; RAM_BYTES],
            disk: vec![0; disk_bytes],
            pushed: Vec::new(),
            published: VecDeque::new(),
            completions: VecDeque::new(),
            late: Vec::new(),
            queue_entries: 1024,
            late_room: false,
            pushes_to_refuse: 0,
            reorder: true,
            executed: 0,
            fault: None,
            muted: false,
            signals: 0,
            doorbell_needed: false,
            asleep: false,
            touched: Vec::new(),
            overlaps: 0,
            depth_seen: 0,
            durable_writes: 0,
        };
        Self { machine: Rc::new(RefCell::new(machine)), clock_ns: Rc::new(Cell::new(1)) }
    }

    pub(crate) fn handles(&self) -> (MockQueue, MockEnvironment) {
        let env = MockEnvironment {
            machine: self.machine.clone(),
            clock_ns: self.clock_ns.clone(),
            latencies_ns: Vec::new(),
        };
        (MockQueue(self.machine.clone()), env)
    }

    /// Injects the fault at the `at`th request from now.
    pub(crate) fn inject(&self, at: u64, fault: Fault) {
        let mut machine = self.machine.borrow_mut();
        machine.fault = Some((machine.executed + at, fault));
    }

    pub(crate) fn set_queue_entries(&self, entries: usize) {
        self.machine.borrow_mut().queue_entries = entries;
    }

    pub(crate) fn set_late_room(&self) {
        self.machine.borrow_mut().late_room = true;
    }

    /// Makes the device sleep when it is idle, so that it needs the doorbell.
    pub(crate) fn set_doorbell_needed(&self) {
        let mut machine = self.machine.borrow_mut();
        machine.doorbell_needed = true;
        machine.asleep = true;
    }

    pub(crate) fn flip_disk_byte(&self, position: usize) {
        self.machine.borrow_mut().disk[position] ^= 1;
    }

    pub(crate) fn disk_block(&self, job: &Job, block: usize) -> Vec<u8> {
        let len = job.block_bytes as usize;
        let first = job.area_offset_bytes as usize + block * len;
        self.machine.borrow().disk[first..first + len].to_vec()
    }

    pub(crate) fn overlaps(&self) -> u64 {
        self.machine.borrow().overlaps
    }

    pub(crate) fn depth_seen(&self) -> usize {
        self.machine.borrow().depth_seen
    }

    pub(crate) fn durable_writes(&self) -> u64 {
        self.machine.borrow().durable_writes
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.machine.borrow().touched.len()
    }
}

impl Machine {
    fn post(&mut self, completion: Completion, signal: bool) {
        self.completions.push_back(completion);
        if signal && !self.muted {
            self.signals += 1;
        }
    }

    /// Executes one request.
    fn step(&mut self, now_ns: u64) {
        while let Some(position) = self.late.iter().position(|(at_ns, _)| *at_ns <= now_ns) {
            let (_, completion) = self.late.swap_remove(position);
            self.post(completion, true);
        }
        if self.asleep {
            return;
        }
        let newest_first = self.reorder && self.executed % 3 == 0;
        let next = if newest_first { self.published.pop_back() } else { self.published.pop_front() };
        let Some(request) = next else {
            self.asleep = self.doorbell_needed;
            return;
        };
        let fault = self.fault.filter(|(at, _)| *at == self.executed).map(|(_, fault)| fault);
        self.executed += 1;
        self.pushes_to_refuse = if self.late_room { 2 } else { 0 };
        self.durable_writes += u64::from(request.write && request.durable);
        let mut res = self.transfer(&request, fault);
        self.touched.retain(|&offset_bytes| offset_bytes != request.offset_bytes);
        match fault {
            Some(Fault::Short) => res /= 2,
            Some(Fault::Error { res: error }) => res = error,
            Some(Fault::MadeUp { user_data }) => self.post(Completion { user_data, res }, true),
            _ => {}
        }
        let completion = Completion { user_data: request.user_data, res };
        match fault {
            Some(Fault::Lost) => return,
            Some(Fault::Late { after_ns }) => return self.late.push((now_ns + after_ns, completion)),
            Some(Fault::Doubled) => self.post(completion, true),
            _ => {}
        }
        self.post(completion, fault != Some(Fault::NoInterrupt));
    }

    fn transfer(&mut self, request: &Request, fault: Option<Fault>) -> i32 {
        let len = request.len_bytes as usize;
        let buffer = (request.gpa - BUFFERS_GPA) as usize;
        let mut first = request.offset_bytes as usize;
        if request.write {
            if fault != Some(Fault::LostWrite) {
                self.disk[first..first + len].copy_from_slice(&self.ram[buffer..buffer + len]);
            }
            return len as i32;
        }
        if fault == Some(Fault::WrongBlock) {
            first = (first + len) % (self.disk.len() - len);
        }
        let arrives = if fault == Some(Fault::MissingSector) { len - 512 } else { len };
        self.ram[buffer..buffer + arrives].copy_from_slice(&self.disk[first..first + arrives]);
        if let Some(Fault::FlippedBit { byte }) = fault {
            self.ram[buffer + byte] ^= 0x10;
        }
        len as i32
    }
}

impl BlockQueue for MockQueue {
    fn push(&mut self, request: &Request) -> Result<(), PushRefusal> {
        let mut machine = self.0.borrow_mut();
        if let Some(left) = machine.pushes_to_refuse.checked_sub(1) {
            machine.pushes_to_refuse = left;
            return Err(PushRefusal::Full);
        }
        if machine.pushed.len() + machine.published.len() >= machine.queue_entries {
            return Err(PushRefusal::Full);
        }
        if machine.touched.contains(&request.offset_bytes) {
            machine.overlaps += 1;
        }
        machine.touched.push(request.offset_bytes);
        machine.depth_seen = machine.depth_seen.max(machine.touched.len());
        machine.pushed.push(*request);
        Ok(())
    }

    fn publish(&mut self) -> bool {
        let mut machine = self.0.borrow_mut();
        let pushed = std::mem::take(&mut machine.pushed);
        machine.published.extend(pushed);
        machine.asleep
    }

    fn reap(&mut self) -> Option<Completion> {
        self.0.borrow_mut().completions.pop_front()
    }

    fn mute(&mut self) {
        self.0.borrow_mut().muted = true;
    }

    fn unmute(&mut self) -> bool {
        let mut machine = self.0.borrow_mut();
        machine.muted = false;
        !machine.completions.is_empty()
    }
}

impl Environment for MockEnvironment {
    fn now_ns(&self) -> u64 {
        self.clock_ns.set(self.clock_ns.get() + 20);
        self.clock_ns.get()
    }

    fn ring_doorbell(&mut self) {
        self.machine.borrow_mut().asleep = false;
    }

    fn relax(&mut self, _empty_polls: u32) {
        self.clock_ns.set(self.clock_ns.get() + 100);
        self.machine.borrow_mut().step(self.clock_ns.get());
    }

    fn wait_for_interrupt(&mut self, timeout_ns: u64) -> Wakeup {
        let end_ns = self.clock_ns.get() + timeout_ns;
        while self.clock_ns.get() < end_ns {
            let mut machine = self.machine.borrow_mut();
            if machine.signals > 0 {
                machine.signals = 0;
                return Wakeup::Interrupt;
            }
            self.clock_ns.set(self.clock_ns.get() + 100);
            machine.step(self.clock_ns.get());
        }
        Wakeup::TimedOut
    }

    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let first = usize::try_from(gpa.checked_sub(BUFFERS_GPA)?).ok()?;
        let mut machine = self.machine.borrow_mut();
        machine.ram.get_mut(first..first.checked_add(len_bytes as usize)?).map(access)
    }

    fn record_latency(&mut self, latency_ns: u64) {
        self.latencies_ns.push(latency_ns);
    }
}

/// 1000 requests of 4 KiB at depth 8, half of them writes, over 64 blocks that start at 8 KiB.
pub(crate) fn job() -> Job {
    Job {
        area_offset_bytes: 8192,
        area_bytes: 64 * 4096,
        operations: 1000,
        duration_ns: 0,
        timeout_ns: 1_000_000,
        pause_ns: 0,
        seed: 1,
        buffers_gpa: BUFFERS_GPA,
        buffer_stride_bytes: 4096,
        block_bytes: 4096,
        depth: 8,
        write_percent: 50,
        durable_percent: 0,
        wait: Wait::Poll,
        verify: Verify::On,
    }
}

/// The size in bytes of a disk for `job`, with some bytes after its area.
pub(crate) fn disk_bytes(job: &Job) -> usize {
    (job.area_offset_bytes + job.area_bytes) as usize + (job.block_bytes as usize) * 2
}
