// SPDX-License-Identifier: GPL-2.0-only
/*
 * The virtqueues of a device, and what each of them is for.
 */
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/virtio_config.h>

#include "ringpass_blk.h"

static unsigned int rp_poll_queues;
module_param_named(poll_queues, rp_poll_queues, uint, 0444);
MODULE_PARM_DESC(poll_queues, "The number of queues without interrupts, for polled I/O (default: 0)");

static unsigned int rp_request_queues;
module_param_named(num_request_queues, rp_request_queues, uint, 0444);
MODULE_PARM_DESC(num_request_queues, "The most hardware queues of a disk (default: 0, as many as CPUs)");

/*
 * How many virtqueues the driver uses, and for what. A device with more than
 * one queue may be a ringpass device, whose queue 0 cannot have a ring: that
 * one gets no CPU then, and takes what the other queues cannot take. So each
 * ring is used by the CPUs of its own interrupt only, and no CPU that goes
 * offline takes the interrupt of queue 0 with it.
 */
int rp_count_queues(struct rp_device *dev)
{
	struct virtio_device *vdev = dev->vdev;
	unsigned int most = min_not_zero(rp_request_queues, nr_cpu_ids);
	unsigned int count, poll;
	u16 offered = 1;

	if (!virtio_cread_feature(vdev, VIRTIO_BLK_F_MQ, struct virtio_blk_config,
				  num_queues, &offered) && !offered) {
		dev_err(&vdev->dev, "the device has no queues\n");
		return -EINVAL;
	}
	dev->first_queue = offered > 1 && !rp_why_no_rings(vdev);
	count = min_t(unsigned int, offered, most + dev->first_queue);
	if (dev->num_queues && count != dev->num_queues) {
		dev_err(&vdev->dev, "the device had %u queues, and has %u now\n",
			dev->num_queues, count);
		return -EINVAL;
	}
	dev->num_queues = count;
	count -= dev->first_queue;
	poll = min(rp_poll_queues, count - 1);
	dev->hw_queues[HCTX_TYPE_DEFAULT] = count - poll;
	dev->hw_queues[HCTX_TYPE_READ] = 0;
	dev->hw_queues[HCTX_TYPE_POLL] = poll;
	return 0;
}

static void rp_init_queue(struct rp_device *dev, unsigned int index)
{
	struct rp_queue *q = &dev->queues[index];

	q->dev = dev;
	q->index = index;
	q->polled = index >= dev->num_queues - dev->hw_queues[HCTX_TYPE_POLL];
	/* Queue 0 has no ring. */
	if (index)
		q->ring_queue = q;
	snprintf(q->name, sizeof(q->name), "%s.%u",
		 q->polled ? "req_poll" : "req", index);
	spin_lock_init(&q->lock);
	q->retry_at = jiffies;
	INIT_LIST_HEAD(&q->quarantine);
}

void rp_init_queues(struct rp_device *dev)
{
	unsigned int i;

	for (i = 0; i < dev->num_queues; i++)
		rp_init_queue(dev, i);
}

/* What the smallest virtqueue holds while it is empty. */
unsigned int rp_least_descriptors(struct rp_device *dev)
{
	unsigned int i, least = UINT_MAX;

	for (i = 0; i < dev->num_queues; i++)
		least = min(least, dev->queues[i].vq->num_free);
	return least;
}

int rp_find_vqs(struct rp_device *dev)
{
	/* The interrupt of a queue 0 without CPUs is not spread over them. */
	struct irq_affinity desc = { .pre_vectors = dev->first_queue };
	unsigned int i, count = dev->num_queues;
	vq_callback_t **callbacks;
	struct virtqueue **vqs;
	const char **names;
	int err = -ENOMEM;

	vqs = kcalloc(count, sizeof(*vqs), GFP_KERNEL);
	callbacks = kcalloc(count, sizeof(*callbacks), GFP_KERNEL);
	names = kcalloc(count, sizeof(*names), GFP_KERNEL);
	if (!vqs || !callbacks || !names)
		goto out;
	for (i = 0; i < count; i++) {
		callbacks[i] = dev->queues[i].polled ? NULL : rp_callback;
		names[i] = dev->queues[i].name;
	}
	err = rp_find_vqs_compat(dev->vdev, count, vqs, callbacks, names, &desc);
	if (err)
		goto out;
	for (i = 0; i < count; i++)
		dev->queues[i].vq = vqs[i];
out:
	kfree(names);
	kfree(callbacks);
	kfree(vqs);
	return err;
}
