// SPDX-License-Identifier: GPL-2.0-only
/*
 * The interface to blk-mq: which way a request goes, and how it ends.
 *
 * A hardware queue has a virtqueue and, while that is attached, a ring. Reads
 * and writes go to the ring of an open epoch. Everything else goes to the
 * hardware queue's own virtqueue, or to queue 0 while that one is attached.
 */
#include "ringpass_blk.h"

/*
 * Completes the requests that have left the queue, or sends them again, and
 * does what else must not be done with the queue's lock held.
 */
void rp_finish(struct rp_queue *q, struct rp_done *done)
{
	struct rp_device *dev = q->dev;
	struct rp_request *req = done->first;

	if (done->doorbell)
		virtqueue_notify(q->vq);
	while (req) {
		/* The request may be used anew as soon as it has ended. */
		struct rp_request *next = req->next;
		struct request *rq = rp_rq(req);

		if (req->again)
			blk_mq_requeue_request(rq, true);
		else if (likely(!blk_should_fake_timeout(rq->q)))
			blk_mq_complete_request(rq);
		req = next;
	}
	if (done->restart)
		blk_mq_start_stopped_hw_queues(dev->disk->queue, true);
	if (done->work && !test_bit(RP_STOPPING, &dev->flags))
		mod_delayed_work(rp_workqueue, &dev->work, 0);
}

/* Takes what a queue has to say: completions, and changes of its ring. */
static unsigned int rp_collect(struct rp_queue *q, struct rp_done *done)
{
	bool was_attached = rp_is_attached(q);

	if (was_attached)
		rp_epoch_step(q, done);
	if (!rp_is_attached(q))
		rp_virtqueue_reap(q, done);
	if (q->starved && (done->first || was_attached)) {
		q->starved = false;
		done->restart = true;
	}
	return !!done->first;
}

void rp_service(struct rp_queue *q)
{
	struct rp_done done;
	unsigned long flags;

	rp_done_init(&done);
	spin_lock_irqsave(&q->lock, flags);
	rp_collect(q, &done);
	spin_unlock_irqrestore(&q->lock, flags);
	rp_finish(q, &done);
}

void rp_callback(struct virtqueue *vq)
{
	struct rp_device *dev = vq->vdev->priv;
	struct rp_queue *q = &dev->queues[vq->index];
	struct rp_done done;
	unsigned long flags;

	rp_done_init(&done);
	spin_lock_irqsave(&q->lock, flags);
	q->stats.interrupts++;
	rp_collect(q, &done);
	spin_unlock_irqrestore(&q->lock, flags);
	rp_finish(q, &done);
}

static struct rp_queue *rp_ring_queue(struct rp_queue *q)
{
	struct rp_queue *ring_queue = q->ring_queue;

	/* The queue's lock decides. This saves it where there are no rings. */
	if (ring_queue && READ_ONCE(ring_queue->state) == RP_RUNNING)
		return ring_queue;
	return NULL;
}

static bool rp_fits_a_ring(struct request *rq)
{
	struct rp_request *req = blk_mq_rq_to_pdu(rq);

	return (req_op(rq) == REQ_OP_READ || req_op(rq) == REQ_OP_WRITE) &&
	       !req->no_ring;
}

/* Makes what was put into the ring visible to the host. */
static void rp_commit_ring(struct rp_queue *q)
{
	bool doorbell = false;
	unsigned long flags;

	spin_lock_irqsave(&q->lock, flags);
	if (q->state == RP_RUNNING)
		doorbell = rp_ring_publish(q);
	spin_unlock_irqrestore(&q->lock, flags);
	if (doorbell)
		virtqueue_notify(q->vq);
}

static void rp_commit_virtqueue(struct rp_queue *q)
{
	unsigned long flags;
	bool kick;

	spin_lock_irqsave(&q->lock, flags);
	/* Linux 6.1 commits a batch of which each request has failed. */
	kick = !test_bit(RP_SUSPENDED, &q->dev->flags) && !rp_is_attached(q) &&
	       virtqueue_kick_prepare(q->vq);
	spin_unlock_irqrestore(&q->lock, flags);
	if (kick)
		virtqueue_notify(q->vq);
}

static void rp_commit_rqs(struct blk_mq_hw_ctx *hctx)
{
	struct rp_queue *q = hctx->driver_data;

	if (rp_ring_queue(q))
		rp_commit_ring(q->ring_queue);
	rp_commit_virtqueue(q);
}

/* Puts a request into the queue's ring, if that is open and has room. */
static enum rp_pushed rp_try_ring(struct rp_queue *q, struct blk_mq_hw_ctx *hctx,
				  struct request *rq, bool last)
{
	enum rp_pushed pushed = RP_UNFIT;
	bool doorbell = false;
	unsigned long flags;

	spin_lock_irqsave(&q->lock, flags);
	if (q->state == RP_RUNNING) {
		pushed = rp_ring_push(q, rq);
		if (pushed == RP_NO_ROOM) {
			/* Completions come only for what the host sees. */
			q->starved = true;
			blk_mq_stop_hw_queue(hctx);
		}
		if (last || pushed == RP_NO_ROOM)
			doorbell = rp_ring_publish(q);
		if (pushed == RP_UNFIT)
			q->stats.fallbacks++;
	}
	spin_unlock_irqrestore(&q->lock, flags);
	if (doorbell)
		virtqueue_notify(q->vq);
	return pushed;
}

