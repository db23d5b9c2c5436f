// SPDX-License-Identifier: GPL-2.0-only
/*
 * A virtio-blk device: probe, removal, suspend, shutdown.
 */
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/reboot.h>
#include <linux/virtio_config.h>
#include <uapi/linux/virtio_ring.h>

#include "ringpass_blk.h"

#define RP_MINOR_BITS	4
/* Of each request: its header and its status. */
#define RP_EXTRA_DESCRIPTORS	2
/* Those of PROBE and EVENT, which stay on queue 0 beside the requests. */
#define RP_COMMAND_DESCRIPTORS	6

bool rp_fastpath = true;
module_param_named(fastpath, rp_fastpath, bool, 0444);
MODULE_PARM_DESC(fastpath, "Use rings of the host where a device offers them (default: 1)");

static unsigned int rp_queue_depth;
module_param_named(queue_depth, rp_queue_depth, uint, 0444);
MODULE_PARM_DESC(queue_depth, "Requests of a hardware queue (default: 0, what the virtqueue holds)");

static int rp_major;
static DEFINE_IDA(rp_indexes);
struct workqueue_struct *rp_workqueue;

/* vda to vdz, vdaa to vdzz, ...: the names that virtio disks have. */
static int rp_name_disk(int index, char *name, size_t bytes)
{
	char *end = name + bytes - 1, *p = end;

	*p = '\0';
	do {
		if (p == name + 2)
			return -EINVAL;
		*--p = 'a' + index % 26;
		index = index / 26 - 1;
	} while (index >= 0);
	memmove(name + 2, p, end - p + 1);
	memcpy(name, "vd", 2);
	return 0;
}

static int rp_alloc_tags(struct rp_device *dev)
{
	struct blk_mq_tag_set *set = &dev->tag_set;
	unsigned int depth = rp_queue_depth;

	if (!depth) {
		depth = rp_least_descriptors(dev);
		/* Without indirect descriptors a request takes two or more. */
		if (!virtio_has_feature(dev->vdev, VIRTIO_RING_F_INDIRECT_DESC))
			depth = max(depth / 2, 1U);
	}
	set->ops = &rp_mq_ops;
	set->queue_depth = depth;
	set->numa_node = NUMA_NO_NODE;
	set->flags = RP_TAG_SET_FLAGS;
	set->cmd_size = sizeof(struct rp_request) +
			RP_INLINE_SG * sizeof(struct scatterlist);
	set->driver_data = dev;
	set->nr_hw_queues = dev->num_queues - dev->first_queue;
	set->nr_maps = dev->hw_queues[HCTX_TYPE_POLL] ? HCTX_MAX_TYPES : 1;
	return blk_mq_alloc_tag_set(set);
}

static int rp_make_disk(struct rp_device *dev, struct queue_limits *lim)
{
	bool cache_is_on = rp_cache_is_on(dev->vdev);
	struct gendisk *disk;

	disk = rp_alloc_disk(&dev->tag_set, lim, cache_is_on, dev);
	if (IS_ERR(disk))
		return PTR_ERR(disk);
	dev->disk = disk;
	dev->dsync = !cache_is_on;
	disk->major = rp_major;
	disk->first_minor = dev->index << RP_MINOR_BITS;
	disk->minors = 1 << RP_MINOR_BITS;
	disk->private_data = dev;
	disk->fops = &rp_fops;
	if (virtio_has_feature(dev->vdev, VIRTIO_BLK_F_RO))
		set_disk_ro(disk, true);
	return rp_name_disk(dev->index, disk->disk_name, DISK_NAME_LEN);
}

void rp_device_free(struct rp_device *dev)
{
	if (dev->index >= 0)
		ida_free(&rp_indexes, dev->index);
	mutex_destroy(&dev->vdev_mutex);
	mutex_destroy(&dev->cache_mutex);
	kfree(dev->probe);
	kfree(dev->event);
	kfree(dev->queues);
	kfree(dev);
}

static struct rp_device *rp_device_alloc(struct virtio_device *vdev)
{
	struct rp_device *dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	int err;

	if (!dev)
		return ERR_PTR(-ENOMEM);
	dev->vdev = vdev;
	mutex_init(&dev->vdev_mutex);
	mutex_init(&dev->cache_mutex);
	INIT_WORK(&dev->config_work, rp_config_work);
	INIT_DELAYED_WORK(&dev->work, rp_work);
	dev->index = ida_alloc_max(&rp_indexes, (1 << (MINORBITS - RP_MINOR_BITS)) - 1,
				   GFP_KERNEL);
	err = dev->index;
	if (err < 0)
		goto fail;
	err = rp_count_queues(dev);
	if (err)
		goto fail;
	err = -ENOMEM;
	dev->queues = kcalloc(dev->num_queues, sizeof(*dev->queues), GFP_KERNEL);
	dev->probe = kzalloc(sizeof(*dev->probe), GFP_KERNEL);
	dev->event = kzalloc(sizeof(*dev->event), GFP_KERNEL);
	if (!dev->queues || !dev->probe || !dev->event)
		goto fail;
	rp_init_queues(dev);
	return dev;

fail:
	rp_device_free(dev);
	return ERR_PTR(err);
}

