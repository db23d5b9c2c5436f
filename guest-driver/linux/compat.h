/* SPDX-License-Identifier: GPL-2.0-only */
/* Differences between kernel versions, and nothing else. */
#ifndef RINGPASS_COMPAT_H
#define RINGPASS_COMPAT_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/hdreg.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 14, 0)
#include <linux/blk-mq-virtio.h>
#endif

/* Merging is no longer a choice of the driver. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 14, 0)
#define RP_TAG_SET_FLAGS BLK_MQ_F_SHOULD_MERGE
#else
#define RP_TAG_SET_FLAGS 0
#endif

static inline void rp_map_queues(struct blk_mq_queue_map *map, struct virtio_device *vdev, unsigned int first)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 14, 0)
	blk_mq_virtio_map_queues(map, vdev, first);
#else
	blk_mq_map_hw_queues(map, &vdev->dev, first);
#endif
}

static inline int rp_map_sg(struct request *rq, struct scatterlist *sg)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
	return blk_rq_map_sg(rq->q, rq, sg);
#else
	return blk_rq_map_sg(rq, sg);
#endif
}

static inline int rp_map_kern(struct request *rq, void *buffer, unsigned int bytes)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
	return blk_rq_map_kern(rq->q, rq, buffer, bytes, GFP_KERNEL);
#else
	return blk_rq_map_kern(rq, buffer, bytes, GFP_KERNEL);
#endif
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
static inline void bvec_set_virt(struct bio_vec *bvec, void *buffer, unsigned int bytes)
{
	bvec->bv_page = virt_to_page(buffer);
	bvec->bv_offset = offset_in_page(buffer);
	bvec->bv_len = bytes;
}
#endif

/* The names and callbacks of virtqueues were two arrays. */
static inline int rp_find_vqs_compat(struct virtio_device *vdev, unsigned int count, struct virtqueue **vqs,
				     vq_callback_t **callbacks, const char **names, struct irq_affinity *desc)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
	return virtio_find_vqs(vdev, count, vqs, callbacks, names, desc);
#else
	struct virtqueue_info *info;
	unsigned int i;
	int err;

	info = kcalloc(count, sizeof(*info), GFP_KERNEL);
	if (!info)
		return -ENOMEM;
	for (i = 0; i < count; i++) {
		info[i].name = names[i];
		info[i].callback = callbacks[i];
	}
	err = virtio_find_vqs(vdev, count, vqs, info, desc);
	kfree(info);
	return err;
#endif
}

/*
 * The limits of a queue are an argument, and they have the write cache.
 * Before, there was a function for each.
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
static inline struct gendisk *rp_alloc_disk(struct blk_mq_tag_set *set, struct queue_limits *lim, bool write_cache,
					    void *data)
{
	struct gendisk *disk = blk_mq_alloc_disk(set, data);
	struct request_queue *q;

	if (IS_ERR(disk))
		return disk;
	q = disk->queue;
	blk_queue_logical_block_size(q, lim->logical_block_size);
	blk_queue_max_segments(q, lim->max_segments);
	blk_queue_max_hw_sectors(q, lim->max_hw_sectors);
	blk_queue_max_segment_size(q, lim->max_segment_size);
	if (lim->physical_block_size)
		blk_queue_physical_block_size(q, lim->physical_block_size);
	if (lim->alignment_offset)
		blk_queue_alignment_offset(q, lim->alignment_offset);
	if (lim->io_min)
		blk_queue_io_min(q, lim->io_min);
	if (lim->io_opt)
		blk_queue_io_opt(q, lim->io_opt);
	if (lim->max_hw_discard_sectors)
		blk_queue_max_discard_sectors(q, lim->max_hw_discard_sectors);
	if (lim->max_write_zeroes_sectors)
		blk_queue_max_write_zeroes_sectors(q, lim->max_write_zeroes_sectors);
	if (lim->max_secure_erase_sectors)
		blk_queue_max_secure_erase_sectors(q, lim->max_secure_erase_sectors);
	if (lim->max_discard_segments)
		blk_queue_max_discard_segments(q, lim->max_discard_segments);
	if (lim->discard_granularity)
		q->limits.discard_granularity = lim->discard_granularity;
	blk_queue_write_cache(q, write_cache, false);
	return disk;
}

static inline int rp_set_write_cache(struct gendisk *disk, bool on)
{
	blk_mq_freeze_queue(disk->queue);
	blk_queue_write_cache(disk->queue, on, false);
	blk_mq_unfreeze_queue(disk->queue);
	return 0;
}
#else
static inline struct gendisk *rp_alloc_disk(struct blk_mq_tag_set *set, struct queue_limits *lim, bool write_cache,
					    void *data)
{
	lim->features |= BLK_FEAT_ROTATIONAL;
	if (write_cache)
		lim->features |= BLK_FEAT_WRITE_CACHE;
	return blk_mq_alloc_disk(set, lim, data);
}

/* No request may be under way while the limits change. */
static inline int rp_commit_limits(struct request_queue *queue, struct queue_limits *lim)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 14, 0)
	int err;

	blk_mq_freeze_queue(queue);
	err = queue_limits_commit_update(queue, lim);
	blk_mq_unfreeze_queue(queue);
	return err;
#else
	return queue_limits_commit_update_frozen(queue, lim);
#endif
}

static inline int rp_set_write_cache(struct gendisk *disk, bool on)
{
	struct queue_limits lim = queue_limits_start_update(disk->queue);

	if (on)
		lim.features |= BLK_FEAT_WRITE_CACHE;
	else
		lim.features &= ~BLK_FEAT_WRITE_CACHE;
	return rp_commit_limits(disk->queue, &lim);
}
#endif

/* Freezing a queue came to return the flags of memory allocations. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 14, 0)
static inline unsigned int rp_freeze_queue(struct request_queue *q)
{
	blk_mq_freeze_queue(q);
	return 0;
}

static inline void rp_unfreeze_queue(struct request_queue *q, unsigned int memflags)
{
	blk_mq_unfreeze_queue(q);
}

#define rp_unfreeze_queue_plain(q) blk_mq_unfreeze_queue(q)
#else
#define rp_freeze_queue(q) blk_mq_freeze_queue(q)
#define rp_unfreeze_queue(q, memflags) blk_mq_unfreeze_queue(q, memflags)
#define rp_unfreeze_queue_plain(q) blk_mq_unfreeze_queue_nomemrestore(q)
#endif

/* The geometry is that of a disk, and was that of a block device. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 18, 0)
#define rp_geo_arg struct block_device
#define rp_geo_disk(arg) ((arg)->bd_disk)
#else
#define rp_geo_arg struct gendisk
#define rp_geo_disk(arg) (arg)
#endif

#endif
