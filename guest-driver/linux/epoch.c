// SPDX-License-Identifier: GPL-2.0-only
/*
 * The driver's half of the epochs, section 6.
 *
 * One word of the control page says which ring belongs to which side; the
 * driver answers in another word. rp_epoch_step() is the only function that
 * changes the state of an attached queue. It needs the queue's lock, under
 * which rings are also filled and reaped, so a request is either in the ring
 * that the state says or not on its way to it.
 *
 *  state       the device's word           what the driver does      next state
 *  ---------   -------------------------   -----------------------   ----------
 *  Idle e      0, nothing announced yet    -                         as before
 *  Idle e      (e, Drain)                  - (acknowledged)          Idle e
 *  Idle e      (e, Ended)                  acknowledge, unless done  Idle e
 *  Idle e      (e+1, Open)                 start the ring            Running e+1
 *  Idle e      (e+1, Drain or Ended)       acknowledge               Idle e+1
 *  Running e   (e, Open)                   reap                      Running e
 *  Running e   (e, Drain)                  publish, submit no more   Draining e
 *  Running e   (e, Ended)                  reap, put the rest aside, Idle e
 *                                          acknowledge
 *  Draining e  (e, Drain), some SQEs left  reap                      Draining e
 *  Draining e  (e, Drain), none left       acknowledge               Idle e
 *  Draining e  (e, Ended)                  reap, put the rest aside, Idle e
 *                                          acknowledge
 *  any         anything else               -                         Failed
 *  any         (ATTACH is completed)       reap, put the rest aside  Detached
 *
 * The document has two states more, Reaping and Leaving, which the driver
 * leaves before it releases the lock.
 */
#include <asm/barrier.h>

#include "ringpass_blk.h"
#include "ringpass_trace.h"

#define RP_EPOCH_MASK	(U32_MAX >> RINGPASS_PHASE_BITS)

static u32 rp_epoch_of(u32 word)
{
	return word >> RINGPASS_PHASE_BITS;
}

static u32 rp_phase_of(u32 word)
{
	return word & RINGPASS_PHASE_MASK;
}

void rp_enter(struct rp_queue *q, enum rp_state state, u32 word)
{
	trace_ringpass_state(q->dev->index, q->index, q->state, state, q->epoch,
			     word);
	/* rp_ring_queue() looks without the lock. */
	WRITE_ONCE(q->state, state);
}

static void rp_break(struct rp_queue *q, u32 word, struct rp_done *done)
{
	dev_err(&q->dev->vdev->dev,
		"queue %u: the device breaks the protocol of rings (epoch %u, word %#x): it will be reset\n",
		q->index, q->epoch, word);
	set_bit(RP_BROKEN, &q->dev->flags);
	done->work = true;
}

static void rp_fail(struct rp_queue *q, u32 word, struct rp_done *done)
{
	if (q->state == RP_FAILED)
		return;
	rp_break(q, word, done);
	rp_enter(q, RP_FAILED, word);
}

static void rp_acknowledge(struct rp_queue *q, u32 word, struct rp_done *done)
{
	if (q->acknowledged == word)
		return;
	q->acknowledged = word;
	/* The driver has read everything in the area before this. */
	virt_store_release(&q->memory->control->acknowledged, cpu_to_le32(word));
	done->doorbell = true;
}

/* The ring of this epoch is gone: takes what it has left. */
static int rp_end_ring(struct rp_queue *q, struct rp_done *done)
{
	int err = rp_ring_reap(q, done);

	if (!err)
		rp_ring_put_aside(q, done, BLK_STS_OK);
	return err;
}

/*
 * ARM stays in the used ring while the queue is attached, so ATTACH is the
 * second entry. It is looked for when the device has written its status.
 */
static bool rp_attach_is_completed(struct rp_queue *q)
{
	return READ_ONCE(q->memory->attach.status) != RP_STATUS_NONE &&
	       virtqueue_poll(q->vq, q->used_before) &&
	       virtqueue_poll(q->vq, (u16)(q->used_before + 1));
}

