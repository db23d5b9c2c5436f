// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ring of the open epoch, section 7. All functions need the queue's lock.
 *
 * The other side is another CPU of the host, also for a guest with one CPU, so
 * the barriers are virt_*() and not smp_*().
 */
#include <linux/bvec.h>
#include <linux/fs.h>

#include "ringpass_blk.h"

/* A segment of a request, and where the ring stood before the request. */
struct rp_push {
	struct rp_queue *q;
	struct request *rq;
	u64 position;
	u64 gpa;
	u64 bytes;
	u32 sqes;
	u8 opcode;
	u32 rw_flags;
};

static u32 rp_outstanding(const struct rp_queue *q)
{
	return q->memory->cq_entries - q->free_count;
}

/*
 * The kernel moves the head at the end of a batch, when completions of that
 * batch may have been reaped already, so the driver's own count comes first.
 */
static bool rp_has_room(struct rp_queue *q)
{
	struct rp_ring *ring = &q->ring;
	u32 entries = ring->sq_mask + 1;

	if (!q->free_count)
		return false;
	if (likely(rp_outstanding(q) < entries))
		return true;
	/* Orders the kernel's reads of SQEs before the reuse of their slots. */
	return ring->tail - virt_load_acquire(ring->sq_head) < entries;
}

static void rp_fill_sqe(struct rp_push *push, u64 gpa, u32 bytes)
{
	struct rp_queue *q = push->q;
	struct rp_ring *ring = &q->ring;
	u32 index = q->memory->free_tickets[--q->free_count];
	struct rp_ticket *ticket = &q->memory->tickets[index];

	ticket->rq = push->rq;
	ticket->len = bytes;
	ticket->serial = ++q->serial;
	ring->sqes[ring->tail++ & ring->sq_mask] = (struct io_uring_sqe) {
		.opcode		= push->opcode,
		.flags		= IOSQE_FIXED_FILE,
		.off		= push->position,
		.addr		= ring->iova_base + gpa,
		.len		= bytes,
		.rw_flags	= (__force __typeof__(((struct io_uring_sqe *)0)->rw_flags))
				  push->rw_flags,
		.user_data	= (u64)ticket->serial << 32 | index,
		.buf_index	= gpa >> ring->slot_shift,
	};
	push->position += bytes;
	push->sqes++;
}

/* Cuts a segment where SQEs must end, and writes the SQEs. */
static enum rp_pushed rp_push_segment(struct rp_push *push)
{
	struct rp_ring *ring = &push->q->ring;
	u64 gpa = push->gpa, bytes = push->bytes;

	if (gpa & ring->address_mask || bytes & ring->length_mask ||
	    push->position & ring->length_mask ||
	    gpa + bytes > ring->gpa_limit)
		return RP_UNFIT;
	while (bytes) {
		u64 boundary = RINGPASS_SEGMENT_BOUNDARY_BYTES -
			       (gpa & (RINGPASS_SEGMENT_BOUNDARY_BYTES - 1));
		u32 part = min3(bytes, boundary, (u64)ring->segment_bytes_max);

		/* A boundary of memory may cut a block of the disk. */
		if (part & ring->length_mask ||
		    push->sqes == min_t(u32, RP_REQUEST_SQES_MAX, ring->sq_mask + 1))
			return RP_UNFIT;
		if (!rp_has_room(push->q))
			return RP_NO_ROOM;
		rp_fill_sqe(push, gpa, part);
		gpa += part;
		bytes -= part;
	}
	return RP_PUSHED;
}

/* Writes the SQEs of all segments, each as long as memory allows. */
static enum rp_pushed rp_push_segments(struct rp_push *push)
{
	struct request *rq = push->rq;
	struct req_iterator iter;
	struct bio_vec bvec;

	/* Two loops in one: a break would leave the inner one only. */
	rq_for_each_bvec(bvec, rq, iter) {
		u64 gpa = page_to_phys(bvec.bv_page) + bvec.bv_offset;

		if (push->bytes && gpa == push->gpa + push->bytes) {
			push->bytes += bvec.bv_len;
			continue;
		}
		if (push->bytes) {
			enum rp_pushed pushed = rp_push_segment(push);

			if (pushed != RP_PUSHED)
				return pushed;
		}
		push->gpa = gpa;
		push->bytes = bvec.bv_len;
	}
	return push->bytes ? rp_push_segment(push) : RP_UNFIT;
}

