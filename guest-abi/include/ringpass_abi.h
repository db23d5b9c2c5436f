/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The ABI of ringpass, version 1: docs/abi.md is its specification. Generated from the Rust source; do not edit.
 *
 * All fields are little-endian. Names in brackets in the comments are names of the Rust crate.
 *
 * The version is frozen; section 10 of the specification says what may be added.
 */

#ifndef RINGPASS_ABI_H
#define RINGPASS_ABI_H

#include <linux/types.h>

/**
 * PROBE, queue 0: asks what the device supports. The answer is a [`ProbeAnswer`](crate::probe::ProbeAnswer).
 */
#define RINGPASS_T_PROBE 0x72700000U

/**
 * ARM, on the queue to be attached, which must be empty. Completes at once. The driver does not reap it while the
 * queue is attached. The answer is an [`Outcome`].
 */
#define RINGPASS_T_ARM 0x72700002U

/**
 * ATTACH, directly after ARM, and the last entry of its queue. Pending while the queue is attached. The payload is an
 * [`AttachPayload`](crate::attach::AttachPayload), the answer is an [`Outcome`].
 */
#define RINGPASS_T_ATTACH 0x72700005U

/**
 * EVENT, queue 0: completes when the driver should look at its queues. The answer is an [`EventAnswer`].
 */
#define RINGPASS_T_EVENT 0x72700006U

/**
 * [`EventAnswer::events`]: look at every queue. The device has announced something or completed an ATTACH on some queue,
 * or it may give rings again. A device that starts sets the bit in its first answer.
 *
 * The other bits are reserved; drivers ignore them.
 */
#define RINGPASS_EVENT_QUEUES 1U

/**
 * Maximum length of a payload in bytes. The device refuses a longer payload with [`ErrorCode::Length`].
 */
#define RINGPASS_PAYLOAD_BYTES_MAX 4096U

/**
 * [`Outcome::field_offset_bytes`]: no field.
 */
#define RINGPASS_NO_FIELD 0xffffffffU

/**
 * The version that this crate implements. Version 1 is frozen: its meaning never changes. `docs/abi.md` says what may be
 * added, and how.
 */
#define RINGPASS_VERSION 1

/**
 * [`ProbeAnswer::magic`]: the bytes `ringpass`.
 */
#define RINGPASS_MAGIC 0x73736170676e6972ULL

/**
 * [`ProbeAnswer::features`]: a write with `RWF_DSYNC` is durable when it completes (force unit access). Without this
 * feature a driver does not attach while the write cache is off, and sends a flush after a write with FUA.
 */
#define RINGPASS_F_DSYNC 1ULL

/**
 * Reserved for I/O priorities in `ioprio` of an SQE. No device offers it.
 */
#define RINGPASS_F_IOPRIO 2ULL

/**
 * Reserved for write streams in `write_stream` of an SQE. No device offers it.
 */
#define RINGPASS_F_WRITE_STREAM 4ULL

/**
 * Reserved for `RWF_DONTCACHE`. No device offers it.
 */
#define RINGPASS_F_DONTCACHE 8ULL

/**
 * Reserved for the moderation of interrupts. No device offers it.
 */
#define RINGPASS_F_MODERATION 16ULL

/**
 * The feature bits that have a meaning in this crate.
 */
#define RINGPASS_FEATURES_KNOWN 1ULL

/**
 * [`RingRecord::doorbell`]: [`Doorbell::WhenAsleep`].
 */
#define RINGPASS_DOORBELL_WHEN_ASLEEP 1U

/**
 * [`RingRecord::doorbell`]: [`Doorbell::Always`].
 */
#define RINGPASS_DOORBELL_ALWAYS 2U

/**
 * [`RingRecord::mode`]: the host kernel consumes the ring.
 */
#define RINGPASS_MODE_DIRECT 1U

/**
 * [`RingRecord::mode`]: the device consumes the ring and checks each entry.
 */
#define RINGPASS_MODE_MEDIATED 2U

/**
 * Length of the control page in bytes.
 */
#define RINGPASS_CONTROL_PAGE_BYTES 4096U

/**
 * Number of low bits of a word that hold the phase. The bits above them hold the epoch's number.
 */
#define RINGPASS_PHASE_BITS 2U

/**
 * The bits of a word that hold the phase.
 */
#define RINGPASS_PHASE_MASK 3U

/**
 * [`Phase::Open`] in the low two bits of the word. If these bits are 0, the device has announced nothing yet.
 */
#define RINGPASS_PHASE_OPEN 1U