static void rp_leave(struct rp_queue *q, struct rp_done *done)
{
	unsigned int length;
	void *first, *second;
	int err = 0;

	/* A ring that does not make sense has no completions to take. */
	if (q->state == RP_RUNNING || q->state == RP_DRAINING)
		err = rp_ring_reap(q, done);
	/* A device that lies gets no request again; the I/O has ended. */
	rp_ring_put_aside(q, done, err ? BLK_STS_IOERR : BLK_STS_OK);
	first = virtqueue_get_buf(q->vq, &length);
	second = virtqueue_get_buf(q->vq, &length);
	if (first != &q->memory->arm || second != &q->memory->attach) {
		rp_fail(q, 0, done);
		return;
	}
	q->answered = true;
	rp_enter(q, RP_DETACHED, 0);
	rp_attach_completed(q, done);
	if (err)
		rp_break(q, 0, done);
}

static void rp_step_idle(struct rp_queue *q, u32 word, struct rp_done *done)
{
	u32 next = (q->epoch + 1) & RP_EPOCH_MASK;
	u32 phase = rp_phase_of(word);

	if (q->announced && rp_epoch_of(word) == q->epoch) {
		if (phase == RINGPASS_PHASE_OPEN)
			rp_fail(q, word, done);
		else if (phase == RINGPASS_PHASE_ENDED)
			rp_acknowledge(q, word, done);
		return;
	}
	if (rp_epoch_of(word) != next) {
		rp_fail(q, word, done);
		return;
	}
	q->announced = true;
	q->answered = true;
	q->epoch = next;
	if (phase != RINGPASS_PHASE_OPEN) {
		rp_acknowledge(q, word, done);
		return;
	}
	if (rp_ring_start(q, next)) {
		rp_fail(q, word, done);
		return;
	}
	q->retry_delay = 0;
	q->refusal = RINGPASS_ERROR_NONE;
	rp_enter(q, RP_RUNNING, word);
	/* Now the other queues may follow. */
	done->work = true;
}

static void rp_step_ring(struct rp_queue *q, u32 word, struct rp_done *done)
{
	u32 phase = rp_phase_of(word);

	if (rp_epoch_of(word) != q->epoch ||
	    (q->state == RP_DRAINING && phase == RINGPASS_PHASE_OPEN)) {
		rp_fail(q, word, done);
		return;
	}
	if (phase == RINGPASS_PHASE_ENDED) {
		if (rp_end_ring(q, done)) {
			rp_fail(q, word, done);
			return;
		}
		rp_acknowledge(q, word, done);
		rp_enter(q, RP_IDLE, word);
		return;
	}
	if (q->state == RP_RUNNING && phase == RINGPASS_PHASE_DRAIN) {
		/* What is in the ring already belongs to this epoch. */
		done->doorbell |= rp_ring_publish(q);
		rp_enter(q, RP_DRAINING, word);
	}
	if (rp_ring_drain(q, done)) {
		rp_fail(q, word, done);
		return;
	}
	if (q->state == RP_DRAINING &&
	    q->free_count == q->memory->cq_entries) {
		rp_acknowledge(q, word, done);
		rp_enter(q, RP_IDLE, word);
	}
}

/*
 * Does what the device's word asks for, and takes completions. To be called
 * after each interrupt, each EVENT and each poll, with the queue's lock held.
 */
void rp_epoch_step(struct rp_queue *q, struct rp_done *done)
{
	u32 word;

	if (rp_attach_is_completed(q)) {
		rp_leave(q, done);
		return;
	}
	if (q->state == RP_FAILED)
		return;
	/* The record, the ring and the CQ are read behind the word. */
	word = le32_to_cpu(virt_load_acquire(&q->memory->control->announced));
	if (!word && !q->announced)
		return;
	if (rp_phase_of(word) == 0)
		rp_fail(q, word, done);
	else if (q->state == RP_IDLE)
		rp_step_idle(q, word, done);
	else
		rp_step_ring(q, word, done);
}