/* Why the driver does not even ask for rings, or NULL. */
static const char *rp_why_ordinary(struct rp_device *dev)
{
	const char *reason = rp_why_no_rings(dev->vdev);

	if (!reason && !virtio_has_feature(dev->vdev, VIRTIO_RING_F_INDIRECT_DESC) &&
	    rp_least_descriptors(dev) <= RP_EXTRA_DESCRIPTORS + RP_COMMAND_DESCRIPTORS)
		reason = "its virtqueues have no room for a request beside PROBE and EVENT";
	return reason;
}

static void rp_start_rings(struct rp_device *dev)
{
	const char *reason = rp_why_ordinary(dev);

	if (reason) {
		dev_info(&dev->vdev->dev, "[%s] an ordinary disk: %s\n",
			 dev->disk->disk_name, reason);
		return;
	}
	rp_allow_rings(dev);
}

/*
 * Without indirect descriptors, a request must fit the virtqueue piece by piece,
 * queue 0 beside the commands that are pending there.
 */
static int rp_limit_segments(struct rp_device *dev, struct queue_limits *lim)
{
	unsigned int least = rp_least_descriptors(dev);
	unsigned int extra = RP_EXTRA_DESCRIPTORS;

	if (virtio_has_feature(dev->vdev, VIRTIO_RING_F_INDIRECT_DESC))
		return 0;
	if (least <= extra) {
		dev_err(&dev->vdev->dev, "a virtqueue of %u descriptors holds no request\n",
			least);
		return -EINVAL;
	}
	if (!rp_why_ordinary(dev))
		extra += RP_COMMAND_DESCRIPTORS;
	lim->max_segments = min_t(unsigned int, lim->max_segments, least - extra);
	return 0;
}

static int rp_probe(struct virtio_device *vdev)
{
	struct queue_limits lim;
	struct rp_device *dev;
	int err;

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "the device has no configuration\n");
		return -EINVAL;
	}
	err = rp_read_limits(vdev, &lim);
	if (err)
		return err;
	dev = rp_device_alloc(vdev);
	if (IS_ERR(dev))
		return PTR_ERR(dev);
	vdev->priv = dev;
	set_bit(RP_STOPPING, &dev->flags);

	err = rp_find_vqs(dev);
	if (err)
		goto fail_device;
	err = rp_limit_segments(dev, &lim);
	if (err)
		goto fail_vqs;
	err = rp_alloc_tags(dev);
	if (err)
		goto fail_vqs;
	err = rp_make_disk(dev, &lim);
	if (err)
		goto fail_disk;
	rp_update_capacity(dev, false);
	virtio_device_ready(vdev);

	dev_info(&vdev->dev, "[%s] %u interrupting and %u polled queues\n",
		 dev->disk->disk_name, dev->hw_queues[HCTX_TYPE_DEFAULT],
		 dev->hw_queues[HCTX_TYPE_POLL]);
	err = device_add_disk(&vdev->dev, dev->disk, rp_disk_groups);
	if (err)
		goto fail_ready;
	if (rp_sysfs_add(dev))
		dev_warn(&vdev->dev, "[%s] no statistics in sysfs\n",
			 dev->disk->disk_name);
	rp_reboot_add(dev);
	rp_start_rings(dev);
	return 0;

fail_ready:
	virtio_reset_device(vdev);
	flush_work(&dev->config_work);
fail_disk:
	if (dev->disk)
		put_disk(dev->disk);
	blk_mq_free_tag_set(&dev->tag_set);
fail_vqs:
	vdev->config->del_vqs(vdev);
fail_device:
	rp_device_free(dev);
	return err;
}

static void rp_remove(struct virtio_device *vdev)
{
	struct rp_device *dev = vdev->priv;

	flush_work(&dev->config_work);
	rp_sysfs_remove(dev);
	/* Waits for all requests, which may need their rings for that. */
	del_gendisk(dev->disk);
	rp_stop_rings(dev);
	/* Not before: a reboot must not pass over a disk whose requests hang. */
	rp_reboot_remove(dev);
	blk_mq_free_tag_set(&dev->tag_set);

	mutex_lock(&dev->vdev_mutex);
	virtio_reset_device(vdev);
	cancel_delayed_work_sync(&dev->work);
	flush_work(&dev->config_work);
	rp_quarantine_keep(dev);
	dev->vdev = NULL;
	vdev->config->del_vqs(vdev);
	mutex_unlock(&dev->vdev_mutex);

	put_disk(dev->disk);
}