/**
 * [`Phase::Drain`] in the low two bits of the word.
 */
#define RINGPASS_PHASE_DRAIN 2U

/**
 * [`Phase::Ended`] in the low two bits of the word.
 */
#define RINGPASS_PHASE_ENDED 3U

/**
 * [`Cqe::res`](crate::Cqe::res), `-EINTR`: the process of the ring was killed.
 */
#define RINGPASS_RES_EINTR (-4)

/**
 * [`Cqe::res`](crate::Cqe::res), `-EAGAIN`: the kernel could not execute the request without waiting.
 */
#define RINGPASS_RES_EAGAIN (-11)

/**
 * [`Cqe::res`](crate::Cqe::res), `-ENOMEM`: the kernel had no memory, or the process of the ring was killed.
 */
#define RINGPASS_RES_ENOMEM (-12)

/**
 * [`Cqe::res`](crate::Cqe::res), `-EFAULT`: the memory is out of reach of rings, or not yet in reach.
 */
#define RINGPASS_RES_EFAULT (-14)

/**
 * [`Cqe::res`](crate::Cqe::res), `-ECANCELED`: the ring was closed before the kernel began the request.
 */
#define RINGPASS_RES_ECANCELED (-125)

/**
 * The smallest [`slot_shift`](FixedAddressing::slot_shift): slots of 4 MiB.
 */
#define RINGPASS_SLOT_SHIFT_MIN 22U

/**
 * The largest [`slot_shift`](FixedAddressing::slot_shift): slots of 1 GiB, the kernel's limit for a registered buffer
 * (`io_validate_user_buf_range`, Linux 5.1 and later).
 */
#define RINGPASS_SLOT_SHIFT_MAX 30U

/**
 * Maximum number of slots: `IORING_MAX_REG_BUFFERS`, 16384.
 */
#define RINGPASS_SLOT_COUNT_MAX 16384U

/**
 * No segment crosses a multiple of this many bytes (the `seg_boundary_mask` of a Linux block driver, plus 1).
 */
#define RINGPASS_SEGMENT_BOUNDARY_BYTES 0x400000ULL

/**
 * Guest RAM for rings ends at or below this address: 16 TiB, [`SLOT_COUNT_MAX`] slots of the largest size.
 */
#define RINGPASS_GPA_LIMIT 0x100000000000ULL

/**
 * `IORING_SQ_NEED_WAKEUP` in the SQ flags: the kernel's SQ thread sleeps, so the driver must ring the doorbell.
 */
#define RINGPASS_SQ_NEED_WAKEUP 1U

/**
 * `IORING_SQ_CQ_OVERFLOW` in the SQ flags: completions wait in the kernel because the CQ was full. A correct driver
 * never sees this flag.
 */
#define RINGPASS_SQ_CQ_OVERFLOW 2U

/**
 * `IORING_CQ_EVENTFD_DISABLED` in the CQ flags: the driver has muted interrupts.
 */
#define RINGPASS_CQ_EVENTFD_DISABLED 1U

/**
 * Maximum number of entries of a submission queue: `IORING_MAX_ENTRIES`.
 */
#define RINGPASS_SQ_ENTRIES_MAX 32768U

/**
 * Maximum number of entries of a completion queue: `IORING_MAX_CQ_ENTRIES`.
 */
#define RINGPASS_CQ_ENTRIES_MAX 65536U

/**
 * Room for the indexes and flags before the CQEs, in bytes. The kernel uses 320 bytes of it (Linux 5.1 to 6.18).
 */
#define RINGPASS_RINGS_HEADER_BYTES 1024U

/**
 * Length of an SQE in bytes.
 */
#define RINGPASS_SQE_BYTES 64U

/**
 * Length of a CQE in bytes.
 */
#define RINGPASS_CQE_BYTES 16U

/**
 * The result of a request ([`Outcome::error`](crate::request::Outcome::error)).
 */
