// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/block/DISK/ringpass/queueN: what each queue does, and has done since the
 * driver took the device.
 */
#include <linux/sysfs.h>

#include "ringpass_blk.h"

/* Lives until the last user has closed its files. */
struct rp_queue_kobj {
	struct kobject kobj;
	struct rp_queue *q;
};

struct rp_queue_attr {
	struct attribute attr;
	ssize_t (*show)(struct rp_queue *q, char *buf);
};

static ssize_t mode_show(struct rp_queue *q, char *buf)
{
	static const char *const names[] = {
		[RP_DETACHED]	= "virtqueue",
		[RP_EMPTYING]	= "attaching",
		[RP_IDLE]	= "waiting for a ring",
		[RP_RUNNING]	= "ring",
		[RP_DRAINING]	= "draining a ring",
		[RP_FAILED]	= "failed",
	};

	return sysfs_emit(buf, "%s\n", names[q->state]);
}

static ssize_t epoch_show(struct rp_queue *q, char *buf)
{
	return sysfs_emit(buf, "%u\n", rp_is_attached(q) ? q->epoch : 0);
}

static ssize_t entries_show(struct rp_queue *q, char *buf)
{
	if (!rp_is_attached(q))
		return sysfs_emit(buf, "0 0\n");
	return sysfs_emit(buf, "%u %u\n", q->memory->sq_entries,
			  q->memory->cq_entries);
}

static ssize_t refusal_show(struct rp_queue *q, char *buf)
{
	return sysfs_emit(buf, "%u\n", q->refusal);
}

/* Memory of before the last reset that the host may still write. */
static ssize_t quarantined_bytes_show(struct rp_queue *q, char *buf)
{
	struct rp_memory *memory;
	size_t bytes = 0;

	list_for_each_entry(memory, &q->quarantine, node)
		bytes += rp_memory_bytes(memory);
	return sysfs_emit(buf, "%zu\n", bytes);
}

#define RP_STAT(_name)							\
static ssize_t _name##_show(struct rp_queue *q, char *buf)		\
{									\
	return sysfs_emit(buf, "%llu\n", q->stats._name);		\
}									\
static const struct rp_queue_attr rp_attr_##_name = __ATTR_RO(_name)

static const struct rp_queue_attr rp_attr_mode = __ATTR_RO(mode);
static const struct rp_queue_attr rp_attr_epoch = __ATTR_RO(epoch);
static const struct rp_queue_attr rp_attr_entries = __ATTR_RO(entries);
static const struct rp_queue_attr rp_attr_refusal = __ATTR_RO(refusal);
static const struct rp_queue_attr rp_attr_quarantined_bytes =
	__ATTR_RO(quarantined_bytes);
RP_STAT(ring_requests);
RP_STAT(ring_sqes);
RP_STAT(durable_writes);
RP_STAT(virtqueue_requests);
RP_STAT(fallbacks);
RP_STAT(doorbells);
RP_STAT(interrupts);

static const struct attribute *const rp_queue_attrs[] = {
	&rp_attr_mode.attr,
	&rp_attr_epoch.attr,
	&rp_attr_entries.attr,
	&rp_attr_refusal.attr,
	&rp_attr_ring_requests.attr,
	&rp_attr_ring_sqes.attr,
	&rp_attr_durable_writes.attr,
	&rp_attr_virtqueue_requests.attr,
	&rp_attr_fallbacks.attr,
	&rp_attr_doorbells.attr,
	&rp_attr_interrupts.attr,
	&rp_attr_quarantined_bytes.attr,
	NULL,
};

static ssize_t rp_attr_show(struct kobject *kobj, struct attribute *attr,
			    char *buf)
{
	struct rp_queue *q = container_of(kobj, struct rp_queue_kobj, kobj)->q;
	ssize_t length;

	spin_lock_irq(&q->lock);
	length = container_of(attr, struct rp_queue_attr, attr)->show(q, buf);
	spin_unlock_irq(&q->lock);
	return length;
}

static void rp_kobj_release(struct kobject *kobj)
{
	kfree(container_of(kobj, struct rp_queue_kobj, kobj));
}

static const struct sysfs_ops rp_sysfs_ops = {
	.show = rp_attr_show,
};

static const struct kobj_type rp_queue_type = {
	.sysfs_ops	= &rp_sysfs_ops,
	.release	= rp_kobj_release,
};

static int rp_sysfs_add_queue(struct rp_queue *q)
{
	struct rp_queue_kobj *queue_kobj = kzalloc(sizeof(*queue_kobj), GFP_KERNEL);
	int err;

	if (!queue_kobj)
		return -ENOMEM;
	queue_kobj->q = q;
	err = kobject_init_and_add(&queue_kobj->kobj, &rp_queue_type, q->dev->kobj,
				   "queue%u", q->index);
	if (!err)
		err = sysfs_create_files(&queue_kobj->kobj, rp_queue_attrs);
	if (err) {
		kobject_put(&queue_kobj->kobj);
		return err;
	}
	q->kobj = &queue_kobj->kobj;
	return 0;
}

int rp_sysfs_add(struct rp_device *dev)
{
	unsigned int i;
	int err;

	dev->kobj = kobject_create_and_add("ringpass", &disk_to_dev(dev->disk)->kobj);
	if (!dev->kobj)
		return -ENOMEM;
	for (i = 0; i < dev->num_queues; i++) {
		err = rp_sysfs_add_queue(&dev->queues[i]);
		if (err) {
			rp_sysfs_remove(dev);
			return err;
		}
	}
	return 0;
}

/* When this returns, no file is being read. */
void rp_sysfs_remove(struct rp_device *dev)
{
	unsigned int i;

	if (!dev->kobj)
		return;
	for (i = 0; i < dev->num_queues; i++) {
		struct kobject *kobj = dev->queues[i].kobj;

		if (!kobj)
			continue;
		kobject_del(kobj);
		kobject_put(kobj);
		dev->queues[i].kobj = NULL;
	}
	kobject_put(dev->kobj);
	dev->kobj = NULL;
}
