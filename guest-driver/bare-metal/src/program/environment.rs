//! The workload's environment in this kind of guest.

use core::hint::spin_loop;

use ringpass_bare_metal::{Attachment, Bell, RAM_REGIONS_MAX, RamRegion, TickRate};
use ringpass_workload::{Environment, Wakeup};

use crate::block::Block;
use crate::{cpu, direct_map};

/// The environment of a queue on a vCPU.
pub(crate) struct Machine {
    block: Block,
    bell: Bell,
    ram: [RamRegion; RAM_REGIONS_MAX],
    tick_rate: TickRate,
}

impl Machine {
    pub(crate) fn new(block: Block, attachment: &Attachment) -> Self {
        let Attachment { bell, ram, tick_rate, .. } = *attachment;
        Self { block, bell, ram, tick_rate }
    }
}

impl Environment for Machine {
    #[inline]
    fn now_ns(&self) -> u64 {
        self.tick_rate.ns(cpu::ticks())
    }

    fn ring_doorbell(&mut self) {
        match self.bell {
            Bell::None => {}
            Bell::Port(port) => cpu::write_port(port),
            // SAFETY: the monitor guarantees that only a doorbell is at this guest-physical address.
            Bell::Mmio(gpa) => unsafe { direct_map(gpa).cast::<u32>().write_volatile(1) },
        }
    }

    #[inline]
    fn relax(&mut self, _empty_polls: u32) {
        spin_loop();
    }

    fn wait_for_interrupt(&mut self, timeout_ns: u64) -> Wakeup {
        let start_ns = self.now_ns();
        loop {
            if self.block.take_interrupt() {
                return Wakeup::Interrupt;
            }
            if self.now_ns().saturating_sub(start_ns) >= timeout_ns {
                return Wakeup::TimedOut;
            }
            cpu::idle();
        }
    }

    #[inline]
    fn with_buffer<R>(&mut self, gpa: u64, len_bytes: u32, access: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let end = gpa.checked_add(u64::from(len_bytes))?;
        self.ram.iter().find(|region| gpa >= region.gpa && end - region.gpa <= region.len_bytes)?;
        // SAFETY: guest RAM is mapped in the direct map, and the workload asks only for memory that no request in
        // flight uses; any bytes are valid.
        Some(access(unsafe { core::slice::from_raw_parts_mut(direct_map(gpa).as_ptr(), len_bytes as usize) }))
    }

    #[inline]
    fn record_latency(&mut self, latency_ns: u64) {
        self.block.count_latency(latency_ns);
    }
}