enum ringpass_error {
  /**
   * Success.
   */
  RINGPASS_ERROR_NONE = 0,
  /**
   * ATTACH ended because the driver set the detach word. The status is `VIRTIO_BLK_S_OK`.
   */
  RINGPASS_ERROR_DETACHED = 1,
  /**
   * The device does not support the version.
   */
  RINGPASS_ERROR_VERSION = 2,
  /**
   * A feature bit is set that the device did not offer.
   */
  RINGPASS_ERROR_FEATURES = 3,
  /**
   * A field that must be zero is not zero, or bytes after the last field that the device knows are not zero.
   */
  RINGPASS_ERROR_RESERVED = 4,
  /**
   * The payload is too short, or longer than [`PAYLOAD_BYTES_MAX`](crate::request::PAYLOAD_BYTES_MAX).
   */
  RINGPASS_ERROR_LENGTH = 5,
  /**
   * A number of entries is not a power of two, is above the limit of PROBE, or the CQ is smaller than the SQ.
   */
  RINGPASS_ERROR_ENTRIES = 6,
  /**
   * An address is not a multiple of the page size of PROBE.
   */
  RINGPASS_ERROR_ALIGNMENT = 7,
  /**
   * A range does not end below 16 TiB.
   */
  RINGPASS_ERROR_RANGE = 8,
  /**
   * Two of the five ranges overlap.
   */
  RINGPASS_ERROR_OVERLAP = 9,
  /**
   * A range is not, or no longer, in one piece of guest RAM; or this guest's RAM cannot hold rings (its kind, or RAM above
   * 16 TiB).
   */
  RINGPASS_ERROR_MEMORY = 10,
  /**
   * The request is on the wrong queue: ARM and ATTACH must not be on queue 0, PROBE and EVENT must be.
   */
  RINGPASS_ERROR_QUEUE = 11,
  /**
   * ARM on a queue with other requests, or ATTACH not directly after ARM.
   */
  RINGPASS_ERROR_ORDER = 12,
  /**
   * Another queue, or a ring that is still closing, uses a range.
   */
  RINGPASS_ERROR_BUSY = 13,
  /**
   * The device offers no rings now.
   */
  RINGPASS_ERROR_MODE = 14,
  /**
   * The host lacks a resource (memory that may be locked, descriptors).
   */
  RINGPASS_ERROR_RESOURCES = 15,
  /**
   * Guest memory was discarded while it was pinned. The device offers no rings before its next reset.
   */
  RINGPASS_ERROR_DISCARDED = 16,
  /**
   * The ring had more requests outstanding than its CQ has entries. The queue gets no ring for a while.
   */
  RINGPASS_ERROR_COST = 17,
  /**
   * The front-end keeps no in-flight region, without which a device that takes over would lose and repeat requests.
   */
  RINGPASS_ERROR_INFLIGHT = 18,
};

/**
 * The answer of PROBE.
 */
struct ringpass_probe_answer {
  /**
   * [`MAGIC`].
   */
  __le64 magic;
  /**
   * Length in bytes of the answer that the device knows, including this field and the magic. Fields beyond it are
   * zero.
   */
  __le32 answer_bytes;
  /**
   * Lowest version that the device supports.
   */
  __le16 version_min;
  /**
   * Highest version that the device supports.
   */
  __le16 version_max;
  /**
   * `F_*`. The driver selects the features that it knows and sets them in ATTACH.
   */
  __le64 features;
  /**
   * Maximum number of SQ entries of a ring.
   */
  __le32 sq_entries_max;
  /**
   * Maximum number of CQ entries of a ring.
   */
  __le32 cq_entries_max;
  /**
   * Alignment of the control page and of the areas, and the unit of their lengths, in bytes: a power of two, 4096 to
   * 65536.
   */
  __le32 page_bytes;
  /**
   * Alignment of each segment's address in bytes: a power of two, at most 4096.
   */
  __le32 address_align_bytes;
  /**
   * The unit of each segment's length, and of its position on the disk, in bytes: a power of two, at most 65536.
   */
  __le32 length_align_bytes;
  /**
   * Maximum number of bytes of one SQE; a multiple of `length_align_bytes`, at least 4096. No segment crosses a
   * multiple of [`SEGMENT_BOUNDARY_BYTES`](crate::SEGMENT_BOUNDARY_BYTES) either.
   */
  __le32 segment_bytes_max;
  /**
   * Number of queues of the device, including queue 0. 1: no queue can be attached.
   */
  __le16 queue_count;
  /**
   * The [`ErrorCode`] with which the device would refuse every ATTACH now; 0: none.
   */
  __le16 refusal;
  /**
   * 0.
   */
  __le32 reserved;
};

/**
 * The addresses of one of the two areas, as the driver wrote them.
 */
struct ringpass_area_address {
  /**
   * Indexes, flags and CQEs: guest-physical, a multiple of the page size.
   */
  __le64 rings_gpa;
  /**
   * SQEs: guest-physical, a multiple of the page size.
   */
  __le64 sqes_gpa;
};

/**
 * The payload of ATTACH, as the driver wrote it, not yet checked.
 */