/*
 * Puts a request into the queue's virtqueue. Returns false if that is attached
 * or about to be.
 */
static bool rp_try_virtqueue(struct rp_queue *q, struct blk_mq_hw_ctx *hctx,
			     struct request *rq, bool last, blk_status_t *status)
{
	bool is_ordinary, kick = false;
	unsigned long flags;

	spin_lock_irqsave(&q->lock, flags);
	is_ordinary = q->state == RP_DETACHED;
	if (is_ordinary) {
		*status = rp_virtqueue_add(q, rq);
		if (*status == BLK_STS_DEV_RESOURCE && hctx->driver_data == q) {
			q->starved = true;
			blk_mq_stop_hw_queue(hctx);
		} else if (*status == BLK_STS_DEV_RESOURCE) {
			/* Completions of another queue restart this one late. */
			*status = BLK_STS_RESOURCE;
		}
		if (last || *status != BLK_STS_OK)
			kick = virtqueue_kick_prepare(q->vq);
	}
	spin_unlock_irqrestore(&q->lock, flags);
	if (kick)
		virtqueue_notify(q->vq);
	return is_ordinary;
}

static blk_status_t rp_queue_rq(struct blk_mq_hw_ctx *hctx,
				const struct blk_mq_queue_data *bd)
{
	struct rp_queue *q = hctx->driver_data;
	struct rp_device *dev = q->dev;
	struct request *rq = bd->rq;
	struct rp_request *req = blk_mq_rq_to_pdu(rq);
	struct rp_queue *ring_queue = rp_ring_queue(q);
	blk_status_t status;

	/* A device that was removed by surprise answers nothing any more. */
	if (unlikely(test_bit(RP_DEAD, &dev->flags) ||
		     virtqueue_is_broken(q->vq)))
		return BLK_STS_IOERR;
	/* A request that comes again keeps what a ring has said of it. */
	if (!(rq->rq_flags & RQF_DONTPREP)) {
		req->token.is_command = false;
		req->no_ring = false;
	}
	req->again = false;
	req->result = BLK_STS_OK;
	req->sqes = 0;
	req->sg_table.nents = 0;
	blk_mq_start_request(rq);

	if (ring_queue && rp_fits_a_ring(rq)) {
		switch (rp_try_ring(ring_queue, hctx, rq, bd->last)) {
		case RP_PUSHED:
			return BLK_STS_OK;
		case RP_NO_ROOM:
			return BLK_STS_DEV_RESOURCE;
		case RP_UNFIT:
			break;
		}
	}

	status = rp_prepare(dev, rq);
	if (status != BLK_STS_OK)
		return status;
	/*
	 * The batch may have requests in the ring and in the own virtqueue.
	 * Those on queue 0 are none that a batch is made of.
	 */
	if (!rp_try_virtqueue(q, hctx, rq, bd->last, &status))
		rp_try_virtqueue(&dev->queues[0], hctx, rq, true, &status);
	if (bd->last && ring_queue)
		rp_commit_ring(ring_queue);
	if (status != BLK_STS_OK)
		rp_release(rq);
	return status;
}

static void rp_complete_rq(struct request *rq)
{
	struct rp_request *req = blk_mq_rq_to_pdu(rq);
	blk_status_t result = req->result;

	rp_release(rq);
	blk_mq_end_request(rq, result);
}

static int rp_poll(struct blk_mq_hw_ctx *hctx, struct io_comp_batch *iob)
{
	struct rp_queue *q = hctx->driver_data;
	struct rp_done done;
	unsigned long flags;
	unsigned int found = 0;

	rp_done_init(&done);
	spin_lock_irqsave(&q->lock, flags);
	/* The end of a device has taken everything from its queues. */
	if (!test_bit(RP_SUSPENDED, &q->dev->flags) &&
	    !test_bit(RP_DEAD, &q->dev->flags))
		found = rp_collect(q, &done);
	spin_unlock_irqrestore(&q->lock, flags);
	rp_finish(q, &done);
	return found;
}

static int rp_init_hctx(struct blk_mq_hw_ctx *hctx, void *data,
			unsigned int index)
{
	struct rp_device *dev = data;

	hctx->driver_data = &dev->queues[dev->first_queue + index];
	return 0;
}

static void rp_map(struct blk_mq_tag_set *set)
{
	struct rp_device *dev = set->driver_data;
	unsigned int i, offset = 0;

	for (i = 0; i < set->nr_maps; i++) {
		struct blk_mq_queue_map *map = &set->map[i];

		map->nr_queues = dev->hw_queues[i];
		map->queue_offset = offset;
		offset += map->nr_queues;
		if (!map->nr_queues)
			continue;
		/* The virtio core has spread the interrupts over the CPUs. */
		if (i == HCTX_TYPE_POLL)
			blk_mq_map_queues(map);
		else
			rp_map_queues(map, dev->vdev, dev->first_queue);
	}
}

const struct blk_mq_ops rp_mq_ops = {
	.queue_rq	= rp_queue_rq,
	.commit_rqs	= rp_commit_rqs,
	.complete	= rp_complete_rq,
	.poll		= rp_poll,
	.init_hctx	= rp_init_hctx,
	.map_queues	= rp_map,
};
