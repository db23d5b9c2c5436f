// SPDX-License-Identifier: GPL-2.0-only
/*
 * ARM and ATTACH, section 4: which queue is attached when. Everything but
 * rp_attach_completed() is called by the device's worker only.
 */
#include "ringpass_blk.h"
#include "ringpass_trace.h"

#define RP_RETRY_DELAY_MAX	(60 * HZ)
/* No more ATTACHs of a queue than this in a period, for all answers. */
#define RP_ATTACHES_MAX		10
#define RP_ATTACHES_PERIOD	(10 * HZ)
/* The same for the lines in the log. */
#define RP_LOG_LINES_MAX	30
#define RP_LOG_LINES_PERIOD	(30 * HZ)
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

/*
 * The queue was refused a ring, or has lost it. The first refusal of the kind
 * "later" has to be waited out; each further one doubles the wait, for
 * all reasons alike: a device that refuses and completes EVENT in turn gets no
 * endless loop.
 */
static void rp_back_off(struct rp_queue *q)
{
	unsigned long delay = q->retry_delay;

	if (q->retry == RP_RETRY_LATER && !delay)
		delay = HZ;
	q->retry_at = jiffies + delay;
	q->retry_delay = clamp_t(unsigned long, 2 * delay, HZ,
				 RP_RETRY_DELAY_MAX);
}

/* The queue is not attached any more. Its lock is held. */
void rp_attach_completed(struct rp_queue *q, struct rp_done *done)
{
	struct rp_command *cmd = &q->memory->attach;
	u32 error = le32_to_cpu(READ_ONCE(cmd->answer.outcome.error));
	u8 status = READ_ONCE(cmd->status);

	trace_ringpass_answer(q->dev->index, q->index, RINGPASS_T_ATTACH,
			      status, error);
	q->retry = rp_retry_of(error);
	/* A server without rings has taken the device over, see EVENT. */
	if (status != VIRTIO_BLK_S_OK && status != VIRTIO_BLK_S_IOERR)
		q->retry = RP_RETRY_EVENT;
	/* Another device may need another ATTACH, but not the same again. */
	if (q->retry == RP_RETRY_PROBE && q->refusal == error)
		q->retry = RP_RETRY_NEVER;
	/*
	 * The EVENT may have come before this: it may also be an older one, so
	 * there is no hurry.
	 */
	if (q->retry == RP_RETRY_EVENT &&
	    q->events_before != READ_ONCE(q->dev->events))
		q->retry = RP_RETRY_LATER;
	/* The driver has not asked for the queue. */
	if (q->retry == RP_RETRY_NOW)
		q->retry = RP_RETRY_LATER;
	rp_back_off(q);
	q->refusal = error;
	q->logged_refusal = false;
	done->work = true;
}

/* What the log says of a queue, copied under its lock. */
struct rp_report {
	bool has_ring;
	bool refused;
	enum rp_retry retry;
	u32 error;
	u32 end_reason;
	u32 epoch;
	u32 mode;
};

/* Returns false if there is nothing new, or too much of it. */
static bool rp_take_report(struct rp_queue *q, struct rp_report *report)
{
	bool is_new;

	spin_lock_irq(&q->lock);
	*report = (struct rp_report) {
		.has_ring	= q->state == RP_RUNNING || q->state == RP_DRAINING,
		.refused	= q->state == RP_DETACHED && q->memory && !q->logged_refusal,
		.retry		= q->retry,
		.error		= q->refusal,
		.epoch		= q->epoch,
		.mode		= q->ring.mode,
	};
	if (rp_is_attached(q))
		report->end_reason =
			le32_to_cpu(READ_ONCE(q->memory->control->end_reason));
	is_new = report->refused || report->has_ring != q->logged_ring;
	if (is_new && rp_pace_wait(&q->log_pace, RP_LOG_LINES_MAX, RP_LOG_LINES_PERIOD))
		is_new = false;
	if (is_new) {
		q->logged_ring = report->has_ring;
		q->logged_refusal |= report->refused;
	}
	spin_unlock_irq(&q->lock);
	return is_new;
}

