//! The thread of one queue: what the device does with requests, and with an attached queue.

use std::{
    fs::File,
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use ringpass_guest_abi::{
    attach::AttachPayload,
    control::{ACKNOWLEDGED_OFFSET_BYTES, ANNOUNCED_OFFSET_BYTES, DETACH_OFFSET_BYTES, RING_OFFSET_BYTES},
    probe::{F_DSYNC, MAGIC, ProbeAnswer, VERSION},
    request::{ErrorCode, EventAnswer, Outcome, T_ARM, T_ATTACH, T_EVENT, T_PROBE},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    CQ_TAIL_BYTES, CQES_BYTES, Conduct, QUEUES, RingLie, SQ_TAIL_BYTES, honest_record, locked,
    queue::{Chain, Queue},
};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;
const HEADER_BYTES: usize = 16;
const SECTOR_BYTES: usize = 512;
/// Phases of the word `announced` (docs/abi.md, section 6).
const OPEN: u32 = 1;
const ENDED: u32 = 3;
/// Fields of an SQE (`<linux/io_uring.h>`).
const SQE_LEN_AT: u64 = 24;
const SQE_USER_DATA_AT: u64 = 32;
/// The area of the first epoch: odd epochs use the second.
const RING_AREA: usize = 1;
/// How often the device looks when there is no kick.
const LOOK: Duration = Duration::from_millis(3);
/// How long a ring lives that the device takes away.
const LIFE: Duration = Duration::from_millis(10);

/// A queue with a pending ATTACH.
struct Attachment {
    chain: Chain,
    payload: AttachPayload,
    conduct: Conduct,
    epoch: u32,
    is_open: bool,
    since: Instant,
}

/// Serves a queue until it is told to stop. Returns the index of the next request.
pub(super) fn serve(mut queue: Queue, index: u16, mut kick: File, stop: &Arc<AtomicBool>) -> io::Result<u16> {
    let mut attachment = None;
    let mut pending_event = None;
    let mut is_first_event = true;
    while !stop.load(Ordering::Acquire) {
        wait(&mut kick)?;
        while let Some(chain) = queue.pop()? {
            let payload = queue.payload(&chain)?;
            let number = payload.first_chunk::<4>().map_or(u32::MAX, |bytes| u32::from_le_bytes(*bytes));
            match number {
                T_EVENT if index == 0 => {
                    queue.shared.events.fetch_add(1, Ordering::Relaxed);
                    pending_event = Some(chain);
                }
                T_ATTACH => {
                    attachment = attach(&mut queue, chain, &payload)?;
                }
                _ => answer(&mut queue, &chain, number, &payload)?,
            }
        }
        if (is_first_event || queue.shared.lies().floods_events) && let_event_go(&mut queue, &mut pending_event)? {
            is_first_event = false;
        }
        if let Some(attached) = &mut attachment {
            if let Some(error) = look(&queue, attached)? {
                let status = if error == ErrorCode::Detached { S_OK } else { S_IOERR };
                queue.complete(&attached.chain, &Outcome::of(error).to_bytes(), status)?;
                attachment = None;
            }
        }
    }
    Ok(queue.next_avail())
}

fn wait(kick: &mut File) -> io::Result<()> {
    let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as _ };
    let mut fds = [PollFd::new(kick, PollFlags::IN)];
    let ready = match poll(&mut fds, Some(&timeout)) {
        Ok(ready) => ready,
        Err(rustix::io::Errno::INTR) => 0,
        Err(error) => return Err(error.into()),
    };
    if ready > 0 {
        // Another reader of the eventfd would leave nothing here.
        match kick.read(&mut [0; 8]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn let_event_go(queue: &mut Queue, pending: &mut Option<Chain>) -> io::Result<bool> {
    let Some(chain) = pending.take() else { return Ok(false) };
    let answer = EventAnswer { events: 1.into(), reserved: 0.into() };
    queue.complete(&chain, &answer.to_bytes(), S_OK)?;
    Ok(true)
}

/// Everything but EVENT and ATTACH.
fn answer(queue: &mut Queue, chain: &Chain, number: u32, payload: &[u8]) -> io::Result<()> {
    let shared = queue.shared.clone();
    let sector = payload.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
    let start = sector as usize * SECTOR_BYTES;
    match number {
        T_IN => {
            shared.transfers.fetch_add(1, Ordering::Relaxed);
            let data = locked(&shared.disk).get(start..start + chain.answer_bytes()).map(<[u8]>::to_vec);
            let status = if data.is_some() { S_OK } else { S_IOERR };
            queue.complete(chain, &data.unwrap_or_default(), status)
        }
        T_OUT => {
            shared.transfers.fetch_add(1, Ordering::Relaxed);
            let data = &payload[HEADER_BYTES..];
            let mut disk = locked(&shared.disk);
            let place = disk.get_mut(start..start + data.len());
            let status = if place.is_some() { S_OK } else { S_IOERR };
            if let Some(place) = place {
                place.copy_from_slice(data);
            }
            drop(disk);
            queue.complete(chain, &[], status)
        }
        T_FLUSH | T_GET_ID => queue.complete(chain, &[], S_OK),
        T_ARM => queue.complete(chain, &Outcome::of(ErrorCode::None).to_bytes(), S_OK),
        T_PROBE => {
            shared.probes.fetch_add(1, Ordering::Relaxed);
            queue.complete(chain, &probe_answer().to_bytes(), S_OK)
        }
        _ => queue.complete(chain, &[], S_UNSUPP),
    }
}

fn probe_answer() -> ProbeAnswer {
    ProbeAnswer {
        magic: MAGIC.into(),
        answer_bytes: (ProbeAnswer::BYTES as u32).into(),
        version_min: VERSION.into(),
        version_max: VERSION.into(),
        features: F_DSYNC.into(),
        sq_entries_max: 64.into(),
        cq_entries_max: 256.into(),
        page_bytes: 4096.into(),
        address_align_bytes: 1.into(),
        length_align_bytes: 512.into(),
        segment_bytes_max: (1 << 20).into(),
        queue_count: QUEUES.into(),
        refusal: 0.into(),
        reserved: 0.into(),
    }
}

fn attach(queue: &mut Queue, chain: Chain, payload: &[u8]) -> io::Result<Option<Attachment>> {
    let nth = queue.shared.attaches.fetch_add(1, Ordering::Relaxed);
    let conduct = queue.shared.lies().conduct;
    let payload = payload.get(HEADER_BYTES..).and_then(|payload| payload.first_chunk());
    let payload = AttachPayload::from_bytes(payload.ok_or(io::ErrorKind::InvalidData)?);
    if let Conduct::Refuse(errors) = &conduct {
        let error = errors[nth % errors.len()];
        queue.complete(&chain, &Outcome::of(error).to_bytes(), S_IOERR)?;
        return Ok(None);
    }
    let record = if let Conduct::Open(record) = &conduct { *record } else { honest_record() };
    queue.shared.ram.write(payload.control_gpa.get() + u64::from(RING_OFFSET_BYTES), &record.to_bytes())?;
    let mut attached = Attachment { chain, payload, conduct, epoch: 0, is_open: false, since: Instant::now() };
    announce(queue, &mut attached, 1, OPEN)?;
    Ok(Some(attached))
}

fn announce(queue: &Queue, attached: &mut Attachment, epoch: u32, phase: u32) -> io::Result<()> {
    attached.epoch = epoch;
    attached.is_open = phase == OPEN;
    attached.since = Instant::now();
    let at = attached.payload.control_gpa.get() + u64::from(ANNOUNCED_OFFSET_BYTES);
    queue.shared.ram.write(at, &(epoch << 2 | phase).to_le_bytes())?;
    queue.signal()
}

/// Goes on with the lies. Returns the error with which ATTACH completes, if it does.
fn look(queue: &Queue, attached: &mut Attachment) -> io::Result<Option<ErrorCode>> {
    let ram = &queue.shared.ram;
    let control = attached.payload.control_gpa.get();
    if ram.read_u32(control + u64::from(DETACH_OFFSET_BYTES))? != 0 && !queue.shared.lies().keeps_queues {
        return Ok(Some(ErrorCode::Detached));
    }
    let acknowledged = ram.read_u32(control + u64::from(ACKNOWLEDGED_OFFSET_BYTES))?;
    let epoch = attached.epoch;
    match attached.conduct {
        Conduct::OpenAndTake if attached.since.elapsed() >= LIFE => return Ok(Some(ErrorCode::Mode)),
        Conduct::EndlessEpochs if attached.is_open && attached.since.elapsed() >= LIFE => {
            announce(queue, attached, epoch, ENDED)?;
        }
        Conduct::EndlessEpochs if !attached.is_open && acknowledged == epoch << 2 | ENDED => {
            announce(queue, attached, epoch + 1, OPEN)?;
        }
        Conduct::Tell(lie, sqes) if attached.is_open => {
            let rings = attached.payload.areas[RING_AREA].rings_gpa.get();
            if ram.read_u32(rings + u64::from(SQ_TAIL_BYTES))? >= sqes {
                tell(queue, attached, lie)?;
                // Once.
                attached.is_open = false;
            }
        }
        _ => {}
    }
    Ok(None)
}

fn tell(queue: &Queue, attached: &Attachment, lie: RingLie) -> io::Result<()> {
    let ram = &queue.shared.ram;
    let area = attached.payload.areas[RING_AREA];
    let rings = area.rings_gpa.get();
    // The first SQE.
    let len = ram.read_u32(area.sqes_gpa.get() + SQE_LEN_AT)?;
    let user_data = u64::from_le_bytes(ram.read(area.sqes_gpa.get() + SQE_USER_DATA_AT)?);
    let honest = (user_data, len);
    let (cqes, tail) = match lie {
        RingLie::Announce(word) => {
            let at = attached.payload.control_gpa.get() + u64::from(ANNOUNCED_OFFSET_BYTES);
            ram.write(at, &word.to_le_bytes())?;
            return queue.signal();
        }
        RingLie::TooManyCompletions => (vec![honest], 0x8000_0000),
        RingLie::SecondCompletion => (vec![honest, honest], 2),
        RingLie::UnknownIndex => (vec![(user_data | 0xffff_fff0, len)], 1),
        RingLie::EarlierUse => (vec![(user_data ^ 1 << 40, len)], 1),
        RingLie::TooManyBytes => (vec![(user_data, len + 1)], 1),
    };
    for ((user_data, res), at) in cqes.iter().zip((rings + u64::from(CQES_BYTES)..).step_by(16)) {
        ram.write(at, &user_data.to_le_bytes())?;
        ram.write(at + 8, &u64::from(*res).to_le_bytes())?;
    }
    ram.write(rings + u64::from(CQ_TAIL_BYTES), &u32::to_le_bytes(tail))?;
    queue.signal()
}
