/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The ABI of ringpass, version 0: docs/abi.md is its specification. Generated from the Rust source; do not edit.
 *
 * All fields are little-endian. Names in brackets in the comments are names of the Rust crate.
 */

#ifndef RINGPASS_ABI_H
#define RINGPASS_ABI_H

#include <linux/types.h>

/**
 * PROBE, queue 0: asks what the device supports. The answer is a [`ProbeAnswer`](crate::probe::ProbeAnswer).
 */
#define RINGPASS_T_PROBE 1919942656

/**
 * ARM, on the queue to be attached, which must be empty. Completes at once. The driver does not reap it while the
 * queue is attached. The answer is an [`Outcome`].
 */
#define RINGPASS_T_ARM 1919942658

/**
 * ATTACH, directly after ARM, and the last entry of its queue. Pending while the queue is attached. The payload is an
 * [`AttachPayload`](crate::attach::AttachPayload), the answer is an [`Outcome`].
 */
#define RINGPASS_T_ATTACH 1919942661

/**
 * EVENT, queue 0: completes when the driver should read its control pages. The answer is an [`EventAnswer`].
 */
#define RINGPASS_T_EVENT 1919942662

/**
 * DETACH, queue 0: the driver has set the detach word of a queue's control page. The payload is a [`DetachPayload`],
 * the answer is an [`Outcome`].
 */
#define RINGPASS_T_DETACH 1919942665

/**
 * [`EventAnswer::events`]: the device made an announcement on some queue, or completed an ATTACH.
 */
#define RINGPASS_EVENT_QUEUES (1 << 0)

/**
 * Maximum length of a payload in bytes. The device refuses a longer payload with [`ErrorCode::Length`].
 */
#define RINGPASS_PAYLOAD_BYTES_MAX 4096

/**
 * [`Outcome::field_offset_bytes`]: no field.
 */
#define RINGPASS_NO_FIELD 4294967295

/**
 * The version that this crate implements. Version 0 is not frozen: both sides must implement the same state of it.
 */
#define RINGPASS_VERSION 0

/**
 * [`ProbeAnswer::magic`]: the bytes `ringpass`.
 */
#define RINGPASS_MAGIC 8319100072082958706

/**
 * [`ProbeAnswer::features`]: a write with `RWF_DSYNC` is durable when it completes (force unit access). Without this
 * feature a driver does not attach while the write cache is off, and sends a flush after a write with FUA.
 */
#define RINGPASS_F_DSYNC (1 << 0)

/**
 * The feature bits that this crate knows.
 */
#define RINGPASS_FEATURES_KNOWN RINGPASS_F_DSYNC

/**
 * [`RingRecord::doorbell`]: [`Doorbell::WhenAsleep`].
 */
#define RINGPASS_DOORBELL_WHEN_ASLEEP 1

/**
 * [`RingRecord::doorbell`]: [`Doorbell::Always`].
 */
#define RINGPASS_DOORBELL_ALWAYS 2

/**
 * [`RingRecord::mode`]: the host kernel consumes the ring.
 */
#define RINGPASS_MODE_DIRECT 1

/**
 * [`RingRecord::mode`]: the device consumes the ring and checks each entry.
 */
#define RINGPASS_MODE_MEDIATED 2

/**
 * Length of the control page in bytes.
 */
#define RINGPASS_CONTROL_PAGE_BYTES 4096

/**
 * [`Phase::Open`] in the low two bits of the word. If these bits are 0, the device has announced nothing yet.
 */
#define RINGPASS_PHASE_OPEN 1

/**
 * [`Phase::Drain`] in the low two bits of the word.
 */
#define RINGPASS_PHASE_DRAIN 2

/**
 * [`Phase::Ended`] in the low two bits of the word.
 */
#define RINGPASS_PHASE_ENDED 3

/**
 * The result of a request ([`Outcome::error`]).
 */