struct ringpass_attach_payload {
  /**
   * The version of the interface: [`VERSION`].
   */
  __le16 version;
  /**
   * 0.
   */
  __le16 reserved[3];
  /**
   * The features that the driver uses, each offered by PROBE.
   */
  __le64 features;
  /**
   * SQ entries, a power of two.
   */
  __le32 sq_entries;
  /**
   * CQ entries, a power of two, at least as many as SQ entries. The driver never has more requests outstanding.
   */
  __le32 cq_entries;
  /**
   * The control page: guest-physical, a multiple of the page size.
   */
  __le64 control_gpa;
  /**
   * The areas of even and of odd epochs.
   */
  struct ringpass_area_address areas[2];
};

/**
 * The answer of ARM and ATTACH.
 */
struct ringpass_outcome {
  /**
   * An [`ErrorCode`].
   */
  __le32 error;
  /**
   * The byte offset of the refused field in the payload; 0xffff_ffff if none.
   */
  __le32 field_offset_bytes;
  /**
   * The value of that field, or the limit, depending on the code. For information, not for programs.
   */
  __le64 value;
};

/**
 * The answer of EVENT.
 */
struct ringpass_event_answer {
  /**
   * [`EVENT_QUEUES`]; 0 when the queue stops. Drivers ignore unknown bits.
   */
  __le32 events;
  /**
   * 0.
   */
  __le32 reserved;
};

/**
 * A ring: the positions of its parts, as offsets in bytes into the rings part of its area, the rule for addresses in its
 * SQEs, and the limits of its segments.
 *
 * The device writes the record before it announces `Open`, and keeps it until the driver has acknowledged the end of
 * that epoch.
 */
struct ringpass_ring_record {
  /**
   * SQ head.
   */
  __le32 sq_head_offset_bytes;
  /**
   * SQ tail.
   */
  __le32 sq_tail_offset_bytes;
  /**
   * SQ flags.
   */
  __le32 sq_flags_offset_bytes;
  /**
   * CQ head.
   */
  __le32 cq_head_offset_bytes;
  /**
   * CQ tail.
   */
  __le32 cq_tail_offset_bytes;
  /**
   * CQ flags.
   */
  __le32 cq_flags_offset_bytes;
  /**
   * The CQEs.
   */
  __le32 cqes_offset_bytes;
  /**
   * [`DOORBELL_WHEN_ASLEEP`] or [`DOORBELL_ALWAYS`].
   */
  __le32 doorbell;
  /**
   * [`MODE_DIRECT`] or [`MODE_MEDIATED`]. For information: a driver does the same in both modes.
   */
  __le32 mode;
  /**
   * `buf_index` is the guest-physical address shifted right by this many bits: 22 to 30.
   */
  __le32 slot_shift;
  /**
   * The number of bytes to add to a guest-physical address for `sqe.addr`: a multiple of 1 GiB, not zero. Like the
   * slots, it holds for this ring only.
   */
  __le64 iova_base;
  /**
   * Alignment of each segment's address in bytes: a power of two, at most 4096.
   */
  __le32 address_align_bytes;
  /**
   * The unit of each segment's length, and of its position on the disk, in bytes: a power of two, at most 65536.
   */
  __le32 length_align_bytes;
  /**
   * Maximum number of bytes of one SQE: a multiple of `length_align_bytes`, at least 4096.
   */
  __le32 segment_bytes_max;
  /**
   * 0; drivers ignore it.
   */
  __le32 reserved;
};

/**
 * The control page.
 */
struct ringpass_control_page {
  /**
   * Device: the [`Announcement`]. Written last, with release; read with acquire.
   */
  __le32 announced;
  /**
   * Device: why the last ring ended early, an [`ErrorCode`]; 0 after a switch and after a restart. Written before
   * `announced`. For information.
   */
  __le32 end_reason;
  /**
   * Device: the ring of the open epoch.
   */
  struct ringpass_ring_record ring;
  /**
   * Device: 0; drivers ignore it.
   */
  __le32 device_reserved[46];
  /**
   * Driver: the announcement whose demand the driver has fulfilled. Written with release, before the doorbell.
   */
  __le32 acknowledged;
  /**
   * Driver: 1 if the driver wants its queue back, and never 0 again. Written with release, before the doorbell.
   */
  __le32 detach;
  /**
   * Driver: 0; devices ignore it.
   */
  __le32 driver_reserved[62];
  /**
   * Neither side writes here: 0.
   */
  __le32 reserved[14][64];
};

#endif  /* RINGPASS_ABI_H */
