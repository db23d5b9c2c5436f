//! How long a stop takes while a guest floods its ring.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use ringpass_broker::disk::Disk;
use ringpass_guest_abi::request::ErrorCode;
use ringpass_tests::{
    front_end::{
        attach::flooder::Reaping,
        session::{FrontEnd, Options},
    },
    harness,
};

use crate::{
    attack::{Attack, Hostile, QUEUE},
    host::{check_kernel_memory, with_kernel_memory_watched},
};

/// How long the guest floods its ring before the stop: longer than the server needs to see that the guest breaks the
/// rules, and shorter.
const FLOODS: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(200)];
/// What a stop may take on a disk that answers.
const STOP_MAX: Duration = Duration::from_secs(1);
/// What the end of everything may take after SIGKILL, and the removal of memory: the server waits for a second before it ends
/// the rings.
const LONG_STOP_MAX: Duration = Duration::from_secs(2);
/// An honest guest's stop takes this long at most on an idle machine. On a busy one all stops take longer.
const HONEST_STOP: Duration = Duration::from_millis(100);

/// A machine that is slower than this fails the test: it must not hide a stop that has become slow for honest guests, too.
const SLOWNESS_MAX: f64 = 5.0;

/// How a queue or a device stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    GetVringBase,
    Detach,
    /// The memory of the requests is taken away.
    RemoveMemory,
    HangUp,
    Terminate,
    Kill,
}

impl Stop {
    const ALL: [Self; 6] =
        [Self::GetVringBase, Self::Detach, Self::RemoveMemory, Self::HangUp, Self::Terminate, Self::Kill];
}

pub(crate) fn bounded(attack: Attack) -> Result<()> {
    let slowness = slowness(attack)?;
    let mut worst = Duration::ZERO;
    for _ in 0..harness::budget(1, 40) {
        for stop in Stop::ALL {
            for flood in FLOODS {
                let took = one(attack, stop, Reaping::Never, flood)?;
                let is_long = matches!(stop, Stop::Kill | Stop::RemoveMemory);
                let max = if is_long { LONG_STOP_MAX } else { STOP_MAX }.mul_f64(slowness);
                ensure!(took < max, "{stop:?} after {flood:?} took {took:?}, more than {max:?}");
                worst = worst.max(took);
            }
        }
    }
    eprintln!("the longest stop took {worst:?} (this machine is {slowness:.1} times as slow as an idle one)");
    Ok(())
}

/// How much slower stops are on this machine now than on an idle one: 1 to [`SLOWNESS_MAX`].
fn slowness(attack: Attack) -> Result<f64> {
    let took = one(attack, Stop::GetVringBase, Reaping::Honest, FLOODS[0])?;
    Ok((took.as_secs_f64() / HONEST_STOP.as_secs_f64()).clamp(1.0, SLOWNESS_MAX))
}

/// Stops a guest that has flooded its ring for this long, and goes on with that. Returns how long the stop took.
fn one(attack: Attack, stop: Stop, reaping: Reaping, flood: Duration) -> Result<Duration> {
    let Hostile { rig, mut broker, ram, buffer, front_end, mut flooder, .. } = Hostile::start(attack, "sq-thread")?;
    let (is_over, detacher) = (AtomicBool::new(false), flooder.detacher());
    let (took, grown_bytes) = with_kernel_memory_watched(|| {
        thread::scope(|scope| {
            let guest = scope.spawn(|| {
                flooder.flood(reaping, || is_over.load(Ordering::Relaxed))?;
                Ok::<_, anyhow::Error>(flooder)
            });
            thread::sleep(flood);
            let begin = Instant::now();
            let stopped = (|| match stop {
                Stop::GetVringBase => front_end.stop_vring(QUEUE).map(drop),
                Stop::Detach => detacher.detach(),
                Stop::RemoveMemory => front_end.connection().rem_mem_reg(&buffer.message(), Some(buffer.file())),
                Stop::HangUp => {
                    front_end.connection().wire().hang_up()?;
                    FrontEnd::connect(&rig.socket(), &ram.ram, Options::default()).map(drop)
                }
                Stop::Terminate => {
                    let status = broker.terminate()?;
                    ensure!(status.success(), "{status}");
                    Ok(())
                }
                Stop::Kill => {
                    broker.kill()?;
                    // The lock is free when the last I/O has ended.
                    Disk::open(&rig.disk().config().lock_wait(Duration::from_secs(60)))?;
                    Ok(())
                }
            })();
            let mut took = begin.elapsed();
            if stop != Stop::Detach {
                is_over.store(true, Ordering::Relaxed);
            }
            let mut flooder = guest.join().map_err(|_| anyhow!("the guest panicked"))??;
            stopped?;
            if stop == Stop::Detach {
                let found = flooder.wait_attach()?;
                took = begin.elapsed();
                // The server may have found the excess first.
                let code = ErrorCode::from_number(found.code);
                ensure!(matches!(code, Some(ErrorCode::Detached | ErrorCode::Cost)), "{found:?}");
            }
            Ok(took)
        })
    })
    .map_err(|error| error.context(format!("{stop:?} after {flood:?}; the broker's log:\n{}", broker.log())))?;
    eprintln!("{stop:?} after {flood:?}: {took:?}");
    check_kernel_memory(grown_bytes)?;
    Ok(took)
}