/* One line for each thing that happened to the queue. */
void rp_log_queue(struct rp_queue *q)
{
	struct device *device = &q->dev->vdev->dev;
	const char *name = q->dev->disk->disk_name;
	struct rp_report report;

	if (!rp_take_report(q, &report))
		return;
	if (report.refused)
		dev_info(device, "[%s] queue %u: a virtqueue, because the device gives it no ring (error %u): %s\n",
			 name, q->index, report.error, rp_retry_text(report.retry));
	else if (report.has_ring)
		dev_info(device, "[%s] queue %u: on a ring of the host (epoch %u, %s)\n",
			 name, q->index, report.epoch,
			 report.mode == RINGPASS_MODE_DIRECT ? "direct" : "mediated");
	else
		dev_info(device, "[%s] queue %u: its ring has ended (reason %u), requests go over queue 0\n",
			 name, q->index, report.end_reason);
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
	if (err) {
		/* Too small a virtqueue, or one that is broken. */
		rp_enter(q, RP_DETACHED, 0);
		q->retry = RP_RETRY_NEVER;
		q->refusal = RINGPASS_ERROR_QUEUE;
		q->logged_refusal = false;
	} else {
		/* There is room. If the virtqueue breaks now, ARM has no end. */
		rp_command_add(q, &memory->attach, RINGPASS_T_ATTACH,
			       sizeof(struct ringpass_attach_payload),
			       sizeof(struct ringpass_outcome));
		rp_enter(q, RP_IDLE, 0);
		virtqueue_kick_prepare(q->vq);
	}
	spin_unlock_irq(&q->lock);
	if (!err)
		virtqueue_notify(q->vq);
}

/*
 * Keeps further requests from the virtqueue, so that it gets empty. Returns
 * false if there is no memory.
 */
static bool rp_attach_begin(struct rp_queue *q)
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
	return memory;
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

/* What the worker learns of all queues before it attaches some. */
struct rp_attach_round {
	unsigned int rings;
	/* Queues that may have a ring soon. */
	unsigned int waiting;
	bool needs_probe;
	/* Jiffies until there is something to do. */
	unsigned long wait;
};

static void rp_attach_wait(struct rp_attach_round *round, unsigned long wait)
{
	round->wait = min(round->wait, wait);
}

static void rp_attach_goes_on(struct rp_queue *q,
				   struct rp_attach_round *round)
{
	round->waiting++;
	/* No interrupt says that the device refuses, and no EVENT. */
	if (q->polled)
		rp_attach_wait(round, HZ);
}

static void rp_attach_count(struct rp_queue *q, struct rp_attach_round *round)
{
	spin_lock_irq(&q->lock);
	if (q->state == RP_RUNNING || q->state == RP_DRAINING)
		round->rings++;
	if (q->state == RP_EMPTYING || q->state == RP_IDLE)
		rp_attach_goes_on(q, round);
	spin_unlock_irq(&q->lock);
}

/* Whether the queue may be attached now. Otherwise the round knows why not. */
static bool rp_attach_is_due(struct rp_queue *q, struct rp_attach_round *round)
{
	unsigned long now = jiffies, wait;

	lockdep_assert_held(&q->lock);
	/* Memory of an attachment that has just ended: it queues the work. */
	if (q->state != RP_DETACHED || q->memory)
		return false;
	if (q->retry == RP_RETRY_EVENT || q->retry == RP_RETRY_NEVER)
		return false;
	if (time_before(now, q->retry_at)) {
		rp_attach_wait(round, q->retry_at - now);
		return false;
	}
	if (q->retry == RP_RETRY_PROBE) {
		round->needs_probe = true;
		return false;
	}
	if (!round->rings && round->waiting)
		return false;
	wait = rp_pace_wait(&q->attach_pace, RP_ATTACHES_MAX, RP_ATTACHES_PERIOD);
	if (wait)
		rp_attach_wait(round, wait);
	return !wait;
}

/*
 * Attaches the queues that may be attached now: one alone until there is a
 * ring, because the device pins the guest's memory once for all queues, and
 * meanwhile the others take the requests.
 */
void rp_attach_queues(struct rp_device *dev)
{
	struct rp_attach_round round = {
		.wait = rp_event_wait(dev) ?: MAX_JIFFY_OFFSET,
	};
	unsigned int i;
	bool is_due;

	for (i = 1; i < dev->queue_count; i++) {
		rp_attach_tidy(&dev->queues[i]);
		rp_attach_send(&dev->queues[i]);
		rp_attach_count(&dev->queues[i], &round);
	}
	for (i = 1; i < dev->queue_count; i++) {
		struct rp_queue *q = &dev->queues[i];

		spin_lock_irq(&q->lock);
		is_due = rp_attach_is_due(q, &round);
		spin_unlock_irq(&q->lock);
		if (!is_due)
			continue;
		if (rp_attach_begin(q))
			rp_attach_goes_on(q, &round);
		else
			rp_attach_wait(&round, HZ);
	}
	if (round.needs_probe)
		rp_probe_send(dev);
	/* If an interrupt has queued the work meanwhile, that is soon enough. */
	if (round.wait != MAX_JIFFY_OFFSET)
		queue_delayed_work(rp_workqueue, &dev->work, round.wait);
}
