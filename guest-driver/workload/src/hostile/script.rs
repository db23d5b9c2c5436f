//! The steps of the script.

use core::fmt;

use ringpass_guest_abi::{FixedAddress, Opcode, Sqe, SqeFlags};

use super::{Extent, Reach, Target, TargetError};

const EBADF: i32 = 9;
const EACCES: i32 = 13;
const EFAULT: i32 = 14;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;

/// The answers to a disallowed operation or flag: the restrictions refuse it, or the kernel refuses it before them as
/// unknown or invalid.
const DENIED: Expect = Expect::Refused(&[EACCES, EINVAL, EOPNOTSUPP]);

const PAGE_BYTES: u32 = 4096;
const RWF_APPEND: u32 = 0x10;

/// The permitted answers to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// An error with one of these errnos (with any errno if the list is empty).
    Refused(&'static [i32]),
    /// An error, or a transfer of at most this many bytes between the disk and the guest's own scratch memory.
    ScratchOnly(u32),
    /// An error, or a transfer of at most this many bytes between the disk and the guest's own RAM.
    AtMost(u32),
    /// Success with all bytes, for an honest request.
    Exactly(u32),
}

impl Expect {
    /// Whether `res` of the CQE is a permitted answer.
    pub fn allows(&self, res: i32) -> bool {
        match *self {
            Self::Refused(errnos) => {
                res < 0 && (errnos.is_empty() || res.checked_neg().is_some_and(|errno| errnos.contains(&errno)))
            }
            Self::ScratchOnly(bytes) | Self::AtMost(bytes) => i64::from(res) <= i64::from(bytes),
            Self::Exactly(bytes) => i64::from(res) == i64::from(bytes),
        }
    }
}

/// The name of a step: what it tries, and two numbers that distinguish it from similar steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// What the step tries.
    pub what: &'static str,
    /// The opcode of the request.
    pub opcode: u8,
    /// The value tried.
    pub value: u64,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x} (opcode {})", self.what, self.value, self.opcode)
    }
}

/// One request to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The name of the step.
    pub name: Name,
    /// The request. The runner chooses its `user_data`.
    pub sqe: Sqe,
    /// The permitted answers.
    pub expect: Expect,
}

/// All steps for `target`, always in the same order. The first and the last step are honest requests, so that a ring
/// that answers only errors does not pass.
pub fn script<'a>(target: &'a Target<'a>) -> Result<impl Iterator<Item = Step> + use<'a>, TargetError> {
    target.check()?;
    let base = Base::new(target);
    Ok(honest(base)
        .chain(addresses(base))
        .chain(buffer_indexes(base))
        .chain(files(base))
        .chain(opcodes_with_flags(base))
        .chain(all_flags(base))
        .chain(fields(base))
        .chain(offsets(base))
        .chain(lengths(base))
        .chain(honest(base)))
}

/// The honest requests from which the script derives the others.
#[derive(Clone, Copy)]
struct Base<'a> {
    target: &'a Target<'a>,
    read: Sqe,
    write: Sqe,
    buf_index: u16,
}

impl<'a> Base<'a> {
    fn new(target: &'a Target<'a>) -> Self {
        let gpa = target.buffer_gpa;
        let buf_index = (gpa >> target.addressing.slot_shift()) as u16;
        let address = FixedAddress { buf_index, addr: target.addressing.iova_base().wrapping_add(gpa) };
        let (len_bytes, offset_bytes) = (target.buffer_bytes, target.disk_offset_bytes);
        Self {
            target,
            read: Sqe::read_fixed(address, len_bytes, offset_bytes, 0),
            write: Sqe::write_fixed(address, len_bytes, offset_bytes, 0),
            buf_index,
        }
    }

    /// Two steps: the read and the write, changed by `change`. A write to a read-only disk must always be denied.
    fn both(
        self,
        what: &'static str,
        value: u64,
        expect: Expect,
        change: impl Fn(Sqe) -> Sqe + 'a,
    ) -> impl Iterator<Item = Step> {
        [self.read, self.write].into_iter().map(move |sqe| {
            let denied = self.target.read_only && sqe.opcode == Opcode::WriteFixed as u8;
            let sqe = change(sqe);
            Step { name: Name { what, opcode: sqe.opcode, value }, sqe, expect: if denied { DENIED } else { expect } }
        })
    }
}