/*
 * Writes the SQEs of a request, which rp_ring_publish() makes visible together.
 * Nothing remains of a request that does not fit.
 */
enum rp_pushed rp_ring_push(struct rp_queue *q, struct request *rq)
{
	struct rp_request *req = blk_mq_rq_to_pdu(rq);
	bool is_write = req_op(rq) == REQ_OP_WRITE;
	struct rp_push push = {
		.q		= q,
		.rq		= rq,
		.position	= blk_rq_pos(rq) << SECTOR_SHIFT,
		.opcode		= is_write ? IORING_OP_WRITE_FIXED :
					     IORING_OP_READ_FIXED,
		.rw_flags	= is_write && READ_ONCE(q->dev->dsync) ?
					(__force u32)RWF_DSYNC : 0,
	};
	u32 free_before = q->free_count, tail_before = q->ring.tail;
	enum rp_pushed pushed = rp_push_segments(&push);

	if (pushed != RP_PUSHED) {
		/* The tickets still lie where they were taken from. */
		while (q->free_count < free_before) {
			u32 index = q->memory->free_tickets[q->free_count++];

			q->memory->tickets[index].rq = NULL;
		}
		q->ring.tail = tail_before;
		return pushed;
	}
	req->sqes = push.sqes;
	q->stats.ring_requests++;
	q->stats.ring_sqes += push.sqes;
	q->stats.durable_writes += !!push.rw_flags;
	return RP_PUSHED;
}

/* Returns whether the host needs the doorbell. */
bool rp_ring_publish(struct rp_queue *q)
{
	struct rp_ring *ring = &q->ring;
	bool doorbell = ring->doorbell == RINGPASS_DOORBELL_ALWAYS;

	if (ring->published == ring->tail)
		return false;
	/* The SQEs are visible before the tail. */
	virt_store_release(ring->sq_tail, ring->tail);
	ring->published = ring->tail;
	if (!doorbell) {
		/* Pairs with the fence of a kernel that goes to sleep. */
		virt_mb();
		doorbell = READ_ONCE(*ring->sq_flags) & IORING_SQ_NEED_WAKEUP;
	}
	q->stats.doorbells += doorbell;
	return doorbell;
}

/* What a completion says: the table of section 7, but for @res above @len. */
static void rp_judge(struct rp_request *req, s32 res, u32 len)
{
	blk_status_t status;

	if (likely(res == len))
		return;
	if (res >= 0 && (u32)res < len) {
		req->again = true;
		return;
	}
	switch (res) {
	case RINGPASS_RES_EINTR:
	case RINGPASS_RES_EAGAIN:
	case RINGPASS_RES_ENOMEM:
	case RINGPASS_RES_EFAULT:
	case RINGPASS_RES_ECANCELED:
		req->again = true;
		return;
	default:
		status = res >= -MAX_ERRNO ? errno_to_blk_status(res) :
					     BLK_STS_IOERR;
		/* Nothing that would let the block layer try again. */
		if (status == BLK_STS_AGAIN || status == BLK_STS_RESOURCE ||
		    status == BLK_STS_DEV_RESOURCE || status == BLK_STS_OK)
			status = BLK_STS_IOERR;
		if (req->result == BLK_STS_OK)
			req->result = status;
	}
}

/* A request ends when each of its SQEs has ended. */
static void rp_sqe_ended(struct rp_queue *q, struct rp_ticket *ticket,
			 struct rp_done *done)
{
	struct rp_request *req = blk_mq_rq_to_pdu(ticket->rq);

	ticket->rq = NULL;
	q->memory->free_tickets[q->free_count++] =
		ticket - q->memory->tickets;
	if (--req->sqes)
		return;
	/* An error of the storage is the answer, whatever the others say. */
	if (req->result != BLK_STS_OK)
		req->again = false;
	if (req->again) {
		rp_rq(req)->rq_flags |= RQF_DONTPREP;
		q->stats.fallbacks += req->no_ring;
	}
	rp_done_add(done, req);
}

