// SPDX-License-Identifier: GPL-2.0-only
/*
 * PROBE and EVENT on queue 0, section 3 and 6, and the worker of a device: the
 * only thread that sends commands.
 */
#include <linux/cc_platform.h>
#include <linux/sched/mm.h>
#include <linux/virtio_config.h>
#include <xen/xen.h>

#include "ringpass_blk.h"
#include "ringpass_trace.h"

/* CQ entries for each request that a hardware queue can have. */
#define RP_CQ_ENTRIES_PER_REQUEST	2
/*
 * How often the worker looks in a period: for this many times, and some more
 * for each queue. A device that completes each EVENT at once gets the next
 * EVENT late.
 */
#define RP_LOOKS_MAX		32
#define RP_LOOKS_MAX_OF_QUEUE	4
#define RP_LOOKS_PERIOD		HZ
/* The longest wait before another EVENT for a device that has refused one. */
#define RP_EVENT_DELAY_MAX	(60 * HZ)

/* The preconditions of section 1. Returns the one that is not met, or NULL. */
const char *rp_why_no_rings(struct virtio_device *vdev)
{
	static const struct {
		unsigned int bit;
		const char *text;
	} excluded[] = {
		{ VIRTIO_F_ACCESS_PLATFORM, "its memory is behind an IOMMU" },
		{ VIRTIO_F_RING_PACKED, "it has packed virtqueues" },
		{ VIRTIO_F_IN_ORDER, "it uses its virtqueues in order" },
		{ VIRTIO_F_RING_RESET, "its queues can be reset one by one" },
		/* VIRTIO_F_NOTIFICATION_DATA, which Linux 6.1 has no name for */
		{ 38, "its doorbells carry data" },
	};
	unsigned int i;

	if (!rp_fastpath)
		return "the module's parameter fastpath is 0";
	if (!virtio_has_feature(vdev, VIRTIO_F_VERSION_1))
		return "it is a legacy device";
	for (i = 0; i < ARRAY_SIZE(excluded); i++)
		if (__virtio_test_bit(vdev, excluded[i].bit))
			return excluded[i].text;
	if (xen_domain() || cc_platform_has(CC_ATTR_MEM_ENCRYPT))
		return "the host cannot use this guest's memory directly";
	return NULL;
}

static int rp_send(struct rp_device *dev, struct rp_command *cmd, u32 type,
		   size_t answer_bytes)
{
	struct rp_queue *q = &dev->queues[0];
	unsigned long flags;
	bool kick = false;
	int err;

	spin_lock_irqsave(&q->lock, flags);
	err = rp_command_add(q, cmd, type, 0, answer_bytes);
	if (!err)
		kick = virtqueue_kick_prepare(q->vq);
	spin_unlock_irqrestore(&q->lock, flags);
	if (kick)
		virtqueue_notify(q->vq);
	return err;
}

/* Sends PROBE, unless that is on its way. Nothing waits for the answer. */
void rp_probe_send(struct rp_device *dev)
{
	if (test_and_set_bit(RP_PROBE_PENDING, &dev->flags))
		return;
	if (rp_send(dev, dev->probe, RINGPASS_T_PROBE,
		    sizeof(struct ringpass_probe_answer))) {
		clear_bit(RP_PROBE_PENDING, &dev->flags);
		/* Queue 0 has no room: it has soon. */
		queue_delayed_work(rp_workqueue, &dev->work, HZ / 10);
	}
}

/* Jiffies until a device that has refused EVENT is asked again. */
unsigned long rp_event_wait(const struct rp_device *dev)
{
	unsigned long now = jiffies;

	if (!dev->event_delay || !time_before(now, dev->event_at))
		return 0;
	return dev->event_at - now;
}

static void rp_event_send(struct rp_device *dev)
{
	if (rp_event_wait(dev) ||
	    test_and_set_bit(RP_EVENT_PENDING, &dev->flags))
		return;
	if (rp_send(dev, dev->event, RINGPASS_T_EVENT,
		    sizeof(struct ringpass_event_answer))) {
		clear_bit(RP_EVENT_PENDING, &dev->flags);
		queue_delayed_work(rp_workqueue, &dev->work, HZ / 10);
	}
}

/* A command on queue 0 is completed. The lock of that queue is held. */
void rp_command_done(struct rp_device *dev, struct rp_command *cmd,
		     struct rp_done *done)
{
	if (cmd == dev->probe)
		set_bit(RP_PROBE_ANSWERED, &dev->flags);
	else if (cmd == dev->event)
		set_bit(RP_EVENT_ANSWERED, &dev->flags);
	done->work = true;
}