fn honest<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    base.both("honest request of bytes", u64::from(base.read.len_bytes), Expect::Exactly(base.read.len_bytes), |sqe| {
        sqe
    })
}

/// The addresses at the edges of the guest's memory, and addresses of the host.
fn addresses<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let target = base.target;
    let iova_base = target.addressing.iova_base();
    let slot_shift = target.addressing.slot_shift();
    let slot_of = move |gpa: u64| gpa >> slot_shift;
    let extents = [target.ram, target.filled_holes, target.empty_holes].into_iter().flatten();
    let edges = extents.flat_map(move |extent| {
        let slots = [slot_of(extent.gpa), slot_of(extent.end() - 1), slot_of(extent.end())];
        slots.into_iter().flat_map(move |slot| {
            let around = around(*extent).into_iter();
            around.map(move |(what, gpa, len_bytes)| (what, iova_base.wrapping_add(gpa), len_bytes, slot as u16))
        })
    });
    let slots = move || {
        let of_ram = target.ram.iter().map(move |extent| slot_of(extent.gpa) as u16);
        [0, base.buf_index].into_iter().chain(of_ram)
    };
    let host = target.host_addresses.iter().flat_map(move |&address| {
        slots().flat_map(move |slot| {
            [("host address", address, PAGE_BYTES, slot), ("host byte", address, 1, slot)].into_iter()
        })
    });
    let page = u64::from(PAGE_BYTES);
    let foreign = [
        ("address", 0),
        ("address", 1),
        ("address", page),
        ("address without the base", target.buffer_gpa),
        ("address with the base twice", target.buffer_gpa.wrapping_add(iova_base).wrapping_add(iova_base)),
        ("address one byte before the base", iova_base.wrapping_sub(1)),
        ("address one page before the base", iova_base.wrapping_sub(page)),
        ("address 16 TiB above the base", iova_base.wrapping_add(1 << 44)),
        ("address at the end of user space", 0x7fff_ffff_f000),
        ("address above user space", 0x8000_0000_0000),
        ("kernel address", 0xffff_8000_0000_0000),
        ("kernel address", 0xffff_ffff_8000_0000),
        ("vsyscall page", 0xffff_ffff_ff60_0000),
        ("address that wraps", u64::MAX),
        ("address that wraps to zero", u64::MAX - page + 1),
    ];
    let foreign =
        foreign.into_iter().flat_map(move |(what, address)| slots().map(move |slot| (what, address, PAGE_BYTES, slot)));

    edges.chain(host).chain(foreign).flat_map(move |(what, addr, len_bytes, buf_index)| {
        let reach = target.reach(buf_index, addr, len_bytes);
        let expect = match reach {
            Reach::Nothing => Expect::Refused(&[EFAULT]),
            Reach::Scratch => Expect::ScratchOnly(len_bytes),
            Reach::Ram => Expect::AtMost(len_bytes),
        };
        base.both(what, addr, expect, move |sqe| Sqe { addr, len_bytes, buf_index, ..sqe }).filter(move |step| {
            let is_read = step.sqe.opcode == Opcode::ReadFixed as u8;
            match reach {
                Reach::Nothing => true,
                // Requests that can succeed must stay small, and a read must not change RAM that may be in use.
                Reach::Scratch => len_bytes <= PAGE_BYTES,
                Reach::Ram => len_bytes <= PAGE_BYTES && !is_read,
            }
        })
    })
}

