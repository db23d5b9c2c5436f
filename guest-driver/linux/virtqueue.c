// SPDX-License-Identifier: GPL-2.0-only
/*
 * Virtqueues: ordinary requests of virtio-blk, and the commands of the ringpass
 * interface, which have the same form.
 */
#include <linux/bvec.h>
#include <linux/ioprio.h>

#include "ringpass_blk.h"

static blk_status_t rp_status(u8 status)
{
	switch (status) {
	case VIRTIO_BLK_S_OK:
		return BLK_STS_OK;
	case VIRTIO_BLK_S_UNSUPP:
		return BLK_STS_NOTSUPP;
	default:
		return BLK_STS_IOERR;
	}
}

/* Gives a discard or the like its payload: a list of ranges. */
static blk_status_t rp_prepare_ranges(struct request *rq, u32 flags)
{
	unsigned short count = blk_rq_nr_discard_segments(rq);
	struct virtio_blk_discard_write_zeroes *ranges;
	unsigned short filled = 0;
	struct bio *bio;

	ranges = kmalloc_array(count, sizeof(*ranges), GFP_ATOMIC);
	if (!ranges)
		return BLK_STS_RESOURCE;
	/* With one range, the block layer merges bios as it does for writes. */
	if (queue_max_discard_segments(rq->q) == 1) {
		ranges[0].sector = cpu_to_le64(blk_rq_pos(rq));
		ranges[0].num_sectors = cpu_to_le32(blk_rq_sectors(rq));
		ranges[0].flags = cpu_to_le32(flags);
		filled = 1;
	} else {
		__rq_for_each_bio(bio, rq) {
			if (filled == count)
				break;
			ranges[filled].sector = cpu_to_le64(bio->bi_iter.bi_sector);
			ranges[filled].num_sectors =
				cpu_to_le32(bio->bi_iter.bi_size >> SECTOR_SHIFT);
			ranges[filled].flags = cpu_to_le32(flags);
			filled++;
		}
	}
	if (WARN_ON_ONCE(filled != count)) {
		kfree(ranges);
		return BLK_STS_IOERR;
	}
	bvec_set_virt(&rq->special_vec, ranges, sizeof(*ranges) * count);
	rq->rq_flags |= RQF_SPECIAL_PAYLOAD;
	return BLK_STS_OK;
}

/* Undoes rp_prepare(). A request that was on a ring has nothing to undo. */
void rp_release(struct request *rq)
{
	struct rp_request *req = blk_mq_rq_to_pdu(rq);

	if (req->sg_table.nents) {
		sg_free_table_chained(&req->sg_table, RP_INLINE_SG);
		req->sg_table.nents = 0;
	}
	if (rq->rq_flags & RQF_SPECIAL_PAYLOAD) {
		kfree(bvec_virt(&rq->special_vec));
		rq->rq_flags &= ~RQF_SPECIAL_PAYLOAD;
	}
}