#ifdef CONFIG_PM_SLEEP
/* Waits for all requests, but not for ever, and lets no more of them come. */
static int rp_hold_requests(struct rp_device *dev)
{
	struct request_queue *queue = dev->disk->queue;
	int remaining;

	blk_freeze_queue_start(queue);
	remaining = blk_mq_freeze_queue_wait_timeout(queue, rp_detach_limit());
	if (remaining)
		blk_mq_quiesce_queue(queue);
	rp_unfreeze_queue_plain(queue);
	return remaining ? 0 : -EBUSY;
}

static int rp_freeze(struct virtio_device *vdev)
{
	struct rp_device *dev = vdev->priv;
	int err;

	err = rp_hold_requests(dev);
	if (err) {
		dev_err(&vdev->dev, "[%s] cannot be suspended: requests do not end\n",
			dev->disk->disk_name);
		return err;
	}
	rp_stop_rings(dev);
	virtio_reset_device(vdev);
	cancel_delayed_work_sync(&dev->work);
	flush_work(&dev->config_work);
	set_bit(RP_SUSPENDED, &dev->flags);
	/* It takes the lock of each queue: a poll has seen that, or has ended. */
	rp_quarantine(dev);
	vdev->config->del_vqs(vdev);
	return 0;
}

static int rp_start_again(struct rp_device *dev)
{
	int err = rp_count_queues(dev);

	if (!err)
		err = rp_find_vqs(dev);
	if (err)
		return err;
	/* All commands have gone with the reset. */
	dev->flags = (dev->flags & BIT(RP_DEAD)) | BIT(RP_STOPPING);
	virtio_device_ready(dev->vdev);
	return rp_restore_cache(dev);
}

static int rp_restore(struct virtio_device *vdev)
{
	struct rp_device *dev = vdev->priv;
	int err = rp_start_again(dev);

	/* Requests fail then, instead of waiting for ever. */
	if (err)
		set_bit(RP_DEAD, &dev->flags);
	blk_mq_unquiesce_queue(dev->disk->queue);
	if (!err)
		rp_start_rings(dev);
	return err;
}
#endif

static const struct virtio_device_id rp_ids[] = {
	{ VIRTIO_ID_BLOCK, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, rp_ids);

static const unsigned int rp_features[] = {
	VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_GEOMETRY,
	VIRTIO_BLK_F_RO, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH,
	VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_MQ,
	VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES,
	VIRTIO_BLK_F_SECURE_ERASE,
};

static struct virtio_driver rp_driver = {
	.feature_table			= rp_features,
	.feature_table_size		= ARRAY_SIZE(rp_features),
	.feature_table_legacy		= rp_features,
	.feature_table_size_legacy	= ARRAY_SIZE(rp_features),
	.driver.name			= KBUILD_MODNAME,
	.driver.owner			= THIS_MODULE,
	.id_table			= rp_ids,
	.probe				= rp_probe,
	.remove				= rp_remove,
	.config_changed			= rp_config_changed,
#ifdef CONFIG_PM_SLEEP
	.freeze				= rp_freeze,
	.restore			= rp_restore,
#endif
};

static int __init rp_init(void)
{
	int err;

	/* To attach a queue takes long, and has to do with no CPU. */
	rp_workqueue = alloc_workqueue("ringpass_blk",
				       WQ_MEM_RECLAIM | WQ_UNBOUND, 0);
	if (!rp_workqueue)
		return -ENOMEM;
	rp_major = register_blkdev(0, "ringpass_blk");
	if (rp_major < 0) {
		err = rp_major;
		goto fail_workqueue;
	}
	err = register_reboot_notifier(&rp_reboot_notifier);
	if (err)
		goto fail_blkdev;
	err = register_virtio_driver(&rp_driver);
	if (err)
		goto fail_notifier;
	return 0;

fail_notifier:
	unregister_reboot_notifier(&rp_reboot_notifier);
fail_blkdev:
	unregister_blkdev(rp_major, "ringpass_blk");
fail_workqueue:
	destroy_workqueue(rp_workqueue);
	return err;
}

static void __exit rp_exit(void)
{
	unregister_virtio_driver(&rp_driver);
	unregister_reboot_notifier(&rp_reboot_notifier);
	unregister_blkdev(rp_major, "ringpass_blk");
	destroy_workqueue(rp_workqueue);
	ida_destroy(&rp_indexes);
}

module_init(rp_init);
module_exit(rp_exit);

MODULE_DESCRIPTION("Virtio block driver with io_uring rings of the host (ringpass)");
MODULE_LICENSE("GPL");