/// Ranges at the edges of an extent. Addresses below zero wrap, and must be refused like all others.
fn around(extent: Extent) -> [(&'static str, u64, u32); 11] {
    let (start, end) = (extent.gpa, extent.end());
    let page = u64::from(PAGE_BYTES);
    let whole = u32::try_from(extent.len_bytes).unwrap_or(u32::MAX);
    [
        ("first page", start, PAGE_BYTES),
        ("last page", end.wrapping_sub(page), PAGE_BYTES),
        ("one byte beyond the end", end.wrapping_sub(page - 1), PAGE_BYTES),
        ("half a page beyond the end", end.wrapping_sub(page / 2), PAGE_BYTES),
        ("the page behind the end", end, PAGE_BYTES),
        ("the byte behind the end", end, 1),
        ("the page before the start", start.wrapping_sub(page), PAGE_BYTES),
        ("half a page before the start", start.wrapping_sub(page / 2), PAGE_BYTES),
        ("the byte before the start", start.wrapping_sub(1), 1),
        ("all of it and one byte more", start, whole.saturating_add(1)),
        ("longer than any transfer", start, u32::MAX),
    ]
}

/// The guest's own address, in buffers that are not at that address.
fn buffer_indexes<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let own = base.buf_index;
    let flipped = (0..16).map(move |bit| own ^ (1 << bit));
    let others = [own.wrapping_add(1), own.wrapping_sub(1), 16383, 16384, 32767, 32768, u16::MAX];
    flipped.chain(others).filter(move |&index| index != own).flat_map(move |buf_index| {
        let expect = Expect::Refused(&[EFAULT]);
        base.both("buffer", u64::from(buf_index), expect, move |sqe| Sqe { buf_index, ..sqe })
    })
}

/// Files other than the disk: fixed slots, and plain descriptors of the ring's owner.
fn files<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let token = base.both("token file", 1, Expect::Refused(&[]), |sqe| Sqe { fd: 1, ..sqe });
    // The token is a directory. The kernel has nothing to refuse in a read of no bytes, and answers 0 (Linux 6.18).
    let empty = base
        .target
        .zero_length
        .then(|| base.both("token file, no bytes", 1, Expect::AtMost(0), |sqe| Sqe { fd: 1, len_bytes: 0, ..sqe }));
    let slots =
        [2, 3, 4, 7, 8, 15, 16, 31, 63, 255, 1023, 4095, 32767, 65535, 1 << 20, i32::MAX, -1, -2, -100, i32::MIN];
    let slots = slots.into_iter().flat_map(move |fd| {
        base.both("file slot", u64::from(fd as u32), Expect::Refused(&[EBADF]), move |sqe| Sqe { fd, ..sqe })
    });
    let plain = (-1..64).chain([-100, i32::MIN, i32::MAX]).flat_map(move |fd| {
        base.both("plain descriptor", u64::from(fd as u32), DENIED, move |sqe| Sqe { fd, flags: 0, ..sqe })
    });
    token.chain(empty.into_iter().flatten()).chain(slots).chain(plain)
}

/// Every opcode with no flag, with FIXED_FILE, and with every other flag alone and beside FIXED_FILE.
fn opcodes_with_flags<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let fixed_file = SqeFlags::FIXED_FILE.0;
    let flags = move || (1..8).map(|bit| 1u8 << bit).chain([0]).flat_map(move |flag| [flag, flag | fixed_file]);
    // If one of them is allowed by mistake, it must touch memory that others see.
    let addr = base.target.host_addresses.first().copied().unwrap_or(base.read.addr);
    let allowed = move |opcode, flags| {
        let reads = opcode == Opcode::ReadFixed as u8;
        let writes = opcode == Opcode::WriteFixed as u8 && !base.target.read_only;
        (reads || writes) && flags == fixed_file
    };
    (0..=u8::MAX)
        .flat_map(move |opcode| flags().map(move |flags| (opcode, flags)))
        .filter(move |&(opcode, flags)| !allowed(opcode, flags))
        .map(move |(opcode, flags)| Step {
            name: Name { what: "operation with flags", opcode, value: u64::from(flags) },
            sqe: Sqe { opcode, flags, addr, ..base.read },
            expect: DENIED,
        })
}

/// Every value of the flags on the allowed operations.
fn all_flags<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let others = (0..=u8::MAX).filter(|&flags| flags != SqeFlags::FIXED_FILE.0);
    others.flat_map(move |flags| base.both("flags", u64::from(flags), DENIED, move |sqe| Sqe { flags, ..sqe }))
}