/* Takes the CQEs. An error shows that the device is broken. */
int rp_ring_reap(struct rp_queue *q, struct rp_done *done)
{
	struct rp_ring *ring = &q->ring;
	/* The CQEs are read behind the tail. */
	u32 tail = virt_load_acquire(ring->cq_tail);

	if (tail == ring->head)
		return 0;
	if (tail - ring->head > rp_outstanding(q))
		return -EPROTO;
	while (ring->head != tail) {
		struct io_uring_cqe *cqe = &ring->cqes[ring->head++ & ring->cq_mask];
		u64 user_data = READ_ONCE(cqe->user_data);
		s32 res = READ_ONCE(cqe->res);
		u32 index = lower_32_bits(user_data);
		struct rp_ticket *ticket;
		struct rp_request *req;

		if (unlikely(index >= q->memory->cq_entries))
			return -EPROTO;
		ticket = &q->memory->tickets[index];
		if (unlikely(!ticket->rq ||
			     ticket->serial != upper_32_bits(user_data)))
			return -EPROTO;
		if (unlikely(res > 0 && (u32)res > ticket->len))
			return -EPROTO;
		req = blk_mq_rq_to_pdu(ticket->rq);
		rp_judge(req, res, ticket->len);
		if (unlikely(req->again))
			req->no_ring = true;
		rp_sqe_ended(q, ticket, done);
	}
	/* The CQEs are read before their slots are given back. */
	virt_store_release(ring->cq_head, ring->head);
	return 0;
}

/* Takes the CQEs of a ring that interrupts: muted while there are some. */
int rp_ring_drain(struct rp_queue *q, struct rp_done *done)
{
	struct rp_ring *ring = &q->ring;
	int err;

	if (q->polled)
		return rp_ring_reap(q, done);
	/* rp_ring_reap() reads the CQEs behind a tail of its own. */
	while (READ_ONCE(*ring->cq_tail) != ring->head) {
		WRITE_ONCE(*ring->cq_flags, IORING_CQ_EVENTFD_DISABLED);
		err = rp_ring_reap(q, done);
		WRITE_ONCE(*ring->cq_flags, 0);
		if (err)
			return err;
		/* Pairs with the fence of a kernel that posts a CQE. */
		virt_mb();
	}
	return 0;
}

/*
 * The epoch has ended: requests whose SQEs have no CQE were not executed or not
 * reported, and their I/O has ended. They may go any way.
 */
void rp_ring_put_aside(struct rp_queue *q, struct rp_done *done, blk_status_t status)
{
	u32 index;

	for (index = 0; index < q->memory->cq_entries; index++) {
		struct rp_ticket *ticket = &q->memory->tickets[index];
		struct rp_request *req;

		if (!ticket->rq)
			continue;
		req = blk_mq_rq_to_pdu(ticket->rq);
		req->again = true;
		if (req->result == BLK_STS_OK)
			req->result = status;
		rp_sqe_ended(q, ticket, done);
	}
}

static bool rp_is_word(__le32 offset, size_t bytes)
{
	u32 at = le32_to_cpu(offset);

	return IS_ALIGNED(at, sizeof(u32)) && (u64)at + sizeof(u32) <= bytes;
}

static bool rp_is_power(u32 value, u32 most)
{
	return is_power_of_2(value) && value <= most;
}