/* Makes a request ready for a virtqueue. */
blk_status_t rp_prepare(struct rp_device *dev, struct request *rq)
{
	struct virtio_device *vdev = dev->vdev;
	struct rp_request *req = blk_mq_rq_to_pdu(rq);
	blk_status_t status = BLK_STS_OK;
	u64 sector = 0;
	u32 type;
	int count;

	switch (req_op(rq)) {
	case REQ_OP_READ:
		type = VIRTIO_BLK_T_IN;
		sector = blk_rq_pos(rq);
		break;
	case REQ_OP_WRITE:
		type = VIRTIO_BLK_T_OUT;
		sector = blk_rq_pos(rq);
		break;
	case REQ_OP_FLUSH:
		type = VIRTIO_BLK_T_FLUSH;
		break;
	case REQ_OP_DISCARD:
		type = VIRTIO_BLK_T_DISCARD;
		status = rp_prepare_ranges(rq, 0);
		break;
	case REQ_OP_SECURE_ERASE:
		type = VIRTIO_BLK_T_SECURE_ERASE;
		status = rp_prepare_ranges(rq, 0);
		break;
	case REQ_OP_WRITE_ZEROES:
		type = VIRTIO_BLK_T_WRITE_ZEROES;
		status = rp_prepare_ranges(rq, rq->cmd_flags & REQ_NOUNMAP ?
					   0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
		break;
	case REQ_OP_DRV_IN:
		/* The only one that this driver makes. */
		type = VIRTIO_BLK_T_GET_ID;
		break;
	default:
		WARN_ON_ONCE(1);
		return BLK_STS_IOERR;
	}
	if (status != BLK_STS_OK)
		return status;
	req->header.type = cpu_to_virtio32(vdev, type);
	req->header.ioprio = cpu_to_virtio32(vdev, req_get_ioprio(rq));
	req->header.sector = cpu_to_virtio64(vdev, sector);
	req->status = RP_STATUS_NONE;

	if (!blk_rq_nr_phys_segments(rq))
		return BLK_STS_OK;
	req->sg_table.sgl = req->sg;
	if (sg_alloc_table_chained(&req->sg_table, blk_rq_nr_phys_segments(rq),
				   req->sg, RP_INLINE_SG)) {
		req->sg_table.nents = 0;
		rp_release(rq);
		return BLK_STS_RESOURCE;
	}
	count = rp_map_sg(rq, req->sg_table.sgl);
	if (unlikely(count <= 0)) {
		rp_release(rq);
		return BLK_STS_IOERR;
	}
	req->sg_table.nents = count;
	return BLK_STS_OK;
}

/* Puts a prepared request into the virtqueue, with its lock held. */
blk_status_t rp_virtqueue_add(struct rp_queue *q, struct request *rq)
{
	struct rp_request *req = blk_mq_rq_to_pdu(rq);
	struct scatterlist header, status, *sgs[3];
	unsigned int out = 0, in = 0;

	sg_init_one(&header, &req->header, sizeof(req->header));
	sgs[out++] = &header;
	if (req->sg_table.nents) {
		/*
		 * Not bit 0 of the type: the device reads the ranges of a
		 * secure erase, whose number is even.
		 */
		if (rq_data_dir(rq) == WRITE)
			sgs[out++] = req->sg_table.sgl;
		else
			sgs[out + in++] = req->sg_table.sgl;
	}
	sg_init_one(&status, &req->status, sizeof(req->status));
	sgs[out + in++] = &status;

	switch (virtqueue_add_sgs(q->vq, sgs, out, in, req, GFP_ATOMIC)) {
	case 0:
		q->in_flight++;
		q->stats.virtqueue_requests++;
		return BLK_STS_OK;
	case -ENOSPC:
		/* Completions make room, if there are any to come. */
		return q->in_flight ? BLK_STS_DEV_RESOURCE : BLK_STS_RESOURCE;
	case -ENOMEM:
		return BLK_STS_RESOURCE;
	default:
		return BLK_STS_IOERR;
	}
}

/*
 * Puts a command into the virtqueue, with its lock held. The answer begins
 * with zeroes: bytes that the device does not write count as zero.
 */
int rp_command_add(struct rp_queue *q, struct rp_command *cmd, u32 type,
		   size_t payload_bytes, size_t answer_bytes)
{
	struct virtio_device *vdev = q->vq->vdev;
	struct scatterlist header, payload, answer, status, *sgs[4];
	unsigned int out = 0, in = 0;

	cmd->token.is_command = true;
	cmd->status = RP_STATUS_NONE;
	cmd->header.type = cpu_to_virtio32(vdev, type);
	cmd->header.ioprio = 0;
	cmd->header.sector = 0;
	memset(&cmd->answer, 0, sizeof(cmd->answer));

	sg_init_one(&header, &cmd->header, sizeof(cmd->header));
	sgs[out++] = &header;
	if (payload_bytes) {
		sg_init_one(&payload, &cmd->payload, payload_bytes);
		sgs[out++] = &payload;
	}
	sg_init_one(&answer, &cmd->answer, answer_bytes);
	sgs[out + in++] = &answer;
	sg_init_one(&status, &cmd->status, sizeof(cmd->status));
	sgs[out + in++] = &status;
	return virtqueue_add_sgs(q->vq, sgs, out, in, cmd, GFP_ATOMIC);
}

/* Takes the completions of a queue that is not attached. */
void rp_virtqueue_reap(struct rp_queue *q, struct rp_done *done)
{
	struct rp_token *token;
	struct rp_request *req;
	unsigned int length;

	do {
		if (!q->polled)
			virtqueue_disable_cb(q->vq);
		while ((token = virtqueue_get_buf(q->vq, &length))) {
			if (unlikely(token->is_command)) {
				rp_command_done(q->dev,
						container_of(token, struct rp_command, token),
						done);
				continue;
			}
			req = container_of(token, struct rp_request, token);
			req->result = rp_status(req->status);
			q->in_flight--;
			q->answered = true;
			rp_done_add(done, req);
		}
	} while (!q->polled && !virtqueue_enable_cb(q->vq));

	if (unlikely(q->state == RP_EMPTYING && !q->in_flight))
		done->work = true;
	if (unlikely(!list_empty(&q->quarantine) && done->first))
		done->work = true;
}