static bool rp_in_range(u32 value, u32 least, u32 most)
{
	return is_power_of_2(value) && value >= least && value <= most;
}

/* Returns why the device's answer allows no rings, or NULL. */
static const char *rp_check_answer(u8 status, const struct ringpass_probe_answer *answer)
{
	u32 length_align = le32_to_cpu(answer->length_align_bytes);
	u32 segment_bytes_max = le32_to_cpu(answer->segment_bytes_max);

	if (status != VIRTIO_BLK_S_OK ||
	    le64_to_cpu(answer->magic) != RINGPASS_MAGIC)
		return "it is not a ringpass device";
	if (le32_to_cpu(answer->answer_bytes) < sizeof(*answer) ||
	    !rp_in_range(le32_to_cpu(answer->sq_entries_max), 1, RINGPASS_SQ_ENTRIES_MAX) ||
	    !rp_in_range(le32_to_cpu(answer->cq_entries_max), 1, RINGPASS_CQ_ENTRIES_MAX) ||
	    le32_to_cpu(answer->cq_entries_max) < le32_to_cpu(answer->sq_entries_max) ||
	    !rp_in_range(le32_to_cpu(answer->page_bytes), SZ_4K, SZ_64K) ||
	    !rp_in_range(le32_to_cpu(answer->address_align_bytes), 1, SZ_4K) ||
	    !rp_in_range(length_align, 1, SZ_64K) ||
	    segment_bytes_max < SZ_4K || segment_bytes_max & (length_align - 1) ||
	    !answer->queue_count)
		return "its answer to PROBE makes no sense";
	if (le16_to_cpu(answer->version_min) > RINGPASS_VERSION ||
	    le16_to_cpu(answer->version_max) < RINGPASS_VERSION)
		return "it has another version of the interface";
	if (!(le64_to_cpu(answer->features) & RINGPASS_F_DSYNC))
		return "it offers no durable writes";
	if (le16_to_cpu(answer->queue_count) < 2)
		return "its only queue stays a virtqueue";
	return NULL;
}

static void rp_probe_answered(struct rp_device *dev)
{
	/* The device can change its answer: what is checked is what is used. */
	const struct ringpass_probe_answer copy = dev->probe->answer.probe;
	const struct ringpass_probe_answer *answer = &copy;
	struct device *device = &dev->vdev->dev;
	const char *reason;
	u32 sq_entries, cq_entries, refusal;
	unsigned int i;
	u8 status;

	barrier();
	status = READ_ONCE(dev->probe->status);
	reason = rp_check_answer(status, answer);
	trace_ringpass_answer(dev->index, 0, RINGPASS_T_PROBE, status,
			      le16_to_cpu(answer->refusal));
	if (reason) {
		/* PROBE stays pending, so to speak: it is not sent again. */
		dev_info(device, "[%s] an ordinary disk: %s\n",
			 dev->disk->disk_name, reason);
		return;
	}
	clear_bit(RP_PROBE_PENDING, &dev->flags);
	cq_entries = roundup_pow_of_two(RP_CQ_ENTRIES_PER_REQUEST *
					dev->tag_set.queue_depth);
	/* More than these would be memory that is never used. */
	sq_entries = min(le32_to_cpu(answer->sq_entries_max), cq_entries);
	dev->sq_entries = sq_entries;
	dev->cq_entries = clamp(cq_entries, sq_entries,
				le32_to_cpu(answer->cq_entries_max));
	dev->page_bytes = le32_to_cpu(answer->page_bytes);
	dev->queue_count = min_t(unsigned int, dev->num_queues,
				 le16_to_cpu(answer->queue_count));
	refusal = le16_to_cpu(answer->refusal);
	if (!test_bit(RP_FAST, &dev->flags)) {
		if (dev->num_queues < 2)
			dev_info(device, "[%s] no rings: queue 0 is the only one\n",
				 dev->disk->disk_name);
		else if (refusal)
			dev_info(device, "[%s] a ringpass device, which gives no rings now (reason %u)\n",
				 dev->disk->disk_name, refusal);
		else
			dev_info(device, "[%s] a ringpass device: %u queues may have rings (SQ %u, CQ %u)\n",
				 dev->disk->disk_name, dev->queue_count - 1,
				 dev->sq_entries, dev->cq_entries);
	}
	for (i = 1; i < dev->queue_count; i++) {
		struct rp_queue *q = &dev->queues[i];

		spin_lock_irq(&q->lock);
		if (refusal && !test_bit(RP_FAST, &dev->flags)) {
			q->retry = rp_retry_of(refusal);
			if (q->retry == RP_RETRY_LATER)
				q->retry_at = jiffies + HZ;
		} else if (q->retry == RP_RETRY_PROBE) {
			q->retry = RP_RETRY_NOW;
		}
		spin_unlock_irq(&q->lock);
	}
	dev->event_delay = 0;
	set_bit(RP_FAST, &dev->flags);
}

