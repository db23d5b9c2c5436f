// SPDX-License-Identifier: GPL-2.0-only
/*
 * What must be done before and after a reset, section 9: a front-end whose
 * device process has died ends a reset at once, and the rings of that process
 * write to the guest's memory until their I/O has ended.
 */
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/virtio_config.h>

#include "ringpass_blk.h"
#include "ringpass_trace.h"

/* The longest time that a test or an operator may want to wait. */
#define RP_DETACH_SECONDS_MAX	3600U

static unsigned int rp_detach_seconds = 30;
module_param_named(detach_seconds, rp_detach_seconds, uint, 0644);
MODULE_PARM_DESC(detach_seconds, "How long a device may take to give its queues back before it is reset (default: 30)");

/* In jiffies. */
unsigned long rp_detach_limit(void)
{
	return min(READ_ONCE(rp_detach_seconds), RP_DETACH_SECONDS_MAX) * HZ;
}

/* Asks the device for the queue. */
static void rp_want_back(struct rp_queue *q)
{
	bool doorbell = false;

	spin_lock_irq(&q->lock);
	if (q->state == RP_EMPTYING) {
		rp_enter(q, RP_DETACHED, 0);
	} else if (rp_is_attached(q)) {
		/* The doorbell comes behind this. */
		virt_store_release(&q->memory->control->detach, cpu_to_le32(1));
		doorbell = true;
	}
	spin_unlock_irq(&q->lock);
	if (doorbell)
		virtqueue_notify(q->vq);
}

static unsigned int rp_count_attached(struct rp_device *dev)
{
	unsigned int i, count = 0;

	for (i = 1; i < dev->num_queues; i++) {
		spin_lock_irq(&dev->queues[i].lock);
		count += rp_is_attached(&dev->queues[i]);
		spin_unlock_irq(&dev->queues[i].lock);
	}
	return count;
}

static void rp_want_all_back(struct rp_device *dev)
{
	unsigned int i;

	for (i = 1; i < dev->num_queues; i++)
		rp_want_back(&dev->queues[i]);
}

/*
 * Takes what the device has given back. Returns whether there is more to wait
 * for: a device that was removed by surprise cannot be asked.
 */
static bool rp_take_back(struct rp_device *dev)
{
	unsigned int i;

	for (i = 1; i < dev->num_queues; i++)
		rp_service(&dev->queues[i]);
	return rp_count_attached(dev) &&
	       !virtqueue_is_broken(dev->queues[0].vq);
}

/* Takes all queues back, within the limit. */
static void rp_detach(struct rp_device *dev)
{
	unsigned long end = jiffies + rp_detach_limit();

	rp_want_all_back(dev);
	while (rp_count_attached(dev) && rp_take_back(dev) &&
	       time_before(jiffies, end))
		usleep_range(500, 2000);
}

static void rp_stop(struct rp_device *dev)
{
	set_bit(RP_STOPPING, &dev->flags);
	cancel_delayed_work_sync(&dev->work);
}

/* Detaches all queues and lets none be attached, until RP_STOPPING is clear. */
void rp_stop_rings(struct rp_device *dev)
{
	rp_stop(dev);
	rp_detach(dev);
}

/*
 * The same for all devices together, within one limit. Each device is asked
 * before the driver waits for the worker of one: that may be burying a device.
 */
void rp_stop_rings_of_all(struct list_head *devices)
{
	struct rp_device *dev;
	unsigned long end;
	bool waiting;

	list_for_each_entry(dev, devices, node) {
		set_bit(RP_STOPPING, &dev->flags);
		rp_want_all_back(dev);
	}
	/* A worker may have sent an ATTACH meanwhile. */
	list_for_each_entry(dev, devices, node) {
		rp_stop(dev);
		rp_want_all_back(dev);
	}
	end = jiffies + rp_detach_limit();
	for (;;) {
		waiting = false;
		list_for_each_entry(dev, devices, node)
			waiting |= rp_count_attached(dev) && rp_take_back(dev);
		if (!waiting || time_after_eq(jiffies, end))
			return;
		usleep_range(500, 2000);
	}
}

/*
 * After a reset: memory of queues that the device has not given back may still
 * be written.
 */
void rp_quarantine(struct rp_device *dev)
{
	unsigned int i;

	for (i = 0; i < dev->num_queues; i++) {
		struct rp_queue *q = &dev->queues[i];

		spin_lock_irq(&q->lock);
		if (rp_is_attached(q)) {
			dev_warn(&dev->vdev->dev,
				 "[%s] queue %u: the device has not given it back: %zu bytes stay reserved\n",
				 dev->disk->disk_name, i,
				 rp_memory_bytes(q->memory));
			list_add(&q->memory->node, &q->quarantine);
			q->memory = NULL;
		}
		rp_enter(q, RP_DETACHED, 0);
		q->in_flight = 0;
		q->answered = false;
		q->retry = RP_RETRY_NOW;
		q->retry_at = jiffies;
		q->retry_delay = 0;
		q->refusal = RINGPASS_ERROR_NONE;
		q->logged_ring = false;
		spin_unlock_irq(&q->lock);
	}
}