/* The rules of section 5, on a copy of the record. */
static bool rp_is_valid(const struct ringpass_ring_record *record,
			const struct rp_memory *memory)
{
	u32 cqes = le32_to_cpu(record->cqes_offset_bytes);
	u32 doorbell = le32_to_cpu(record->doorbell);
	u32 slot_shift = le32_to_cpu(record->slot_shift);
	u64 iova_base = le64_to_cpu(record->iova_base);
	u32 length_align = le32_to_cpu(record->length_align_bytes);
	u32 segment_max = le32_to_cpu(record->segment_bytes_max);
	size_t bytes = memory->rings_bytes;

	return rp_is_word(record->sq_head_offset_bytes, bytes) &&
	       rp_is_word(record->sq_tail_offset_bytes, bytes) &&
	       rp_is_word(record->sq_flags_offset_bytes, bytes) &&
	       rp_is_word(record->cq_head_offset_bytes, bytes) &&
	       rp_is_word(record->cq_tail_offset_bytes, bytes) &&
	       rp_is_word(record->cq_flags_offset_bytes, bytes) &&
	       IS_ALIGNED(cqes, sizeof(u64)) &&
	       cqes + (u64)memory->cq_entries * RINGPASS_CQE_BYTES <= bytes &&
	       (doorbell == RINGPASS_DOORBELL_WHEN_ASLEEP ||
		doorbell == RINGPASS_DOORBELL_ALWAYS) &&
	       slot_shift >= RINGPASS_SLOT_SHIFT_MIN &&
	       slot_shift <= RINGPASS_SLOT_SHIFT_MAX &&
	       iova_base && IS_ALIGNED(iova_base, SZ_1G) &&
	       iova_base <= U64_MAX - RINGPASS_GPA_LIMIT + 1 &&
	       rp_is_power(le32_to_cpu(record->address_align_bytes), SZ_4K) &&
	       rp_is_power(length_align, SZ_64K) &&
	       segment_max >= SZ_4K && IS_ALIGNED(segment_max, length_align);
}

/* Starts the ring of an epoch with all indexes zero. */
int rp_ring_start(struct rp_queue *q, u32 epoch)
{
	struct rp_memory *memory = q->memory;
	const u32 *shared = (const u32 *)&memory->control->ring;
	void *rings = memory->areas[epoch & 1].rings;
	struct rp_ring *ring = &q->ring;
	struct ringpass_ring_record record;
	u32 *copy = (u32 *)&record;
	u32 slot_shift, i;

	BUILD_BUG_ON(sizeof(struct io_uring_sqe) != RINGPASS_SQE_BYTES);
	BUILD_BUG_ON(sizeof(struct io_uring_cqe) != RINGPASS_CQE_BYTES);
	/* The device can write here at any time: only the copy is used. */
	for (i = 0; i < sizeof(record) / sizeof(u32); i++)
		copy[i] = READ_ONCE(shared[i]);
	if (!rp_is_valid(&record, memory))
		return -EPROTO;

	slot_shift = le32_to_cpu(record.slot_shift);
	*ring = (struct rp_ring) {
		.sqes		= memory->areas[epoch & 1].sqes,
		.cqes		= rings + le32_to_cpu(record.cqes_offset_bytes),
		.sq_head	= rings + le32_to_cpu(record.sq_head_offset_bytes),
		.sq_tail	= rings + le32_to_cpu(record.sq_tail_offset_bytes),
		.sq_flags	= rings + le32_to_cpu(record.sq_flags_offset_bytes),
		.cq_head	= rings + le32_to_cpu(record.cq_head_offset_bytes),
		.cq_tail	= rings + le32_to_cpu(record.cq_tail_offset_bytes),
		.cq_flags	= rings + le32_to_cpu(record.cq_flags_offset_bytes),
		.sq_mask	= memory->sq_entries - 1,
		.cq_mask	= memory->cq_entries - 1,
		.doorbell	= le32_to_cpu(record.doorbell),
		.mode		= le32_to_cpu(record.mode),
		.slot_shift	= slot_shift,
		.iova_base	= le64_to_cpu(record.iova_base),
		.gpa_limit	= (u64)RINGPASS_SLOT_COUNT_MAX << slot_shift,
		.address_mask	= le32_to_cpu(record.address_align_bytes) - 1,
		.length_mask	= le32_to_cpu(record.length_align_bytes) - 1,
		.segment_bytes_max = le32_to_cpu(record.segment_bytes_max),
	};
	if (q->polled)
		WRITE_ONCE(*ring->cq_flags, IORING_CQ_EVENTFD_DISABLED);
	return 0;
}