static void rp_event_answered(struct rp_device *dev)
{
	u32 events = le32_to_cpu(READ_ONCE(dev->event->answer.event.events));
	u8 status = READ_ONCE(dev->event->status);
	unsigned int i;

	trace_ringpass_answer(dev->index, 0, RINGPASS_T_EVENT, status, events);
	clear_bit(RP_EVENT_PENDING, &dev->flags);
	if (status != VIRTIO_BLK_S_OK) {
		/*
		 * A server without rings has taken the device over. The next
		 * one may have rings and completes its first EVENT: nothing
		 * else tells a driver of a restart.
		 */
		if (!dev->event_delay)
			dev_warn_ratelimited(&dev->vdev->dev, "[%s] the device refuses EVENT: the driver asks again in a while\n",
					     dev->disk->disk_name);
		dev->event_delay = clamp_t(unsigned long, 2 * dev->event_delay,
					   HZ, RP_EVENT_DELAY_MAX);
		dev->event_at = jiffies + dev->event_delay;
		return;
	}
	dev->event_delay = 0;
	if (!(events & RINGPASS_EVENT_QUEUES))
		return;
	/* rp_attach_completed() looks, with the queue's lock held. */
	WRITE_ONCE(dev->events, dev->events + 1);
	for (i = 1; i < dev->queue_count; i++) {
		struct rp_queue *q = &dev->queues[i];

		spin_lock_irq(&q->lock);
		if (q->retry == RP_RETRY_EVENT)
			q->retry = RP_RETRY_NOW;
		spin_unlock_irq(&q->lock);
	}
}

static void rp_look(struct rp_device *dev)
{
	unsigned int i;

	if (test_bit(RP_BROKEN, &dev->flags)) {
		rp_bury(dev);
		return;
	}
	/* Also of a device that has no rings any more. */
	for (i = 0; i < dev->num_queues; i++)
		rp_quarantine_end(&dev->queues[i]);
	if (test_and_clear_bit(RP_PROBE_ANSWERED, &dev->flags))
		rp_probe_answered(dev);
	else if (!test_bit(RP_FAST, &dev->flags))
		rp_probe_send(dev);
	/* Without queues for rings there is nothing that an EVENT could tell. */
	if (!test_bit(RP_FAST, &dev->flags) || dev->queue_count < 2)
		return;
	/* The next EVENT first, and then a look at what happened. */
	if (test_and_clear_bit(RP_EVENT_ANSWERED, &dev->flags))
		rp_event_answered(dev);
	rp_event_send(dev);
	for (i = 1; i < dev->queue_count; i++) {
		rp_service(&dev->queues[i]);
		rp_log_queue(&dev->queues[i]);
	}
	/* This look may have found it out; the next one buries the device. */
	if (!test_bit(RP_BROKEN, &dev->flags))
		rp_attach_queues(dev);
}

void rp_work(struct work_struct *work)
{
	struct rp_device *dev = container_of(to_delayed_work(work),
					     struct rp_device, work);
	unsigned int most = RP_LOOKS_MAX + RP_LOOKS_MAX_OF_QUEUE * dev->num_queues;
	unsigned long wait;
	unsigned int noio;

	if (test_bit(RP_STOPPING, &dev->flags) || test_bit(RP_DEAD, &dev->flags))
		return;
	/* Nothing can be sent to a device that was removed by surprise. */
	if (virtqueue_is_broken(dev->queues[0].vq) &&
	    !test_bit(RP_BROKEN, &dev->flags))
		return;
	/* The end of a broken device does not wait. */
	wait = test_bit(RP_BROKEN, &dev->flags) ? 0 :
	       rp_pace_wait(&dev->work_pace, most, RP_LOOKS_PERIOD);
	if (wait) {
		queue_delayed_work(rp_workqueue, &dev->work, wait);
		return;
	}
	/* Memory must not be freed by I/O on this disk, which may wait for this. */
	noio = memalloc_noio_save();
	rp_look(dev);
	memalloc_noio_restore(noio);
}
