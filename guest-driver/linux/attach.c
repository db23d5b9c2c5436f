// SPDX-License-Identifier: GPL-2.0-only
/*
 * ARM and ATTACH, section 4: which queue is attached when. Everything but
 * rp_attach_completed() is called by the device's worker only.
 */
#include "ringpass_blk.h"
#include "ringpass_trace.h"

#define RP_RETRY_DELAY_MAX	(60 * HZ)
/* Descriptors of ARM and ATTACH. */
#define RP_ATTACH_DESCRIPTORS	7

/* When ATTACH may be sent again: the table of section 2. */
enum rp_retry rp_retry_of(u32 error)
{
	switch (error) {
	case RINGPASS_ERROR_NONE:
	case RINGPASS_ERROR_DETACHED:
		return RP_RETRY_NOW;
	case RINGPASS_ERROR_BUSY:
	case RINGPASS_ERROR_RESOURCES:
		return RP_RETRY_LATER;
	case RINGPASS_ERROR_MODE:
	case RINGPASS_ERROR_COST:
		return RP_RETRY_EVENT;
	case RINGPASS_ERROR_VERSION:
	case RINGPASS_ERROR_FEATURES:
	case RINGPASS_ERROR_ENTRIES:
	case RINGPASS_ERROR_ALIGNMENT:
		return RP_RETRY_PROBE;
	default:
		return RP_RETRY_NEVER;
	}
}

static const char *rp_retry_text(enum rp_retry retry)
{
	switch (retry) {
	case RP_RETRY_NOW:
		return "it asks again";
	case RP_RETRY_LATER:
		return "it asks again in a while";
	case RP_RETRY_EVENT:
		return "it asks again when the device says so";
	case RP_RETRY_PROBE:
		return "it asks again according to another PROBE";
	default:
		return "it asks again after the next reset";
	}
}

/* The queue is not attached any more. Its lock is held. */
void rp_attach_completed(struct rp_queue *q, struct rp_done *done)
{
	struct rp_command *cmd = &q->memory->attach;
	u32 error = le32_to_cpu(cmd->answer.outcome.error);

	trace_ringpass_answer(q->dev->index, q->index, RINGPASS_T_ATTACH,
			      cmd->status, error);
	q->retry = rp_retry_of(error);
	if (cmd->status != VIRTIO_BLK_S_OK && cmd->status != VIRTIO_BLK_S_IOERR)
		q->retry = RP_RETRY_NEVER;
	/* Another device may need another ATTACH, but not the same again. */
	if (q->retry == RP_RETRY_PROBE && q->refusal == error)
		q->retry = RP_RETRY_NEVER;
	/* The EVENT may have come before this. */
	if (q->retry == RP_RETRY_EVENT && q->events_before != q->dev->events)
		q->retry = RP_RETRY_NOW;
	/* A device that gives success and error in turn gets no endless loop. */
	if (q->retry == RP_RETRY_LATER || q->retry == RP_RETRY_NOW) {
		if (!q->retry_delay)
			q->retry_delay = HZ;
		else
			q->retry_delay = min_t(unsigned long, 2 * q->retry_delay,
					       RP_RETRY_DELAY_MAX);
		q->retry_at = jiffies + q->retry_delay;
		q->retry = RP_RETRY_LATER;
	}
	q->refusal = error;
	q->logged_refusal = false;
	done->work = true;
}

/* One line for each thing that happened to the queue. */
void rp_log_queue(struct rp_queue *q)
{
	struct device *device = &q->dev->vdev->dev;
	const char *name = q->dev->disk->disk_name;
	bool has_ring, refused;
	enum rp_retry retry;
	u32 error, reason = 0;

	spin_lock_irq(&q->lock);
	has_ring = q->state == RP_RUNNING || q->state == RP_DRAINING;
	refused = q->state == RP_DETACHED && q->memory && !q->logged_refusal;
	retry = q->retry;
	error = q->refusal;
	if (rp_is_attached(q))
		reason = le32_to_cpu(READ_ONCE(q->memory->control->end_reason));
	q->logged_refusal |= refused;
	spin_unlock_irq(&q->lock);

	if (refused)
		dev_info(device, "[%s] queue %u: a virtqueue, because the device gives it no ring (error %u): %s\n",
			 name, q->index, error, rp_retry_text(retry));
	else if (has_ring && !q->logged_ring)
		dev_info(device, "[%s] queue %u: on a ring of the host (epoch %u, %s)\n",
			 name, q->index, q->epoch,
			 q->ring.mode == RINGPASS_MODE_DIRECT ? "direct" : "mediated");
	else if (!has_ring && q->logged_ring)
		dev_info(device, "[%s] queue %u: its ring has ended (reason %u), requests go over queue 0\n",
			 name, q->index, reason);
	q->logged_ring = has_ring;
}

