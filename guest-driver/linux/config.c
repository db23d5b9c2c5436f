// SPDX-License-Identifier: GPL-2.0-only
/*
 * The configuration space of virtio-blk: limits, capacity, cache mode,
 * geometry; and the serial number.
 */
#include <linux/hdreg.h>
#include <linux/string_helpers.h>
#include <linux/virtio_config.h>

#include "ringpass_blk.h"

/* The block layer has a list of ranges on one page. */
#define RP_DISCARD_SEGMENTS_MAX	256U
/* What fits a virtqueue at most, without header and status. */
#define RP_SEGMENTS_MAX		(32768U - 2)

/* A field of the configuration, or @otherwise without its feature. */
static u32 rp_config_u32(struct virtio_device *vdev, unsigned int feature,
			 unsigned int offset, u32 otherwise)
{
	return virtio_has_feature(vdev, feature) ? virtio_cread32(vdev, offset) :
						   otherwise;
}

static u16 rp_config_u16(struct virtio_device *vdev, unsigned int feature,
			 unsigned int offset, u16 otherwise)
{
	return virtio_has_feature(vdev, feature) ? virtio_cread16(vdev, offset) :
						   otherwise;
}

static u8 rp_config_u8(struct virtio_device *vdev, unsigned int feature,
		       unsigned int offset, u8 otherwise)
{
	return virtio_has_feature(vdev, feature) ? virtio_cread8(vdev, offset) :
						   otherwise;
}

#define RP_U32(vdev, feature, field, otherwise)				\
	rp_config_u32(vdev, VIRTIO_BLK_F_##feature,			\
		      offsetof(struct virtio_blk_config, field), otherwise)
#define RP_U16(vdev, feature, field, otherwise)				\
	rp_config_u16(vdev, VIRTIO_BLK_F_##feature,			\
		      offsetof(struct virtio_blk_config, field), otherwise)
#define RP_U8(vdev, feature, field, otherwise)				\
	rp_config_u8(vdev, VIRTIO_BLK_F_##feature,			\
		     offsetof(struct virtio_blk_config, field), otherwise)

/* Discard and secure erase have one set of limits in the block layer. */
static int rp_read_discard_limits(struct virtio_device *vdev,
				  struct queue_limits *lim)
{
	u32 granularity = 0, segments = 0;

	if (virtio_has_feature(vdev, VIRTIO_BLK_F_DISCARD)) {
		u32 sectors = RP_U32(vdev, DISCARD, max_discard_sectors, 0);

		granularity = RP_U32(vdev, DISCARD, discard_sector_alignment, 0);
		segments = RP_U32(vdev, DISCARD, max_discard_seg, 0);
		lim->max_hw_discard_sectors = sectors ?: UINT_MAX;
	}
	if (virtio_has_feature(vdev, VIRTIO_BLK_F_SECURE_ERASE)) {
		u32 alignment = RP_U32(vdev, SECURE_ERASE,
				       secure_erase_sector_alignment, 0);
		u32 sectors = RP_U32(vdev, SECURE_ERASE,
				     max_secure_erase_sectors, 0);
		u32 count = RP_U32(vdev, SECURE_ERASE, max_secure_erase_seg, 0);

		if (!alignment || !sectors || !count) {
			dev_err(&vdev->dev, "the device has limits of secure erase that are 0\n");
			return -EINVAL;
		}
		granularity = min_not_zero(granularity, alignment);
		segments = min_not_zero(segments, count);
		lim->max_secure_erase_sectors = sectors;
	}
	if (virtio_has_feature(vdev, VIRTIO_BLK_F_DISCARD) ||
	    virtio_has_feature(vdev, VIRTIO_BLK_F_SECURE_ERASE)) {
		if (!segments)
			segments = lim->max_segments;
		lim->max_discard_segments = min(segments, RP_DISCARD_SEGMENTS_MAX);
		lim->discard_granularity = granularity ?
			granularity << SECTOR_SHIFT : lim->logical_block_size;
	}
	if (virtio_has_feature(vdev, VIRTIO_BLK_F_WRITE_ZEROES)) {
		u32 sectors = RP_U32(vdev, WRITE_ZEROES,
				     max_write_zeroes_sectors, 0);

		lim->max_write_zeroes_sectors = sectors ?: UINT_MAX;
	}
	return 0;
}

