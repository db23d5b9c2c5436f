// SPDX-License-Identifier: GPL-2.0-only
/*
 * What must be done before and after a reset, section 9: a front-end whose
 * device process has died ends a reset at once, and the rings of that process
 * write to the guest's memory until their I/O has ended.
 */
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/virtio_config.h>

#include "ringpass_blk.h"
#include "ringpass_trace.h"

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

/*
 * Takes all queues back, within a limit. A device that was removed by surprise
 * cannot be asked.
 */
static void rp_detach(struct rp_device *dev)
{
	unsigned long end = jiffies + RP_DETACH_LIMIT;
	unsigned int i;

	for (i = 1; i < dev->num_queues; i++)
		rp_want_back(&dev->queues[i]);
	while (rp_count_attached(dev) && time_before(jiffies, end) &&
	       !virtqueue_is_broken(dev->queues[0].vq)) {
		usleep_range(500, 2000);
		for (i = 1; i < dev->num_queues; i++)
			rp_service(&dev->queues[i]);
	}
}

/* Detaches all queues and lets none be attached, until RP_STOPPING is clear. */
void rp_stop_rings(struct rp_device *dev)
{
	set_bit(RP_STOPPING, &dev->flags);
	cancel_delayed_work_sync(&dev->work);
	rp_detach(dev);
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
				 q->memory->control_bytes +
				 2 * (q->memory->rings_bytes + q->memory->sqes_bytes));
			list_add(&q->memory->node, &q->quarantine);
			q->memory = NULL;
		}
		rp_enter(q, RP_DETACHED, 0);
		q->in_flight = 0;
		q->answered = false;
		q->retry = RP_RETRY_NOW;
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

/* A request fails although the host may still use its buffer. */
static void rp_hold_buffer(struct request *rq)
{
	struct req_iterator iter;
	struct bio_vec bvec;

	rq_for_each_segment(bvec, rq, iter)
		/* The allocator of small objects does not look at references. */
		if (!PageSlab(bvec.bv_page))
			get_page(bvec.bv_page);
}

static void rp_fail_request(struct rp_request *req, struct rp_done *done)
{
	req->again = false;
	req->result = BLK_STS_IOERR;
	rp_done_add(done, req);
}

/* Fails everything that the queue has. */
static void rp_fail_queue(struct rp_queue *q)
{
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
			rp_hold_buffer(ticket->rq);
			rp_fail_request(req, &done);
		}
		ticket->rq = NULL;
	}
	spin_unlock_irq(&q->lock);
	rp_finish(q, &done);
}

/*
 * The end of a device that breaks the protocol: it is detached and reset, and
 * from now on every request fails.
 */
void rp_bury(struct rp_device *dev)
{
	struct request_queue *queue = dev->disk->queue;
	unsigned int i;

	blk_mq_quiesce_queue(queue);
	rp_detach(dev);
	virtio_reset_device(dev->vdev);
	set_bit(RP_DEAD, &dev->flags);
	for (i = 0; i < dev->num_queues; i++)
		rp_fail_queue(&dev->queues[i]);
	rp_quarantine(dev);
	dev_err(&dev->vdev->dev, "[%s] the device was reset: every request fails from now on\n",
		dev->disk->disk_name);
	blk_mq_start_stopped_hw_queues(queue, true);
	blk_mq_unquiesce_queue(queue);
}