/* Sends ARM and ATTACH when the virtqueue is empty. */
static void rp_attach_send(struct rp_queue *q)
{
	struct rp_memory *memory = q->memory;
	int err;

	spin_lock_irq(&q->lock);
	if (q->state != RP_EMPTYING || q->in_flight) {
		spin_unlock_irq(&q->lock);
		return;
	}
	/*
	 * The last look at the used ring before ATTACH ends: ARM must stay
	 * there, and interrupts stay on.
	 */
	q->used_before = virtqueue_enable_cb_prepare(q->vq);
	if (q->polled)
		virtqueue_disable_cb(q->vq);
	q->announced = false;
	q->epoch = 0;
	q->acknowledged = 0;
	q->free_count = memory->cq_entries;
	q->events_before = q->dev->events;
	err = q->vq->num_free < RP_ATTACH_DESCRIPTORS ? -ENOSPC : 0;
	if (!err)
		err = rp_command_add(q, &memory->arm, RINGPASS_T_ARM, 0,
				     sizeof(struct ringpass_outcome));
	if (!err)
		err = rp_command_add(q, &memory->attach, RINGPASS_T_ATTACH,
				     sizeof(struct ringpass_attach_payload),
				     sizeof(struct ringpass_outcome));
	if (err) {
		/* Too small a virtqueue, or one that is broken. */
		rp_enter(q, RP_DETACHED, 0);
		q->retry = RP_RETRY_NEVER;
		q->refusal = RINGPASS_ERROR_QUEUE;
		q->logged_refusal = false;
	} else {
		rp_enter(q, RP_IDLE, 0);
		virtqueue_kick_prepare(q->vq);
	}
	spin_unlock_irq(&q->lock);
	if (!err)
		virtqueue_notify(q->vq);
}

/* Keeps further requests from the virtqueue, so that it gets empty. */
static void rp_attach_begin(struct rp_queue *q)
{
	struct rp_memory *memory = rp_memory_alloc(q->dev);
	bool kick = false;

	spin_lock_irq(&q->lock);
	if (!memory) {
		q->retry = RP_RETRY_LATER;
		q->retry_at = jiffies + HZ;
	} else {
		q->memory = memory;
		rp_enter(q, RP_EMPTYING, 0);
		/* The rest of a batch that is being made. */
		kick = virtqueue_kick_prepare(q->vq);
	}
	spin_unlock_irq(&q->lock);
	if (kick)
		virtqueue_notify(q->vq);
	if (memory)
		rp_attach_send(q);
}

/* Frees the memory of an attachment that has ended. */
static void rp_attach_tidy(struct rp_queue *q)
{
	struct rp_memory *memory = NULL;

	spin_lock_irq(&q->lock);
	if (q->state == RP_DETACHED)
		swap(memory, q->memory);
	spin_unlock_irq(&q->lock);
	rp_memory_free(memory);
}

/*
 * Attaches the queues that may be attached now: one alone until there is a
 * ring, because the device pins the guest's memory once for all queues, and
 * meanwhile the others take the requests.
 */
void rp_attach_queues(struct rp_device *dev)
{
	unsigned int i, rings = 0, waiting = 0;
	enum rp_state state;
	unsigned long wait = MAX_JIFFY_OFFSET;
	bool needs_probe = false;

	for (i = 1; i < dev->queue_count; i++) {
		struct rp_queue *q = &dev->queues[i];

		rp_attach_tidy(q);
		rp_attach_send(q);
		/* Interrupts may change it, and then queue the work again. */
		state = READ_ONCE(q->state);
		rings += state == RP_RUNNING || state == RP_DRAINING;
		waiting += state == RP_EMPTYING || state == RP_IDLE;
	}
	for (i = 1; i < dev->queue_count; i++) {
		struct rp_queue *q = &dev->queues[i];
		unsigned long now = jiffies;

		if (READ_ONCE(q->state) != RP_DETACHED)
			continue;
		if (q->retry == RP_RETRY_PROBE)
			needs_probe = true;
		if (q->retry == RP_RETRY_LATER) {
			if (time_before(now, q->retry_at)) {
				wait = min(wait, q->retry_at - now);
				continue;
			}
			q->retry = RP_RETRY_NOW;
		}
		if (q->retry != RP_RETRY_NOW || (!rings && waiting))
			continue;
		rp_attach_begin(q);
		/* Without memory it tries again. */
		if (READ_ONCE(q->state) == RP_DETACHED)
			wait = min_t(unsigned long, wait, HZ);
		else
			waiting++;
	}
	if (needs_probe)
		rp_probe_send(dev);
	/* If an interrupt has queued the work meanwhile, that is soon enough. */
	if (wait != MAX_JIFFY_OFFSET)
		queue_delayed_work(rp_workqueue, &dev->work, wait);
}