int rp_read_limits(struct virtio_device *vdev, struct queue_limits *lim)
{
	u32 segments = RP_U32(vdev, SEG_MAX, seg_max, 1);
	u32 block = RP_U32(vdev, BLK_SIZE, blk_size, SECTOR_SIZE);
	u32 opt = RP_U32(vdev, TOPOLOGY, opt_io_size, 0);
	u16 min_io = RP_U16(vdev, TOPOLOGY, min_io_size, 0);
	u8 exponent = RP_U8(vdev, TOPOLOGY, physical_block_exp, 0);
	u8 offset = RP_U8(vdev, TOPOLOGY, alignment_offset, 0);
	size_t dma_max = virtio_max_dma_size(vdev);

	if (blk_validate_block_size(block)) {
		dev_err(&vdev->dev, "the device has blocks of %u bytes, which Linux has not\n",
			block);
		return -EINVAL;
	}
	memset(lim, 0, sizeof(*lim));
	lim->logical_block_size = block;
	lim->max_segments = clamp(segments, 1U, RP_SEGMENTS_MAX);
	lim->max_hw_sectors = UINT_MAX;
	lim->max_segment_size = min_t(size_t, dma_max,
				      RP_U32(vdev, SIZE_MAX, size_max, U32_MAX));
	if (exponent)
		lim->physical_block_size = block << min_t(u8, exponent, 16);
	if (offset)
		lim->alignment_offset = block * offset;
	if (min_io)
		lim->io_min = block * min_io;
	if (opt)
		lim->io_opt = block * opt;
	return rp_read_discard_limits(vdev, lim);
}

/* Whether the device has a write cache that is on. */
bool rp_cache_is_on(struct virtio_device *vdev)
{
	return RP_U8(vdev, CONFIG_WCE, wce,
		     virtio_has_feature(vdev, VIRTIO_BLK_F_FLUSH));
}

static void rp_write_wce(struct rp_device *dev, bool on)
{
	virtio_cwrite8(dev->vdev, offsetof(struct virtio_blk_config, wce), on);
}

/* A device that was reset has the mode again that it begins with. */
int rp_restore_cache(struct rp_device *dev)
{
	bool on = !dev->dsync;

	if (rp_cache_is_on(dev->vdev) == on)
		return 0;
	if (virtio_has_feature(dev->vdev, VIRTIO_BLK_F_CONFIG_WCE))
		rp_write_wce(dev, on);
	if (rp_cache_is_on(dev->vdev) == on)
		return 0;
	/* Without a cache, flushes are not needed and do no harm. */
	if (on) {
		WRITE_ONCE(dev->dsync, true);
		return 0;
	}
	dev_err(&dev->vdev->dev, "[%s] the device does not turn its write cache off\n",
		dev->disk->disk_name);
	return -EIO;
}

void rp_update_capacity(struct rp_device *dev, bool resize)
{
	struct virtio_device *vdev = dev->vdev;
	unsigned int block = queue_logical_block_size(dev->disk->queue);
	char binary[10], decimal[10];
	u64 sectors, blocks;

	virtio_cread(vdev, struct virtio_blk_config, capacity, &sectors);
	/* The device has changed something else, or nothing. */
	if (resize && sectors == get_capacity(dev->disk))
		return;
	blocks = DIV_ROUND_UP_ULL(sectors, block >> SECTOR_SHIFT);
	string_get_size(blocks, block, STRING_UNITS_2, binary, sizeof(binary));
	string_get_size(blocks, block, STRING_UNITS_10, decimal, sizeof(decimal));
	dev_notice(&vdev->dev, "[%s] %s%llu %u-byte logical blocks (%s/%s)\n",
		   dev->disk->disk_name, resize ? "new size: " : "", blocks,
		   block, decimal, binary);
	set_capacity_and_notify(dev->disk, sectors);
}

void rp_config_work(struct work_struct *work)
{
	rp_update_capacity(container_of(work, struct rp_device, config_work),
			   true);
}

void rp_config_changed(struct virtio_device *vdev)
{
	struct rp_device *dev = vdev->priv;

	queue_work(rp_workqueue, &dev->config_work);
}

static int rp_read_serial(struct gendisk *disk, char *serial)
{
	struct request *rq;
	int err;

	rq = blk_mq_alloc_request(disk->queue, REQ_OP_DRV_IN, 0);
	if (IS_ERR(rq))
		return PTR_ERR(rq);
	err = rp_map_kern(rq, serial, VIRTIO_BLK_ID_BYTES);
	if (!err)
		err = blk_status_to_errno(blk_execute_rq(rq, false));
	blk_mq_free_request(rq);
	return err;
}

static ssize_t serial_show(struct device *device, struct device_attribute *attr,
			   char *buf)
{
	int err;

	/* A serial number that fills its field has no end. */
	buf[VIRTIO_BLK_ID_BYTES] = '\0';
	err = rp_read_serial(dev_to_disk(device), buf);
	if (!err)
		return strlen(buf);
	/* The device has none. */
	return err == -EIO || err == -EOPNOTSUPP ? 0 : err;
}
static DEVICE_ATTR_RO(serial);

