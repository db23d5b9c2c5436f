// SPDX-License-Identifier: GPL-2.0-only
/*
 * Before a reboot or kexec: the driver takes all queues of all devices back,
 * within one limit, or logs which it has not got. A kernel that comes by kexec
 * knows of no quarantine. Requests that still come go over the virtqueues.
 */
#include <linux/reboot.h>

#include "ringpass_blk.h"

/* Protects both, and is held while the queues are taken back. */
static DEFINE_MUTEX(rp_devices_mutex);
static LIST_HEAD(rp_devices);
static bool rp_is_rebooting;

void rp_reboot_add(struct rp_device *dev)
{
	mutex_lock(&rp_devices_mutex);
	list_add_tail(&dev->node, &rp_devices);
	mutex_unlock(&rp_devices_mutex);
}

void rp_reboot_remove(struct rp_device *dev)
{
	mutex_lock(&rp_devices_mutex);
	list_del(&dev->node);
	mutex_unlock(&rp_devices_mutex);
}

/* From now on the device's worker attaches queues, unless it is too late. */
void rp_allow_rings(struct rp_device *dev)
{
	mutex_lock(&rp_devices_mutex);
	if (!rp_is_rebooting) {
		clear_bit(RP_STOPPING, &dev->flags);
		queue_delayed_work(rp_workqueue, &dev->work, 0);
	}
	mutex_unlock(&rp_devices_mutex);
}

static void rp_warn_of_queues(struct rp_device *dev)
{
	unsigned int i;

	for (i = 1; i < dev->num_queues; i++) {
		if (rp_is_attached(&dev->queues[i]))
			dev_warn(&dev->vdev->dev, "[%s] queue %u: the device has not given it back: the host may still write to the memory of this guest\n",
				 dev->disk->disk_name, i);
	}
}

static int rp_reboot(struct notifier_block *notifier, unsigned long event,
		     void *data)
{
	struct rp_device *dev;

	mutex_lock(&rp_devices_mutex);
	rp_is_rebooting = true;
	rp_stop_rings_of_all(&rp_devices);
	list_for_each_entry(dev, &rp_devices, node)
		rp_warn_of_queues(dev);
	mutex_unlock(&rp_devices_mutex);
	return NOTIFY_DONE;
}

struct notifier_block rp_reboot_notifier = {
	.notifier_call = rp_reboot,
};