enum ringpass_error {
  /**
   * Success.
   */
  RINGPASS_ERROR_NONE = 0,
  /**
   * ATTACH ended because the driver sent DETACH. The status is `VIRTIO_BLK_S_OK`.
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
   * The payload is too short, or longer than [`PAYLOAD_BYTES_MAX`].
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
   * A range is not, or no longer, in one piece of guest RAM, or the host cannot place rings in memory of that kind.
   */
  RINGPASS_ERROR_MEMORY = 10,
  /**
   * The request is on the wrong queue: ARM and ATTACH must not be on queue 0, all others must be.
   */
  RINGPASS_ERROR_QUEUE = 11,
  /**
   * ARM on a queue with other requests, or ATTACH not directly after ARM.
   */
  RINGPASS_ERROR_ORDER = 12,
  /**
   * Another queue, or a ring that is still closing, uses a range. Try again later.
   */
  RINGPASS_ERROR_BUSY = 13,
  /**
   * The device offers no rings now. An EVENT completes when the driver can try again.
   */
  RINGPASS_ERROR_MODE = 14,
  /**
   * The host lacks a resource (memory that may be locked, descriptors). Trying again later may help.
   */
  RINGPASS_ERROR_RESOURCES = 15,
  /**
   * Guest memory was discarded while it was pinned. The device offers no rings before its next reset.
   */
  RINGPASS_ERROR_DISCARDED = 16,
  /**
   * The ring had more requests outstanding than its CQ has entries. The queue gets no ring for a while. An EVENT
   * completes when the driver can try again.
   */
  RINGPASS_ERROR_COST = 17,
};

/**
 * One of the two areas of a queue.
 */
struct Area;

/**
 * The number of an epoch, 30 bits; the highest number is followed by 0.
 *
 * Both sides compare numbers only for equality, with the current epoch and the next one.
 */
struct Epoch;

/**
 * A request of this interface.
 */
struct RequestType;

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
   * Required alignment of each data segment's address and length in bytes: a power of two, at most 4096. In
   * addition, the position on the disk and the total length must be multiples of the logical block size.
   */
  __le32 segment_align_bytes;
  /**
   * Maximum number of bytes of one SQE; a multiple of `segment_align_bytes`. No segment crosses a multiple of
   * [`SEGMENT_BOUNDARY_BYTES`](crate::SEGMENT_BOUNDARY_BYTES) either.
   */
  __le32 segment_bytes_max;
  /**
   * Number of queues of the device, including queue 0. 1: no queue can be attached.
   */
  __le16 queue_count;
  /**
   * 0.
   */
  __le16 reserved;
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
 * The answer of ARM, ATTACH and DETACH.
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
 * The payload of DETACH.
 */
struct ringpass_detach_payload {
  /**
   * The queue, at least 1.
   */
  __le16 queue;
  /**
   * 0.
   */
  __le16 reserved[3];
};

/**
 * A ring: the positions of its parts, as offsets in bytes into the rings part of its area, and the rule for addresses in
 * its SQEs.
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
   * Device: 0 in version 0; drivers ignore it.
   */
  __le32 device_reserved[50];
  /**
   * Driver: the announcement whose demand the driver has fulfilled. Written with release, before the doorbell.
   */
  __le32 acknowledged;
  /**
   * Driver: 1 if the device must complete ATTACH instead of opening another epoch. Written before DETACH is sent.
   */
  __le32 detach;
  /**
   * Driver: 0 in version 0; devices ignore it.
   */
  __le32 driver_reserved[62];
  /**
   * Neither side writes here: 0.
   */
  __le32 reserved[14][64];
};



/**
 * All codes of version 0.
 */
#define ringpass_error_ALL { ringpass_error_None, ringpass_error_Detached, ringpass_error_Version, ringpass_error_Features, ringpass_error_Reserved, ringpass_error_Length, ringpass_error_Entries, ringpass_error_Alignment, ringpass_error_Range, ringpass_error_Overlap, ringpass_error_Memory, ringpass_error_Queue, ringpass_error_Order, ringpass_error_Busy, ringpass_error_Mode, ringpass_error_Resources, ringpass_error_Discarded, ringpass_error_Cost, }





#endif  /* RINGPASS_ABI_H */