static const char *const rp_cache_types[] = { "write through", "write back" };

static ssize_t cache_type_show(struct device *device,
			       struct device_attribute *attr, char *buf)
{
	struct rp_device *dev = dev_to_disk(device)->private_data;

	return sysfs_emit(buf, "%s\n", rp_cache_types[rp_cache_is_on(dev->vdev)]);
}

/*
 * Section 8: while the cache is being turned off, writes on rings are durable
 * at once, and a flush covers those that were not. Until then the block layer
 * goes on to send flushes.
 */
static int rp_turn_cache_off(struct rp_device *dev)
{
	struct request_queue *queue = dev->disk->queue;
	unsigned int memflags;
	int err;

	WRITE_ONCE(dev->dsync, true);
	rp_write_wce(dev, false);
	/* Waits for the writes that are not durable. */
	memflags = rp_freeze_queue(queue);
	rp_unfreeze_queue(queue, memflags);
	err = blkdev_issue_flush(dev->disk->part0);
	if (!err && rp_cache_is_on(dev->vdev))
		err = -EIO;
	if (!err)
		err = rp_set_write_cache(dev->disk, false);
	if (!err)
		return 0;
	/* What was written may be in the cache, so it stays on. */
	rp_write_wce(dev, true);
	WRITE_ONCE(dev->dsync, false);
	return err;
}

/* The block layer must send flushes before a write can need one. */
static int rp_turn_cache_on(struct rp_device *dev)
{
	int err = rp_set_write_cache(dev->disk, true);

	if (err)
		return err;
	rp_write_wce(dev, true);
	if (!rp_cache_is_on(dev->vdev)) {
		rp_set_write_cache(dev->disk, false);
		return -EIO;
	}
	WRITE_ONCE(dev->dsync, false);
	return 0;
}

static ssize_t cache_type_store(struct device *device,
				struct device_attribute *attr, const char *buf,
				size_t count)
{
	struct rp_device *dev = dev_to_disk(device)->private_data;
	int type = sysfs_match_string(rp_cache_types, buf);
	int err = 0;

	if (type < 0)
		return type;
	mutex_lock(&dev->cache_mutex);
	if (type == dev->dsync)
		err = type ? rp_turn_cache_on(dev) : rp_turn_cache_off(dev);
	mutex_unlock(&dev->cache_mutex);
	return err ?: count;
}
static DEVICE_ATTR_RW(cache_type);

static struct attribute *rp_disk_attrs[] = {
	&dev_attr_serial.attr,
	&dev_attr_cache_type.attr,
	NULL,
};

static umode_t rp_disk_attr_mode(struct kobject *kobj, struct attribute *attr,
				 int index)
{
	struct rp_device *dev = dev_to_disk(kobj_to_dev(kobj))->private_data;

	if (attr == &dev_attr_cache_type.attr &&
	    !virtio_has_feature(dev->vdev, VIRTIO_BLK_F_CONFIG_WCE))
		return 0444;
	return attr->mode;
}

static const struct attribute_group rp_disk_group = {
	.attrs		= rp_disk_attrs,
	.is_visible	= rp_disk_attr_mode,
};

const struct attribute_group *rp_disk_groups[] = {
	&rp_disk_group,
	NULL,
};

/* For tools that think in cylinders. */
static int rp_getgeo(rp_geo_arg *arg, struct hd_geometry *geo)
{
	struct rp_device *dev = rp_geo_disk(arg)->private_data;
	struct virtio_device *vdev;
	int err = 0;

	mutex_lock(&dev->vdev_mutex);
	vdev = dev->vdev;
	if (!vdev) {
		err = -ENXIO;
	} else if (virtio_has_feature(vdev, VIRTIO_BLK_F_GEOMETRY)) {
		virtio_cread(vdev, struct virtio_blk_config, geometry.cylinders,
			     &geo->cylinders);
		virtio_cread(vdev, struct virtio_blk_config, geometry.heads,
			     &geo->heads);
		virtio_cread(vdev, struct virtio_blk_config, geometry.sectors,
			     &geo->sectors);
	} else {
		geo->heads = 64;
		geo->sectors = 32;
		geo->cylinders = get_capacity(dev->disk) / (64 * 32);
	}
	mutex_unlock(&dev->vdev_mutex);
	return err;
}

/* The last user of the disk has gone, perhaps long after the device. */
static void rp_free_disk(struct gendisk *disk)
{
	rp_device_free(disk->private_data);
}

const struct block_device_operations rp_fops = {
	.owner		= THIS_MODULE,
	.getgeo		= rp_getgeo,
	.free_disk	= rp_free_disk,
};