/*
 * The device has completed a request that was sent on this queue after the
 * reset: nothing older is left of it.
 */
void rp_quarantine_end(struct rp_queue *q)
{
	struct rp_memory *memory, *next;
	LIST_HEAD(ended);

	spin_lock_irq(&q->lock);
	if (q->answered)
		list_splice_init(&q->quarantine, &ended);
	spin_unlock_irq(&q->lock);
	list_for_each_entry_safe(memory, next, &ended, node)
		rp_memory_free(memory);
}

/* The queues are never used again, so a quarantine never ends: a leak. */
void rp_quarantine_keep(struct rp_device *dev)
{
	unsigned int i;

	rp_quarantine(dev);
	for (i = 0; i < dev->num_queues; i++) {
		INIT_LIST_HEAD(&dev->queues[i].quarantine);
		rp_memory_free(dev->queues[i].memory);
		dev->queues[i].memory = NULL;
	}
}

static void rp_release_buffer(struct request *rq, unsigned int held)
{
	struct req_iterator iter;
	struct bio_vec bvec;

	rq_for_each_segment(bvec, rq, iter) {
		if (!held--)
			return;
		folio_put(page_folio(bvec.bv_page));
	}
}

/*
 * The host may still use the buffer of a request that is to fail: nothing else
 * may get its pages. Returns false if the allocator of small objects has one of
 * them: it does not look at references.
 */
static bool rp_hold_buffer(struct request *rq)
{
	struct req_iterator iter;
	unsigned int held = 0;
	struct bio_vec bvec;

	rq_for_each_segment(bvec, rq, iter) {
		/* The pages of some allocators have no references to take. */
		if (PageSlab(bvec.bv_page) ||
		    !folio_try_get(page_folio(bvec.bv_page))) {
			rp_release_buffer(rq, held);
			return false;
		}
		held++;
	}
	return true;
}

static void rp_fail_request(struct rp_request *req, struct rp_done *done)
{
	req->again = false;
	req->result = BLK_STS_IOERR;
	rp_done_add(done, req);
}

/*
 * Fails everything that the queue has. Returns the number of requests that
 * cannot fail, because their buffers would be used anew.
 */
static unsigned int rp_fail_queue(struct rp_queue *q)
{
	unsigned int unfinished = 0;
	struct rp_done done;
	void *token;
	u32 i;

	rp_done_init(&done);
	spin_lock_irq(&q->lock);
	while ((token = virtqueue_detach_unused_buf(q->vq))) {
		if (!((struct rp_token *)token)->is_command)
			rp_fail_request(container_of(token, struct rp_request, token),
					&done);
	}
	for (i = 0; q->memory && i < q->memory->cq_entries; i++) {
		struct rp_ticket *ticket = &q->memory->tickets[i];
		struct rp_request *req;

		if (!ticket->rq)
			continue;
		req = blk_mq_rq_to_pdu(ticket->rq);
		if (!--req->sqes) {
			if (rp_hold_buffer(ticket->rq))
				rp_fail_request(req, &done);
			else
				unfinished++;
		}
		ticket->rq = NULL;
	}
	spin_unlock_irq(&q->lock);
	rp_finish(q, &done);
	return unfinished;
}

/*
 * The end of a device that breaks the protocol: it is detached and reset, and
 * from now on every request fails.
 */
void rp_bury(struct rp_device *dev)
{
	struct request_queue *queue = dev->disk->queue;
	unsigned int i, unfinished = 0;

	blk_mq_quiesce_queue(queue);
	rp_detach(dev);
	/* No callback may look at what is left. */
	virtio_break_device(dev->vdev);
	virtio_synchronize_cbs(dev->vdev);
	virtio_reset_device(dev->vdev);
	set_bit(RP_DEAD, &dev->flags);
	for (i = 0; i < dev->num_queues; i++)
		unfinished += rp_fail_queue(&dev->queues[i]);
	rp_quarantine(dev);
	dev_err(&dev->vdev->dev, "[%s] the device was reset: every request fails from now on\n",
		dev->disk->disk_name);
	if (unfinished)
		dev_err(&dev->vdev->dev, "[%s] %u requests never end: the host may still write to memory of the kernel's that they name\n",
			dev->disk->disk_name, unfinished);
	blk_mq_start_stopped_hw_queues(queue, true);
	blk_mq_unquiesce_queue(queue);
}