/// Fields that the restrictions do not check.
fn fields<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let inside = Expect::AtMost(base.read.len_bytes);
    let personalities = [1, 2, 3, 255, 0x7fff, u16::MAX].into_iter().flat_map(move |personality| {
        let expect = Expect::Refused(&[EINVAL]);
        base.both("personality", u64::from(personality), expect, move |sqe| Sqe { personality, ..sqe })
    });
    // The class is in the three highest bits: none, real time, best effort, idle, and four undefined classes.
    let priorities = (0..8u16).flat_map(|class| [0, 1, 7, 8, 0x1fff].map(|level| class << 13 | level));
    let priorities = priorities
        .flat_map(move |ioprio| base.both("I/O priority", u64::from(ioprio), inside, move |sqe| Sqe { ioprio, ..sqe }));
    let rw_flags = (0..32).map(|bit| 1 << bit).chain([u32::MAX, 0x7f, 0xff]);
    let rw_flags = rw_flags.flat_map(move |rw_flags| {
        let steps = base.both("rw_flags", u64::from(rw_flags), inside, move |sqe| Sqe { rw_flags, ..sqe });
        // An appending write ignores its offset: it would grow the disk.
        steps.map(move |step| {
            let grows = step.sqe.opcode == Opcode::WriteFixed as u8 && rw_flags & RWF_APPEND != 0;
            if grows && step.expect == inside { Step { expect: Expect::AtMost(0), ..step } } else { step }
        })
    });
    let words = [1, 2, u64::MAX, base.read.addr].into_iter().chain(base.target.host_addresses.iter().copied());
    let words = words.flat_map(move |word| {
        let file_index = base.both("file index", word, inside, move |sqe| Sqe { file_index: word as u32, ..sqe });
        let attribute = base.both("attribute at", word, inside, move |sqe| Sqe { addr3: word, pad2: 1, ..sqe });
        let mask = base.both("attribute mask", word, inside, move |sqe| Sqe { addr3: word, pad2: word, ..sqe });
        file_index.chain(attribute).chain(mask)
    });
    personalities.chain(priorities).chain(rw_flags).chain(words)
}

/// Positions on the disk, and after its end.
fn offsets<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let disk_bytes = base.target.disk_bytes;
    let len_bytes = base.read.len_bytes;
    let offsets = [
        1,
        513,
        disk_bytes - u64::from(len_bytes),
        disk_bytes - u64::from(len_bytes) + 512,
        disk_bytes.saturating_sub(512),
        disk_bytes - 1,
        disk_bytes,
        disk_bytes.saturating_add(1),
        disk_bytes.saturating_add(512),
        disk_bytes.saturating_add(u64::from(len_bytes)),
        disk_bytes.saturating_mul(2),
        1 << 40,
        1 << 50,
        1 << 62,
        i64::MAX as u64 - u64::from(len_bytes) + 1,
        i64::MAX as u64,
        1 << 63,
        u64::MAX - 1,
        // The file's own position.
        u64::MAX,
    ];
    offsets.into_iter().flat_map(move |off_bytes| {
        let behind = u32::try_from(disk_bytes.saturating_sub(off_bytes)).unwrap_or(u32::MAX);
        let limit = if off_bytes == u64::MAX { len_bytes } else { behind.min(len_bytes) };
        base.both("disk offset", off_bytes, Expect::AtMost(limit), move |sqe| Sqe { off_bytes, ..sqe })
    })
}

/// Lengths inside the guest's own buffer.
fn lengths<'a>(base: Base<'a>) -> impl Iterator<Item = Step> {
    let odd = [1, 7, 511, 512, 513, base.read.len_bytes - 1].into_iter();
    let zero = base.target.zero_length.then_some(0);
    odd.chain(zero).flat_map(move |len_bytes| {
        base.both("length", u64::from(len_bytes), Expect::AtMost(len_bytes), move |sqe| Sqe { len_bytes, ..sqe })
    })
}
